"""Each layout of pipeline goes through train, generate and diffusers."""

import jax
import numpy as np
import pytest
from tiny_images import make_tiny_images, train_images
from tiny_runs import command, losses

from dpo_jax.cli import image_generate, image_train
from dpo_jax.diffusion.models.folder import load_denoiser, open_pipeline, predict_function
from dpo_jax.diffusion.types import TextCondition
from dpo_jax.sharding import make_mesh

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["sd", "sdxl", "sd3"])
def run(request, tmp_path_factory):
    """Kind, and folder of a run with the exported pipeline."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny = make_tiny_images(folder / "tiny", request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_train, "mesh_of", lambda config: make_mesh(devices=jax.devices()[:1]))
        words = ("--held-out", 0, "--caption-dropout", 0.5, "--buckets", "aspect")
        answer = train_images(tiny, folder / "run", *words, steps=2)
    assert answer.code == 0, answer.err
    return request.param, folder / "run"


def test_losses_begin_where_policy_and_reference_are_one(run):
    assert losses(run[1])[0] == pytest.approx(np.log(2), abs=1e-3)


def test_images_of_what_was_trained(run, tmp_path, monkeypatch):
    monkeypatch.setattr(image_generate, "mesh_of", lambda config: make_mesh(devices=jax.devices()[:1]))
    given = ("--prompt", "a red circle", "a blue square", "--out", tmp_path, "--sampling-steps", 2)
    answer = command("generate", "--model", run[1], *given, "--json")
    assert answer.code == 0, answer.err
    assert answer.result["images"] == 2 and (tmp_path / "0001_00.png").exists()


def test_diffusers_reads_the_export_and_predicts_the_same(run):
    reason = "reads the exported pipeline with the library that it is for"
    torch = pytest.importorskip("torch", reason=reason)
    diffusers = pytest.importorskip("diffusers", reason=reason)
    kind, out = run
    pipeline = open_pipeline(out / "export")
    random = np.random.default_rng(0)
    config, shape = pipeline.denoiser, (2, 8, 8, pipeline.denoiser.in_channels)
    width, pooled = _widths(config)
    latents = random.normal(size=shape).astype(np.float32)
    times = np.array([3.0, 700.0], np.float32)
    states = random.normal(size=(2, 5, width)).astype(np.float32)
    vector = None if pooled is None else random.normal(size=(2, pooled)).astype(np.float32)
    sizes = np.tile(np.array([[16, 16, 0, 2, 16, 16]], np.float32), (2, 1)) if kind == "sdxl" else None
    predict = jax.jit(predict_function(pipeline))
    mine = predict(load_denoiser(pipeline), latents, times, TextCondition(states, vector, sizes))
    absent = {"text_encoder_3": None, "tokenizer_3": None} if kind == "sd3" else {}
    said = diffusers.DiffusionPipeline.from_pretrained(out / "export", **absent)
    model = said.transformer if kind == "sd3" else said.unet
    given = {"encoder_hidden_states": torch.tensor(states), "timestep": torch.tensor(times)}
    if kind == "sd3":
        assert vector is not None
        given["pooled_projections"] = torch.tensor(vector)
    if kind == "sdxl":
        assert vector is not None and sizes is not None
        given["added_cond_kwargs"] = {"text_embeds": torch.tensor(vector), "time_ids": torch.tensor(sizes)}
    with torch.no_grad():
        theirs = model(torch.tensor(latents).permute(0, 3, 1, 2), **given).sample.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(np.asarray(mine), theirs, atol=1e-4)


def _widths(config):
    """Of the text states, and of the vector of the whole text."""
    if hasattr(config, "joint_attention_dim"):
        return config.joint_attention_dim, config.pooled_projection_dim
    pooled = config.pooled_dim - 6 * config.size_embedding if config.size_embedding else None
    return config.cross_attention_dim, pooled
