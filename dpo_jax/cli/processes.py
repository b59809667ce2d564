"""A run of several processes: how they find each other, and what they must agree on."""

import os
import pickle
from collections.abc import Callable
from typing import TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from dpo_jax.cli.console import UsageError

T = TypeVar("T")

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def join_processes() -> None:
    """Join the other processes of the run; to be called before any array is made.

    TPU pods, SLURM and Open MPI tell JAX who is who. Elsewhere three environment variables do: the address and port of
    process 0 (`JAX_COORDINATOR_ADDRESS`), the number of processes (`JAX_NUM_PROCESSES`) and this one's index
    (`JAX_PROCESS_ID`), which JAX itself does not all read.

    Raises:
      UsageError: a number without the other, or no number; nothing that says where the other processes are.
    """
    given = {name: os.environ[name] for name in (COUNT, INDEX) if os.environ.get(name)}
    if len(given) == 1:
        raise UsageError(f"{next(iter(given))} is set; set {COUNT} and {INDEX} both, or neither")
    try:
        numbers = {name: int(value) for name, value in given.items()}
    except ValueError as error:
        raise UsageError(f"{COUNT} and {INDEX} are whole numbers: {error}") from error
    try:
        jax.distributed.initialize(num_processes=numbers.get(COUNT), process_id=numbers.get(INDEX))
    except ValueError as error:
        raise UsageError(f"--distributed: {error} Set {ADDRESS} (host:port), {COUNT} and {INDEX}") from error


def is_first() -> bool:
    """Whether this process is the one that writes files and prints results."""
    return jax.process_index() == 0


def true_everywhere(value: bool) -> bool:
    """Whether it is true on all processes; all of them must ask."""
    return value if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.array(value))))


def true_anywhere(value: bool) -> bool:
    """Whether it is true on any process; all of them must ask."""
    return value if jax.process_count() == 1 else bool(np.any(multihost_utils.process_allgather(np.array(value))))


def from_all(value: T) -> list[T]:
    """A value of each process, which can be pickled, on every process; all of them must ask."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(data.size))
    parts = multihost_utils.process_allgather(np.pad(data, (0, sizes.max() - data.size)))
    return [pickle.loads(part[:size].tobytes()) for part, size in zip(parts, sizes)]


def agreed(work: Callable[[], T]) -> T:
    """What `work` makes on this process; where it fails on any of them, all raise the error of the first that failed.

    Without it the others would wait for ever for the one that failed.
    """
    if jax.process_count() == 1:
        return work()
    made, error = None, None
    try:
        made = work()
    except Exception as caught:
        error = caught
    if first := next(filter(None, from_all(_portable(error))), None):
        raise first from error
    return cast(T, made)


def _portable(error: Exception | None) -> Exception | None:
    """The error, or one with its words where it cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
