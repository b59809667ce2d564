"""Columns from frozen models: the reference, a guidance model, two contrasted models, an embedding model."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dpo_jax.cli.console import UsageError, say
from dpo_jax.cli.data import Prepared, Wanted, layout_of
from dpo_jax.cli.models import OpenModel, open_model, open_reward_model
from dpo_jax.cli.processes import is_first, true_everywhere
from dpo_jax.language.data.annotate import (
    completion_rewards,
    content_key,
    contrastive_logps,
    each_example,
    first_two_distance,
    load_logps,
    prompt_and_chosen,
    save_logps,
    step_similarities,
    to_longest,
    token_logps,
    with_column,
)
from dpo_jax.language.data.batches import epoch_batches
from dpo_jax.language.data.columns import value_of
from dpo_jax.language.types import COMPLETIONS, Batch, Example
from dpo_jax.types import PyTree

Says = Callable[[PyTree, Batch], jax.Array]  # (variables, batch) -> [B, ...]


def annotate(data: Prepared, wanted: Wanted, config: Any, mesh: Mesh, out: Path) -> Prepared:
    """The examples with every column that a frozen model makes and that the options or the method ask for."""
    have = data.train[0].columns
    if config.model.reference == "columns" and "reference_logps" not in have:
        model = open_model(config.model.reference_model or config.model.model, config.model)
        data = _with_logps(data, "reference_logps", [model], partial(token_logps, model.apply_fn), config, mesh, out)
    missing = [name for name in wanted.columns if name not in have]
    frozen = config.frozen
    if "guidance_logps" in missing and frozen.guidance_model:
        model = open_model(frozen.guidance_model, config.model)
        data = _with_logps(data, "guidance_logps", [model], partial(token_logps, model.apply_fn), config, mesh, out)
    if "contrastive_logps" in missing and frozen.positive_model and frozen.negative_model:
        models = [open_model(name, config.model) for name in (frozen.positive_model, frozen.negative_model)]
        if models[0].config != models[1].config:
            raise UsageError(
                "--positive-model and --negative-model have different shapes; fine-tune both from one start"
            )
        says = partial(contrastive_logps, models[0].apply_fn)
        data = _with_logps(data, "contrastive_logps", models, says, config, mesh, out)
    if frozen.embedding_model:
        data = _with_embeddings(data, missing, config, mesh)
    if frozen.reward_model:
        data = _with_scores(data, wanted, missing, config, mesh)
    return data


def _with_logps(
    data: Prepared, name: str, models: Sequence[OpenModel], says: Says, config: Any, mesh: Mesh, out: Path
) -> Prepared:
    """A column of numbers per token, computed once and kept in the run's folder."""
    variables: Any = None

    def annotated(examples: list[Example], multiple: int) -> list[Example]:
        nonlocal variables
        # What the numbers depend on: the weights, the type they are computed in, and every token.
        weights = " ".join(model.fingerprint() for model in models)
        key = content_key(f"{weights} {config.model.dtype} {config.model.param_dtype}", examples)
        path = out / f"{name}_{key}.npz"
        logps = load_logps(path, examples)
        # The other processes may see no such file; to compute takes all of them.
        if not true_everywhere(logps is not None):
            if variables is None:
                several = len(models) > 1
                variables = tuple(model.load(mesh) for model in models) if several else models[0].load(mesh)
            logps = to_longest(examples, _said(examples, multiple, says, variables, config, mesh))
            if is_first():
                save_logps(path, logps, examples)
            say(f"{name} of {len(examples)} examples computed and kept in {path}")
        else:
            say(f"{name} of {len(examples)} examples read from {path}")
        assert logps is not None
        return with_column(examples, name, logps)

    return _both_parts(data, annotated)


def _with_embeddings(data: Prepared, missing: Sequence[str], config: Any, mesh: Mesh) -> Prepared:
    """Columns from the last hidden states of an embedding model."""
    model = open_model(config.frozen.embedding_model, config.model)
    variables = model.load(mesh)

    def distances(examples: list[Example], multiple: int) -> list[Example]:
        compared = [prompt_and_chosen(example) for example in examples]
        says = partial(first_two_distance, model.apply_fn)
        return with_column(examples, "semantic_distance", _said(compared, multiple, says, variables, config, mesh))

    def similarities(examples: list[Example], multiple: int) -> list[Example]:
        says = partial(step_similarities, model.apply_fn, steps=most_steps)
        return with_column(examples, "step_similarity", _said(examples, multiple, says, variables, config, mesh))

    if "semantic_distance" in missing:
        data = _both_parts(data, distances)
    if "step_similarity" in missing and "step_ids" in data.train[0].columns:
        every = [*data.train, *data.held_out]
        most_steps = 1 + max(int(np.max(example.columns["step_ids"])) for example in every)
        data = _both_parts(data, similarities)
    return data


def _with_scores(data: Prepared, wanted: Wanted, missing: Sequence[str], config: Any, mesh: Mesh) -> Prepared:
    """Scores by a reward model, and the columns that are made of them."""
    model = open_reward_model(config.frozen.reward_model, config.model)
    variables, says = model.load(mesh), partial(completion_rewards, model.apply_fn)

    def scored(example: Example, values: np.ndarray) -> Example:
        numbers = values[: sum(len(ids) > 0 for ids in example.completions)].tolist()
        names = COMPLETIONS[wanted.form]
        given = {f"{name}_score": number for name, number in zip(names, numbers)} if names else {"scores": numbers}
        made = {name: value_of(name, {**example.columns, **given}) for name in missing}
        arrays = {
            name: np.pad(np.asarray(v, np.float32), (0, len(values) - len(v))) if isinstance(v, list) else np.float32(v)
            for name, v in made.items()
            if v is not None
        }
        return replace(example, columns={**example.columns, **arrays})

    def annotated(examples: list[Example], multiple: int) -> list[Example]:
        found = _said(examples, multiple, says, variables, config, mesh)
        return [scored(example, np.asarray(values)) for example, values in zip(examples, found, strict=True)]

    return _both_parts(data, annotated)


def _said(
    examples: Sequence[Example], multiple: int, says: Says, variables: PyTree, config: Any, mesh: Mesh
) -> list[np.ndarray]:
    """What frozen models say of each example."""
    size, padded = config.loop.batch_size, config.data.layout == "padded"
    plan = layout_of(examples, batch_size=size, row_multiple=multiple, seed=None, padded=padded)
    hosts = {"host": jax.process_index(), "hosts": jax.process_count()}
    stream = epoch_batches(examples, plan.layout, batch_size=size, padded=padded, **hosts)
    return each_example(says, variables, stream, mesh)


def _both_parts(data: Prepared, annotated: Callable[[list[Example], int], list[Example]]) -> Prepared:
    multiple = data.layout.rows
    held_out = annotated(data.held_out, multiple) if data.held_out else []
    return replace(data, train=annotated(data.train, multiple), held_out=held_out)
