"""Step-DPO: the masked loss against float64 NumPy, and pairs of steps from solutions with a known mistake."""

import jax
import numpy as np
import pytest
from numeric import assert_formula, completions, float32, gradients, log_ratio, softplus

from dpo_jax.language.methods.dpo import dpo_loss
from dpo_jax.language.methods.step_dpo import (
    build_step_pairs,
    cut_eos,
    first_divergent_step,
    join_prefix,
    parse_step_verdict,
    split_steps,
    step_dpo_loss,
    step_mask,
    step_prefix,
)
from dpo_jax.worlds import digits

SOLUTION = "Step 1: 2 + 2 = 4.\nStep 2: 4 * 3 = 13.\nStep 3: The answer is 13."
PREFIX = "Step 1: 2 + 2 = 4.\nStep 2:"
DIGIT_STEP = r"(?:^|(?<=;))(?=\d)"  # steps of the digit world have no header, they begin where one ended


def pairs(seed=0):
    return completions(("chosen", "rejected"), reference=True, seed=seed)


def numpy_step_dpo(beta):
    return lambda a: softplus(-beta * (log_ratio(a, "chosen") - log_ratio(a, "rejected")))


@pytest.mark.parametrize("beta", [0.4, 2.0])
def test_value_and_gradient_follow_the_formula(beta):
    assert_formula(step_dpo_loss, numpy_step_dpo(beta), pairs(), beta=beta)


def test_a_step_that_is_the_completion_is_dpo():
    arrays = float32(pairs())
    np.testing.assert_array_equal(step_dpo_loss(**arrays, beta=0.4).loss, dpo_loss(**arrays, beta=0.4).loss)


def shared_opening(shared):
    """Pairs that share tokens 0 to 2; step 1 is the tokens from 3 on. `shared` says whether the masks hold both."""
    rng = np.random.default_rng(3)
    opening = {name: -rng.gamma(2.0, 0.8, (4, 3)) for name in ("policy", "reference")}
    arrays = {}
    for side in ("chosen", "rejected"):
        for name, common in opening.items():
            arrays[f"{name}_{side}_logps"] = np.concatenate([common, -rng.gamma(2.0, 0.8, (4, 3))], 1)
        arrays[f"{side}_mask"] = np.tile([float(shared)] * 3 + [1.0] * 3, (4, 1))
    return arrays


def test_shared_right_steps_may_stay_in_the_masks():
    step, both = shared_opening(shared=False), shared_opening(shared=True)
    losses = [step_dpo_loss(**float32(arrays)).loss for arrays in (step, both)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    got, whole = gradients(step_dpo_loss, step), gradients(step_dpo_loss, both)
    for side in ("chosen", "rejected"):
        name = f"policy_{side}_logps"
        assert (got[name][:, :3] == 0).all() and (got[name][:, 3:] != 0).all()
        np.testing.assert_allclose(whole[name][:, 3:], got[name][:, 3:], rtol=1e-5)
    # Each shared token gets opposite gradients in the two rows, so that parameters see none of it.
    common = whole["policy_chosen_logps"][:, :3] + whole["policy_rejected_logps"][:, :3]
    np.testing.assert_allclose(common, 0, atol=1e-6)


def test_only_the_difference_of_the_log_ratios_counts():
    arrays = pairs()
    shifted = {**arrays}
    for side in ("chosen", "rejected"):
        first = np.arange(arrays[f"{side}_mask"].shape[1]) == 0
        shifted[f"policy_{side}_logps"] = arrays[f"policy_{side}_logps"] + 3.0 * first
    before, after = (step_dpo_loss(**float32(a)).loss for a in (arrays, shifted))
    np.testing.assert_allclose(before, after, rtol=1e-4)


def test_step_mask():
    ids = np.array([[0, 0, 1, 2, -1], [0, 1, 1, -1, -1], [0, 0, 0, -1, -1], [0, 1, 2, -1, -1]])
    mask = jax.jit(step_mask)(ids, np.array([1, 1, 1, -1]))
    np.testing.assert_array_equal(mask, [[0, 0, 1, 0, 0], [0, 1, 1, 0, 0], [0] * 5, [0] * 5])
    assert mask.dtype == np.float32


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        (SOLUTION, [(1, " 2 + 2 = 4."), (2, " 4 * 3 = 13."), (3, " The answer is 13.")]),
        ("Well.\nStep 1: a\nb \n\nStep 2:", [(1, " a\nb"), (2, "")]),
        ("Step 1: by Step 2: of the book\nStep 2: x", [(1, " by Step 2: of the book"), (2, " x")]),
        ("Step 1: a\nStep 1: again\nStep 3: skips\nStep 2: b", [(1, " a\nStep 1: again\nStep 3: skips"), (2, " b")]),
        ("no steps", []),
        ("", []),
    ],
)
def test_split_steps(text, steps):
    assert split_steps(text) == steps


def test_steps_make_up_the_text():
    assert "\n".join(f"Step {k}:{body}" for k, body in split_steps(SOLUTION)) == SOLUTION


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("Step 1 is fine.\n**Final Decision**:\nStep 1: correct; Step 2: correct;\nStep 3: Incorrect; ", 3),
        ("Final decision: step 1: neutral; step 2: incorrect", 1),
        ("Final decision: step 1: incorrect\n... Final decision: step 1: correct; step 12 : incorrect", 12),
        ("Summary decision: step 2: incorrect", 2),
        ("Final decision: step 1: correct; step 2: correct", None),
        ("Final decision: step 1 and step 2: incorrect", None),
        ("Final decision: incorrect", None),
        ("Final decision: step two: incorrect", None),
        ("step 1: incorrect", None),
        ("", None),
    ],
)
def test_parse_step_verdict(text, step):
    assert parse_step_verdict(text) == step


def test_pairs_of_steps_by_hand():
    continuations = [
        " 4 * 3 = 12.\nStep 3: The answer is 12.",
        " 4 * 3 = 12.\nStep 3: So it is 12.",  # the same step once more
        " 4 * 3 = 13.\nStep 3: No, 12.",  # the wrong step itself, although the answer came out right
        " 3 * 4 = 12, the answer.",
        " 4 * 3 = 14.",  # judged wrong
        "\nStep 3: The answer is 12.",  # an empty step
    ]
    rows = build_step_pairs("Q?", SOLUTION, 2, continuations, [True, True, True, True, False, True])
    assert [row["chosen"] for row in rows] == [" 4 * 3 = 12.", " 3 * 4 = 12, the answer."]
    assert [(row["chosen_is_last"], row["rejected_is_last"]) for row in rows] == [(0, 0), (1, 0)]
    for row in rows:
        assert (row["prompt"], row["prefix"], row["rejected"]) == ("Q?", PREFIX, " 4 * 3 = 13.")
        assert row["full_chosen"].startswith(row["prefix"] + row["chosen"]) and row["full_rejected"] == SOLUTION
        assert row["step_number"] == 2


def test_pairs_of_steps_in_the_digit_world():
    rng = np.random.default_rng(0)
    built = 0
    for prompt in digits.make_prompts(40, seed=1):
        chain = digits.noisy_solution(prompt, 0.3, rng)
        error = digits.judge(prompt, chain).first_error_step
        if error is None:
            continue
        right = digits.solve(prompt)
        prefix = step_prefix(chain, error + 1, step_pattern=DIGIT_STEP)
        rows = build_step_pairs(prompt, chain, error + 1, [right[len(prefix) :]], [True], step_pattern=DIGIT_STEP)
        (row,) = rows
        assert len(split_steps(row["prefix"], step_pattern=DIGIT_STEP)) == error
        assert row["prefix"] + row["chosen"] == right[: 3 * (error + 1)] and row["chosen"] != row["rejected"]
        assert row["chosen_is_last"] == row["rejected_is_last"] == (error == digits.STEPS - 1)
        built += 1
    assert built > 20


@pytest.mark.parametrize("step", [0, 4])
def test_there_must_be_such_a_step(step):
    with pytest.raises(ValueError, match=f"error_step is {step}.*1 to 3"):
        build_step_pairs("Q?", SOLUTION, step, [], [])
    with pytest.raises(ValueError, match=f"step is {step}.*1 to 3"):
        step_prefix(SOLUTION, step)


def test_each_continuation_needs_a_verdict():
    with pytest.raises(ValueError, match="2 continuations with 1 verdicts"):
        build_step_pairs("Q?", SOLUTION, 2, ["a", "b"], [True])


@pytest.mark.parametrize("name", ["prefix", "initial_reason_steps"])
def test_prefix_joins_the_prompt(name):
    row = {"prompt": "Q?\n", name: PREFIX, "chosen": "a", "rejected": "b", "answer": 12}
    assert join_prefix(row) == {"prompt": "Q?\n" + PREFIX, "chosen": "a", "rejected": "b", "answer": 12}


@pytest.mark.parametrize("row", [{"prompt": "Q?"}, {"prompt": [{"role": "user", "content": "Q?"}], "prefix": "a"}])
def test_prefix_needs_a_text_prompt(row):
    with pytest.raises(ValueError, match="a text prompt and a prefix"):
        join_prefix(row)


def test_an_inner_step_ends_without_eos():
    step = np.array([7, 8, 2])
    np.testing.assert_array_equal(cut_eos(step, False, eos=2), [7, 8])
    np.testing.assert_array_equal(cut_eos(step, True, eos=2), step)
    np.testing.assert_array_equal(cut_eos(step[:2], False, eos=2), [7, 8])


@pytest.mark.parametrize(
    ("tokens", "step_ids", "step"),
    [
        ([5, 6, 7, 8, 9], [0, 0, 1, 1, 2], None),
        ([5, 6, 7, 4, 9], [0, 0, 1, 1, 2], 1),
        ([5, 6, 7, 8], [0, 0, 1, 1], 2),  # the last step is missing
        ([5, 6, 7, 8, 9], [0, 1, 1, 1, 2], 0),  # the same tokens, cut otherwise
        ([5, 6, 7, 8, 9, 3], [0, 0, 1, 1, 2, -1], None),  # a token outside of all steps
        ([], [], 0),
    ],
)
def test_first_divergent_step(tokens, step_ids, step):
    other = np.array([5, 6, 7, 8, 9]), np.array([0, 0, 1, 1, 2])
    arrays = np.array(tokens, int), np.array(step_ids, int)
    assert first_divergent_step(*arrays, *other) == first_divergent_step(*other, *arrays) == step
