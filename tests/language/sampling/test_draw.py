"""The model-free sampler on tables: frequencies, ends, log-probs, independence of neighbours."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.language.sampling.draw import draw_steps, start_rows
from dpo_jax.language.sampling.engine import prompt_keys
from dpo_jax.language.sampling.filters import GREEDY, Sampling, filtered_logps

# Next words by last word; five words.
TABLE = np.log(np.random.default_rng(0).dirichlet(np.ones(5), size=5)).astype(np.float32) + 1.5


def markov(tokens, state):
    return jnp.asarray(TABLE)[tokens], state


def counting(tokens, state):
    """Most probable is the number of steps so far, whatever the tokens."""
    return jax.nn.one_hot(state, 9) * 5, state + 1


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def draw(step_fn, count, *, key=0, start=0, state=(), seen=None, **options):
    rows = start_rows(state, jnp.full(count, start, jnp.int32), prompt_keys(jax.random.key(key), count), seen)
    return jax.device_get(jax.jit(partial(draw_steps, step_fn, **options))(rows))


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.5), Sampling(temperature=2.0, top_k=3), Sampling(top_p=0.8)]
)
def test_frequencies_are_those_of_the_filtered_model(sampling):
    count, steps = 3000, 3
    _, drawn = draw(markov, count, steps=steps, limit=steps, sampling=sampling, key=7)
    before = np.concatenate([np.zeros((count, 1), int), drawn.tokens[:, :-1]], axis=1)
    chances = np.asarray(np.exp(filtered_logps(jnp.asarray(TABLE), sampling)), np.float64)
    statistic, freedom = 0.0, 0
    for word in range(5):
        after = drawn.tokens[before == word]
        got, want = np.bincount(after, minlength=5), chances[word] * len(after)
        assert not got[chances[word] == 0].any()
        possible = want > 0
        statistic += np.sum((got - want)[possible] ** 2 / want[possible])
        freedom += max(possible.sum() - 1, 0) * (len(after) > 0)
    # Five standard deviations of chi-square above its mean.
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)
    # Both log-probs: the model's own, and those that were drawn from.
    np.testing.assert_allclose(drawn.logps[:, 0], log_softmax(TABLE)[before, drawn.tokens], atol=1e-5)
    np.testing.assert_allclose(np.exp(drawn.drawn_logps), chances[before, drawn.tokens], atol=1e-5)


def test_the_sampler_sees_the_words_it_drew():
    assert np.array_equal(
        draw(counting, 2, state=jnp.zeros(2, int), steps=4, limit=9, sampling=GREEDY)[1].tokens[0], range(4)
    )


def test_rows_end_at_stop_tokens_or_at_the_limit_and_stay_ended():
    options = {"state": jnp.array([0, 3, 6]), "stop_tokens": (4, 8), "sampling": GREEDY, "pad": 1}
    rows, drawn = draw(counting, 3, steps=5, limit=4, **options)
    np.testing.assert_array_equal(drawn.tokens, [[0, 1, 2, 3, 1], [3, 4, 1, 1, 1], [6, 7, 8, 1, 1]])
    np.testing.assert_array_equal(drawn.mask.sum(1), [4, 2, 3])
    assert rows.done.all() and np.array_equal(rows.drawn, [4, 2, 3])
    assert not drawn.logps[:, 0][drawn.mask == 0].any() and not drawn.drawn_logps[drawn.mask == 0].any()


def test_two_scans_are_one():
    options = {"limit": 6, "stop_tokens": (4,), "sampling": Sampling()}
    whole = draw(markov, 20, steps=6, **options)[1]
    rows = start_rows((), jnp.zeros(20, jnp.int32), prompt_keys(jax.random.key(0), 20))
    parts = []
    for steps in (2, 4):
        rows, drawn = draw_steps(markov, rows, steps=steps, **options)
        parts.append(drawn)
    for a, b, both in zip(*parts, whole):
        np.testing.assert_allclose(np.concatenate([a, b], axis=-1), both, atol=1e-6)


def test_a_row_depends_on_its_own_key_only():
    many = draw(markov, 30, steps=5, limit=5)[1].tokens
    np.testing.assert_array_equal(draw(markov, 3, steps=5, limit=5)[1].tokens, many[:3])
    assert len(np.unique(many, axis=0)) > 10  # and keys differ
    assert not np.array_equal(draw(markov, 30, steps=5, limit=5, key=1)[1].tokens, many)


def test_a_repetition_penalty_reaches_words_of_the_prompt_and_drawn_ones():
    def level(tokens, state):
        return jnp.tile(jnp.array([3.0, 2.9, 2.8, 2.7]), (len(tokens), 1)), state

    seen = jnp.array([[True, False, False, False], [False, True, False, False]])
    sampling = Sampling(temperature=0.0, repetition_penalty=2.0)
    tokens = draw(level, 2, seen=seen, steps=4, limit=4, sampling=sampling)[1].tokens
    np.testing.assert_array_equal(tokens, [[1, 2, 3, 0], [0, 2, 3, 0]])


def test_models_in_lock_step_score_what_the_first_draws():
    other = jnp.asarray(TABLE[::-1])

    def both(tokens, state):
        return jnp.stack([jnp.asarray(TABLE)[tokens], other[tokens]], axis=1), state

    alone, together = (draw(step, 50, steps=4, limit=4)[1] for step in (markov, both))
    np.testing.assert_array_equal(alone.tokens, together.tokens)
    before = np.concatenate([np.zeros((50, 1), int), alone.tokens[:, :-1]], axis=1)
    np.testing.assert_allclose(together.logps[:, 1], log_softmax(TABLE[::-1])[before, alone.tokens], atol=1e-5)
