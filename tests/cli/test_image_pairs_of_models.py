"""Two pipelines side by side, and images in tiles: what must be alike, what each brings, what the cache keeps."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_images import TinyImages, make_image_folder, train_images
from tiny_pipelines import make_tiny_pipeline
from tiny_runs import command

from dpo_jax.cli.images import train as image_train
from dpo_jax.cli.images.configs import ImageModelConfig
from dpo_jax.cli.images.models import image_decoder, image_encoder, open_images
from dpo_jax.diffusion.data.cache import Cache
from dpo_jax.diffusion.models.folder import load_autoencoder
from dpo_jax.diffusion.models.vae import autoencoder_function, from_latents, to_latents
from dpo_jax.sharding import make_mesh


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("model"), "sd")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp("rows") / "pairs", count=8, size=32)


def changed(model, out, file, **keys):
    """A copy of a pipeline with other values in one of its files."""
    folder = shutil.copytree(model, out)
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**values, **keys}))
    return folder


CHANGES = {
    "prediction type": ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}),
    "noise": ("scheduler/scheduler_config.json", {"beta_end": 0.02}),
    "autoencoder (scaling_factor)": ("vae/config.json", {"scaling_factor": 0.5}),
    "text encoder 1 (text)": ("text_encoder/config.json", {"hidden_act": "gelu"}),
}


@pytest.mark.parametrize("fact", CHANGES)
def test_a_reference_or_negative_model_must_be_alike(model, rows, tmp_path, fact):
    file, keys = CHANGES[fact]
    other = changed(model, tmp_path / "other", file, **keys)
    train = ("train", "diffusion-dpo", "--model", model, "--data", rows, "--out", tmp_path / "run")
    generate = ("generate", "--model", model, "--prompt", "x", "--out", tmp_path / "o")
    for words in ((*train, "--batch-size", 2, "--reference-model", other), (*generate, "--negative-model", other)):
        answer = command(*words)
        assert answer.code == 2, answer.err
        said = answer.err.strip().splitlines()[-1]
        assert said.endswith(f"{other} does not fit {model}; they differ in {fact}")
    assert not (tmp_path / "run").exists() and not (tmp_path / "o").exists()


def test_another_size_of_the_autoencoder_is_alike(model, tmp_path):
    other = changed(model, tmp_path / "other", "vae/config.json", sample_size=64, force_upcast=True)
    image_train.require_alike(*(open_images(str(folder), ImageModelConfig()) for folder in (model, other)))


def drawn(out, name):
    return np.stack([np.asarray(Image.open(path)).astype(int) for path in sorted((out / name).glob("0*.png"))])


@pytest.mark.slow
def test_evaluate_draws_each_model_with_its_own_parts(model, tmp_path):
    """A reference's images are those that it gives alone, whatever it is the reference of."""
    other = changed(model, tmp_path / "other", "scheduler/scheduler_config.json", prediction_type="v_prediction")
    changed_vae = json.loads((other / "vae" / "config.json").read_text())
    (other / "vae" / "config.json").write_text(json.dumps({**changed_vae, "scaling_factor": 0.5}))
    given = ("--prompt", "a red circle", "a blue square", "--samples", 2, "--sampling-steps", 2, "--json")
    both = command("evaluate", "--model", model, "--reference-model", other, *given, "--out", tmp_path / "both")
    alone = command("evaluate", "--model", other, *given, "--out", tmp_path / "alone")
    assert both.code == 0 and alone.code == 0, both.err
    np.testing.assert_array_equal(drawn(tmp_path / "both", "reference"), drawn(tmp_path / "alone", "model"))
    assert np.abs(drawn(tmp_path / "both", "reference") - drawn(tmp_path / "both", "model")).max() > 10


def test_evaluate_refuses_latents_of_another_shape(model, tmp_path):
    other = make_tiny_pipeline(tmp_path / "sd3", "sd3")
    answer = command("evaluate", "--model", model, "--prompt", "x", "--samples", 2, "--reference-model", other)
    assert answer.code == 2 and f"{other} has latents of [8, 8, 16] and {model} of [8, 8, 4]" in answer.err


# Tiles. The tiny autoencoder's own size is 16 pixels.


@pytest.mark.parametrize("side", [16, 40])
def test_images_that_are_larger_than_a_tile_go_through_tiles(model, side):
    mesh, options = make_mesh(devices=jax.devices()[:1]), ImageModelConfig(vae_tiling=True)
    opened, plain = open_images(str(model), options), open_images(str(model), ImageModelConfig())
    config = opened.pipeline.autoencoder
    assert config is not None
    variables, apply = load_autoencoder(opened.pipeline), autoencoder_function(config)
    images = np.random.default_rng(0).uniform(-1, 1, (2, side, side, 3)).astype(np.float32)
    found = np.stack([entry["latents"] for entry in image_encoder(opened, mesh)(images)]).astype(np.float32)
    expected = to_latents(config, apply(variables, images, method="tiled_encode").mean)
    np.testing.assert_allclose(found, expected, atol=2e-3)
    whole = np.stack([entry["latents"] for entry in image_encoder(plain, mesh)(images)]).astype(np.float32)
    assert (np.abs(found - whole).max() > 0.01) == (side > 16)
    latents = np.asarray(expected, np.float32)
    with jax.set_mesh(mesh):
        decoded, together = (np.asarray(image_decoder(one, mesh)(latents)) for one in (opened, plain))
    tiles = apply(variables, from_latents(config, latents), method="tiled_decode")
    np.testing.assert_allclose(decoded, np.clip(tiles, -1, 1), atol=1e-4)
    assert (np.abs(decoded - together).max() > 0.01) == (side > 16)


def test_latents_of_tiles_are_entries_of_their_own(model):
    marks = [open_images(str(model), ImageModelConfig(vae_tiling=tiled)).image_fingerprint() for tiled in (True, False)]
    assert marks[0] != marks[1]


@pytest.mark.slow
def test_commands_with_tiles(model, rows, tmp_path):
    tiny = TinyImages(model, rows, model)
    words = ("--held-out", 0, "--resolution", 32, "--no-export", "--cache", tmp_path / "cache")
    sizes = []
    for name, more in (("whole", ()), ("tiles", ("--vae-tiling",)), ("again", ("--vae-tiling",))):
        answer = train_images(tiny, tmp_path / name, *words, *more, steps=1)
        assert answer.code == 0, answer.err
        sizes.append(len(Cache(tmp_path / "cache")))
    assert sizes[1] == sizes[2] == sizes[0] + 16  # latents are made again, text states are not
    given = ("generate", "--model", model, "--prompt", "x", "--sampling-steps", 2, "--height", 32, "--width", 32)
    for name, more in (("a", ()), ("b", ("--vae-tiling",))):
        assert command(*given, "--out", tmp_path / name, *more).code == 0
    images = [np.asarray(Image.open(tmp_path / name / "0000_00.png")).astype(int) for name in "ab"]
    assert images[0].shape == (32, 32, 3) and np.abs(images[0] - images[1]).max() > 1


def test_tiles_that_cannot_be(model, tmp_path):
    given = ("generate", "--prompt", "x", "--out", tmp_path / "o", "--vae-tiling", "--model")
    odd = changed(model, tmp_path / "odd", "vae/config.json", sample_size=18)
    answer = command(*given, odd)
    assert answer.code == 2 and f"the autoencoder of {odd} has a size of 18, no multiple of 8" in answer.err
    pixels = shutil.copytree(model, tmp_path / "pixels")
    index = json.loads((pixels / "model_index.json").read_text())
    (pixels / "model_index.json").write_text(json.dumps({**index, "vae": [None, None]}))
    answer = command(*given, pixels)
    assert answer.code == 2 and f"--vae-tiling has no effect: {pixels} is a model of pixels" in answer.err
