"""What a compiled step needs: bytes on each device by purpose, FLOPs, and the collectives in it."""

import os
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from dpo_jax.train import TrainState
from dpo_jax.types import PyTree


@dataclass(frozen=True)
class StepNeeds:
    """Bytes on one device (the first of the mesh), and what the program does.

    Attributes:
      policy, frozen, reference, optimizer, ema: bytes of the state's parts.
      batch: bytes of the batch.
      temporaries: bytes of activations, gradients and work space, as the compiler planned them.
      available: bytes of the device's memory, or None where the device does not tell.
      flops: of one step on one device by the compiler's count (loop bodies are counted once), or None.
      collectives: kind -> number of such instructions in the program.
    """

    policy: int
    frozen: int
    reference: int
    optimizer: int
    ema: int
    batch: int
    temporaries: int
    available: int | None
    flops: float | None
    collectives: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes that must be there at once."""
        parts = (self.policy, self.frozen, self.reference, self.optimizer, self.ema, self.batch, self.temporaries)
        return sum(parts)


def device_bytes(tree: PyTree) -> int:
    """Bytes of a tree of arrays on one device, by the shape of its shards."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue
        shape = leaf.sharding.shard_shape(leaf.shape) if hasattr(leaf, "sharding") and leaf.sharding else leaf.shape
        total += int(np.prod(shape, dtype=np.int64)) * leaf.dtype.itemsize
    return total


def available_bytes(device: Any) -> int | None:
    """Memory of a device: its own limit, or the machine's memory for a CPU; None where nothing tells."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None and device.platform == "cpu" and "SC_PHYS_PAGES" in os.sysconf_names:
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return limit


def count_collectives(program: str) -> dict[str, int]:
    """Number of collective instructions in the text of a compiled program, by kind."""
    kinds = r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    return dict(sorted(Counter(re.findall(kinds, program)).items()))


def step_needs(compiled: Any, state: TrainState, batch: PyTree) -> StepNeeds:
    """Memory, FLOPs and collectives of a compiled train step (`ShardedStep.lower(state, batch).compile()`)."""
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    return StepNeeds(
        policy=device_bytes(state.params),
        frozen=device_bytes(state.frozen),
        reference=device_bytes(state.reference),
        optimizer=device_bytes(state.opt_state),
        ema=device_bytes(state.ema),
        batch=device_bytes(batch),
        temporaries=int(memory.temp_size_in_bytes) if memory is not None else 0,
        available=available_bytes(jax.local_devices()[0]),
        flops=cost.get("flops"),
        collectives=count_collectives(compiled.as_text() or ""),
    )
