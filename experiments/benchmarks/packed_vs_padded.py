"""Packed prefix trees against padded rows: the same pairs, model and step, side by side.

Claim     on preference data with long shared prompts and ragged answers packed rows train several times as many pairs
          per second as padded rows, in less memory, with the same losses.
Command   python experiments/benchmarks/packed_vs_padded.py --model DIR --data ROWS.jsonl.gz
          (DIR: a Hugging Face folder, e.g. from `python tests/make_tiny_checkpoint.py --out DIR --data ROWS.jsonl.gz`)

Each layout runs in processes of its own, in turns; seconds are medians over the steps after the first three. Useful
tokens are those of the packed rows: every prompt once. Batches hold the same pairs in both layouts.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

Layouts = Literal["packed", "padded"]
WARM_UP = 3


@dataclass(frozen=True)
class Benchmark:
    """Time the DPO step in both layouts."""

    model: str
    """Hugging Face folder."""
    data: str
    """JSONL(.gz) rows of pairs."""
    batch_size: int = 8
    """Pairs in a step."""
    steps: int = 10
    """Steps, the first three of which are not counted."""
    rounds: int = 2
    """Turns of each layout."""
    max_length: int = 1024
    """Most tokens of a prompt with one answer."""
    only: Layouts | None = None
    """Run one layout in this process and print one JSON line."""


def run(config: Benchmark, layout: str) -> dict[str, Any]:
    """Train a few steps in one layout; its figures."""
    import jax
    import optax

    from dpo_jax.cli.configs import DataConfig, ModelConfig
    from dpo_jax.cli.data import Wanted, layout_of, read_examples
    from dpo_jax.cli.models import open_model
    from dpo_jax.language.data.batches import batches
    from dpo_jax.language.methods import dpo_loss
    from dpo_jax.language.models.decoder import RULES
    from dpo_jax.language.objectives import from_loss
    from dpo_jax.plan import step_needs
    from dpo_jax.sharding import make_mesh, shard_batch
    from dpo_jax.train import compile_step, init_state, make_train_step

    model = open_model(config.model, ModelConfig())
    options_of_data = DataConfig(max_length=config.max_length)
    examples = read_examples([config.data], model.tokenizer, options_of_data, None, Wanted("pairs"))
    padded = layout == "padded"
    options = {"batch_size": config.batch_size, "seed": 0}
    plan = layout_of(examples, row_multiple=1, padded=padded, steps=config.steps, **options)
    useful = layout_of(examples, row_multiple=1, padded=False, steps=config.steps, **options)
    mesh, optimizer = make_mesh(devices=jax.devices()[:1]), optax.adamw(1e-4)
    state = init_state(model.load(mesh), optimizer, jax.random.key(0))
    step = make_train_step(from_loss(dpo_loss), model.apply_fn, optimizer)
    sharded, state = compile_step(step, state, mesh, RULES)
    stream = batches(examples, plan.layout, padded=padded, **options)
    compiled, seconds, losses, needs = None, [], [], None
    for _ in range(config.steps):
        batch = shard_batch(next(stream), mesh)
        if compiled is None:
            compiled = sharded.lower(state, batch).compile()
            needs = step_needs(compiled, state, batch)
        begun = time.perf_counter()
        state, metrics = compiled(state, batch)
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - begun)
    assert needs is not None
    # Seen by the packed plan of the same batches: the tokens that any layout must compute at least.
    tokens = useful.fill_rate * useful.layout.rows * useful.layout.length
    median = statistics.median(seconds[WARM_UP:])
    return {
        "layout": layout,
        "rows": plan.layout.rows,
        "row_length": plan.layout.length,
        "fill_rate": plan.fill_rate,
        "step_s": median,
        "useful_tokens_per_s": tokens / median,
        "temporaries_mib": needs.temporaries / 2**20,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "losses": losses,
    }


def side_by_side(config: Benchmark) -> None:
    """Both layouts in turns, and a table."""
    from dpo_jax.report import table

    results: dict[str, list[dict[str, Any]]] = {"packed": [], "padded": []}
    for _ in range(config.rounds):
        for layout, lines in results.items():
            options = [
                f"--{name.replace('_', '-')}={value}" for name, value in asdict(config).items() if name != "only"
            ]
            command = [sys.executable, str(Path(__file__)), *options, "--only", layout]
            lines.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    names = ("rows", "row_length", "fill_rate", "step_s", "useful_tokens_per_s", "temporaries_mib", "peak_rss_mib")
    middle = {
        layout: {n: statistics.median(line[n] for line in lines) for n in names} for layout, lines in results.items()
    }
    packed, padded = middle["packed"], middle["padded"]
    print(table([(n, f"{packed[n]:.4g}", f"{padded[n]:.4g}") for n in names], ("figure", "packed", "padded")))
    print(f"padded / packed seconds: {padded['step_s'] / packed['step_s']:.2f}")
    difference = np.max(np.abs(np.subtract(results["packed"][0]["losses"], results["padded"][0]["losses"])))
    print(f"largest difference of a loss in {config.steps} steps: {difference:.1e}")


if __name__ == "__main__":
    chosen = tyro.cli(Benchmark)
    if chosen.only:
        print(json.dumps(run(chosen, chosen.only)))
    else:
        side_by_side(chosen)
