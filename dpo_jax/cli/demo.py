"""`dpo-jax demo`: the whole way on the digit world, from random weights to an aligned checkpoint, judged exactly.

A small decoder learns from chains with wrong steps (supervised warm start), samples chains of its own, the judge pairs
a right one with a wrong one of the same prompt, DPO trains on the pairs against the frozen warm start, and fresh
prompts show what it was worth. A falling loss would be no evidence: too small a beta or too many steps collapse the
policy.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from dpo_jax.cli.console import OutputConfig, UsageError, result, say
from dpo_jax.cli.demo_training import open_folder, trained
from dpo_jax.cli.evaluate import evaluate_pairs
from dpo_jax.cli.loop import Course, Outcome, with_tokens
from dpo_jax.language.data.batches import batches
from dpo_jax.language.data.dealing import plan_layout
from dpo_jax.language.data.pack import example_lengths
from dpo_jax.language.methods import dpo_loss, sft_loss
from dpo_jax.language.models.decoder import (
    RULES,
    DecoderConfig,
    RopeConfig,
    decoder_function,
    empty_cache,
    init_variables,
)
from dpo_jax.language.models.weights import save_hf
from dpo_jax.language.objectives import from_loss
from dpo_jax.language.sampling.engine import Engine, generate, make_engine, prompt_keys
from dpo_jax.language.sampling.steps import CachedModel
from dpo_jax.language.types import Example
from dpo_jax.optimizers import OptimizerConfig
from dpo_jax.report import table
from dpo_jax.sharding import data_shards, make_mesh
from dpo_jax.statistics import wilson_interval
from dpo_jax.train import Objective
from dpo_jax.types import PyTree
from dpo_jax.worlds import digits

MODEL = DecoderConfig(
    vocabulary_size=digits.VOCABULARY_SIZE,
    hidden_size=128,  # of six seeds at width 64, two had not learned the sums after 200 steps
    intermediate_size=512,
    layers=2,
    heads=8,
    key_value_heads=8,
    head_dim=16,
    rope=RopeConfig(theta=30.0),  # chains are short: slow rotations would tell no place from the next
    initializer_range=0.1,  # 0.02 is for wide models
)


@dataclass(frozen=True)
class DemoConfig:
    """Supervised warm start, own samples judged into pairs, DPO, accuracy before and after; minutes on two cores."""

    out: str
    """Folder of the run: checkpoints, metrics, Hugging Face export."""
    seed: int = 0
    """Of everything random."""
    warm_steps: int = 250
    """Steps of the supervised warm start, 64 chains each."""
    prompts: int = 600
    """Prompts that the warm start answers for the pairs."""
    rollouts: int = 8
    """Chains sampled for each of them."""
    steps: int = 120
    """Steps of DPO, 32 pairs each."""
    beta: float = 0.5
    """Strength of the constraint to the warm start."""
    learning_rate: float = 1e-4
    """Of DPO, constant."""
    test_prompts: int = 1500
    """Fresh prompts that are judged before and after, one sampled chain each."""
    output: OutputConfig = field(default_factory=OutputConfig)


def demo_command(config: DemoConfig) -> None:
    """Run the demo and print what it gained.

    Raises:
      UsageError: the folder holds another run; no prompt got both a right and a wrong chain.
    """
    begun, out = time.perf_counter(), open_folder(config, "dpo")
    mesh, key = make_mesh(), jax.random.key(config.seed)
    apply_fn = decoder_function(MODEL)
    say(f"warm start: {config.warm_steps} steps on chains whose steps are wrong with probability {digits.STEP_NOISE}")
    variables = init_variables(MODEL, jax.random.fold_in(key, 0))
    chains = noisy_chains(20_000, config.seed)
    # Under Adam the sums are learned late and suddenly, as the seed will have it.
    warm = OptimizerConfig("muon", learning_rate=0.02, schedule="cosine", warmup=20, weight_decay=0.01, clip=0.0)
    course = Course(config.warm_steps, 20, 0, 0, "warm start")
    variables, _ = train(out / "warm_start", course, from_loss(sft_loss), variables, chains, 64, warm, mesh, config)
    engine = chain_engine(config, mesh)
    before = accuracy(engine, variables, config, jax.random.fold_in(key, 1))
    pairs = own_pairs(engine, variables, config, jax.random.fold_in(key, 2))
    if not pairs:
        raise UsageError("no prompt got both a right and a wrong chain; give more --prompts or --rollouts")
    say(f"{len(pairs)} pairs of a right and a wrong chain, from {config.prompts} prompts x {config.rollouts} chains")
    constant = OptimizerConfig(learning_rate=config.learning_rate, schedule="constant", warmup=0)
    course = Course(config.steps, 10, 0, 0, "dpo")
    objective = from_loss(dpo_loss, beta=config.beta)
    aligned, outcome = train(out, course, objective, variables, pairs, 32, constant, mesh, config)
    after = accuracy(engine, aligned, config, jax.random.fold_in(key, 1))
    plan = plan_layout(example_lengths(pairs), batch_size=64, row_multiple=data_shards(mesh), seed=None)
    moved = evaluate_pairs(apply_fn, aligned, variables, pairs, plan.layout, beta=config.beta, batch_size=64, mesh=mesh)
    save_hf(out / "export", MODEL, aligned)
    digits.make_tokenizer().save_pretrained(out / "export")
    report(config, before, after, moved, len(pairs), outcome, time.perf_counter() - begun)


def noisy_chains(count: int, seed: int) -> list[Example]:
    """Random prompts, each with one chain that may be wrong."""
    random = np.random.default_rng([seed, 1])
    return [
        Example(digits.prompt_ids(p), (digits.completion_ids(digits.noisy_solution(p, digits.STEP_NOISE, random)),))
        for p in digits.make_prompts(count, seed)
    ]


def train(
    out: Path,
    course: Course,
    objective: Objective,
    variables: PyTree,
    examples: Sequence[Example],
    batch_size: int,
    optimizer: OptimizerConfig,
    mesh: Mesh,
    config: DemoConfig,
) -> tuple[PyTree, Outcome]:
    """The decoder, trained on examples; pairs train it against its start."""
    lengths, shards = example_lengths(examples), data_shards(mesh)
    plan = plan_layout(lengths, batch_size=batch_size, row_multiple=shards, seed=config.seed, steps=course.steps)
    stream = with_tokens(batches(examples, plan.layout, batch_size=batch_size, seed=config.seed))
    function, pairwise = decoder_function(MODEL), len(examples[0].completions) == 2
    return trained(
        out, course, objective, function, variables, stream, optimizer, mesh, RULES, config, reference=pairwise
    )


def chain_engine(config: DemoConfig, mesh: Mesh) -> Engine:
    """The engine that samples chains of the decoder at temperature 1."""
    shards = data_shards(mesh)
    return make_engine(
        [CachedModel(decoder_function(MODEL), partial(empty_cache, MODEL))],
        new_tokens=digits.COMPLETION_LENGTH,
        stop_tokens=(digits.EOS,),
        rows=-(-min(500, config.test_prompts) // shards) * shards,
        mesh=mesh,
    )


def sample_chains(
    engine: Engine, variables: PyTree, prompts: Sequence[str], key: jax.Array, *, samples: int = 1
) -> list[list[str]]:
    """Chains of each prompt."""
    ids, keys = [digits.prompt_ids(prompt) for prompt in prompts], prompt_keys(key, len(prompts))
    answers = generate(engine, (variables,), ids, keys, samples=samples)
    return [[digits.decode(answer.tokens) for answer in several] for several in answers]


def accuracy(engine: Engine, variables: PyTree, config: DemoConfig, key: jax.Array) -> int:
    """Number of fresh prompts whose sampled chain ends in the right sum."""
    prompts = digits.make_prompts(config.test_prompts, config.seed + 1_000_003)
    chains = sample_chains(engine, variables, prompts, key)
    return sum(digits.judge(prompt, chain).final_correct for prompt, (chain,) in zip(prompts, chains))


def own_pairs(engine: Engine, variables: PyTree, config: DemoConfig, key: jax.Array) -> list[Example]:
    """For each prompt that got both, its first right and its first wrong chain."""
    prompts = digits.make_prompts(config.prompts, config.seed + 2_000_003)
    chains = sample_chains(engine, variables, prompts, key, samples=config.rollouts)
    pairs = []
    for prompt, tried in zip(prompts, chains):
        right = [c for c in tried if digits.judge(prompt, c).first_error_step is None]
        wrong = [c for c in tried if not digits.judge(prompt, c).final_correct and "?" not in c]
        if right and wrong:
            completions = (digits.completion_ids(right[0]), digits.completion_ids(wrong[0]))
            pairs.append(Example(digits.prompt_ids(prompt), completions))
    return pairs


def report(
    config: DemoConfig,
    before: int,
    after: int,
    moved: dict[str, float],
    pairs: int,
    outcome: Outcome,
    seconds: float,
) -> None:
    """Print accuracy before and after with intervals, KL, margins."""
    total = config.test_prompts
    interval_before, interval_after = wilson_interval(before, total), wilson_interval(after, total)
    values = {
        "accuracy_before": before / total,
        "accuracy_before_interval": list(interval_before),
        "accuracy_after": after / total,
        "accuracy_after_interval": list(interval_after),
        "seconds": seconds,
        "pairs": pairs,
        "kl": moved["kl"],
        "margin": moved["margin"],
        "reward_accuracy": moved["accuracy"],
        "chosen_log_ratio": moved["chosen_log_ratio"],
        "rejected_log_ratio": moved["rejected_log_ratio"],
        "loss_last": outcome.last.get("loss"),
        "out": config.out,
    }
    rows = [
        (name, f"{count / total:.3f}", f"{low:.3f} to {high:.3f}")
        for name, count, (low, high) in (
            ("warm start", before, interval_before),
            ("dpo", after, interval_after),
        )
    ]
    text = [
        f"sampled accuracy on {total} fresh prompts, temperature 1",
        table(rows, ("model", "accuracy", "95% interval")),
        f"KL to the warm start {values['kl']:.2f} nats per chain, margin {values['margin']:.2f}, right above wrong on "
        f"{values['reward_accuracy']:.1%} of {pairs} pairs; log ratio right {values['chosen_log_ratio']:+.2f}, "
        f"wrong {values['rejected_log_ratio']:+.2f}",
        f"{seconds:.0f} s; checkpoints, metrics and a Hugging Face export in {config.out}",
    ]
    result(values, "\n".join(text), as_json=config.output.json)
