"""Checkpoints of any pytree of sharded arrays: asynchronous, atomic, checked leaf by leaf, movable between meshes.

Orbax writes and commits the files. Beside the arrays each step holds one JSON record: what the run wants back (data
position, configuration, seed), and of each leaf the dtype, the shape and a 32-bit fingerprint of its contents. The
record says before any array is read whether a checkpoint fits the state, and afterwards whether the arrays are still
the ones that were saved: storage answers flipped bits and lost chunks with other numbers more often than with errors.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from dpo_jax.tree import path_name
from dpo_jax.types import Array, PyTree

_FORMAT = 1
_SHOWN = 6  # leaves that an error message names
_SMALL = 1 << 18  # elements of a leaf that is read to the host rather than that a program is compiled for it

Words = TypeVar("Words", jax.Array, np.ndarray)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used for what was asked; the message names the folder and the remedy."""


class Restored(NamedTuple):
    """What `Checkpoints.restore` read.

    Attributes:
      state: the tree asked for, in the shardings asked for.
      extras: the JSON values given to `save`.
      step: the step it was saved at.
      damaged: (step, reason) of each newer checkpoint that was passed over, newest first.
    """

    state: PyTree
    extras: dict[str, Any]
    step: int
    damaged: tuple[tuple[int, str], ...]


class Checkpoints:
    """The checkpoints of one folder; made by `open_checkpoints`, closed by `with` or `close()`.

    In a run of many processes each of them makes the same calls in the same order; Orbax lets each write its own
    shards, and process 0 alone writes the record.
    """

    def __init__(self, folder: epath.Path, manager: ocp.CheckpointManager, read_only: bool):
        self.folder = folder
        self.read_only = read_only
        self._manager = manager
        self._abandoned: tuple[int, ...] = ()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the save under way and let go of the folder.

        Raises:
          Exception: of the storage, if the save in the background failed.
        """
        self._manager.close()

    def wait(self) -> None:
        """Return when the save under way is committed; raises what the storage raised in the background."""
        self._manager.wait_until_finished()

    def steps(self) -> tuple[int, ...]:
        """Steps that have a checkpoint, oldest first; one that is still being written is among them, those that are
        newer than the restored one are not."""
        return tuple(sorted(set(self._manager.all_steps()) - set(self._abandoned)))

    def latest_step(self) -> int | None:
        """The newest of `steps()`, or None."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: PyTree, extras: Mapping[str, Any], *, wait: bool = False) -> None:
        """Save a state; the arrays are copied to the host before this returns and written in the background.

        The buffers may be donated right afterwards. A save still under way is waited for first. The first save after a
        `restore` removes the checkpoints newer than the restored one: their steps are about to be done again.

        Args:
          step: optimizer steps done; above every step in the folder but those newer than the one restored.
          state: any pytree of arrays or typed PRNG keys, of any dtype and sharding; None leaves are allowed. In a run
            of many processes all arrays are global ones.
          extras: JSON values, the same on every process (process 0 writes its own).
          wait: return only when the checkpoint is committed.

        Raises:
          CheckpointError: the folder already holds this step or a newer one of another run, or is open for reading.
          TypeError: extras are not JSON.
          ValueError: two leaves have the same path name.
        """
        if self.read_only:
            raise CheckpointError(f"{self.folder} was opened with read_only; open it for writing to save")
        leaves = _arrays(state)
        prints = jax.device_get(_fingerprints(leaves))
        layout = {name: [*spec, int(prints[name])] for name, spec in _layout(state).items()}
        # Through JSON and back, so that the checksum is of what a reader will see (tuples and integer keys change).
        record = json.loads(json.dumps({"format": _FORMAT, "step": step, "extras": dict(extras), "leaves": layout}))
        latest = self.latest_step()
        if latest is not None and step <= latest:
            raise CheckpointError(
                f"{self.folder} already holds step {latest}, so step {step} cannot be saved; "
                "resume from it, or give the run a folder of its own"
            )
        for abandoned in self._abandoned:
            self._manager.delete(abandoned)
        self._abandoned = ()
        arrays = {name: array for name, array in leaves.items() if array.size}  # Orbax refuses empty arrays
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(arrays), record=ocp.args.JsonSave({**record, "checksum": _checksum(record)})
            ),
            force=True,
        )
        if wait:
            self.wait()

    def restore(self, abstract_state: PyTree, *, step: int | None = None, subset: bool = False) -> Restored:
        """Read the newest checkpoint that is whole, passing over damaged ones.

        Args:
          abstract_state: tree of `jax.ShapeDtypeStruct` with shardings (of any mesh), or of arrays whose shape, dtype
            and sharding are taken; None leaves stay None.
          step: read this one and no other; None is the newest that is whole.
          subset: the tree may leave out leaves that were saved, e.g. `{"params": ...}` to evaluate without the
            optimizer's state; all that it names must be there.

        Raises:
          CheckpointError: no checkpoint, none that is whole, or one of another structure, named leaf by leaf.
        """
        self.wait()
        steps = sorted(self._manager.all_steps())
        if not steps or (step is not None and step not in steps):
            held = f"holds steps {', '.join(map(str, steps))}" if steps else "holds no checkpoint"
            raise CheckpointError(f"{self.folder} {held}" + (f", not step {step}" if steps else ""))
        damaged: list[tuple[int, str]] = []
        for candidate in sorted(steps, reverse=True) if step is None else [step]:
            record, reason = self._read_record(candidate)
            if record is not None:
                _check_structure(f"{self.folder}, step {candidate}", _layout(abstract_state), record["leaves"], subset)
                state, reason = self._read_state(candidate, abstract_state, record["leaves"])
                if reason is None:
                    self._abandoned = tuple(later for later in steps if later > candidate)
                    return Restored(state, record["extras"], candidate, tuple(damaged))
            damaged.append((candidate, str(reason)))
        reasons = "; ".join(f"step {number}: {reason}" for number, reason in damaged)
        raise CheckpointError(f"no checkpoint in {self.folder} can be read: {reasons}")

    def _read_record(self, step: int) -> tuple[dict[str, Any] | None, str | None]:
        record, reason = None, None
        try:
            record = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
            if not isinstance(record, dict) or record.pop("checksum", None) != _checksum(record):
                reason = "its record fails the checksum"
            elif record.get("format") != _FORMAT:
                reason = f"its record has format {record.get('format')}, this version reads {_FORMAT}"
        except Exception as error:
            reason = f"its record cannot be read ({_brief(error)})"
        reason = _agreed(reason)
        return (record if reason is None else None), reason

    def _read_state(self, step: int, abstract_state: PyTree, saved: dict[str, list]) -> tuple[PyTree, str | None]:
        targets = _abstract_arrays(abstract_state)
        wanted = {name: target for name, target in targets.items() if target.size}
        arguments = ocp.args.PyTreeRestore(
            wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
        )
        arrays, reason = {}, None
        try:
            if wanted:
                arrays = dict(self._manager.restore(step, args=ocp.args.Composite(state=arguments))["state"])
            jax.block_until_ready(arrays)
        except Exception as error:
            # A machine that is too small says nothing about the file.
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise
            reason = f"its arrays cannot be read ({_brief(error)})"
        reason = _agreed(reason)
        if reason is not None:
            return None, reason
        arrays |= {name: jnp.zeros(t.shape, t.dtype, device=t.sharding) for name, t in targets.items() if not t.size}
        prints = jax.device_get(_fingerprints(arrays))
        changed = [name for name in arrays if int(prints[name]) != saved[name][2]]
        if changed:
            return None, f"{len(changed)} of {len(arrays)} arrays are not what was saved: {_some(changed)}"
        return _as_asked(abstract_state, arrays), None


def open_checkpoints(folder: str | os.PathLike, *, keep: int = 3, read_only: bool = False) -> Checkpoints:
    """Open a folder of checkpoints, local or remote (`gs://...`).

    Opened for writing, the folder is made if need be, and what a killed save left behind is removed.

    Args:
      keep: number of newest checkpoints to keep, at least 1; older ones go when a newer one is committed.
      read_only: for a reader beside the run that writes; `save` is not allowed.

    Raises:
      ValueError: keep is below 1.
      CheckpointError: read_only, and there is no such folder.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; give at least 1")
    name = os.fspath(folder)
    path = epath.Path(name if "://" in name else os.path.abspath(os.path.expanduser(name)))
    if read_only and not path.exists():
        raise CheckpointError(f"{path} does not exist; give the folder that the run saved its checkpoints to")
    if read_only:
        options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
    else:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            cleanup_tmp_directories=True,
            # Made in the background, a save that fails early leaves threads that wait 20 minutes for its folder.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "record": ocp.JsonCheckpointHandler()}
    return Checkpoints(path, ocp.CheckpointManager(path, item_handlers=handlers, options=options), read_only)


def _named(tree: PyTree) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if path_name(path) in leaves:
            raise ValueError(f"two leaves are named {path_name(path)}; rename one")
        leaves[path_name(path)] = leaf
    return leaves


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _arrays(state: PyTree) -> dict[str, Array]:
    """Leaves by name as plain jax arrays; of typed keys their integer data."""
    return {
        name: jax.random.key_data(leaf) if _is_key(leaf) else jnp.asarray(leaf) for name, leaf in _named(state).items()
    }


def _layout(tree: PyTree) -> dict[str, list]:
    """Name -> [dtype, shape] of arrays, keys or ShapeDtypeStructs."""

    def describe(leaf: Any) -> list:
        if _is_key(leaf):
            return [str(leaf.dtype), list(leaf.shape)]
        leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        return [str(jax.dtypes.canonicalize_dtype(leaf.dtype)), list(leaf.shape)]

    return {name: describe(leaf) for name, leaf in _named(tree).items()}


def _abstract_arrays(abstract_state: PyTree) -> dict[str, jax.ShapeDtypeStruct]:
    """Leaves by name as plain arrays will be read: keys as their integer data, each with a sharding."""

    def plain(leaf: Any) -> jax.ShapeDtypeStruct:
        leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        if _is_key(leaf):
            leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype), sharding=sharding)

    return {name: plain(leaf) for name, leaf in _named(abstract_state).items()}


def _as_asked(abstract_state: PyTree, arrays: dict[str, Array]) -> PyTree:
    """The tree asked for, filled with the arrays; typed keys made again from their data."""

    def fill(path: tuple, leaf: Any) -> Array:
        array = arrays[path_name(path)]
        if not _is_key(leaf):
            return array
        # The implementation is known to a traced key only, not to a ShapeDtypeStruct.
        found = []
        jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        return jax.random.wrap_key_data(array, impl=found[0])

    return jax.tree_util.tree_map_with_path(fill, abstract_state)


def _fingerprints(arrays: dict[str, Array]) -> dict[str, Array | np.uint32]:
    """Fingerprint of each leaf; small ones on the host, where nothing is compiled for them."""
    small = {name: array for name, array in arrays.items() if _is_small(array)}
    host = {name: _host_fingerprint(np.asarray(array)) for name, array in jax.device_get(small).items()}
    large = {name: array for name, array in arrays.items() if name not in small}
    return {**host, **(_device_fingerprints(large) if large else {})}


def _is_small(array: Array) -> bool:
    readable = array.is_fully_addressable or array.is_fully_replicated
    return readable and array.size <= _SMALL and (array.dtype == jnp.bool_ or array.dtype.itemsize in (1, 2, 4, 8))


def _host_fingerprint(values: np.ndarray) -> np.uint32:
    """What `_fingerprint` says, on the host."""
    if values.dtype == np.bool_:
        words = values.astype(np.uint32)
    elif values.dtype.itemsize >= 4:
        words = np.ascontiguousarray(values).view(np.uint32)
    else:
        words = np.ascontiguousarray(values).view(f"uint{8 * values.dtype.itemsize}").astype(np.uint32)
    index = np.arange(words.size, dtype=np.uint32)
    return np.sum(_mixed(words.reshape(-1) ^ _mixed(index)), dtype=np.uint32)


@jax.jit
def _device_fingerprints(arrays: dict[str, Array]) -> dict[str, Array]:
    # One program for all leaves: dozens of them in flight at once, each with collectives, exhaust the threads of
    # forced host devices, and then all wait for each other for ever.
    return {name: _fingerprint(array) for name, array in arrays.items()}


def _fingerprint(array: Array) -> Array:
    """Hash of an array's bits and their places, uint32 []; the same on every mesh.

    Each word is mixed with its index by a bijection (the MurmurHash3 finaliser) and the results are added modulo 2^32:
    addition has no order, so shards add up to the same number wherever they lie, and a change within one word never
    goes unseen (any other one in 2^32 does).
    """
    words = _words(array)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        index = index * jnp.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(_mixed(words ^ _mixed(index)), dtype=jnp.uint32)


def _words(array: Array) -> Array:
    """The bits of each element as uint32; elements of 64 bits get a last axis of two."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.stack([array.real, array.imag], axis=-1)
    bits = jnp.iinfo(array.dtype).bits if jnp.issubdtype(array.dtype, jnp.integer) else jnp.finfo(array.dtype).bits
    if bits >= 32:
        return jax.lax.bitcast_convert_type(array, jnp.uint32)
    return jax.lax.bitcast_convert_type(array, f"uint{bits}").astype(jnp.uint32)


def _mixed(words: Words) -> Words:
    words = (words ^ (words >> 16)) * np.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * np.uint32(0xC2B2AE35)
    return words ^ (words >> 16)


def _checksum(record: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=8).hexdigest()


def _check_structure(place: str, wanted: dict[str, list], saved: dict[str, list], subset: bool) -> None:
    """Raise CheckpointError naming the first leaves that differ between the state asked for and the one saved."""

    def show(spec: list | None) -> str:
        return "nothing" if spec is None else f"{spec[0]}[{', '.join(map(str, spec[1]))}]"

    names = list(wanted) + ([] if subset else [name for name in saved if name not in wanted])
    differing = [
        f"{name}: expected {show(wanted.get(name))}, found {show(saved.get(name))}"
        for name in names
        if wanted.get(name) != saved.get(name, [None])[:2]
    ]
    if differing:
        raise CheckpointError(
            f"{place}: the checkpoint holds another state, {len(differing)} leaves differ: "
            f"{_some(differing, '; ')}. Give the model, optimizer and options of the run that saved it"
        )


def _agreed(reason: str | None) -> str | None:
    """None if every process has None, so that all of them pass over the same checkpoints."""
    if jax.process_count() == 1:
        return reason
    failed = multihost_utils.process_allgather(np.int32(reason is not None))
    return reason if reason or not failed.any() else "another process could not read it"


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _some(items: list[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return separator.join(items[:_SHOWN]) + more
