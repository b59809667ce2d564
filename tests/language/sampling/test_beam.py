"""Beam search on tables against all sequences by hand, and on a decoder against scoring passes."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.language.sampling.beam import beam_search, gnmt_penalty, implicit_value, length_power

WORDS, DEPTH, STOP = 4, 4, 3
PREFIXES = 3 ** (DEPTH - 1) * WORDS  # continuations of all prefixes that have not ended, one before the limit


def tables(seed, *, spread=1.0):
    """Log-probs of the next word after each prefix, [WORDS] * (t + 1) at depth t."""
    rng = np.random.default_rng(seed)
    logits = [spread * rng.normal(size=(WORDS,) * (t + 1)) for t in range(DEPTH)]
    return [x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logits]


def tree_step(*models):
    """Step function of policies on prefixes; the state is the prefix so far [N, DEPTH] and its length [N]."""

    def step(tokens, state):
        prefix, length = state
        prefix = jnp.where(jnp.arange(DEPTH) == length[:, None] - 1, tokens[:, None], prefix)

        def logits(tables):
            at = [
                jnp.asarray(table, jnp.float32)[tuple(prefix[:, i] for i in range(t))] for t, table in enumerate(tables)
            ]
            at[0] = jnp.broadcast_to(at[0], (len(tokens), WORDS))
            return jnp.select([(length == t)[:, None] for t in range(DEPTH)], at)

        answers = [logits(tables) for tables in models]
        return (jnp.stack(answers, 1) if len(models) > 1 else answers[0]), (prefix, length + 1)

    return step


POWERS = {alpha: length_power(alpha) for alpha in (0.0, 0.8, 1.0)}
GNMT, VALUE = gnmt_penalty(0.6), implicit_value(0.3)
STATIC = ("width", "limit", "stop_tokens", "token_scores", "normaliser")


@partial(jax.jit, static_argnames=STATIC)
def searched(models, groups, **options):
    state = (jnp.zeros((len(groups), DEPTH), jnp.int32), jnp.zeros_like(groups))
    return beam_search(tree_step(*models), state, groups, pad=9, **options)


def run(models, groups=1, **options):
    options = {"limit": DEPTH, "stop_tokens": (STOP,), **options}
    models = [[np.asarray(table, np.float32) for table in tables] for tables in models]
    return jax.device_get(searched(models, np.zeros(groups, np.int32), **options))


def all_finished(score, normaliser):
    """(score, tokens) of every sequence that ends in the stop word within the limit, best first."""
    found = []
    for size in range(DEPTH):
        for body in itertools.product(range(STOP), repeat=size):
            words = (*body, STOP)
            found.append((sum(score(words[:t], words[t]) for t in range(len(words))) / normaliser(len(words)), words))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("normaliser", "same"),
    [(None, lambda n: 1), (POWERS[1.0], lambda n: n), (GNMT, lambda n: ((5 + n) / 6) ** 0.6)],
)
def test_a_wide_beam_finds_the_most_likely_sequences(seed, normaliser, same):
    policy = tables(seed)
    want = all_finished(lambda prefix, word: policy[len(prefix)][(*prefix, word)], same)
    got = run([policy], width=PREFIXES, normaliser=normaliser)
    assert got.finished[0, : len(want)].all() and not got.finished[0, len(want) :].any()
    np.testing.assert_allclose(got.scores[0, : len(want)], [score for score, _ in want], atol=1e-5)
    assert np.isneginf(got.scores[0, len(want) :]).all() and not got.lengths[0, len(want) :].any()
    for tokens, length, (_, words) in zip(got.tokens[0], got.lengths[0], want):
        assert tuple(tokens[:length]) == words and (tokens[length:] == 9).all()


@pytest.mark.parametrize("seed", range(4))
def test_a_wide_beam_by_implicit_value_is_the_search_by_hand(seed):
    policy, reference = tables(seed), tables(seed + 10)
    beta = 0.3

    def value(prefix, word):
        return beta * (policy[len(prefix)][(*prefix, word)] - reference[len(prefix)][(*prefix, word)])

    want = all_finished(value, lambda n: 1)
    got = run([policy, reference], width=PREFIXES, token_scores=VALUE)
    np.testing.assert_allclose(got.scores[0, : len(want)], [score for score, _ in want], atol=1e-5)
    assert tuple(got.tokens[0, 0, : got.lengths[0, 0]]) == want[0][1]
    # The sums of both models give the value again.
    there = got.finished[0]
    np.testing.assert_allclose(
        beta * (got.logps[0, there, 0] - got.logps[0, there, 1]), got.scores[0, there], atol=1e-5
    )


def by_hand(policy, width, normaliser):
    """The stated rule with lists, and without ever stopping early."""
    live, finished = [(0.0, ())], []
    for count in range(1, DEPTH + 1):
        continuations = sorted(
            ((s + policy[count - 1][(*p, w)], (*p, w)) for s, p in live for w in range(WORDS)), key=lambda c: -c[0]
        )
        finished += [(s / normaliser(count), p) for s, p in continuations[:width] if p[-1] == STOP]
        finished = sorted(finished, key=lambda f: -f[0])[:width]
        live = [c for c in continuations if c[1][-1] != STOP][:width]
    return finished or [(s / normaliser(DEPTH), p) for s, p in live]


@pytest.mark.parametrize("width", [1, 2, 3])
def test_narrow_beams_follow_the_rule_and_stopping_early_loses_nothing(width):
    for alpha in (0.0, 0.8):
        for seed in range(12):
            policy = tables(seed, spread=1.5)
            want = by_hand(policy, width, lambda n, alpha=alpha: n**alpha)
            search = run([policy], width=width, normaliser=POWERS[alpha])
            np.testing.assert_allclose(search.scores[0, : len(want)], [score for score, _ in want], atol=1e-5)
            for tokens, length, (_, words) in zip(search.tokens[0], search.lengths[0], want):
                assert tuple(tokens[:length]) == words


def test_one_beam_is_greedy():
    for seed in range(12):
        policy, words = tables(seed), ()
        while len(words) < DEPTH and words[-1:] != (STOP,):
            words += (int(policy[len(words)][words].argmax()),)
        got = run([policy], width=1)
        assert tuple(got.tokens[0, 0, : got.lengths[0, 0]]) == words
        assert got.finished[0, 0] == (words[-1] == STOP)


def test_two_beams_leave_the_garden_path():
    """Greedy takes 0.6, then nothing above 0.3 (0.18 in all); the second beam finds 0.4 * 0.9."""
    first = np.log([0.6, 0.4, 1e-9, 1e-9])
    second = np.log(np.array([[0.3, 0.2, 0.2, 0.3], [0.03, 0.03, 0.04, 0.9], [0.25] * 4, [0.25] * 4]))
    policy = [first, second, *[np.full((WORDS,) * t, np.log(0.25)) for t in (3, 4)]]
    narrow, wide = (run([policy], width=width, limit=2) for width in (1, 2))
    assert np.exp(narrow.scores[0, 0]) == pytest.approx(0.18, abs=1e-5)
    assert np.exp(wide.scores[0, 0]) == pytest.approx(0.36, abs=1e-5) and tuple(wide.tokens[0, 0]) == (1, STOP)


def test_groups_do_not_touch_each_other_and_no_dead_beam_is_finished():
    policy = tables(3)
    one, three = run([policy], width=5), run([policy], groups=3, width=5)
    for lone, together in zip(one, three):
        for group in together:
            np.testing.assert_array_equal(lone[0], group)
    assert not three.finished[np.isneginf(three.scores)].any()
    assert (np.diff(three.scores, axis=1) <= 0)[np.isfinite(three.scores[:, 1:])].all()


def test_several_stop_words_and_none():
    policy = tables(1)
    several = run([policy], width=2, stop_tokens=(2, 3))
    ends = [several.tokens[0, i, several.lengths[0, i] - 1] for i in range(2) if several.finished[0, i]]
    assert ends and set(map(int, ends)) <= {2, 3}
    none = run([policy], width=300, stop_tokens=())
    assert not none.finished.any() and (none.lengths[0, : WORDS**DEPTH] == DEPTH).all()
    probabilities = np.exp(none.scores[0, : WORDS**DEPTH])
    assert probabilities.sum() == pytest.approx(1, abs=1e-4)


def test_wrong_use_is_refused():
    for options, said in (({"width": 0}, "width is 0"), ({"width": 1, "limit": 0}, "limit is 0")):
        with pytest.raises(ValueError, match=said):
            run([tables(0)], **options)
    for make, number, said in (
        (implicit_value, 0.0, "beta"),
        (length_power, -1.0, "alpha"),
        (gnmt_penalty, -1.0, "alpha"),
    ):
        with pytest.raises(ValueError, match=said):
            make(number)
