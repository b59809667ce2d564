"""A training run, the same for both wings: start or go on, train, evaluate, save, export."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dpo_jax.checkpoint import open_checkpoints
from dpo_jax.cli.configs import CONFIG_FILE, differing_keys, write_record
from dpo_jax.cli.console import UsageError, result, say
from dpo_jax.cli.loop import Course, Outcome, run_course, without_frozen
from dpo_jax.cli.processes import is_first
from dpo_jax.optimizers import make_optimizer
from dpo_jax.perturb import perturb
from dpo_jax.report import open_metrics, read_metrics
from dpo_jax.sharding import Rules, shard_batch
from dpo_jax.train import (
    Objective,
    ReferenceUpdate,
    TrainState,
    compile_eval_step,
    compile_step,
    evaluate_batches,
    init_state,
    make_eval_step,
    make_train_step,
    state_shardings,
)
from dpo_jax.tree import combine, partition
from dpo_jax.types import Array, PyTree


@dataclass(frozen=True)
class Job:
    """What a wing makes of its options, so that a run can begin.

    Attributes:
      slug: of the method.
      objective, apply_fn, rules: what is trained, and how it is laid out.
      abstract: shapes of the model's variables, adapters among them.
      trainable: of a variable's path name.
      variables: `(mesh, key) -> variables` at the start of the run; reads files.
      frozen_part: of these variables, as a state keeps it; None where everything is trained.
      fingerprint: of the files that the variables come from.
      reference: whether the state holds a reference.
      other_reference: reads another reference than the policy's own start, or None.
      loss_state: what the loss remembers before the first step.
      steps: optimizer steps of the run.
      stream: `stream(step)` gives batches (NumPy, this process's rows) from a step on, each with the number that its
        speed is counted in (tokens, images).
      held_out: batches that hold every held-out row once, or None.
      export: writes the model of a state's variables.
      unit: what the speed is counted in.
      start_noise: share of the parameters' deviation that the policy, and not its reference, is moved by at the start.
    """

    slug: str
    objective: Objective
    apply_fn: Callable[..., Any]
    rules: Rules
    abstract: PyTree
    trainable: Callable[[str], bool]
    variables: Callable[[Mesh, Array], PyTree]
    frozen_part: Callable[[PyTree], PyTree] | None
    fingerprint: str
    reference: bool
    other_reference: Callable[[Mesh], PyTree] | None
    loss_state: PyTree
    steps: int
    stream: Callable[[int], Iterator[tuple[PyTree, int]]]
    held_out: Callable[[], Iterable[PyTree]] | None
    export: Callable[[TrainState], None]
    unit: str = "tokens"
    start_noise: float = 0.0


def keep_config(out: Path, record: dict[str, Any]) -> None:
    """Write the resolved config to the run's folder, or compare it with the one of the run that is continued."""
    path = out / CONFIG_FILE
    # A run that failed before its first checkpoint has nothing to continue: its config is replaced.
    if path.exists() and any((out / "checkpoints").glob("*")):
        try:
            before = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{path} cannot be read ({error}), so the run cannot be continued; give another --out"
            ) from error
        made_by = (before.get("command"), before.get("method"))
        if made_by != (record["command"], record["method"]):
            raise UsageError(f"{out} holds a run of `{made_by[0]} {made_by[1]}`; give this one an --out of its own")
        if different := differing_keys(before["config"], record["config"]):
            raise UsageError(
                f"{out} holds a run with other options: {'; '.join(different)}. "
                "Give the same options to continue it, or another --out"
            )
    if is_first():
        write_record(out, record)


def hyper_parameters(config: Any) -> dict[str, Any]:
    """The loss's options of a run's config."""
    return {f.name: getattr(config.loss, f.name) for f in fields(config.loss)}


def run_job(job: Job, config: Any, mesh: Mesh, record: dict[str, Any], out: Path) -> tuple[Outcome, int]:
    """Train, evaluate and export; the outcome, and the step that the run was resumed from.

    Args:
      config: with the parts `loop`, `optimizer` of `cli.configs`.
      record: the resolved config, kept beside every checkpoint.
      out: the run's folder.
    """
    loop = config.loop
    optimizer = make_optimizer(config.optimizer, job.steps)
    with open_checkpoints(out / "checkpoints", keep=loop.keep) as checkpoints:
        state, resumed = _start(job, config, mesh, optimizer, checkpoints)
        update = None
        if loop.reference_update_every:
            update = ReferenceUpdate(loop.reference_update_rate, loop.reference_update_every)
        step = make_train_step(
            job.objective,
            job.apply_fn,
            optimizer,
            microbatches=loop.microbatches,
            ema_decay=loop.ema_decay,
            reference_update=update,
        )
        sharded, state = compile_step(step, state, mesh, job.rules)
        course = Course(job.steps, loop.log_every, loop.eval_every, loop.save_every, f"train {job.slug}", job.unit)
        with open_metrics(out, resume_step=resumed, active=is_first()) as metrics:
            state, outcome = run_course(
                course,
                sharded,
                state,
                job.stream(resumed),
                mesh,
                checkpoints=checkpoints,
                metrics=metrics,
                extras={"run": record, "seed": loop.seed, "base": job.fingerprint},
                evaluate=_evaluator(job, state, mesh),
            )
        if outcome.stopped:
            say(f"asked to stop: saved step {int(state.step)} of {job.steps}; the same command goes on from there")
        elif loop.export:
            job.export(state)
    return outcome, resumed


def _start(job: Job, config: Any, mesh: Mesh, optimizer: Any, checkpoints: Any) -> tuple[TrainState, int]:
    """The state to begin with: from the newest whole checkpoint, or from the model's weights."""
    key = jax.random.key(config.loop.seed)

    def build(variables: Any, other: Any) -> TrainState:
        return init_state(
            variables,
            optimizer,
            key,
            trainable=job.trainable,
            reference=(other if other is not None else True) if job.reference else False,
            ema=config.loop.ema_decay is not None,
            loss_state=job.loss_state,
        )

    def begin() -> Any:
        # Steps fold their numbers into the key, and none has this one.
        return job.variables(mesh, jax.random.fold_in(key, 2**32 - 1))

    if checkpoints.latest_step() is None:
        other = None if job.other_reference is None or not job.reference else job.other_reference(mesh)
        return _moved(job, build(begin(), other), mesh, jax.random.fold_in(key, 2**32 - 2)), 0
    whole = jax.eval_shape(build, job.abstract, None)
    abstract = without_frozen(whole)
    shardings = state_shardings(abstract, mesh, job.rules)
    abstract = jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), abstract, shardings
    )
    restored = checkpoints.restore(abstract)
    for number, reason in restored.damaged:
        say(f"checkpoint of step {number} is damaged and was passed over: {reason}")
    say(f"going on from step {restored.step}")
    frozen = whole.frozen  # nothing of it is left where the whole model is trained
    if job.frozen_part is not None:
        if restored.extras.get("base") != job.fingerprint:
            say("the model's files are not those that this run began with; its adapters may not fit")
        frozen = job.frozen_part(begin())
    return replace(restored.state, frozen=frozen), restored.step


def _moved(job: Job, state: TrainState, mesh: Mesh, key: Array) -> TrainState:
    """The state with the job's noise on its policy."""
    if not job.start_noise:
        return state
    say(f"the policy starts with noise of {job.start_noise:g} of its parameters' deviation")

    def noisy(params: PyTree, frozen: PyTree) -> PyTree:
        moved = perturb(combine(params, frozen), key, job.start_noise, trainable=job.trainable)
        return partition(moved, job.trainable)[0]

    shardings = state_shardings(state, mesh, job.rules).params
    params = jax.jit(noisy, donate_argnums=0, out_shardings=shardings)(state.params, state.frozen)
    ema = None if state.ema is None else jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), params)
    return replace(state, params=params, ema=ema)


def _evaluator(job: Job, state: TrainState, mesh: Mesh) -> Callable[[TrainState], dict[str, float]] | None:
    """Weighted means of the objective over the held-out rows; None if there are none."""
    held_out = job.held_out
    if held_out is None:
        return None
    step = compile_eval_step(make_eval_step(job.objective, job.apply_fn), state, mesh, job.rules)

    def evaluate(state: TrainState) -> dict[str, float]:
        return evaluate_batches(step, state, (shard_batch(batch, mesh) for batch in held_out()))

    return evaluate


def summarise(
    slug: str, config: Any, out: Path, outcome: Outcome, resumed: int, more: dict[str, Any], speed: str
) -> None:
    """Print the result of a run; `more` goes into its JSON, `speed` is the last line for people."""
    lines = [line for line in read_metrics(out) if line["split"] == "train"]
    first, last = (lines[0], lines[-1]) if lines else ({}, {})
    values = {
        "method": slug,
        "out": str(out),
        "steps": last.get("step", 0),
        "loss_first": first.get("loss"),
        "loss_last": last.get("loss"),
        "accuracy": outcome.evaluation.get("accuracy", last.get("accuracy")),
        "accuracy_train": last.get("accuracy"),
        "resumed_from": resumed,
        "stopped": outcome.stopped,
        "evaluation": outcome.evaluation,
        "needs": asdict(outcome.needs) if outcome.needs else None,
        **more,
    }
    text = [f"{slug}: {values['steps']} steps in {out}"]
    text += [f"  loss {first['loss']:.4f} -> {last['loss']:.4f}"] if lines else []
    if outcome.evaluation:
        names = [name for name in ("loss", "accuracy", "margin") if name in outcome.evaluation]
        text.append("  held out: " + ", ".join(f"{name} {outcome.evaluation[name]:.4f}" for name in names))
    result(values, "\n".join([*text, f"  {speed}"]), as_json=config.output.json)
