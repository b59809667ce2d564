"""Curry-DPO: pairs from ratings, stages from easy to hard, and what an iterated reference does to DPO."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.language.methods.curry_dpo import (
    all_preference_pairs,
    curriculum_stages,
    pooled_stages,
    preference_pairs,
    run_stages,
)
from dpo_jax.language.methods.dpo import dpo_loss

LOG2 = np.log(2.0)


def random_ratings(seed=0, prompts=25):
    """Ratings 1 to 5 of 0 to 5 responses per prompt, with many ties."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 6, rng.integers(0, 6)).astype(float).tolist() for _ in range(prompts)]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([3.0, 5.0, 1.0, 4.0], [(1, 2, 4.0), (1, 0, 2.0), (1, 3, 1.0)]),
        ([4.0, 4.0, 2.0, 2.0], [(0, 2, 2.0), (0, 3, 2.0)]),
        ([2.0, 2.0], []),
        ([1.0], []),
        ([], []),
    ],
)
def test_best_against_the_rest_by_hand(scores, expected):
    assert preference_pairs(scores) == expected


def test_all_pairs_by_hand():
    expected = [(0, 1, 3.0), (0, 2, 2.0), (3, 1, 2.0), (0, 3, 1.0), (2, 1, 1.0), (3, 2, 1.0)]
    assert all_preference_pairs([4.0, 1.0, 2.0, 3.0]) == expected
    assert all_preference_pairs([2.0, 2.0]) == []


@pytest.mark.parametrize("make", [preference_pairs, all_preference_pairs])
def test_pairs_hold_what_they_promise(make):
    for scores in random_ratings():
        pairs = make(scores)
        assert len({(p.chosen, p.rejected) for p in pairs}) == len(pairs)
        assert all(p.gap == scores[p.chosen] - scores[p.rejected] > 0 for p in pairs)
        assert all(a.gap >= b.gap for a, b in pairwise(pairs))
        if make is preference_pairs:
            assert all(scores[p.chosen] == max(scores) for p in pairs)
        else:
            assert len(pairs) == sum(a > b for a in scores for b in scores)


@pytest.mark.parametrize("make", [preference_pairs, all_preference_pairs])
def test_ratings_must_be_finite(make):
    with pytest.raises(ValueError, match="response 1 is nan"):
        make([1.0, float("nan")])


def test_each_stage_takes_one_pair_of_each_prompt():
    ratings = random_ratings()
    pairs = [preference_pairs(scores) for scores in ratings]
    stages = curriculum_stages([own[::-1] for own in pairs], num_stages=4)  # sorted again by the stages
    assert sorted(p for stage in stages for p in stage) == sorted(
        (n, p.chosen, p.rejected) for n, own in enumerate(pairs) for p in own
    )
    for stage in stages:
        assert len({p.prompt for p in stage}) == len(stage)
    assert [len(stage) for stage in stages] == [sum(len(own) > i for own in pairs) for i in range(4)]
    for easy, hard in pairwise(stages):
        gap = {p.prompt: ratings[p.prompt][p.chosen] - ratings[p.prompt][p.rejected] for p in easy}
        assert all(gap[p.prompt] >= ratings[p.prompt][p.chosen] - ratings[p.prompt][p.rejected] for p in hard)


def test_one_stage_is_the_best_and_the_worst():
    pairs = [preference_pairs([3.0, 5.0, 1.0, 4.0]), [], preference_pairs([1.0, 2.0])]
    assert curriculum_stages(pairs, num_stages=1) == [[(0, 1, 2), (2, 1, 0)]]


@pytest.mark.parametrize("num_stages", [1, 3, 7, 200])
def test_pooled_stages_are_equal_and_sorted(num_stages):
    ratings = random_ratings()
    pairs = [preference_pairs(scores) for scores in ratings]
    stages = pooled_stages(pairs, num_stages=num_stages)
    sizes = [len(stage) for stage in stages]
    assert len(stages) == num_stages and sum(sizes) == sum(map(len, pairs)) and max(sizes) - min(sizes) <= 1
    assert len({p for stage in stages for p in stage}) == sum(sizes)
    gaps = [[ratings[p.prompt][p.chosen] - ratings[p.prompt][p.rejected] for p in stage] for stage in stages]
    assert all(min(easy) >= max(hard) for easy, hard in pairwise(gaps) if easy and hard)


def test_another_easiness_in_the_place_of_the_gap():
    pairs = [[p._replace(gap=-p.gap) for p in preference_pairs([3.0, 5.0, 1.0])]]
    assert pooled_stages(pairs, num_stages=2) == [[(0, 1, 0)], [(0, 1, 2)]]
    assert curriculum_stages(pairs, num_stages=2) == [[(0, 1, 0)], [(0, 1, 2)]]


@pytest.mark.parametrize("make", [curriculum_stages, pooled_stages])
def test_there_is_at_least_one_stage(make):
    with pytest.raises(ValueError, match="num_stages is 0"):
        make([], num_stages=0)


# Training: 6 prompts, 4 responses, a tabular softmax policy; the "completion" is one token.

RATINGS = np.array([[4.0, 3.0, 2.0, 1.0]] * 6)


def loss_of(logits, reference, index):
    """Mean DPO loss of pairs [B, 3] under a table of logits [6, 4]."""
    arrays = {f"{side}_mask": jnp.ones((len(index), 1)) for side in ("chosen", "rejected")}
    for name, table in (("policy", logits), ("reference", reference)):
        logps = jax.nn.log_softmax(table)[index[:, :1], index[:, 1:]]  # [B, 2]
        arrays |= {f"{name}_{side}_logps": logps[:, i : i + 1] for i, side in enumerate(("chosen", "rejected"))}
    return dpo_loss(**arrays, beta=0.5).loss.mean()


@jax.jit
def descend(logits, reference, index):
    first = loss_of(logits, reference, index)
    return logits - 2.0 * jax.grad(loss_of)(logits, reference, index), first


def train_stage(logits, reference, stage):
    losses, index = [], jnp.array(stage)
    for _ in range(5):
        logits, loss = descend(logits, reference, index)
        losses.append(float(loss))
    return logits, (losses[0], reference)


def run(stages, **options):
    start = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
    return start, *run_stages(train_stage, start, stages, **options)


STAGES = curriculum_stages([preference_pairs(row) for row in RATINGS.tolist()], num_stages=3)


def test_stages_begin_at_log_two_and_their_log_ratios_add_up():
    start, end, history = run(STAGES)
    np.testing.assert_allclose([first for first, _ in history], LOG2, rtol=1e-6)
    models = [jax.nn.log_softmax(table) for table in (*[reference for _, reference in history], end)]
    np.testing.assert_array_equal(history[0][1], start)
    total = sum(after - before for before, after in pairwise(models))
    np.testing.assert_allclose(total, models[-1] - models[0], atol=1e-5)


def test_a_fixed_reference_does_not_begin_anew():
    start = run(STAGES)[0]
    _, _, history = run(STAGES, reference=start)
    assert history[0][0] == pytest.approx(LOG2, rel=1e-6) and all(first < LOG2 - 0.01 for first, _ in history[1:])


def test_stages_of_a_tabular_policy_commute_with_an_iterated_reference_only():
    there, back = run(STAGES), run(STAGES[::-1])
    np.testing.assert_allclose(there[1], back[1], atol=1e-5)
    fixed, fixed_back = (run(stages, reference=there[0])[1] for stages in (STAGES, STAGES[::-1]))
    assert np.abs(np.asarray(fixed - fixed_back)).max() > 0.01


def test_order_within_a_stage_does_not_matter_to_a_full_batch():
    table = jnp.asarray(np.random.default_rng(1).normal(size=(6, 4)), jnp.float32)
    reference = jnp.zeros((6, 4))
    gradients = [descend(table, reference, jnp.array(stage))[0] for stage in (STAGES[0], STAGES[0][::-1])]
    np.testing.assert_allclose(*gradients, atol=1e-6)


def test_the_reference_survives_donated_parameters():
    def donate(params, reference, stage):
        after = jax.jit(lambda p: jax.tree.map(lambda x: x + stage, p), donate_argnums=0)(params)
        return after, reference

    end, history = run_stages(donate, {"w": jnp.ones(3)}, [1.0, 10.0])
    np.testing.assert_array_equal(end["w"], [12.0] * 3)
    np.testing.assert_array_equal([r["w"] for r in history], [[1.0] * 3, [2.0] * 3])


def test_no_stages_change_nothing():
    assert run_stages(train_stage, {"w": 1}, []) == ({"w": 1}, [])
