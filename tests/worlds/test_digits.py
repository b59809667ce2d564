"""The digit world: right chains, exact verdicts, tokens that come back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_jax.language.data.rows import check_rows
from dpo_jax.worlds import digits

PROMPTS = st.text("0123456789", min_size=6, max_size=6)


def test_the_example_of_the_docstring():
    assert digits.solve("314159") == "14;48;19;54;93;"


@given(PROMPTS)
def test_right_chain_is_judged_right(prompt):
    verdict = digits.judge(prompt, digits.solve(prompt))
    assert verdict == (True, None, (1.0,) * digits.STEPS)


@given(PROMPTS, st.integers(0, 2**31))
def test_first_error_is_the_first_place_that_differs_from_the_right_chain(prompt, seed):
    chain = digits.noisy_solution(prompt, 0.4, np.random.default_rng(seed))
    right, verdict = digits.solve(prompt), digits.judge(prompt, chain)
    differing = [i for i in range(digits.STEPS) if chain[3 * i : 3 * i + 3] != right[3 * i : 3 * i + 3]]
    assert verdict.first_error_step == (differing[0] if differing else None)
    assert verdict.final_correct == (chain[-2] == right[-2])


@given(PROMPTS, st.text("0123456789;?x ", max_size=20))
def test_judge_takes_any_text(prompt, chain):
    verdict = digits.judge(prompt, chain)
    assert verdict.final_correct in (True, False)
    if chain == digits.solve(prompt):
        assert verdict.final_correct
    elif verdict.first_error_step is None:
        pytest.fail(f"{chain} is not the right chain of {prompt} and no error was found")


def test_noise_sets_the_share_of_right_answers():
    random = np.random.default_rng(0)
    prompts = digits.make_prompts(4000, 1)
    right = [
        digits.judge(p, digits.noisy_solution(p, digits.STEP_NOISE, random)).first_error_step is None for p in prompts
    ]
    assert np.mean(right) == pytest.approx((1 - digits.STEP_NOISE) ** digits.STEPS, abs=0.03)


@given(PROMPTS)
def test_tokens_come_back(prompt):
    chain = digits.solve(prompt)
    ids = digits.completion_ids(chain)
    assert len(ids) == digits.COMPLETION_LENGTH and digits.decode(ids) == chain
    assert digits.decode(digits.prompt_ids(prompt)[1:]) == prompt


def test_unknown_characters_are_named():
    with pytest.raises(ValueError, match="'x'"):
        digits.encode("1x")


def test_tokenizer_agrees_with_the_worlds_own_ids(tmp_path):
    tokenizer = digits.make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again("314159")["input_ids"], digits.prompt_ids("314159"))
    np.testing.assert_array_equal(again("14;48;", add_special_tokens=False)["input_ids"], digits.encode("14;48;"))
    assert again.decode(digits.encode("14;48;")) == "14;48;"
    assert (again.eos_token_id, again.pad_token_id) == (digits.EOS, digits.PAD)


@pytest.mark.parametrize("form", ["pairs", "triples", "singles", "lists"])
def test_rows_are_of_their_form_and_in_order(form):
    rows = digits.make_rows(form, 30, seed=1)
    assert rows == digits.make_rows(form, 30, seed=1) != digits.make_rows(form, 30, seed=2)
    read = check_rows(rows).rows
    assert {row.form for row in read} == {form}
    for row, given_row in zip(read, rows):
        verdicts = [digits.judge(row.prompt, chain) for chain in row.completions]
        if form == "singles":
            assert verdicts[0].final_correct or not given_row["label"]
        if form == "lists":
            scores = row.columns["scores"]
            assert scores == sorted(scores, reverse=True) and (scores[0] == 1.0) == verdicts[0].final_correct
        if form == "pairs":
            assert verdicts[0].first_error_step is None and verdicts[1].first_error_step is not None
            assert row.columns["chosen_score"] > row.columns["rejected_score"]
        if form == "triples":
            assert verdicts[2].first_error_step is None
    with pytest.raises(ValueError, match="no rows of 'trees'"):
        digits.make_rows("trees", 1, seed=0)
