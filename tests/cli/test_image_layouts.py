"""Each layout of pipeline goes through train, kill -9, the same command again, export, generate and diffusers."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from real_processes import finish, kill_at, result_of, shared_programs, starting
from safetensors.numpy import load_file
from tiny_images import TinyImages, leaves, make_tiny_images, same_bytes, train_words
from tiny_runs import command, losses

from dpo_jax.diffusion.models.folder import Kind, denoiser_name, load_denoiser, open_pipeline, predict_function
from dpo_jax.diffusion.types import TextCondition

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = 40
WORDS = ("--held-out", 0, "--caption-dropout", 0.5, "--buckets", "aspect", "--save-every", 2)
# A fixed table of positions, and queries of captions that the last block has and does not read.
LAST = "transformer_blocks.2.attn.add_q_proj"
UNTRAINED = {"sd": set(), "sdxl": set(), "sd3": {"pos_embed.pos_embed", f"{LAST}.weight", f"{LAST}.bias"}}


class Run(NamedTuple):
    """A run that was killed and that ended, and what is known of it.

    Attributes:
      out: its folder.
      before: its losses when it was killed.
      resumed: what the command that ended it printed.
      whole: folder of the run that nothing interrupted.
    """

    kind: Kind
    tiny: TinyImages
    out: Path
    before: list[float]
    resumed: dict[str, Any]
    whole: Path


@pytest.fixture(scope="module", params=["sd", "sdxl", "sd3"])
def run(request, tmp_path_factory):
    """The one run of each layout, in processes of its own, beside its uninterrupted twin."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny = make_tiny_images(folder / "tiny", request.param)
    out, whole = folder / "run", folder / "whole"
    programs = shared_programs()
    with starting() as start:
        kill_at([start(1, train_words(tiny, out, *WORDS, steps=STEPS), programs)], out, 4)
        before = losses(out)
        # With the devices of this process other programs would be compiled, whose numbers differ in the last bits.
        both = [start(1, train_words(tiny, place, *WORDS, steps=STEPS), programs) for place in (out, whole)]
        resumed = result_of(finish(both)[0])
    return Run(request.param, tiny, out, before, resumed, whole)


def test_losses_begin_where_policy_and_reference_are_one(run):
    assert losses(run.out)[0] == pytest.approx(np.log(2), abs=1e-3)


def test_killed_without_warning_it_ends_as_if_never_killed(run):
    assert 4 <= len(run.before) < STEPS and 4 <= run.resumed["resumed_from"] <= len(run.before)
    assert run.before == losses(run.out)[: len(run.before)]
    lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert losses(run.out) == losses(run.whole)
    assert leaves(run.out, STEPS) == leaves(run.whole, STEPS)


def test_the_export_has_the_trained_weights_and_all_else_as_it_was(run, tmp_path):
    name = denoiser_name(run.kind)
    same_bytes(run.tiny.model, run.out / "export", name)
    weights = f"{name}/diffusion_pytorch_model.safetensors"
    before, after = load_file(run.tiny.model / weights), load_file(run.out / "export" / weights)
    assert before.keys() == after.keys()
    assert {key for key in before if (before[key] == after[key]).all()} == UNTRAINED[run.kind]
    answer = command("export", "--run", run.out, "--out", tmp_path / "again", "--json")
    assert answer.code == 0 and answer.result["step"] == STEPS, answer.err
    same_bytes(run.out / "export", tmp_path / "again", "nothing")


def test_images_of_what_was_trained(run, tmp_path):
    given = ("--prompt", "a red circle", "a blue square", "--out", tmp_path, "--sampling-steps", 2)
    answer = command("generate", "--model", run.out, *given, "--json")
    assert answer.code == 0, answer.err
    assert answer.result["images"] == 2 and (tmp_path / "0001_00.png").exists()


def test_diffusers_reads_the_export_and_predicts_the_same(run):
    reason = "reads the exported pipeline with the library that it is for"
    torch = pytest.importorskip("torch", reason=reason)
    diffusers = pytest.importorskip("diffusers", reason=reason)
    kind, out = run.kind, run.out
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
