"""The two-mode world: formulas against automatic derivatives and sampling, labels and measures against chance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.worlds import two_modes
from dpo_jax.worlds.two_modes import OTHER, PREFERRED, TwoModes

ON_A_MODE = 1 - np.exp(-(two_modes.EDGE**2) / 2)  # of a round normal cloud in the plane
log_density, score, epsilon, denoised = map(
    jax.jit, (two_modes.log_density, two_modes.score, two_modes.epsilon, two_modes.denoised)
)
gradient = jax.jit(jax.grad(lambda x, *rest: two_modes.log_density(x, *rest).sum()))
LEVELS = [(1.0, 0.0), (0.9, 0.436), (0.5, 0.866), (0.1, 0.995), (0.0, 1.0), (0.3, 0.7)]


def noised(count, scale, noise, seed=0):
    points, classes, _ = two_modes.make_points(count, seed)
    eps = np.random.default_rng(seed + 1).normal(size=points.shape).astype(np.float32)
    return jnp.asarray(scale * points + noise * eps), points, eps, classes


@pytest.mark.parametrize("scale, noise", LEVELS)
@pytest.mark.parametrize("condition", [True, False])
def test_score_is_the_gradient_of_the_log_density(scale, noise, condition):
    x, _, _, classes = noised(200, scale, noise)
    classes = classes if condition else None
    expected = gradient(x, scale, noise, classes)
    np.testing.assert_allclose(score(x, scale, noise, classes), expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("scale, noise", LEVELS)
def test_predictions_belong_together(scale, noise):
    x, _, _, classes = noised(200, scale, noise)
    clean = denoised(x, scale, noise, classes)
    eps = epsilon(x, scale, noise, classes)
    np.testing.assert_allclose(scale * clean + noise * eps, x, atol=1e-5)


@pytest.mark.parametrize("scale, noise", [(0.9, 0.436), (0.5, 0.866), (0.1, 0.995)])
def test_epsilon_is_the_best_prediction_of_the_noise(scale, noise):
    x, points, eps, classes = noised(40000, scale, noise)
    predicted = np.asarray(epsilon(x, scale, noise, classes))
    # The error of the conditional mean is uncorrelated with any function of x; 4 standard errors.
    for function in (np.ones_like(eps), np.asarray(x), np.tanh(3 * np.asarray(x))):
        product = ((eps - predicted) * function).ravel()
        assert abs(product.mean()) < 4 * product.std() / np.sqrt(product.size)
    clean = np.asarray(denoised(x, scale, noise, classes))
    product = ((points - clean) * np.asarray(x)).ravel()
    assert abs(product.mean()) < 4 * product.std() / np.sqrt(product.size)


def test_density_sums_to_one_for_every_class():
    line = np.linspace(-6, 6, 241, dtype=np.float32)
    grid = jnp.stack(jnp.meshgrid(line, line), -1)
    for classes in (None, 0, 2):
        labels = None if classes is None else jnp.full(grid.shape[:-1], classes)
        total = jnp.exp(log_density(grid, 0.8, 0.6, labels)).sum() * 0.05**2
        assert total == pytest.approx(1.0, abs=1e-4)


def test_levels_may_differ_between_points():
    x, _, _, classes = noised(2, 0.5, 0.8)
    scale, noise = jnp.array([0.5, 0.9]), jnp.array([0.8, 0.4])
    both = epsilon(x, scale, noise, classes)
    for i in range(2):
        alone = epsilon(x[i], scale[i], noise[i], classes[i])
        np.testing.assert_allclose(both[i], alone, rtol=1e-5)


def test_the_exact_model_samples_the_data():
    """Deterministic steps with the exact prediction lead back to both modes of the class."""
    abar = np.cos(np.linspace(np.pi / 2 - 1e-3, 0, 201)) ** 2
    classes = jnp.asarray(np.arange(3000) % 3)
    x = jax.random.normal(jax.random.key(0), (3000, 2))

    def step(x, levels):
        now, then = levels
        eps = two_modes.epsilon(x, jnp.sqrt(now), jnp.sqrt(1 - now), classes)
        clean = (x - jnp.sqrt(1 - now) * eps) / jnp.sqrt(now)
        return jnp.sqrt(then) * clean + jnp.sqrt(1 - then) * eps, None

    x = jax.lax.scan(step, x, (jnp.asarray(abar[:-1], x.dtype), jnp.asarray(abar[1:], x.dtype)))[0]
    measures = two_modes.measure(np.asarray(x), np.asarray(classes))
    assert measures.on_manifold == pytest.approx(ON_A_MODE, abs=0.01)
    assert measures.preferred == pytest.approx(0.5, abs=0.04)
    assert measures.right_class > 0.997  # some points of a mode lie nearer to the neighbour


def test_measures_of_the_data_are_those_of_chance():
    points, classes, modes = two_modes.make_points(40000, 0)
    measures = two_modes.measure(points, classes)
    assert measures.on_manifold == pytest.approx(ON_A_MODE, abs=0.003)
    assert measures.preferred == pytest.approx((modes == PREFERRED).mean(), abs=1e-3)
    assert measures.on_preferred + measures.on_other == pytest.approx(measures.on_manifold, abs=1e-6)
    assert measures.preferred_on_manifold == pytest.approx(0.5, abs=0.01) and measures.right_class > 0.999
    shifted = two_modes.make_points(40000, 0, world=TwoModes(preferred_share=0.9))
    assert two_modes.measure(*shifted[:2]).preferred == pytest.approx(0.9, abs=0.01)
    told = two_modes.make_points(40000, 0, random_classes=0.5)
    assert two_modes.measure(*told[:2]).right_class == pytest.approx(0.5 + 0.5 / 3, abs=0.01)


def test_measures_of_hand_made_points():
    centres = two_modes.mode_centres()
    points = [centres[0, PREFERRED], centres[0, OTHER], centres[1, OTHER], [np.nan, 0], [9, 0], 1.2 * centres[0, 0]]
    measures = two_modes.measure(np.array(points), np.zeros(6, int))
    assert measures == tuple(pytest.approx(n / 6) for n in (3, 3, 2, 1, 4, 4))
    far = two_modes.measure(np.full((2, 2), np.inf), np.zeros(2, int))
    assert far == (0.0,) * 6
    with pytest.raises(ValueError, match=r"points \[2, 3\] and classes \[2\]"):
        two_modes.measure(np.zeros((2, 3)), np.zeros(2, int))


def test_clean_pairs():
    pairs = two_modes.make_pairs(2000, 1)
    assert two_modes.measure(pairs.chosen, pairs.classes).on_preferred == pytest.approx(ON_A_MODE, abs=0.01)
    assert two_modes.measure(pairs.rejected, pairs.classes).on_other == pytest.approx(ON_A_MODE, abs=0.01)
    assert (pairs.chosen_reward > pairs.rejected_reward + 1.9).mean() > 0.99
    again, other = two_modes.make_pairs(2000, 1), two_modes.make_pairs(2000, 2)
    np.testing.assert_array_equal(pairs.chosen, again.chosen)
    assert np.abs(pairs.chosen - other.chosen).max() > 0.1


def test_noisy_pairs_are_wrong_as_often_as_promised():
    pairs = two_modes.make_noisy_pairs(40000, 1)
    gap = pairs.chosen_reward - pairs.rejected_reward
    equal, wrong = np.abs(gap) < 1, gap < -1
    assert equal.mean() == pytest.approx(0.2, abs=0.01)
    assert wrong.mean() == pytest.approx(0.8 / (1 + np.exp(2)), abs=0.01)
    assert (equal | wrong).mean() == pytest.approx(0.295, abs=0.01)


def test_worse_pairs_are_worse_than_the_data():
    pairs = two_modes.make_worse_pairs(20000, 1)
    chosen, rejected = ((r > -(two_modes.EDGE**2) / 2).mean() for r in (pairs.chosen_reward, pairs.rejected_reward))
    assert chosen == pytest.approx(1 - np.exp(-9 / 8), abs=0.01)
    assert rejected == pytest.approx(1 - np.exp(-9 / 32), abs=0.01)
    assert (pairs.chosen_reward > pairs.rejected_reward).mean() == pytest.approx(0.8, abs=0.01)  # 16 / (16 + 4)
