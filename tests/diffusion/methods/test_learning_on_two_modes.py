"""Losses of noised images on the two-mode world: three hundred steps take the samples where the preference points.

The classes of the base have half of their samples in either mode. Betas fit errors of points in the plane, where they
are far below those of latents.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import two_mode_model as world

from dpo_jax.diffusion.methods.capo import capo_unweighted_inputs, capo_unweighted_loss
from dpo_jax.diffusion.methods.diffusion_baselines import diffusion_sft_chosen_loss, diffusion_sft_loss
from dpo_jax.diffusion.methods.diffusion_dpo import diffusion_dpo_loss
from dpo_jax.diffusion.methods.diffusion_kto import diffusion_kto_loss
from dpo_jax.diffusion.methods.mapo import mapo_loss
from dpo_jax.diffusion.methods.text_po import tdpo_inputs, tdpo_loss, tkto_inputs, tkto_loss
from dpo_jax.diffusion.objectives import from_loss
from dpo_jax.diffusion.types import DiffusionBatch
from dpo_jax.worlds import two_modes

pytestmark = pytest.mark.slow
PAIRS = two_modes.make_pairs(4000, 1)


def liked_and_disliked():
    """One image of each pair: every other row keeps the chosen one."""
    liked = np.arange(4000) % 2
    return world.rows_of([np.where(liked[:, None] == 1, PAIRS.chosen, PAIRS.rejected)], PAIRS.classes, labels=liked)


def measures(params):
    return world.measures(params, count=3000)


@functools.cache
def after_diffusion_dpo(beta):
    return measures(world.train(diffusion_dpo_loss, world.pairs_of(PAIRS), beta=beta))


def test_base_has_no_preference():
    base = measures(world.base_model())
    assert 0.4 < base.preferred < 0.6 and base.on_manifold > 0.85


def test_diffusion_dpo():
    far = after_diffusion_dpo(100.0)
    assert far.preferred > 0.9 and far.on_manifold > 0.85
    near = after_diffusion_dpo(500.0)
    assert near.preferred > 0.6 and near.on_manifold > 0.85


def test_beta_trades_the_preference_for_the_tie_to_the_reference():
    near, loose = after_diffusion_dpo(500.0), after_diffusion_dpo(100.0)
    assert loose.preferred > near.preferred + 0.1
    lost = after_diffusion_dpo(20.0)  # too loose: the samples leave the data
    assert lost.preferred > 0.9 and lost.on_manifold < 0.3


def test_fine_tuning_on_the_chosen_images():
    tuned = measures(world.train(diffusion_sft_chosen_loss, world.pairs_of(PAIRS)))
    assert tuned.preferred > 0.9 and tuned.on_manifold > 0.85


def test_mapo_without_a_reference():
    tuned = measures(world.train(mapo_loss, world.pairs_of(PAIRS), beta=0.1, margin_scale=100.0))
    assert tuned.preferred > 0.9 and tuned.on_manifold > 0.85


def test_diffusion_kto_from_single_images():
    tuned = measures(world.train(diffusion_kto_loss, liked_and_disliked(), beta=20.0))
    assert tuned.preferred > 0.8 and tuned.on_manifold > 0.85


# Captions: half of the base's rows were told a class drawn at random.


def captioned():
    """Points under their class and under another one."""
    points, random = two_modes.make_points(6000, 3), np.random.default_rng(0)
    wrong = (points.classes + random.integers(1, two_modes.WORLD.classes, 6000)) % two_modes.WORLD.classes
    twice = jnp.repeat(jnp.asarray(points.points)[:, None], 2, axis=1)
    return points, DiffusionBatch(twice, jnp.stack([points.classes, wrong], axis=1), jnp.ones(6000), {})


@functools.cache
def after_right_captions():
    points, _ = captioned()
    base = world.base_model(random_classes=0.5)
    return measures(
        world.train(diffusion_sft_loss, world.rows_of([points.points], points.classes), reference=base, steps=200)
    )


@pytest.mark.parametrize(("loss", "inputs", "beta"), [(tdpo_loss, tdpo_inputs, 5.0), (tkto_loss, tkto_inputs, 2.5)])
def test_preferred_captions_teach_more_than_right_ones(loss, inputs, beta):
    base = world.base_model(random_classes=0.5)
    start, fitted = measures(base), after_right_captions()
    tuned = measures(world.train(loss, captioned()[1], inputs=inputs, beta=beta, reference=base, steps=200))
    assert tuned.right_class > fitted.right_class + 0.03 and fitted.right_class > start.right_class + 0.1
    assert tuned.on_manifold > start.on_manifold + 0.1


# The optimum of CaPO is bounded.


def test_capo_settles_at_its_gap_where_diffusion_dpo_goes_on():
    gap, beta, base = 0.8, 20.0, world.base_model()
    rows = world.pairs_of(PAIRS, reward_gap=np.full(len(PAIRS.classes), gap, np.float32))
    margin_of = from_loss(diffusion_dpo_loss, world.PROCESS, beta=2.0)

    def margin(params):
        """Mean gain in error of the chosen images above the rejected ones."""
        policy, reference = (functools.partial(world.predict, p) for p in (params, base))
        return float(jnp.mean(margin_of(policy, reference, rows, jax.random.key(7)).metrics["margin"]))

    fitted = world.train(capo_unweighted_loss, rows, beta=beta, inputs=capo_unweighted_inputs, steps=900)
    assert 0.2 * gap / beta < margin(fitted) < 1.2 * gap / beta
    assert measures(fitted).preferred > measures(base).preferred + 0.15
    pushed = world.train(diffusion_dpo_loss, rows, beta=100.0, steps=900)
    assert margin(pushed) > 3 * gap / beta
