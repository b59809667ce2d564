"""PatchDPO: loss against float64, and the qualities of patches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.diffusion.methods.patchdpo import patch_quality, patchdpo_loss, resize_map

B, H, W = 3, 4, 2
ERRORS = ("policy_entity_error_map", "policy_generated_error_map")
MAPS = ("entity_quality", "generated_quality")


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    made = {name: rng.gamma(2.0, 0.5, (B, H, W)) for name in ERRORS}
    return made | {name: rng.uniform(size=(B, H, W)) for name in MAPS}


def float32(given):
    return {name: jnp.asarray(x, jnp.float32) for name, x in given.items()}


def test_loss_and_gradient_are_those_of_float64():
    a = arrays()
    entity, generated = (1 - a["entity_quality"]) * a[ERRORS[0]], a["generated_quality"] * a[ERRORS[1]]
    output = patchdpo_loss(**float32(a))
    np.testing.assert_allclose(output.loss, np.concatenate([entity, generated], 1).mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(output.metrics["entity_loss"], 0.5 * entity.mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(output.metrics["entity_quality"], a["entity_quality"].mean((1, 2)), rtol=1e-5)
    a["generated_quality"][0, 1, 1] = 0.0
    gradient = jax.grad(lambda e: patchdpo_loss(**e).loss.sum())(float32(a))
    np.testing.assert_allclose(gradient[ERRORS[0]], (1 - a["entity_quality"]) / (2 * H * W), rtol=1e-5)
    np.testing.assert_allclose(gradient[ERRORS[1]], a["generated_quality"] / (2 * H * W), rtol=1e-5)
    assert gradient[ERRORS[1]][0, 1, 1] == 0
    assert all(np.all(gradient[name] == 0) for name in MAPS)


@pytest.mark.parametrize("quality, entity, generated", [(1.0, 0.0, 0.5), (0.0, 0.5, 0.0), (0.5, 0.25, 0.25)])
def test_even_qualities_are_plain_regressions(quality, entity, generated):
    a = arrays() | {name: np.full((B, H, W), quality) for name in MAPS}
    wanted = entity * a[ERRORS[0]].mean((1, 2)) + generated * a[ERRORS[1]].mean((1, 2))
    np.testing.assert_allclose(patchdpo_loss(**float32(a)).loss, wanted, rtol=1e-5)


def test_the_loss_is_affine_in_the_maps():
    one, two = arrays(0), arrays(0) | {name: arrays(1)[name] for name in MAPS}
    middle = one | {name: 0.3 * one[name] + 0.7 * two[name] for name in MAPS}
    values = [np.asarray(patchdpo_loss(**float32(a)).loss) for a in (one, two, middle)]
    np.testing.assert_allclose(values[2], 0.3 * values[0] + 0.7 * values[1], rtol=1e-5)
    with pytest.raises(AssertionError):
        patchdpo_loss(**float32(arrays() | {"entity_quality": np.ones((B, H, W, 1))}))


def features(seed=0, shape=(2, 4, 3, 5)):
    return np.random.default_rng(seed).normal(size=shape)


def test_quality_is_the_best_cosine_of_float64():
    mine, other = features(0), features(1, (2, 2, 6, 5))
    quality, place = patch_quality(jnp.asarray(mine), jnp.asarray(other))
    flat = other.reshape(2, 12, 5)
    norms = np.linalg.norm(mine, axis=-1)[..., None] * np.linalg.norm(flat, axis=-1)[:, None, None]
    cosines = np.einsum("bhwd,bqd->bhwq", mine, flat) / norms
    np.testing.assert_allclose(quality, np.clip(cosines.max(-1), 0, 1), atol=1e-5)
    np.testing.assert_array_equal(place, cosines.argmax(-1))


def test_properties_of_quality():
    mine, other = (jnp.asarray(features(seed), jnp.float32) for seed in (0, 1))
    quality, _ = patch_quality(mine, other)
    same, place = patch_quality(mine, mine)
    np.testing.assert_allclose(same, 1, atol=1e-5)
    np.testing.assert_array_equal(place, np.tile(np.arange(12).reshape(4, 3), (2, 1, 1)))
    shuffled = other.reshape(2, 12, 5)[:, np.random.default_rng(0).permutation(12)].reshape(other.shape)
    np.testing.assert_allclose(patch_quality(mine, shuffled).quality, quality, atol=1e-6)
    np.testing.assert_allclose(patch_quality(mine * 1e20, 3 * other).quality, quality, atol=1e-5)
    np.testing.assert_allclose(patch_quality(mine[:, ::-1], other).quality, quality[:, ::-1], atol=1e-6)
    assert np.all(patch_quality(jnp.ones((1, 1, 2)), -jnp.ones((1, 1, 2))).quality == 0)  # never negative
    assert np.all(patch_quality(jnp.zeros((1, 1, 2)), jnp.ones((1, 1, 2))).quality == 0)


def test_maps_are_resized():
    small = jnp.array([[0.0, 1.0], [0.5, 0.25]])
    np.testing.assert_array_equal(resize_map(small, 4, 4), np.repeat(np.repeat(small, 2, 0), 2, 1))
    smooth = resize_map(small[None], 8, 8, "bilinear")
    assert smooth.shape == (1, 8, 8) and smooth.min() >= 0 and smooth.max() <= 1
    assert len(np.unique(smooth)) > 10
