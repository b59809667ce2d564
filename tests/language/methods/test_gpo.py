"""GPO's links against float64 NumPy, convexity, and the losses they share with other papers."""

import numpy as np
import pytest
from numeric import assert_formula, float32, pairs, scalar_pair, sigmoid, slope, sums

from dpo_jax.language.methods.dpo import hinge_loss, ipo_sum_loss
from dpo_jax.language.methods.gpo import (
    gpo_exponential_loss,
    gpo_savage_loss,
    gpo_squared_hinge_loss,
    gpo_squared_loss,
)

LINKS = {
    gpo_exponential_loss: lambda x: np.exp(-x),
    gpo_squared_hinge_loss: lambda x: np.maximum(0, 1 - x) ** 2,
    gpo_savage_loss: lambda x: sigmoid(-x) ** 2,
    gpo_squared_loss: lambda x: (1 - x) ** 2,
}
# loss -> its value at x = 0 and the sign of its slope at x = 3
SHAPES = [
    (gpo_exponential_loss, 1.0, -1),
    (gpo_squared_hinge_loss, 1.0, 0),
    (gpo_savage_loss, 0.25, -1),
    (gpo_squared_loss, 1.0, 1),
]


def margin(a, beta):
    _, u, _, _, v, _ = sums(a)
    return beta * (u - v)


@pytest.mark.parametrize("loss", LINKS, ids=lambda loss: loss.__name__)
def test_value_and_gradient_against_the_formula(loss):
    assert_formula(loss, lambda a: LINKS[loss](margin(a, 0.6)), pairs(), beta=0.6)
    np.testing.assert_allclose(loss(**float32(pairs(1))).loss, LINKS[loss](margin(pairs(1), 0.1)), rtol=2e-5)


@pytest.mark.parametrize(("loss", "at_zero", "beyond"), SHAPES, ids=[loss.__name__ for loss, _, _ in SHAPES])
def test_value_where_policy_is_reference_and_where_the_pull_ends(loss, at_zero, beyond):
    assert float(loss(**scalar_pair(0.0)).loss[0]) == at_zero
    np.testing.assert_array_equal(np.sign(slope(loss, scalar_pair([-1.0, 3.0]), beta=1.0)), [-1, beyond])


@pytest.mark.parametrize("loss", LINKS, ids=lambda loss: loss.__name__)
def test_all_links_but_savage_are_convex(loss):
    slopes = slope(loss, scalar_pair(np.linspace(-6, 6, 49)), beta=1.0)
    assert np.all(np.diff(slopes) > -1e-6) == (loss is not gpo_savage_loss)


def test_savage_is_bounded_and_gives_up_badly_wrong_pairs():
    inputs = scalar_pair([-1e4, -30.0, 30.0])
    np.testing.assert_allclose(gpo_savage_loss(**inputs, beta=1.0).loss, [1.0, 1.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(slope(gpo_savage_loss, inputs, beta=1.0), 0.0, atol=1e-6)


def test_squared_links_are_those_of_ipo_and_of_the_hinge():
    arrays = float32(pairs())
    ipo = ipo_sum_loss(**arrays, beta=0.3).loss
    np.testing.assert_allclose(gpo_squared_loss(**arrays, beta=0.6).loss, 0.36 * ipo, rtol=1e-5)
    hinge = hinge_loss(**arrays, beta=0.6).loss
    np.testing.assert_allclose(gpo_squared_hinge_loss(**arrays, beta=0.6).loss, hinge**2, rtol=1e-6)


def test_exponential_is_capped_and_says_so():
    inputs = scalar_pair([-79.0, -81.0, -1e4])
    output = gpo_exponential_loss(**inputs, beta=1.0)
    np.testing.assert_array_equal(output.metrics["clipped"], [0.0, 1.0, 1.0])
    np.testing.assert_allclose(output.loss, np.exp([79.0, 80.0, 80.0]), rtol=2e-5)
    np.testing.assert_array_equal(slope(gpo_exponential_loss, inputs, beta=1.0) < 0, [True, False, False])


@pytest.mark.parametrize("loss", LINKS, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("beta", [0.0, float("inf")])
def test_options_out_of_range_are_refused(loss, beta):
    with pytest.raises(ValueError, match=f"beta is {beta}"):
        loss(**float32(pairs()), beta=beta)
