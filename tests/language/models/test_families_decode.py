"""Families with a cache and on trees: the numbers of whole rows."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from make_family_fixtures import FOLDER, WORDS
from test_decoder import jit, jitted_logits, padded_rows, tree_row

from dpo_jax.language.models.decoder import decoder_function, empty_cache, most_decoded
from dpo_jax.language.models.rope import in_long_trees
from dpo_jax.language.models.weights import load_hf

# Windows in all and in some layers, caps, two bases, partial rotation, learned positions, experts.
CACHED = ("qwen2_tied_window", "mistral", "gemma2", "gemma3", "phi", "gpt2", "qwen3_moe_renormalized")


@pytest.mark.parametrize("variant", CACHED)
def test_cache_gives_what_whole_rows_give(variant):
    config, variables = load_hf(FOLDER / variant)
    apply_fn, size, columns = decoder_function(config), 4, 20
    decode = jit(partial(apply_fn, method="decode"))
    tokens = np.random.default_rng(1).integers(0, WORDS, (2, 16)).astype(np.int32)
    whole = jit(apply_fn)(variables, *padded_rows(tokens, np.array([16, 16]))).hidden
    # The second row begins at column 3, as a prompt that is padded on the left.
    first = np.array([0, 3])
    cache, parts = empty_cache(config, 2, columns), []
    for start in range(0, 16, size):
        at = np.arange(start, start + size, dtype=np.int32)
        column = np.arange(columns)
        mask = (column >= first[:, None, None]) & (column <= (first[:, None] + at)[..., None])
        positions = np.broadcast_to(at, (2, size))
        answer, cache = decode(variables, tokens[:, at], positions, cache, jnp.asarray(first + start), mask)
        parts.append(answer.hidden)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=3e-5)


@pytest.mark.parametrize("variant", ["gemma2", "gpt2"])
def test_greedy_decoding_is_the_most_probable_word_of_whole_rows(variant):
    config, variables = load_hf(FOLDER / variant)
    apply_fn, new = decoder_function(config), 10
    rows = np.zeros((2, 16), np.int32)
    rows[:, :6] = np.random.default_rng(3).integers(0, WORDS, (2, 6))
    cache = empty_cache(config, 2, 16)

    def logits(answer):
        scores = answer.hidden[:, -1] @ answer.head.T + (0 if answer.bias is None else answer.bias)
        return scores if answer.softcap is None else answer.softcap * jnp.tanh(scores / answer.softcap)

    @jit
    def step(cache, tokens, at):
        mask = jnp.broadcast_to(jnp.arange(16) <= at[:, None], (2, len(at), 16))
        answer, cache = apply_fn(
            variables, tokens, jnp.broadcast_to(at, tokens.shape), cache, at[0], mask, method="decode"
        )
        return logits(answer), cache

    scores, cache = step(cache, rows[:, :6], np.arange(6))
    for place in range(6, 6 + new):
        rows[:, place] = np.argmax(scores, axis=-1)
        if place < 15:
            scores, cache = step(cache, rows[:, place : place + 1], np.array([place]))
    whole = jitted_logits(config, variables, *padded_rows(rows, np.array([16, 16])))
    np.testing.assert_array_equal(np.argmax(whole[:, 5:-1], axis=-1), rows[:, 6:])
    assert len(set(rows[:, 6:].flatten())) > 2


@pytest.mark.parametrize("variant", ["mistral", "gpt2"])
def test_each_path_of_a_tree_is_as_if_it_stood_alone(variant):
    (config, variables), (row, paths) = load_hf(FOLDER / variant), tree_row()
    together = jitted_logits(config, variables, *row)
    for columns, tokens in paths[1:]:
        alone = np.array(tokens, np.int32)[None]
        # As long as the tree, so that one program serves all.
        lone = np.zeros_like(row[0])
        lone[:, : alone.shape[1]] = alone
        separate = jitted_logits(config, variables, *padded_rows(lone, np.array([alone.shape[1]])))
        np.testing.assert_allclose(together[0, columns], separate[0, : len(columns)], atol=3e-5)


def test_each_tree_is_long_or_short_for_itself():
    # Three trees (the second with two completions, one of them long), then padding that counts on.
    positions = np.array([[0, 1, 2, 0, 1, 2, 3, 4, 5, 2, 3, 0, 1, 2, 3, 4, 5, 6]])
    ends = np.array([[3] * 3 + [11, 11, 9, 9, 9, 9, 11, 11] + [14] * 3 + [0] * 4])
    want = np.array([[False] * 3 + [True] * 8 + [False] * 7])
    np.testing.assert_array_equal(in_long_trees(jnp.asarray(positions), jnp.asarray(ends), 5), want)
    assert not np.any(in_long_trees(jnp.asarray(positions), jnp.asarray(ends), 6))


def test_longrope_is_the_same_alone_and_in_one_row():
    config, variables = load_hf(FOLDER / "phi3_longrope")
    assert config.rope.original_length == most_decoded(config) == 12
    draw = np.random.default_rng(2)
    # A long row and a short one behind each other in one row.
    lengths = (15, 6)
    parts = [draw.integers(0, WORDS, length).astype(np.int32) for length in lengths]
    tokens = np.concatenate(parts)[None]
    positions = np.concatenate([np.arange(length) for length in lengths])[None].astype(np.int32)
    ends = np.repeat(np.cumsum(lengths), lengths)[None].astype(np.int32)
    together = jitted_logits(config, variables, tokens, positions, ends)
    for part, begin in zip(parts, (0, 15)):
        padded = np.zeros_like(tokens)
        padded[:, : len(part)] = part
        alone = jitted_logits(config, variables, *padded_rows(padded, np.array([len(part)])))
        np.testing.assert_allclose(together[0, begin : begin + len(part)], alone[0, : len(part)], atol=3e-5)


def test_a_cache_answers_up_to_the_original_context_of_longrope():
    config, variables = load_hf(FOLDER / "phi3_longrope")
    decode = jit(partial(decoder_function(config), method="decode"))
    tokens = np.random.default_rng(1).integers(0, WORDS, (1, 13)).astype(np.int32)
    mask = np.tril(np.ones((13, 13), bool))[None]
    at = np.arange(13, dtype=np.int32)[None]
    answer, _ = decode(variables, tokens, at, empty_cache(config, 1, 13), jnp.int32(0), mask)
    whole = jit(decoder_function(config))(variables, *padded_rows(tokens, np.array([12]))).hidden
    np.testing.assert_allclose(answer.hidden[:, :12], whole[:, :12], atol=3e-5)
    assert np.all(np.isnan(answer.hidden[:, 12]))
