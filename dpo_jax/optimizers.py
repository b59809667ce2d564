"""Optimizers and schedules by name, all of them optax's, with clipping and a decay mask in one place."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import optax

from dpo_jax.tree import map_named
from dpo_jax.types import PyTree


@dataclass(frozen=True)
class OptimizerConfig:
    """How the parameters move."""

    optimizer: Literal["adamw", "adafactor", "lion", "muon", "sgd"] = "adamw"
    """Algorithm, as optax has it."""
    learning_rate: float = 1e-6
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Course after the warm-up, down to `final_learning_rate` x peak at the last step."""
    warmup: float = 0.1
    """Linear warm-up: a number of steps, or, below 1, a share of all steps."""
    final_learning_rate: float = 0.0
    """Share of the peak that is left at the last step."""
    weight_decay: float = 0.0
    """Decoupled weight decay; vectors (norms, biases) are never decayed."""
    clip: float = 1.0
    """Largest global norm of the gradient; 0 does not clip."""
    b1: float = 0.9
    """First-moment decay (adamw, lion; momentum of sgd)."""
    b2: float = 0.999
    """Second-moment decay (adamw, lion)."""
    epsilon: float = 1e-8
    """Added to the root of the second moment (adamw)."""


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of each step for a run of so many steps."""
    if config.warmup < 0 or steps < 1:
        raise ValueError(f"warmup must not be negative and steps at least 1, got {config.warmup} and {steps}")
    warmup = int(config.warmup if config.warmup >= 1 else round(config.warmup * steps))
    peak, left = config.learning_rate, max(steps - warmup, 1)
    courses = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, peak * config.final_learning_rate, left),
        "cosine": optax.cosine_decay_schedule(peak, left, alpha=config.final_learning_rate),
    }
    if not warmup:
        return courses[config.schedule]
    # The first step already moves: step n of the warm-up has (n + 1) / warmup of the peak.
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, courses[config.schedule]], [warmup])


def is_matrix(params: PyTree) -> PyTree:
    """True where weight decay applies: kernels, embeddings and factors of adapters, not vectors, however stacked."""
    vectors = ("norm", "bias", "scale", "magnitude")
    return map_named(lambda name, leaf: not any(word in name for word in vectors), params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optax optimizer of a configuration for a run of so many steps."""
    schedule = make_schedule(config, steps)
    decay = {"weight_decay": config.weight_decay, "mask": is_matrix}
    makers: dict[str, Callable[[], optax.GradientTransformation]] = {
        "adamw": lambda: optax.adamw(schedule, b1=config.b1, b2=config.b2, eps=config.epsilon, **decay),
        "adafactor": lambda: _adafactor(config, schedule),
        "lion": lambda: optax.lion(schedule, b1=config.b1, b2=config.b2, **decay),
        "muon": lambda: _muon(config, schedule),
        "sgd": lambda: optax.chain(
            optax.add_decayed_weights(config.weight_decay, is_matrix), optax.sgd(schedule, momentum=config.b1 or None)
        ),
    }
    optimizer = makers[config.optimizer]()
    return optax.chain(optax.clip_by_global_norm(config.clip), optimizer) if config.clip > 0 else optimizer


def _adafactor(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Adafactor whose steps have the size of the rate and not of the parameters, as recipes for alignment have it.

    So rates mean about what they mean for AdamW. optax would subtract the decay undiminished by the rate.
    """
    rule = optax.adafactor(
        None,
        multiply_by_parameter_scale=False,
        weight_decay_rate=config.weight_decay or None,
        weight_decay_mask=is_matrix,
    )
    return optax.chain(rule, optax.scale_by_schedule(schedule))


def _muon(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Muon for kernels (the last two axes, however stacked), AdamW for embeddings, heads, norms and biases."""

    def dimensions(params: PyTree) -> PyTree:
        def of(name: str, leaf):
            if leaf.ndim < 2 or not name.endswith(("kernel", "kernels")):
                return None
            return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

        return map_named(of, params)

    # Muon's own decay passes over the leaves that it leaves to Adam; decayed here, all matrices are treated alike.
    return optax.chain(
        optax.contrib.muon(1.0, adam_b1=config.b1, adam_b2=config.b2, muon_weight_dimension_numbers=dimensions),
        optax.add_decayed_weights(-config.weight_decay, is_matrix),
        optax.scale_by_schedule(schedule),
    )
