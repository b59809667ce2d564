"""`dpo-jax train METHOD`: from rows to an aligned Hugging Face checkpoint, resumable at any step."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from dpo_jax.checkpoint import Checkpoints, open_checkpoints
from dpo_jax.cli.adapters import Adapted, adapted_model, frozen_part, write_model
from dpo_jax.cli.annotate import annotate
from dpo_jax.cli.catalogue import Method, initial_loss_state
from dpo_jax.cli.checks import check_loss_options, check_options, mesh_of
from dpo_jax.cli.configs import CONFIG_FILE, config_record, differing_keys, write_record
from dpo_jax.cli.console import UsageError, result, say
from dpo_jax.cli.data import Prepared, check_columns, prepare, wanted_by
from dpo_jax.cli.loop import Course, Outcome, run_course, with_tokens, without_frozen
from dpo_jax.cli.models import OpenModel, open_model
from dpo_jax.cli.processes import is_first, join_processes
from dpo_jax.language.data.batches import batches, epoch_batches
from dpo_jax.language.models.decoder import RULES
from dpo_jax.language.objectives import from_loss, needs_reference
from dpo_jax.optimizers import make_optimizer
from dpo_jax.report import open_metrics, read_metrics
from dpo_jax.sharding import data_shards, shard_batch
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
from dpo_jax.tree import combine


def train(method: Method, config: Any) -> None:
    """Run or continue a training run.

    Args:
      method: the loss to train.
      config: an instance of `configs.train_config_class(method)`.

    Raises:
      UsageError: options that do not fit each other, the method or an earlier run in the same folder.
    """
    check_options(method, config)
    if config.mesh.distributed:
        join_processes()
    check_loss_options(method, config)
    out = Path(config.loop.out)
    record = config_record("train", method.slug, config)
    mesh = mesh_of(config.mesh)
    keep_config(out, record)
    model = open_model(config.model.model, config.model, reward=method.reward)
    adapted = adapted_model(model, config.adapters)
    wanted = wanted_by(method.loss)
    multiple = data_shards(mesh) * config.loop.microbatches
    data = prepare(config, wanted, model.tokenizer, out, row_multiple=multiple)
    data = annotate(data, wanted, config, mesh, out)
    check_columns(method.slug, wanted, data.train[0].columns)
    with open_checkpoints(out / "checkpoints", keep=config.loop.keep) as checkpoints:
        outcome, resumed = run(method, config, mesh, adapted, data, checkpoints, record, out)
    if is_first():
        summarise(method, config, out, data, outcome, resumed)


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


def run(
    method: Method,
    config: Any,
    mesh: Mesh,
    adapted: Adapted,
    data: Prepared,
    checkpoints: Checkpoints,
    record: dict[str, Any],
    out: Path,
) -> tuple[Outcome, int]:
    """Train, evaluate and export; the outcome, and the step that the run was resumed from."""
    hyper = {f.name: getattr(config.loss, f.name) for f in fields(config.loss)}
    model = adapted.model
    objective = from_loss(method.loss, frozen_head=adapted.rslora is not None, **hyper)
    optimizer = make_optimizer(config.optimizer, data.steps)
    state, resumed = start_state(method, config, mesh, adapted, data, optimizer, checkpoints)
    update = None
    if config.loop.reference_update_every:
        update = ReferenceUpdate(config.loop.reference_update_rate, config.loop.reference_update_every)
    step = make_train_step(
        objective,
        model.apply_fn,
        optimizer,
        microbatches=config.loop.microbatches,
        ema_decay=config.loop.ema_decay,
        reference_update=update,
    )
    sharded, state = compile_step(step, state, mesh, RULES)
    course = Course(
        steps=data.steps,
        log_every=config.loop.log_every,
        eval_every=config.loop.eval_every,
        save_every=config.loop.save_every,
        description=f"train {method.slug}",
    )
    stream = batches(
        data.train,
        data.layout,
        batch_size=config.loop.batch_size,
        seed=config.loop.seed,
        start_step=resumed,
        host=jax.process_index(),
        hosts=jax.process_count(),
        padded=config.data.layout == "padded",
    )
    with open_metrics(out, resume_step=resumed, active=is_first()) as metrics:
        state, outcome = run_course(
            course,
            sharded,
            state,
            with_tokens(stream),
            mesh,
            checkpoints=checkpoints,
            metrics=metrics,
            extras={"run": record, "seed": config.loop.seed, "base": model.fingerprint()},
            evaluate=evaluator(objective, model, state, data, config, mesh),
        )
    if outcome.stopped:
        say(f"asked to stop: saved step {int(state.step)} of {data.steps}; the same command goes on from there")
    elif config.loop.export:
        export_state(state, adapted, out, base=config.model.model)
    return outcome, resumed


def start_state(
    method: Method,
    config: Any,
    mesh: Mesh,
    adapted: Adapted,
    data: Prepared,
    optimizer: Any,
    checkpoints: Checkpoints,
) -> tuple[TrainState, int]:
    """The state to begin with: from the newest whole checkpoint, or from the model's weights."""
    reference = needs_reference(method.loss, tuple(data.train[0].columns))
    model, key = adapted.model, jax.random.key(config.loop.seed)

    def build(variables: Any, other: Any) -> TrainState:
        return init_state(
            variables,
            optimizer,
            key,
            trainable=adapted.trainable,
            reference=(other if other is not None else True) if reference else False,
            ema=config.loop.ema_decay is not None,
            loss_state=initial_loss_state(method),
        )

    def complete() -> Any:
        # Steps fold their numbers into the key, and none has this one.
        return adapted.complete(model.load(mesh), jax.random.fold_in(key, 2**32 - 1))

    if checkpoints.latest_step() is not None:
        whole = jax.eval_shape(build, adapted.abstract, None)
        abstract = without_frozen(whole)
        shardings = state_shardings(abstract, mesh, RULES)
        abstract = jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), abstract, shardings
        )
        restored = checkpoints.restore(abstract)
        for number, reason in restored.damaged:
            say(f"checkpoint of step {number} is damaged and was passed over: {reason}")
        say(f"going on from step {restored.step}")
        frozen = whole.frozen  # nothing of it is left where the whole model is trained
        if adapted.rslora is not None:
            if restored.extras.get("base") != model.fingerprint():
                say(f"the files of {model.folder} are not those that this run began with; its adapters may not fit")
            frozen = frozen_part(adapted, complete())
        return replace(restored.state, frozen=frozen), restored.step
    other = None
    if reference and config.model.reference_model is not None:
        opened = open_model(config.model.reference_model, config.model)
        if opened.config != model.config:
            raise UsageError(
                f"{config.model.reference_model} has another shape or vocabulary than {config.model.model}; "
                "--reference columns takes a reference of another shape"
            )
        other = opened.load(mesh)
    return build(complete(), other), 0


def evaluator(
    objective: Objective, model: OpenModel, state: TrainState, data: Prepared, config: Any, mesh: Mesh
) -> Callable[[TrainState], dict[str, float]] | None:
    """Weighted means of the objective over the held-out rows; None if there are none."""
    if not data.held_out:
        return None
    step = compile_eval_step(make_eval_step(objective, model.apply_fn), state, mesh, RULES)

    def evaluate(state: TrainState) -> dict[str, float]:
        return evaluate_batches(step, state, held_out_batches(data, config, mesh))

    return evaluate


def held_out_batches(data: Prepared, config: Any, mesh: Mesh) -> Iterator[Any]:
    """The held-out rows, each once, as global arrays."""
    assert data.held_out_layout is not None
    stream = epoch_batches(
        data.held_out,
        data.held_out_layout,
        batch_size=config.loop.batch_size,
        host=jax.process_index(),
        hosts=jax.process_count(),
        padded=config.data.layout == "padded",
    )
    return (shard_batch(stream[number], mesh) for number in range(len(stream)))


def export_state(state: TrainState, adapted: Adapted, out: Path, *, base: str) -> None:
    """Write the policy (its moving average if there is one) as a Hugging Face folder, and its adapters alone."""
    params = state.params if state.ema is None else state.ema
    write_model(adapted, combine(params, state.frozen), out / "export", out / "adapter", base=base)
    say(f"exported to {out / 'export'}")


def summarise(method: Method, config: Any, out: Path, data: Prepared, outcome: Outcome, resumed: int) -> None:
    """Print the result of a run."""
    lines = [line for line in read_metrics(out) if line["split"] == "train"]
    first, last = (lines[0], lines[-1]) if lines else ({}, {})
    values = {
        "method": method.slug,
        "out": str(out),
        "steps": last.get("step", 0),
        "loss_first": first.get("loss"),
        "loss_last": last.get("loss"),
        "accuracy": outcome.evaluation.get("accuracy", last.get("accuracy")),
        "accuracy_train": last.get("accuracy"),
        "tokens_per_second": outcome.tokens_per_second,
        "fill_rate": data.fill_rate,
        "resumed_from": resumed,
        "stopped": outcome.stopped,
        "evaluation": outcome.evaluation,
        "needs": asdict(outcome.needs) if outcome.needs else None,
    }
    text = [f"{method.slug}: {values['steps']} steps in {out}"]
    text += [f"  loss {first['loss']:.4f} -> {last['loss']:.4f}"] if lines else []
    if outcome.evaluation:
        shown = {
            name: outcome.evaluation[name] for name in ("loss", "accuracy", "margin") if name in outcome.evaluation
        }
        text.append("  held out: " + ", ".join(f"{name} {value:.4f}" for name, value in shown.items()))
    text.append(f"  {outcome.tokens_per_second:.0f} tokens/s, fill rate {data.fill_rate:.3f}")
    result(values, "\n".join(text), as_json=config.output.json)
