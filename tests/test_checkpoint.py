"""Checkpoints come back bit for bit on any mesh, survive donation, kill -9 and damage, and refuse another model."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax.checkpoint import CheckpointError, _fingerprint, _host_fingerprint, open_checkpoints
from dpo_jax.sharding import make_mesh

# Orbax leaves the reads that ran beside a failed one to the garbage collector, which complains of each.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@dataclass(frozen=True)
class State:
    step: Any
    params: Any
    opt_state: Any
    reference: Any
    key: Any


jax.tree_util.register_dataclass(State, data_fields=["step", "params", "opt_state", "reference", "key"], meta_fields=[])


def make_state(mesh, seed=0, width=16, dtype=jnp.float32):
    rng = np.random.default_rng(seed)

    def put(shape, spec, dtype=dtype):
        return jax.device_put(jnp.asarray(rng.normal(size=shape), dtype), NamedSharding(mesh, spec))

    alone = NamedSharding(mesh, P())
    params = {
        "layers": [{"kernel": put((width, 8), P("fsdp", "model")), "frozen": None} for _ in range(2)],
        "scale": put((width,), P(), jnp.bfloat16),
        "mask": jax.device_put(jnp.asarray(rng.integers(0, 2, (3, 5)), bool), alone),
        "empty": jax.device_put(jnp.zeros((0, 4)), alone),
    }
    opt_state = jax.device_put(optax.adamw(1e-3).init(params["layers"]), alone)
    key = jax.device_put(jax.random.key(seed, impl="rbg"), alone)
    return State(jax.device_put(jnp.int32(seed), alone), params, opt_state, None, key)


def abstract(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def bits(leaf):
    leaf = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return np.asarray(leaf).tobytes()


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert bits(one) == bits(other)


@pytest.fixture
def mesh():
    return make_mesh(data=2, fsdp=2, model=2)


def save_steps(folder, mesh, steps=(1, 2, 3), **options):
    with open_checkpoints(folder, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(mesh, step), {"position": 10 * step})


def test_state_and_extras_come_back_bit_for_bit(tmp_path, mesh):
    state, extras = make_state(mesh, 5), {"position": [7, 1], "config": {"beta": 0.1, "name": "dpo"}, "note": None}
    with open_checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None
        checkpoints.save(5, state, extras, wait=True)
        assert checkpoints.latest_step() == 5
    with open_checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(abstract(state))
    assert (restored.step, restored.extras, restored.damaged) == (5, extras, ())
    assert_same(restored.state, state)
    jax.tree.map(lambda a, b: pytest.fail() if a.sharding != b.sharding else None, restored.state, state)
    assert bits(jax.random.normal(restored.state.key, (3,))) == bits(jax.random.normal(state.key, (3,)))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 8, 1), (1, 4, 2), (1, 1, 8)])
def test_another_mesh_than_the_one_saved_from(tmp_path, mesh, sizes):
    save_steps(tmp_path, mesh, steps=(1,))
    data, fsdp, model = sizes
    other = make_state(
        make_mesh(data=data, fsdp=fsdp, model=model, devices=jax.devices()[: data * fsdp * model]), seed=99
    )
    with open_checkpoints(tmp_path) as checkpoints:
        state = checkpoints.restore(abstract(other)).state
    assert_same(state, make_state(mesh, 1))
    assert state.params["layers"][0]["kernel"].sharding == other.params["layers"][0]["kernel"].sharding


def test_keeps_the_newest_and_removes_the_rest(tmp_path, mesh):
    save_steps(tmp_path, mesh, steps=(1, 2, 3, 4), keep=2)
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps() == (3, 4)
        assert checkpoints.restore(abstract(make_state(mesh)), step=3).extras == {"position": 30}


def test_donating_the_state_right_after_save_leaves_the_checkpoint_alone(tmp_path):
    advance = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 3 + 1, tree), donate_argnums=0)
    state = {name: jnp.full((1 << 20,), value, jnp.int32) for name, value in (("a", 1), ("b", 2), ("c", 3))}
    with open_checkpoints(tmp_path, keep=9) as checkpoints:
        expected = {}
        for step in range(1, 5):
            state = advance(state)
            expected[step] = {name: int(leaf[0]) for name, leaf in state.items()}
            checkpoints.save(step, state, {})
            for _ in range(3):
                old, state = state, advance(state)
            # The CPU backend refuses a donation while somebody reads the buffer; the later ones do happen.
            assert old["a"].is_deleted()
        for step, values in expected.items():
            restored = checkpoints.restore(abstract(state), step=step).state
            for name, value in values.items():
                np.testing.assert_array_equal(restored[name], value)


def test_numpy_leaves_may_change_after_save(tmp_path):
    values = np.arange(1 << 20, dtype=np.float32)
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": values}, {})
        values[:] = -1
        restored = checkpoints.restore({"x": jax.ShapeDtypeStruct(values.shape, jnp.float32)}).state
    np.testing.assert_array_equal(restored["x"], np.arange(1 << 20, dtype=np.float32))


def files(step_folder):
    return sorted(path for path in step_folder.rglob("*") if path.is_file())


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_in_the_middle(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def change_position(step_folder):
    path = step_folder / "record" / "metadata"
    text = path.read_text()
    assert '"position": 30' in text
    path.write_text(text.replace('"position": 30', '"position": 31'))


def empty(step_folder):
    shutil.rmtree(step_folder)
    step_folder.mkdir()


def each_data_file(step_folder, damage):
    # Orbax writes its data twice, before and after it joins the processes' parts, and which copy is the larger one is
    # not always the same.
    for path in [path for path in files(step_folder) if "/d/" in str(path)]:
        damage(path)


DAMAGES = {
    "arrays truncated": lambda folder: each_data_file(folder, truncate),
    "arrays flipped": lambda folder: each_data_file(folder, flip_in_the_middle),
    "arrays deleted": lambda folder: each_data_file(folder, lambda path: path.unlink()),
    "array folder deleted": lambda folder: shutil.rmtree(folder / "state"),
    "database manifest deleted": lambda folder: (folder / "state" / "manifest.ocdbt").unlink(),
    "tree metadata truncated": lambda folder: truncate(folder / "state" / "_METADATA"),
    "record deleted": lambda folder: shutil.rmtree(folder / "record"),
    "record truncated": lambda folder: truncate(folder / "record" / "metadata"),
    "record changed": change_position,
    "folder emptied": empty,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_last_checkpoint_is_reported_and_the_one_before_is_used(tmp_path, mesh, damage):
    save_steps(tmp_path, mesh)
    damage(tmp_path / "3")
    with open_checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(abstract(make_state(mesh)))
        assert (restored.step, restored.extras) == (2, {"position": 20})
        assert_same(restored.state, make_state(mesh, 2))
        ((step, reason),) = restored.damaged
        assert step == 3 and len(reason) > 20
        with pytest.raises(CheckpointError, match="step 3"):
            checkpoints.restore(abstract(make_state(mesh)), step=3)


@pytest.mark.parametrize("seed", range(3))
def test_no_flipped_bit_is_ever_restored(tmp_path, mesh, seed):
    """Whichever file and bit: either the newest comes back bit for bit, or it is reported."""
    save_steps(tmp_path, mesh, steps=(1, 2))
    rng = np.random.default_rng(seed)
    caught = 0
    for path in files(tmp_path / "2"):
        content = path.read_bytes()
        changed = bytearray(content)
        changed[rng.integers(len(changed))] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        with open_checkpoints(tmp_path, read_only=True) as checkpoints:
            restored = checkpoints.restore(abstract(make_state(mesh)))
        assert restored.step + len(restored.damaged) == 2
        assert_same(restored.state, make_state(mesh, restored.step))
        assert restored.extras == {"position": 10 * restored.step}
        caught += len(restored.damaged)
        path.write_bytes(content)
    assert caught >= 3


def test_after_falling_back_the_steps_are_done_again(tmp_path, mesh):
    save_steps(tmp_path, mesh, steps=(1, 2, 3), keep=2)
    truncate(tmp_path / "3" / "record" / "metadata")
    with open_checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.restore(abstract(make_state(mesh))).step == 2
        assert checkpoints.steps() == (2,) and (tmp_path / "3").exists()  # reading alone removes nothing
        checkpoints.save(3, make_state(mesh, 7), {}, wait=True)
        restored = checkpoints.restore(abstract(make_state(mesh)))
    assert (restored.step, restored.damaged) == (3, ())
    assert_same(restored.state, make_state(mesh, 7))


def test_all_damaged_is_one_clear_error(tmp_path, mesh):
    save_steps(tmp_path, mesh, steps=(1, 2))
    for step in ("1", "2"):
        truncate(tmp_path / step / "record" / "metadata")
    with open_checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError) as error:
        checkpoints.restore(abstract(make_state(mesh)))
    assert str(tmp_path) in str(error.value)
    assert "step 1" in str(error.value) and "step 2" in str(error.value)


def test_another_model_or_optimizer_is_refused_by_name(tmp_path, mesh):
    save_steps(tmp_path, mesh, steps=(1,))
    with open_checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore(abstract(make_state(mesh, width=32)))
        assert "params/layers/0/kernel: expected float32[32, 8], found float32[16, 8]" in str(error.value)
        with pytest.raises(CheckpointError, match=r"expected bfloat16\[16, 8\], found float32\[16, 8\]"):
            checkpoints.restore(abstract(make_state(mesh, dtype=jnp.bfloat16)))
        state = make_state(mesh)
        other = State(state.step, state.params, optax.sgd(1e-3).init(state.params), state.reference, state.key)
        with pytest.raises(CheckpointError, match=r"opt_state/0/count: expected nothing, found int32\[\]"):
            checkpoints.restore(abstract(other))
        more = State(state.step, state.params, state.opt_state, {"w": jnp.zeros(2)}, state.key)
        with pytest.raises(CheckpointError, match=r"reference/w: expected float32\[2\], found nothing"):
            checkpoints.restore(abstract(more))


def test_part_of_a_state(tmp_path, mesh):
    save_steps(tmp_path, mesh, steps=(1,))
    part = {"params": abstract(make_state(mesh)).params}
    with open_checkpoints(tmp_path, read_only=True) as checkpoints:
        assert_same(checkpoints.restore(part, subset=True).state["params"], make_state(mesh, 1).params)
        with pytest.raises(CheckpointError, match="opt_state"):
            checkpoints.restore(part)
        with pytest.raises(CheckpointError, match="read_only"):
            checkpoints.save(2, make_state(mesh), {})


def test_what_cannot_be_saved_or_opened(tmp_path, mesh):
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoints(tmp_path / "nowhere", read_only=True)
    with pytest.raises(ValueError, match="keep is 0"):
        open_checkpoints(tmp_path, keep=0)
    with open_checkpoints(tmp_path / "run") as checkpoints:
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            checkpoints.restore(abstract(make_state(mesh)))
        with pytest.raises(TypeError):
            checkpoints.save(1, make_state(mesh), {"x": np.float32(1)})
        with pytest.raises(ValueError, match="two leaves are named a/b"):
            checkpoints.save(1, {"a": {"b": jnp.ones(2)}, "a/b": jnp.ones(2)}, {})
        checkpoints.save(4, make_state(mesh), {})
        for step in (3, 4):
            with pytest.raises(CheckpointError, match="already holds step 4"):
                checkpoints.save(step, make_state(mesh), {})


KILLED = """
import os, signal, sys
import jax.numpy as jnp, numpy as np
from dpo_jax.checkpoint import open_checkpoints
def state(seed):
    return {"x": jnp.asarray(np.random.default_rng(seed).normal(size=1 << 23), jnp.float32)}
checkpoints = open_checkpoints(sys.argv[1])
checkpoints.save(1, state(1), {"position": 1}, wait=True)
checkpoints.save(2, state(2), {"position": 2})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_in_the_middle_of_a_save_leaves_the_earlier_ones(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env={**os.environ}, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert [path for path in tmp_path.iterdir() if path.name.startswith("2.")], "the save was over before the kill"
    with open_checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore({"x": jax.ShapeDtypeStruct((1 << 23,), jnp.float32)})
        assert (restored.step, restored.damaged) == (1, ())
        expected = np.random.default_rng(1).normal(size=1 << 23).astype(np.float32)
        np.testing.assert_array_equal(restored.state["x"], expected)
        checkpoints.save(2, restored.state, {}, wait=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


TWO_PROCESSES = """
import json, sys
import jax
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from dpo_jax.checkpoint import open_checkpoints
from dpo_jax.sharding import make_mesh
mesh = make_mesh(data=1, fsdp=4)
sharding, alone = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
key = jax.jit(jax.random.key, out_shardings=alone)
target = {"x": jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=sharding), "key": key(1)}
make = jax.jit(lambda n: jnp.arange(24.0).reshape(8, 3) * n, out_shardings=sharding)
with open_checkpoints(sys.argv[1]) as checkpoints:
    for step in (1, 2):
        checkpoints.save(step, {"x": make(float(step)), "key": key(step)}, {"step": step})
if jax.process_index() == 0:
    record = __import__("pathlib").Path(sys.argv[1]) / "2" / "record" / "metadata"
    record.write_text(record.read_text().replace('"step": 2', '"step": 3'))
jax.experimental.multihost_utils.sync_global_devices("damaged")
with open_checkpoints(sys.argv[1]) as checkpoints:
    restored = checkpoints.restore(target)
    assert restored.step == 1 and restored.damaged[0][0] == 2, restored
    same = jax.jit(lambda a, b: (a == b).all())(restored.state["x"], make(1.0))
    assert bool(same) and restored.extras == {"step": 1}
print("whole")
"""


@pytest.mark.slow
def test_two_processes_save_and_restore_together(tmp_path, unused_port):
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(tmp_path), f"localhost:{unused_port}", str(index)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        for run in runs:
            out, err = run.communicate(timeout=120)
            assert run.returncode == 0 and "whole" in out, err[-3000:]
    finally:
        for run in runs:
            run.kill()
    assert json.loads((tmp_path / "1" / "record" / "metadata").read_text())["extras"] == {"step": 1}


@pytest.fixture
def unused_port():
    import socket

    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "int4", "uint16", "int32", "bool", "complex64"]
)
def test_fingerprint_sees_one_changed_element_and_two_swapped_ones(dtype):
    values = jnp.asarray(np.random.default_rng(0).permutation(24).reshape(4, 6) % 7 % (2 if dtype == "bool" else 7))
    first = int(_fingerprint(values.astype(dtype)))
    for row in range(4):
        changed = values.at[row, 3].set(1 - values[row, 3] if dtype == "bool" else 7)
        assert int(_fingerprint(changed.astype(dtype))) != first
        swapped = values.at[row, 0].set(values[row, 1]).at[row, 1].set(values[row, 0])
        assert (int(_fingerprint(swapped.astype(dtype))) != first) == bool(values[row, 0] != values[row, 1])


def test_fingerprint_is_the_same_however_the_array_is_laid_out(mesh):
    values = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)
    expected = int(_fingerprint(values))
    for spec in (P("fsdp", "model"), P(("data", "fsdp", "model")), P(None, "model")):
        assert int(_fingerprint(jax.device_put(values, NamedSharding(mesh, spec)))) == expected
    words = np.asarray(values).view(np.uint32).ravel()

    def mix(word):
        word = ((word ^ (word >> 16)) * 0x85EBCA6B) % 2**32
        word = ((word ^ (word >> 13)) * 0xC2B2AE35) % 2**32
        return word ^ (word >> 16)

    assert expected == sum(mix(int(word) ^ mix(place)) for place, word in enumerate(words)) % 2**32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "int8", "uint8", "bool", "complex64"])
def test_fingerprints_of_host_and_device_agree(dtype):
    # A checkpoint may be written where a leaf is small enough for the host, and read where it is not.
    values = jax.random.normal(jax.random.key(0), (3, 5)) * 100
    array = (values > 0) if dtype == "bool" else values.astype(dtype)
    assert int(_host_fingerprint(np.asarray(array))) == int(_fingerprint(array))
