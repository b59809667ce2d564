"""Beam search over a decoder: greedy at width one, log-probs of a scoring pass, batches and meshes change nothing."""

from functools import cache

import jax
import numpy as np
import pytest
from tiny_decoder import EOS, MODEL, PROMPTS, score_alone, weights

from dpo_jax.language.sampling.beam import implicit_value
from dpo_jax.language.sampling.engine import generate, make_engine, prompt_keys
from dpo_jax.language.sampling.filters import GREEDY
from dpo_jax.language.sampling.search import make_searcher, search
from dpo_jax.sharding import make_mesh

NEW, BETA = 6, 0.5
SHORT = PROMPTS[:6]


@cache
def searcher(models=1, **options):
    options = {"width": 4, "new_tokens": NEW, "stop_tokens": (EOS,), "groups": 4, **options}
    return make_searcher([MODEL] * models, **options)


@pytest.fixture(scope="module")
def found():
    return search(searcher(), (weights(1),), SHORT)


def test_one_beam_is_greedy():
    used = make_engine([MODEL], new_tokens=NEW, stop_tokens=(EOS,), rows=4, prefill_rows=4, sampling=GREEDY)
    greedy = generate(used, (weights(1),), SHORT, prompt_keys(jax.random.key(0), len(SHORT)))
    for (best,), (want,) in zip(search(searcher(width=1), (weights(1),), SHORT), greedy, strict=True):
        np.testing.assert_array_equal(best.tokens, want.tokens)
        assert best.score == pytest.approx(want.logps.sum(), abs=1e-4) and best.ended == want.ended


def test_scores_are_those_of_a_scoring_pass(found):
    for prompt, several in zip(SHORT, found, strict=True):
        assert 1 <= len(several) <= 4
        assert [one.score for one in several] == sorted((one.score for one in several), reverse=True)
        for one in several:
            assert one.ended == (one.tokens[-1] == EOS)
            assert one.score == pytest.approx(score_alone(1, prompt, one.tokens).sum(), abs=1e-4)
            assert one.logps[0] == pytest.approx(one.score, abs=1e-5)


def test_by_implicit_value_both_models_score_what_is_found():
    pair = searcher(2, token_scores=implicit_value(BETA))
    for prompt, several in zip(SHORT, search(pair, (weights(1), weights(2)), SHORT)):
        for one in several:
            policy, reference = (score_alone(seed, prompt, one.tokens).sum() for seed in (1, 2))
            np.testing.assert_allclose(one.logps, [policy, reference], atol=1e-4)
            assert one.score == pytest.approx(BETA * (policy - reference), abs=1e-4)


def test_a_policy_equal_to_its_reference_finds_no_value():
    pair = searcher(2, token_scores=implicit_value(BETA))
    for several in search(pair, (weights(1), weights(1)), SHORT[:2]):
        assert all(one.score == 0 for one in several)


def test_neighbours_and_eight_devices_change_nothing(found):
    alone = search(searcher(), (weights(1),), SHORT[3:4])
    spread = search(searcher(mesh=make_mesh(data=2, fsdp=2, model=2)), (weights(1),), SHORT)
    for got, want in [(alone[0], found[3]), *zip(spread, found, strict=True)]:
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a.tokens, b.tokens)
            assert a.score == pytest.approx(b.score, abs=1e-4)


def test_wrong_use_is_refused():
    with pytest.raises(ValueError, match="multiple of 8"):
        searcher(mesh=make_mesh())
    with pytest.raises(ValueError, match=r"\[0\] are empty"):
        search(searcher(), (weights(1),), [PROMPTS[0][:0]])
