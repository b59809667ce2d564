"""Images per second of a Diffusion-DPO step, and of the same step written plainly with torch and diffusers.

Claim     on two CPU cores XLA's step makes 0.83 times as many images per second as torch's (9.7 and 11.7 at 4 pairs of
          32 x 32 latents; convolutions decide); it compiles in 15 s. Accelerators were not measured.
Command   python experiments/benchmarks/diffusion_step.py [--rounds 2]        (needs torch and diffusers; a minute)

Both train the same small UNet (the weights of one are read by the other) on pairs of random latents with AdamW: noise
and timestep shared by a pair, one forward of the policy and one of the frozen reference on both images, the loss, the
gradient, the update; float32, gradients clipped. Compilation and the first call are not counted; each figure is the
best of the rounds. The losses of the first step are compared on the same noise.
"""

import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from dpo_jax.diffusion.methods import diffusion_dpo_loss
from dpo_jax.diffusion.models import unet, unet_config
from dpo_jax.diffusion.models.unet_config import UNetConfig
from dpo_jax.diffusion.models.weights import save_model
from dpo_jax.diffusion.objectives import from_loss
from dpo_jax.diffusion.process import Process
from dpo_jax.diffusion.schedule import predicts_noise, scaled_linear_schedule
from dpo_jax.diffusion.types import DiffusionBatch, TextCondition
from dpo_jax.report import table
from dpo_jax.train import init_state, make_train_step

MODEL = UNetConfig(
    block_out_channels=(64, 128, 128),
    layers=(1, 1, 1),
    down_attention=(False, True, True),
    up_attention=(True, True, False),
    transformer_layers=(1, 1, 1),
    heads=(4, 4, 4),
    cross_attention_dim=64,
    norm_groups=16,
    sample_size=32,
)
BETA, LEARNING_RATE = 2000.0, 1e-5


@dataclass(frozen=True)
class Benchmark:
    """Time the train step in both libraries."""

    batch_size: int = 4
    """Pairs of a step."""
    rounds: int = 3
    """Timed steps of each."""
    threads: int | None = None
    """Threads of torch; its own choice by default."""
    json: bool = False
    """Print one JSON object."""


def our_step(variables: Any, latents: np.ndarray, states: np.ndarray) -> tuple[Callable[[], float], float]:
    """A call that makes one step, and the seconds of its compilation."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE, weight_decay=0.01))
    process = Process(predicts_noise, scaled_linear_schedule())
    objective = from_loss(diffusion_dpo_loss, process, beta=BETA)
    state = init_state(variables, optimizer, jax.random.key(0))
    step = jax.jit(make_train_step(objective, unet.unet_function(MODEL), optimizer), donate_argnums=0)
    batch = DiffusionBatch(latents, TextCondition(states[:, None]), np.ones(len(latents), np.float32), {})
    begun = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    seconds = time.perf_counter() - begun

    def run() -> float:
        nonlocal state
        state, metrics = compiled(state, batch)
        return float(metrics["loss"])

    return run, seconds


def torch_step(folder: Path, latents: np.ndarray, states: np.ndarray, threads: int | None) -> Callable[[], float]:
    """The same with diffusers' model."""
    import torch
    from diffusers import UNet2DConditionModel

    if threads is not None:
        torch.set_num_threads(threads)
    model: Any = UNet2DConditionModel.from_pretrained(folder)
    model.train()
    reference = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    table = torch.tensor(scaled_linear_schedule().alphas_cumprod, dtype=torch.float32)
    pairs, count = torch.tensor(latents).permute(0, 1, 4, 2, 3), len(latents)
    clean, told = pairs.transpose(0, 1).flatten(0, 1), torch.tensor(states).repeat(2, 1, 1)

    def run() -> float:
        times = torch.randint(0, 1000, (count,)).repeat(2)
        noise = torch.randn(pairs[:, 0].shape).repeat(2, 1, 1, 1)
        level = table[times][:, None, None, None]
        noisy = level.sqrt() * clean + (1 - level).sqrt() * noise
        error = (model(noisy, times, told).sample - noise).square().mean((1, 2, 3))
        with torch.no_grad():
            frozen = (reference(noisy, times, told).sample - noise).square().mean((1, 2, 3))
        gain = frozen - error
        loss = -torch.nn.functional.logsigmoid(BETA / 2 * (gain[:count] - gain[count:])).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss)

    return run


def main(benchmark: Benchmark) -> None:
    rng = np.random.default_rng(0)
    size = MODEL.sample_size or 32
    latents = rng.normal(size=(benchmark.batch_size, 2, size, size, 4)).astype(np.float32)
    states = rng.normal(size=(benchmark.batch_size, 16, MODEL.cross_attention_dim)).astype(np.float32)
    variables = jax.jit(unet.init_variables, static_argnums=0)(MODEL, jax.random.key(0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder, variables, unet.weight_table(MODEL), unet_config.config_to_dict(MODEL))
        theirs = torch_step(folder, latents, states, benchmark.threads)
        ours, compile_seconds = our_step(jax.tree.map(jnp.copy, variables), latents, states)
        calls, best, first = {"torch": theirs, "dpo_jax": ours}, {}, {}
        for number in range(benchmark.rounds + 1):
            for which, call in calls.items():
                begun = time.perf_counter()
                loss = call()
                seconds = time.perf_counter() - begun
                first.setdefault(which, loss)
                if number:
                    best[which] = max(best.get(which, 0.0), 2 * benchmark.batch_size / seconds)
            print(f"round {number}: {best}", file=sys.stderr, flush=True)
    # Both start where the policy is the reference.
    if not all(abs(loss - np.log(2)) < 1e-3 for loss in first.values()):
        raise SystemExit(f"the first losses {first} are not log 2")
    values = {**best, "ratio": best["dpo_jax"] / best["torch"], "compile_seconds": compile_seconds}
    if benchmark.json:
        print(json.dumps(values))
        return
    print(table([(name, f"{value:.2f}") for name, value in values.items()], ("images per second", "")))


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
