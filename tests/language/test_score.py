"""Packed prefix trees, padded rows and sequences computed alone give the same numbers and gradients."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_model import VOCABULARY, logps_one_by_one, ragged_examples, toy_logits, toy_model, toy_variables

from dpo_jax.language.data.dealing import plan_layout, plan_padded_layout
from dpo_jax.language.data.pack import example_lengths, pack_rows, pad_rows
from dpo_jax.language.score import completion_mask
from dpo_jax.language.score import score as score_eagerly


@partial(jax.jit, static_argnames=("model", "statistics", "reference"))
def _score(variables, batch, model, statistics, reference_variables, reference):
    other = partial(model, reference_variables) if reference else None
    return score_eagerly(partial(model, variables), batch, statistics=statistics, reference=other)


def score(model, batch, *, statistics=(), reference=None):
    """Compiled: op by op the same takes seconds."""
    variables = model.args[0]
    other = variables if reference is None else reference.args[0]
    return _score(variables, batch, model.func, statistics, other, reference is not None)


@jax.jit
def logps_of(variables, ids):
    length = ids.shape[1]
    logits = toy_logits(variables, ids, jnp.arange(length)[None], jnp.full((1, length), length))
    return jax.nn.log_softmax(logits[0])


def both_layouts(examples, rows=2):
    lengths = example_lengths(examples)
    packed = plan_layout(lengths, batch_size=len(examples), row_multiple=rows, seed=None).layout
    dealt = [examples[r :: packed.rows] for r in range(packed.rows)]
    room = max(sum(len(e.prompt) + sum(map(len, e.completions)) for e in row) for row in dealt)
    targets = max(sum(len(c) for e in row for c in e.completions) for row in dealt)
    wide = type(packed)(packed.rows, room, targets, max(map(len, dealt)), packed.completions, packed.completion_length)
    padded = plan_padded_layout(lengths, batch_size=len(examples)).layout
    return dealt, pack_rows(dealt, wide), pad_rows([[e] for e in examples], padded)


def by_example(values, batch, order):
    """[B, K, T] of a packed batch in the order of the examples."""
    values = np.asarray(values)
    places = np.flatnonzero(np.asarray(batch.weight).reshape(-1))
    return dict(zip(order, values[places]))


@pytest.mark.parametrize("completions", [1, 2, 3])
def test_packed_padded_and_alone_agree(completions):
    variables, examples = toy_variables(), ragged_examples(7, completions=completions)
    dealt, packed, padded = both_layouts(examples)
    order = [id(example) for row in dealt for example in row]
    model = partial(toy_model, variables)
    from_packed = by_example(score(model, packed)["logps"], packed, order)
    from_padded = np.asarray(score(model, padded)["logps"])
    for number, example in enumerate(examples):
        for k, expected in enumerate(logps_one_by_one(variables, example)):
            np.testing.assert_allclose(from_packed[id(example)][k, : len(expected)], expected, atol=1e-5)
            np.testing.assert_allclose(from_padded[number, k, : len(expected)], expected, atol=1e-5)
            assert not from_packed[id(example)][k, len(expected) :].any()


def test_packed_and_padded_gradients_agree():
    examples = ragged_examples(6, seed=3)
    _, packed, padded = both_layouts(examples)
    variables = toy_variables(1)

    def loss(variables, batch):
        logps = score(partial(toy_model, variables), batch)["logps"]
        sums = logps.sum(-1)  # [B, K, T] -> [B, K]
        return jnp.sum(jnp.logaddexp(0.0, sums[:, 1] - sums[:, 0]) * batch.weight.reshape(-1))

    a, b = (jax.jit(jax.grad(loss))(variables, batch) for batch in (packed, padded))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), a, b)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(a)) > 1e-2


def test_what_stands_in_padding_changes_nothing():
    examples = ragged_examples(5, seed=4)
    _, packed, _ = both_layouts(examples)
    variables = toy_variables()

    def loss(variables, tokens):
        batch = type(packed)(**{**vars(packed), "tokens": tokens})
        return score(partial(toy_model, variables), batch)["logps"].sum()

    empty = np.asarray(packed.subtree_end) == 0
    assert empty.any()
    noise = np.where(empty, VOCABULARY - 1, packed.tokens)
    before, after = (jax.jit(jax.value_and_grad(loss))(variables, tokens) for tokens in (packed.tokens, noise))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_a_sibling_changes_nothing():
    examples = ragged_examples(1, seed=5)
    _, packed, _ = both_layouts(examples, rows=1)
    prompt, chosen = len(examples[0].prompt), len(examples[0].completions[0])
    tokens = np.array(packed.tokens)
    tokens[0, prompt + chosen :] = 1
    other = type(packed)(**{**vars(packed), "tokens": tokens})
    model = partial(toy_model, toy_variables())
    np.testing.assert_array_equal(score(model, packed)["logps"][:, 0], score(model, other)["logps"][:, 0])


def test_foreign_logits_give_the_same_log_probabilities():
    examples = ragged_examples(4, seed=6)
    _, _, padded = both_layouts(examples)
    variables = toy_variables()
    ours, theirs = (score(partial(model, variables), padded)["logps"] for model in (toy_model, toy_logits))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    with pytest.raises(ValueError, match="Prediction"):
        score(partial(toy_logits, variables), padded, statistics=("entropy",))


def test_statistics_stand_where_the_tokens_do():
    examples = ragged_examples(4, seed=7)
    _, packed, _ = both_layouts(examples)
    variables, other = toy_variables(0), toy_variables(1)
    policy, reference = partial(toy_model, variables), partial(toy_model, other)
    names = ("entropy", "collision", "kl", "reverse_kl")
    values = score(policy, packed, statistics=names, reference=reference)
    mask = np.asarray(completion_mask(packed)) > 0
    for e, example in enumerate(packed.weight.reshape(-1)):
        if not example:
            assert not any(np.asarray(values[name])[e].any() for name in names)
    logp = jax.nn.log_softmax(toy_logits(variables, packed.tokens, packed.positions, packed.subtree_end))
    logq = jax.nn.log_softmax(toy_logits(other, packed.tokens, packed.positions, packed.subtree_end))
    expected = {
        "entropy": -jnp.sum(jnp.exp(logp) * logp, -1),
        "collision": jnp.log(jnp.sum(jnp.exp(2 * logp), -1)),
        "kl": jnp.sum(jnp.exp(logq) * (logq - logp), -1),
        "reverse_kl": jnp.sum(jnp.exp(logp) * (logp - logq), -1),
    }
    slots = np.asarray(packed.slots)
    for name in names:
        by_row = np.take_along_axis(np.asarray(expected[name]), np.asarray(packed.source), 1)
        wanted = np.stack([by_row[r][np.maximum(slots[r], 0)] for r in range(len(slots))])
        wanted = wanted.reshape(-1, *slots.shape[2:])
        np.testing.assert_allclose(np.asarray(values[name])[mask], wanted[mask], atol=2e-5)
    np.testing.assert_allclose(values["reference_logps"], score(reference, packed)["logps"], atol=1e-6)


def test_unknown_statistics_are_named():
    with pytest.raises(ValueError, match="perplexity"):
        score(partial(toy_model, toy_variables()), both_layouts(ragged_examples(2))[1], statistics=("perplexity",))


def test_an_eos_with_the_id_of_padding_is_scored_like_any_token():
    """Rows are filled with id 0; a mask made by comparing ids with it would leave this EOS out."""
    end = np.zeros(1, np.int32)
    examples = [
        replace(e, completions=tuple(np.concatenate([c, end]) for c in e.completions))
        for e in ragged_examples(4, seed=8)
    ]
    dealt, packed, padded = both_layouts(examples)
    variables = toy_variables()
    counted = sum(len(c) for e in examples for c in e.completions)
    for batch in (packed, padded):
        assert float(completion_mask(batch).sum()) == counted
    logps = by_example(score(partial(toy_model, variables), packed)["logps"], packed, [id(e) for r in dealt for e in r])
    for example in examples:
        for k, expected in enumerate(logps_one_by_one(variables, example)):
            assert expected[-1] < -0.1
            np.testing.assert_allclose(logps[id(example)][k, len(expected) - 1], expected[-1], atol=1e-5)
