"""A run of several processes: how they find each other, and what they must agree on."""

import os

import jax
import numpy as np
from jax.experimental import multihost_utils

from dpo_jax.cli.console import UsageError

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
