"""Columns from frozen models, against the same numbers computed sequence by sequence in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_model import VOCABULARY, logps_one_by_one, ragged_examples, toy_logits, toy_model, toy_variables

from dpo_jax.language.data import annotate
from dpo_jax.language.data.batches import epoch_batches
from dpo_jax.language.data.dealing import plan_layout, plan_padded_layout
from dpo_jax.language.data.pack import example_lengths
from dpo_jax.language.types import Example
from dpo_jax.sharding import make_mesh


def said(function, variables, examples, *, padded=False):
    lengths = example_lengths(examples)
    plan = plan_padded_layout if padded else partial(plan_layout, seed=None)
    layout = plan(lengths, batch_size=4, row_multiple=1).layout
    source = epoch_batches(examples, layout, batch_size=4, padded=padded)
    return annotate.each_example(partial(function, toy_model), variables, source, make_mesh(devices=jax.devices()[:1]))


def hidden_and_logits(variables, ids):
    """[L, D] and [L, V] of one sequence alone."""
    length = len(ids)
    places = jnp.arange(length)[None], jnp.full((1, length), length)
    answer = toy_model(variables, jnp.asarray(ids)[None], *places)
    return np.asarray(answer.hidden[0], np.float64), np.asarray(
        toy_logits(variables, jnp.asarray(ids)[None], *places)[0], np.float64
    )


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("padded", [False, True])
def test_token_logps_of_every_example(padded):
    examples = ragged_examples(7, completions=2)
    found = annotate.to_longest(examples, said(annotate.token_logps, toy_variables(), examples, padded=padded))
    for example, values in zip(examples, found, strict=True):
        assert values.shape == (2, max(map(len, example.completions)))
        for k, expected in enumerate(logps_one_by_one(toy_variables(), example)):
            np.testing.assert_allclose(values[k, : len(expected)], expected, atol=1e-5)
            assert not values[k, len(expected) :].any()


@pytest.mark.parametrize("contrast", [1.0, 0.3])
def test_contrastive_logps_over_chunks_of_tokens(contrast, monkeypatch):
    monkeypatch.setattr(annotate, "CHUNK", 3)
    examples = ragged_examples(5, completions=2)
    models = toy_variables(0), toy_variables(1)
    found = said(partial(annotate.contrastive_logps, contrast=contrast), models, examples)
    for example, values in zip(examples, found, strict=True):
        for k, ids in enumerate(example.completions):
            path = np.concatenate([example.prompt, ids])
            positive, negative = (log_softmax(hidden_and_logits(v, path)[1]) for v in models)
            s = log_softmax((1 + contrast) * positive - contrast * negative)
            start = len(example.prompt) - 1
            expected = [s[start + i, token] for i, token in enumerate(ids)]
            np.testing.assert_allclose(values[k, : len(ids)], expected, atol=1e-4)


def test_distance_of_prompt_and_chosen():
    examples = ragged_examples(6, completions=2)
    found = said(annotate.first_two_distance, toy_variables(), [annotate.prompt_and_chosen(e) for e in examples])
    for example, value in zip(examples, found, strict=True):
        prompt = example.prompt[1:] if len(example.prompt) > 1 else example.prompt
        means = []
        for ids in (prompt, example.completions[0]):
            hidden, _ = hidden_and_logits(toy_variables(), np.concatenate([example.prompt[:1], ids]))
            means.append(hidden[1:].mean(0))
        cosine = means[0] @ means[1] / np.linalg.norm(means[0]) / np.linalg.norm(means[1])
        np.testing.assert_allclose(value, 1 - cosine, atol=1e-5)


def test_similarity_of_common_steps():
    rng = np.random.default_rng(0)

    def example():
        ids = [rng.integers(1, VOCABULARY, n).astype(np.int32) for n in (3, 6, 4, 0)]
        steps = np.array([[0, 0, 1, 1, 2, 2], [0, 1, 1, 1, -1, -1], [-1] * 6], np.int32)
        return Example(ids[0], tuple(ids[1:]), {"step_ids": steps})

    examples = [example() for _ in range(5)]
    found = said(partial(annotate.step_similarities, steps=3), toy_variables(), examples)
    for example, values in zip(examples, found, strict=True):
        assert values.shape == (3, 3, 3)
        states = [
            hidden_and_logits(toy_variables(), np.concatenate([example.prompt, ids]))[0][len(example.prompt) :]
            for ids in example.completions[:2]
        ]
        # The second answer has two steps, so the third step of the first belongs to its second.
        means = [[states[0][:2].mean(0), states[0][2:].mean(0)], [states[1][:1].mean(0), states[1][1:].mean(0)]]
        for step in range(2):
            a, b = means[0][step], means[1][step]
            cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            np.testing.assert_allclose(values[0, 1, step], cosine, atol=1e-5)
            np.testing.assert_allclose(values[1, 0, step], cosine, atol=1e-5)
            np.testing.assert_allclose(values[0, 0, step], 1.0, atol=1e-5)
        assert not values[:, :, 2].any() and not values[2].any()


def test_foreign_models_that_answer_logits_are_refused_by_name():
    examples = ragged_examples(2, completions=2)
    layout = plan_layout(example_lengths(examples), batch_size=2, seed=None).layout
    source = epoch_batches(examples, layout, batch_size=2)
    with pytest.raises(ValueError, match="answers a Prediction"):
        annotate.each_example(
            partial(annotate.first_two_distance, toy_logits),
            toy_variables(),
            source,
            make_mesh(devices=jax.devices()[:1]),
        )
