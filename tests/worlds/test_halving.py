"""The autoencoder that is written down: averages in, smoothed averages out, and images that the judge still reads."""

from functools import partial

import jax
import numpy as np
import pytest

from dpo_jax.diffusion.models import vae
from dpo_jax.diffusion.models.vae_config import config_to_dict
from dpo_jax.diffusion.models.weights import DIFFUSERS, save_model
from dpo_jax.worlds.halving import halving_config, halving_variables, latents_of
from dpo_jax.worlds.shapes import GROUND, judge, make_captions, make_images


@pytest.fixture(scope="module")
def both_ways():
    """True images, what the encoder and the decoder make of them."""
    captions = make_captions(300, 3)
    images = make_images(captions, 3)
    apply = partial(vae.autoencoder_function(halving_config()), halving_variables())
    posterior = jax.jit(partial(apply, method="encode"))(images)
    return captions, images, posterior, np.asarray(jax.jit(partial(apply, method="decode"))(posterior.mean))


def averages(images: np.ndarray) -> np.ndarray:
    count, height, width, channels = images.shape
    return images.reshape(count, height // 2, 2, width // 2, 2, channels).astype(np.float64).mean((2, 4))


def test_latents_are_averages_and_sure(both_ways):
    _, images, posterior, _ = both_ways
    np.testing.assert_allclose(posterior.mean, averages(images), atol=5e-5)
    assert (np.asarray(posterior.log_variance) == -30).all()
    np.testing.assert_allclose(latents_of(images[:7], batch_size=3), averages(images[:7]), atol=5e-5)


def test_images_are_doubled_and_smoothed(both_ways):
    _, images, _, drawn = both_ways
    doubled = np.pad(
        averages(images).repeat(2, 1).repeat(2, 2), ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=GROUND
    )
    size, weights = images.shape[1], (0.15, 0.7, 0.15)
    wanted = sum(weights[i] * weights[j] * doubled[:, i : i + size, j : j + size] for i in range(3) for j in range(3))
    np.testing.assert_allclose(drawn, wanted, atol=1e-4)


def test_the_judge_reads_what_comes_out(both_ways):
    captions, images, _, drawn = both_ways
    before, after = ([judge(caption, image) for caption, image in zip(captions, some)] for some in (images, drawn))
    assert np.mean([verdict.correct for verdict in after]) > 0.88
    assert np.mean([abs(a.saturation - b.saturation) for a, b in zip(before, after)]) < 0.03


def test_diffusers_draws_the_same(both_ways, tmp_path):
    reason = "draws with the library whose layout the weights have"
    torch = pytest.importorskip("torch", reason=reason)
    diffusers = pytest.importorskip("diffusers", reason=reason)
    _, images, _, drawn = both_ways
    config = halving_config()
    keys = config_to_dict(config)
    save_model(tmp_path, halving_variables(), vae.weight_table(config), keys, stem=DIFFUSERS)
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path)
    with torch.no_grad():
        said = theirs(torch.tensor(images[:4]).permute(0, 3, 1, 2)).sample.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(said, drawn[:4], atol=1e-4)
