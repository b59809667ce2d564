"""What both demonstrations share: a folder that is theirs, and runs in it as `dpo-jax train` makes them."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dpo_jax.checkpoint import open_checkpoints
from dpo_jax.cli.configs import CONFIG_FILE, config_record, write_record
from dpo_jax.cli.console import UsageError
from dpo_jax.cli.loop import Course, Outcome, run_course
from dpo_jax.optimizers import OptimizerConfig, make_optimizer
from dpo_jax.report import open_metrics
from dpo_jax.sharding import Rules
from dpo_jax.train import ApplyFn, Objective, compile_step, init_state, make_train_step
from dpo_jax.types import PyTree


def open_folder(config: Any, slug: str) -> Path:
    """The demonstration's folder, with its config in it.

    Raises:
      UsageError: it holds another run.
    """
    out = Path(config.out)
    if (out / CONFIG_FILE).exists() or (out / "checkpoints").exists():
        raise UsageError(f"{out} already holds a run; give the demo a folder of its own")
    write_record(out, config_record("demo", slug, config))
    return out


def trained(
    out: Path,
    course: Course,
    objective: Objective,
    function: ApplyFn,
    variables: PyTree,
    stream: Iterator[tuple[PyTree, int]],
    optimizer_config: OptimizerConfig,
    mesh: Mesh,
    rules: Rules,
    config: Any,
    *,
    reference: bool = False,
    ema_decay: float | None = None,
) -> tuple[PyTree, Outcome]:
    """Train a copy of the variables; the moving average, where there is one, and how the run went.

    Args:
      out: folder of the run's checkpoints and metrics.
      stream: batches, and what each of them counts in the course's unit.
      config: of the demonstration, kept with the checkpoints; its `seed` is that of the run.

    Raises:
      KeyboardInterrupt: a signal stopped the run.
    """
    optimizer = make_optimizer(optimizer_config, course.steps)
    # The step uses up the state's arrays, and the start is asked again at the end.
    start = jax.tree.map(jnp.copy, variables)
    state = init_state(start, optimizer, jax.random.key(config.seed), reference=reference, ema=ema_decay is not None)
    step, state = compile_step(make_train_step(objective, function, optimizer, ema_decay=ema_decay), state, mesh, rules)
    with open_checkpoints(out / "checkpoints") as checkpoints, open_metrics(out) as metrics:
        kept = {"checkpoints": checkpoints, "metrics": metrics, "extras": {"config": asdict(config)}}
        state, outcome = run_course(course, step, state, stream, mesh, **kept)
    if outcome.stopped:
        raise KeyboardInterrupt
    return state.params if state.ema is None else state.ema, outcome
