"""DenseDPO: losses against float64, ties, pairs that share their motion, segments and judges' labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import gaussian_model

from dpo_jax.diffusion.methods.densedpo import (
    dense_dpo_inputs,
    dense_dpo_loss,
    dense_dpo_sum_loss,
    frame_labels,
    guided_pair,
    labelled_pairs,
    latent_frames,
    majority,
    merge_answers,
    segment_ids,
)
from dpo_jax.diffusion.methods.diffusion_dpo import diffusion_dpo_loss
from dpo_jax.diffusion.process import Process
from dpo_jax.diffusion.schedule import predicts_flow

NAMES = [f"{model}_{side}_frame_error" for model in ("policy", "reference") for side in ("chosen", "rejected")]
LOSSES = {"mean": dense_dpo_loss, "sum": dense_dpo_sum_loss}
LABELS = np.array([[1, 1, -1, 0], [1, 1, 1, 1], [0, 0, 0, -1], [-1, 1, 0, 0]])


def errors(seed=0, rows=4, frames=4):
    rng = np.random.default_rng(seed)
    return {name: rng.gamma(4.0, 0.1, (rows, frames)) for name in NAMES}


def float32(arrays):
    return {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}


@pytest.mark.parametrize("kind", LOSSES)
def test_loss_and_gradient_are_those_of_float64(kind):
    a, loss = errors(), LOSSES[kind]
    chosen, rejected = (a[f"policy_{s}_frame_error"] - a[f"reference_{s}_frame_error"] for s in ("chosen", "rejected"))
    scale = 6.0 / (np.abs(LABELS).sum(1) if kind == "mean" else 1)
    z = -scale * (LABELS * (chosen - rejected)).sum(1)
    arrays, labels = float32(a), jnp.asarray(LABELS)
    output = loss(**arrays, segment_labels=labels, beta=6.0)
    np.testing.assert_allclose(output.loss, np.logaddexp(0, -z), rtol=1e-5)
    np.testing.assert_allclose(output.metrics["labelled"], [0.75, 1, 0.25, 0.5])
    gradient = jax.grad(lambda e: loss(**e, segment_labels=labels, beta=6.0).loss.sum())(arrays)
    slope = (scale / (1 + np.exp(z)))[:, None] * LABELS
    np.testing.assert_allclose(gradient["policy_chosen_frame_error"], slope, rtol=1e-4)
    np.testing.assert_allclose(gradient["policy_rejected_frame_error"], -slope, rtol=1e-4)
    assert np.all(np.asarray(gradient["policy_chosen_frame_error"])[LABELS == 0] == 0)
    assert all(np.all(gradient[name] == 0) for name in NAMES if name.startswith("reference"))


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_exchanging_videos_and_labels_is_no_change(loss):
    arrays = float32(errors())
    exchanged = {
        name: arrays[name.replace(*pair)]
        for name in NAMES
        for pair in [("chosen", "rejected") if "chosen" in name else ("rejected", "chosen")]
    }
    one = loss(**arrays, segment_labels=jnp.asarray(LABELS), beta=6.0).loss
    np.testing.assert_allclose(loss(**exchanged, segment_labels=-jnp.asarray(LABELS), beta=6.0).loss, one, rtol=1e-6)


def test_uniform_labels_are_a_whole_videos_loss():
    """Labels all alike, or one segment: the loss of mean errors, whose logit is beta / 2 times the margin there."""
    arrays = float32(errors())
    means = {name.replace("_frame", ""): jnp.mean(x, axis=1) for name, x in arrays.items()}
    given = dense_dpo_loss(**arrays, segment_labels=jnp.ones((4, 4)), beta=6.0)
    np.testing.assert_allclose(given.loss, diffusion_dpo_loss(**means, beta=12.0).loss, rtol=1e-5)
    first = {name: x[:, :1] for name, x in arrays.items()}
    image = {name.replace("_frame", ""): x[:, 0] for name, x in arrays.items()}
    given = dense_dpo_loss(**first, segment_labels=jnp.ones((4, 1)), beta=6.0)
    np.testing.assert_allclose(given.loss, diffusion_dpo_loss(**image, beta=12.0).loss, rtol=1e-5)


def test_opposite_labels_of_equal_errors_cancel_and_all_ties_say_nothing():
    arrays = float32({name: np.repeat(x[:, :1], 4, axis=1) for name, x in errors().items()})
    for labels in ([[1, -1, 0, 0]], [[0, 0, 0, 0]]):
        labels = jnp.asarray(np.repeat(labels, 4, axis=0))
        np.testing.assert_allclose(dense_dpo_loss(**arrays, segment_labels=labels).loss, np.log(2), rtol=1e-5)
    gradient = jax.grad(lambda e: dense_dpo_loss(**e, segment_labels=jnp.zeros((4, 4))).loss.sum())(arrays)
    assert all(np.all(x == 0) for x in gradient.values())


def test_what_stands_at_ties_is_not_read():
    arrays = float32(errors())
    spoiled = {name: jnp.where(LABELS == 0, jnp.nan, x) for name, x in arrays.items()}
    labels = jnp.asarray(LABELS)

    def both(e):
        return jax.value_and_grad(lambda e: dense_dpo_loss(**e, segment_labels=labels).loss.sum())(e)

    jax.tree.map(np.testing.assert_array_equal, both(spoiled), both(arrays))


def test_videos_have_noise_of_their_own():
    clean, noise = jax.random.normal(jax.random.key(0), (2, 4, 3, 2))
    process = Process(predicts_flow)
    inputs = dense_dpo_inputs(clean=clean, own_noise=noise, times=jnp.full(4, 250.0), condition=None, process=process)
    np.testing.assert_allclose(inputs.latents, 0.75 * clean + 0.25 * noise, atol=1e-6)
    np.testing.assert_allclose(inputs.target, noise - clean, atol=1e-6)


EXACT = gaussian_model(None, predicts_flow)


def pair(level, *, same=False, steps=20, **options):
    keys = jax.random.split(jax.random.key(1), 3)
    video, one, two = (jax.random.normal(key, (64, 3, 2)) for key in keys)
    video = 0.6 + 0.4 * video
    noises = (one, one if same else two)
    videos = guided_pair(
        EXACT, video, noises, parameterisation=predicts_flow, guidance_level=level, steps=steps, **options
    )
    return video, noises, videos


def test_guided_pairs_stay_as_near_to_the_video_as_the_level_is_low():
    video, _, (one, two) = pair(0.0)
    np.testing.assert_array_equal(one, video)
    np.testing.assert_array_equal(two, video)
    _, _, (one, two) = pair(0.75, same=True)
    np.testing.assert_array_equal(one, two)
    apart, away = [], []
    for level in (0.2, 0.5, 0.8, 1.0):
        video, _, (one, two) = pair(level)
        apart.append(float(jnp.mean((one - two) ** 2)))
        away.append(float(jnp.mean((one - video) ** 2)))
    assert apart == sorted(apart) and away == sorted(away) and apart[0] < 0.5 * apart[-1]


def test_guided_pairs_are_eulers_steps_downwards():
    """x <- x - v / N; the start is at the level, or at that of the first step."""
    for snap, start in ((False, 0.33), (True, 0.35)):
        video, noises, videos = pair(0.33, snap=snap)  # 6.6 of 20 steps are 7
        for noise, given in zip(noises, videos):
            x = (1 - start) * video + start * noise
            for i in range(7, 0, -1):
                x = x - EXACT(x, jnp.full(64, 50.0 * i), None) / 20
            np.testing.assert_allclose(given, x, atol=1e-4)
    with pytest.raises(ValueError, match="guidance_level"):
        pair(1.2)


def test_frames_belong_to_segments():
    np.testing.assert_array_equal(segment_ids(7, 3), [0, 0, 0, 1, 1, 1, 2])
    np.testing.assert_array_equal(latent_frames(9, 4), [0, 4, 8])
    ids = segment_ids(17, 8)[latent_frames(17, 4)]  # latent frames 0, 1-4, 5-8, 9-12, 13-16
    np.testing.assert_array_equal(ids, [0, 0, 1, 1, 2])
    np.testing.assert_array_equal(frame_labels(np.array([[1, 0, -1]]), ids), [[1, 1, 0, 0, -1]])
    with pytest.raises(ValueError, match="segments"):
        segment_ids(4, 0)


def test_answers_that_disagree_are_ties():
    forward, swapped = np.array([1, 1, 1, 0, -1, -1, 0]), np.array([-1, 1, 0, 0, 1, -1, 1])
    np.testing.assert_array_equal(merge_answers(forward, swapped), [1, 0, 0, 0, -1, 0, 0])
    np.testing.assert_array_equal(majority([[1, 1, -1], [1, -1, 0], [0, 0, -1]]), [1, 0, -1])
    np.testing.assert_array_equal(labelled_pairs([[0, 0, 0, 0, 1], [0, 1, 1, 0, 0], [0] * 5]), [1])
