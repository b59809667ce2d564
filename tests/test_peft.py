"""What configs of PEFT may say, whichever model the adapter belongs to."""

import pytest

from dpo_jax.keys import WeightsError
from dpo_jax.peft import ALPHA, RANK, check_options

OPTIONS = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["to_q"]}


@pytest.mark.parametrize(
    ("module", "value"),
    [("mid.to_q", 2), ("to_q", 2), ("mid.up.to_k", 3), ("mid.not_to_q", 8), ("mid.to_q.inner", 8)],
)
def test_a_pattern_is_the_end_of_a_name(module, value):
    options = {**OPTIONS, "alpha_pattern": {"to_q": 2, r"up\.to_.": 3}}
    assert ALPHA.of(options, module) == value
    assert RANK.of(options, module) == 4


def test_only_settings_that_are_read_are_checked():
    options = {**OPTIONS, "r": 0, "rank_pattern": [3]}
    check_options(options, "here", (ALPHA,))
    with pytest.raises(WeightsError, match="here: rank_pattern is"):
        check_options(options, "here", (RANK, ALPHA))


def test_a_pattern_that_is_no_regular_expression_is_named():
    with pytest.raises(WeightsError, match=r"here: rank_pattern has '\[', no regular expression"):
        check_options({**OPTIONS, "rank_pattern": {"[": 4}}, "here", (RANK, ALPHA))


@pytest.mark.parametrize("whole", [["lm_head"], ["score", "lm_head"], "score", 3])
def test_modules_trained_whole_are_refused_unless_they_are_known(whole):
    check_options({**OPTIONS, "modules_to_save": ["score"]}, "here", (RANK,), learned=("score",))
    with pytest.raises(WeightsError, match="here: not supported: modules_to_save"):
        check_options({**OPTIONS, "modules_to_save": whole}, "here", (RANK,), learned=("score",))


def test_a_config_that_names_no_kind_of_adapter_is_refused():
    with pytest.raises(WeightsError, match="peft_type"):
        check_options({"r": 4, "lora_alpha": 8}, "here", (RANK, ALPHA))
