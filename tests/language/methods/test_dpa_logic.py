"""Compiled preference logic against float64 sums over worlds, and the losses it contains."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numeric import assert_formula, completions, float32, log_ratio, mean, softplus, total

from dpo_jax.language.methods.dpa_logic import (
    ccpo_loss,
    ceunl_loss,
    cfunl_loss,
    compile_code,
    cunl_loss,
    funl_loss,
    log_wmc,
    logic_loss,
    qfunl_loss,
    uncpo_loss,
)
from dpo_jax.language.methods.dpo import dpo_loss, ipo_sum_loss
from dpo_jax.language.methods.preference_logic import (
    NAMED,
    And,
    PreferenceStructure,
    Var,
    decompile,
    enumerate_losses,
    relation,
    truth_table,
)

SATISFIABLE = [c for c in enumerate_losses(2) if set(c) & set("TX") and set(c) & set("BX")]
INTERVAL = list(enumerate_losses(2, between=("BTBB", "TTBT")))
PAIR = completions(("chosen", "rejected"), reference=False)
REFERRED = completions(("chosen", "rejected"), reference=True)


def log_count(table, log_probs):
    """Log of the sum over the worlds, float64 [B]; log_probs [n, B]."""
    probs = np.exp(log_probs)
    worlds = itertools.product((True, False), repeat=len(probs))
    return np.log(sum(math.prod(p if v else 1 - p for p, v in zip(probs, w)) for on, w in zip(table, worlds) if on))


def rho(code, log_probs):
    return log_count([m in "TX" for m in code], log_probs) - log_count([m in "BX" for m in code], log_probs)


def log_formula(code, beta, arrays):
    return softplus(-beta * rho(code, np.stack([mean(arrays, "chosen"), mean(arrays, "rejected")])))


def ratio(w, l, code):
    structure, log_probs = PreferenceStructure.from_code(code), {"w": w, "l": l}
    return log_wmc(structure.top, log_probs) - log_wmc(structure.bottom, log_probs)


@functools.cache
def all_ratios():
    """rho [225, 40], its gradients by log p_w and log p_l, and the [2, 40] log-probabilities they are taken at."""
    log_probs = np.log(np.random.default_rng(3).uniform(0.02, 0.98, (2, 40)))
    out = []
    # Not compiled: a graph of 225 ratios takes XLA longer than all the operations one by one.
    for code in SATISFIABLE:
        value, pull = jax.vjp(functools.partial(ratio, code=code), *jnp.asarray(log_probs, jnp.float32))
        out.append((value, *pull(jnp.ones_like(value))))
    return *map(np.array, zip(*out)), log_probs


def test_all_225_ratios_are_the_logs_of_weighted_sums():
    value, _, _, log_probs = all_ratios()
    for row, code in zip(value, SATISFIABLE):
        np.testing.assert_allclose(row, rho(code, log_probs), rtol=2e-5, atol=5e-6, err_msg=code)


def test_all_225_gradients_are_central_differences():
    _, by_w, by_l, log_probs = all_ratios()
    step = 1e-6
    for number, code in enumerate(SATISFIABLE):
        for gradient, move in ((by_w, [[step], [0]]), (by_l, [[0], [step]])):
            expected = (rho(code, log_probs + move) - rho(code, log_probs - np.asarray(move))) / (2 * step)
            np.testing.assert_allclose(gradient[number], expected, rtol=2e-4, atol=2e-5, err_msg=code)


def test_swapping_top_and_bottom_negates_the_ratio():
    value, *_ = all_ratios()
    for row, code in zip(value, SATISFIABLE):
        swapped = code.translate(str.maketrans("TB", "BT"))
        np.testing.assert_array_equal(row, -value[SATISFIABLE.index(swapped)])


def test_a_code_with_equal_sides_is_constant():
    value, by_w, by_l, _ = all_ratios()
    for number in (n for n, code in enumerate(SATISFIABLE) if set(code) <= set("X-")):
        assert (value[number] == 0).all()
        assert max(np.abs(by_w[number]).max(), np.abs(by_l[number]).max()) < 1e-6


def test_entailment_orders_ratios_and_losses():
    value, *_ = all_ratios()
    for i, j in itertools.product(range(len(SATISFIABLE)), repeat=2):
        if relation(SATISFIABLE[i], SATISFIABLE[j]) == "entails":
            assert (value[i] <= value[j] + 1e-5).all(), (SATISFIABLE[i], SATISFIABLE[j])


@pytest.mark.parametrize("form", ["log", "margin"])
def test_the_stronger_loss_is_the_larger_one(form):
    arrays = float32(PAIR)
    for stronger, weaker in [("BTBB", "TTBB"), ("TTBB", "TTB-"), ("TTB-", "TTBT"), ("XTB-", "TTB-"), ("-TBX", "-TBT")]:
        losses = [compile_code(code, form=form)(**arrays).loss for code in (stronger, weaker)]
        assert (losses[0] >= losses[1] - 1e-6).all()


def test_squared_form_breaks_that_order():
    """A large ratio overshoots the target 1/(2 beta), so the weaker loss with the larger ratio is the larger one."""
    sure = {k: v * 0.05 if "chosen_logps" in k else v for k, v in PAIR.items()}
    losses = [compile_code(code, form="squared")(**float32(sure)).loss for code in ("XTB-", "TTB-")]
    assert (losses[0] < losses[1]).any()


def test_signs_of_the_sixteen_between_ceunl_and_uncpo():
    _, by_w, by_l, _ = all_ratios()
    for code in INTERVAL:
        number = SATISFIABLE.index(code)
        assert (by_w[number] >= -1e-6).all() and (by_l[number] <= 1e-6).all(), code
    assert (by_l[SATISFIABLE.index("TTBB")] == 0).all()  # CE does not look at the loser
    assert (by_w[SATISFIABLE.index("BTBT")] == 0).all()  # fUNL does not look at the winner


# Losses


@pytest.mark.parametrize(
    ("loss", "name", "beta"),
    [
        (ccpo_loss, "cCPO", 1.0),
        (uncpo_loss, "unCPO", 0.5),
        (cunl_loss, "cUNL", 3.0),
        (cfunl_loss, "cfUNL", 0.5),
        (qfunl_loss, "qfUNL", 1.0),
        (ceunl_loss, "CEUnl", 3.0),
    ],
)
def test_named_losses(loss, name, beta):
    assert_formula(loss, functools.partial(log_formula, NAMED[name].code, beta), PAIR, beta=beta)


def test_funl_is_its_code_without_the_chosen_answer():
    rejected = {name: value for name, value in PAIR.items() if "rejected" in name}
    assert_formula(funl_loss, lambda a: softplus(-2 * np.log(1 / np.exp(mean(a, "rejected")) - 1)), rejected, beta=2.0)
    arrays = float32(PAIR)
    of_code = logic_loss(**arrays, code="BTBT")
    np.testing.assert_allclose(funl_loss(**float32(rejected)).loss, of_code.loss, rtol=1e-6)
    assert (jax.grad(lambda w: logic_loss(**{**arrays, "policy_chosen_logps": w}, code="BTBT").loss.sum())(
        arrays["policy_chosen_logps"]
    ) == 0).all()  # fmt: skip


@pytest.mark.parametrize("code", ["XTB-", "-TB-", "TTBB", "XX-B"])
def test_logic_loss_trains_any_code(code):
    idle = "policy_rejected_logps" if code == "TTBB" else ""  # a code of the chosen answer alone
    assert_formula(logic_loss, functools.partial(log_formula, code, 0.7), PAIR, idle=idle, code=code, beta=0.7)


@pytest.mark.parametrize("code", ["----", "TTTT", "BBB-", "T---", "TTB", "abcd"])
def test_logic_loss_names_a_bad_code(code):
    with pytest.raises(ValueError, match=code):
        logic_loss(**float32(PAIR), code=code)


def test_ce_is_the_likelihood_and_ceunl_adds_the_unlikelihood():
    p_w, p_l = np.exp(mean(PAIR, "chosen")), np.exp(mean(PAIR, "rejected"))
    arrays = float32(PAIR)
    np.testing.assert_allclose(logic_loss(**arrays, code="TTBB").loss, -np.log(p_w), rtol=1e-5)
    np.testing.assert_allclose(ceunl_loss(**arrays).loss, -np.log(p_w) - np.log(1 - p_l), rtol=1e-5)


def test_orpo_is_the_ratio_of_odds():
    odds = [p / (1 - p) for p in (np.exp(mean(PAIR, "chosen")), np.exp(mean(PAIR, "rejected")))]
    loss = logic_loss(**float32(PAIR), code="-TB-", beta=0.5).loss
    np.testing.assert_allclose(loss, softplus(-0.5 * np.log(odds[0] / odds[1])), rtol=1e-5)


FOUR = ("w", "l", "ref_w", "ref_l")
DPO_OF_FOUR = decompile({"w*ref_l": 1}, {"l*ref_w": 1}, FOUR).code


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize(
    "compiled",
    [
        lambda beta: compile_code("XTB-", beta=beta, length_normalize=False, reference=True),
        lambda beta: compile_code(DPO_OF_FOUR, FOUR, beta=beta, length_normalize=False),
    ],
    ids=["reference form", "four variables"],
)
def test_dpo(compiled, beta):
    assert_formula(
        compiled(beta), lambda a: softplus(-beta * (log_ratio(a, "chosen") - log_ratio(a, "rejected"))), REFERRED
    )
    ours, theirs = compiled(beta)(**float32(REFERRED)), dpo_loss(**float32(REFERRED), beta=beta)
    for name, value in theirs.metrics.items():
        np.testing.assert_allclose(ours.metrics[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_ipo_is_the_squared_reference_form_of_cpo():
    loss = compile_code("XTB-", form="squared", beta=0.2, length_normalize=False, reference=True)
    arrays = float32(REFERRED)
    np.testing.assert_allclose(loss(**arrays).loss, ipo_sum_loss(**arrays, beta=0.2).loss, rtol=1e-4, atol=1e-4)


def test_simpo_is_cpo_with_a_constant_reference():
    """log p_ref,w - log p_ref,l = gamma / beta moves the margin by gamma."""
    beta, gamma = 2.0, 1.0
    gap = {"reference_chosen_logps": -1.0 + gamma / beta, "reference_rejected_logps": -1.0}
    arrays = {**PAIR, **{name: np.full(PAIR["chosen_mask"].shape, value) for name, value in gap.items()}}
    loss = compile_code("XTB-", beta=beta, reference=True)
    assert_formula(loss, lambda a: softplus(-beta * (mean(a, "chosen") - mean(a, "rejected")) + gamma), arrays)


def test_margin_form_is_slic_on_sums():
    loss = compile_code("XTB-", form="margin", beta=3.0, length_normalize=False)
    assert_formula(loss, lambda a: np.maximum(0, 3.0 - total(a, "chosen") + total(a, "rejected")), PAIR)


@pytest.mark.parametrize("code", ["TTB-", "TTBT", "-TBX"])
def test_reference_form_is_zero_ratio_at_the_reference_and_stops_there(code):
    arrays = float32(REFERRED)
    arrays |= {f"reference_{s}_logps": arrays[f"policy_{s}_logps"] for s in ("chosen", "rejected")}
    loss = compile_code(code, reference=True)
    np.testing.assert_allclose(loss(**arrays).loss, np.log(2), rtol=1e-6)
    for side in ("chosen", "rejected"):
        name = f"reference_{side}_logps"
        gradient = jax.grad(lambda v, n=name: loss(**{**arrays, n: v}).loss.sum())(arrays[name])
        assert (gradient == 0).all()


def test_a_structure_of_one_variable():
    loss = compile_code("TB", ("w",))
    np.testing.assert_allclose(loss(**float32(PAIR)).loss, -mean(PAIR, "chosen"), rtol=1e-5)


def test_ratio_of_long_sums_keeps_its_digits():
    """CPO's counts are p_w and p_l themselves: nothing is lost at log-probabilities of -1e4."""
    table = NAMED["CPO"]
    log_probs = {"w": jnp.array([-1e4, -1e-7, 0.0]), "l": jnp.array([-1e4 - 1 / 16, -1e4, -1.0])}
    np.testing.assert_array_equal(log_wmc(table.top, log_probs), log_probs["w"])
    np.testing.assert_array_equal(log_wmc(table.bottom, log_probs), log_probs["l"])


def test_certain_and_impossible_answers_stay_finite():
    w, l = jnp.asarray(list(itertools.product([0.0, -1e-7, -1e-3, -50.0, -1e4], repeat=2)), jnp.float32).T
    for code in SATISFIABLE[::16]:
        value, pull = jax.vjp(functools.partial(ratio, code=code), w, l)
        assert np.isfinite(value).all() and np.isfinite(pull(jnp.ones_like(value))).all(), code


def test_counts_over_everything_and_nothing():
    log_probs = {"w": jnp.array([-1.0, -2.0]), "l": jnp.array([-3.0, -4.0])}
    np.testing.assert_array_equal(log_wmc((True,) * 4, log_probs), [0.0, 0.0])
    both = truth_table(And(Var("w"), Var("l")))
    np.testing.assert_array_equal(log_wmc(both, log_probs), [-4.0, -6.0])
    for table in [(False,) * 4, (True, False)]:
        with pytest.raises(ValueError, match="no satisfiable truth table"):
            log_wmc(table, log_probs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(code="TTB-", beta=0.0), "beta is 0.0"),
        (dict(code="TTB-", form="hinge"), "hinge"),
        (dict(code="TTB-", variables=("w", "v")), "'v'"),
        (dict(code=DPO_OF_FOUR, variables=FOUR, reference=True), "reference=True"),
        (dict(code="TB", variables=("w", "l")), "code 'TB'"),
        (dict(code="X", variables=()), "variables"),
    ],
)
def test_what_cannot_be_compiled_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        compile_code(**options)
