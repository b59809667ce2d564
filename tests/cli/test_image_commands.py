"""`train`, `export`, `generate` and `evaluate` of diffusion models on tiny pipelines: the numbers that they promise."""

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from tiny_images import change_rows, leaves, make_image_folder, make_tiny_images, same_bytes, train_images
from tiny_runs import command, losses

from dpo_jax.cli import loop
from dpo_jax.cli.images import evaluate as image_evaluate
from dpo_jax.diffusion.models.folder import open_pipeline

STEPS = 4
HELD = ("--held-out", 2.0)
EXACT = ("--caption-dropout", 0.3, "--ema-decay", 0.9, "--save-every", 2, "--no-export", *HELD)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """Folder of a run of the whole model that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    answer = train_images(tiny, out, "--caption-dropout", 0.3, "--ema-decay", 0.9, "--save-every", 2, *HELD)
    assert answer.code == 0, answer.err
    return out


@pytest.fixture(scope="module")
def adapted(tiny, tmp_path_factory):
    """Folder of a run of adapters."""
    out = tmp_path_factory.mktemp("adapted")
    answer = train_images(tiny, out, "--lora-rank", 2, "--held-out", 0)
    assert answer.code == 0, answer.err
    return out


@pytest.fixture
def stop_at(monkeypatch):
    """`stop_at(n)`: the next run gets SIGTERM while its n-th batch is laid out on the devices."""

    def arm(number: int) -> None:
        count, real = 0, loop.shard_batch

        def shard_batch(batch, mesh):
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(batch, mesh)

        monkeypatch.setattr(loop, "shard_batch", shard_batch)

    return arm


def drawn(folder: Path) -> dict[str, np.ndarray]:
    """Images of a folder by name, without the grid."""
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("0*.png"))}


def generate(model, out, *words) -> dict[str, np.ndarray]:
    given = ("generate", "--model", model, "--out", out, "--sampling-steps", 3, "--guidance", 2.0, "--json")
    answer = command(*given, *words)
    assert answer.code == 0, answer.err
    images = drawn(out)
    assert answer.result["images"] == len(images)
    return images


def gap(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> int:
    """Largest difference of a colour, of 255."""
    return max(int(np.abs(first[name] - second[name]).max()) for name in first)


PROMPTS = ("--prompt", "a red circle", "a blue square")


# The first run of a program is compiled, which takes longer than ten seconds; what follows shares it.


@pytest.mark.slow
def test_train_exports_a_pipeline_with_all_other_parts_as_they_were(tiny, whole):
    assert losses(whole)[0] == pytest.approx(math.log(2), abs=1e-3)  # beta is 5000: rounding shows
    assert len(losses(whole)) == STEPS and len(losses(whole, "eval")) == 1
    opened, before = open_pipeline(whole / "export"), open_pipeline(tiny.model)
    assert opened.denoiser == before.denoiser and opened.kind == "sd"
    same_bytes(tiny.model, whole / "export", "unet")
    weights = [load_file(p / "unet" / "diffusion_pytorch_model.safetensors") for p in (tiny.model, whole / "export")]
    assert {k: v.shape for k, v in weights[0].items()} == {k: v.shape for k, v in weights[1].items()}
    assert any((weights[0][name] != weights[1][name]).any() for name in weights[0])
    answer = train_images(tiny, whole, "--caption-dropout", 0.3, "--ema-decay", 0.9, "--save-every", 2, *HELD)
    assert answer.code == 0, answer.err
    assert answer.result["resumed_from"] == answer.result["steps"] == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 3])
def test_stopped_by_sigterm_it_ends_as_if_never_stopped(tiny, whole, tmp_path, stop_at, stop):
    stop_at(stop)
    answer = train_images(tiny, tmp_path, *EXACT)
    assert answer.code == 0 and answer.result["stopped"], answer.err
    stop_at(100)
    answer = train_images(tiny, tmp_path, *EXACT)
    assert answer.code == 0, answer.err
    assert answer.result["resumed_from"] == stop and not answer.result["stopped"]
    assert losses(tmp_path) == losses(whole) and losses(tmp_path, "eval") == losses(whole, "eval")
    assert leaves(tmp_path, STEPS) == leaves(whole, STEPS)
    assert {name.split("/")[0] for name in leaves(whole, STEPS)} == {
        "step",
        "params",
        "opt_state",
        "key",
        "ema",
        "reference",
    }


@pytest.mark.slow
def test_microbatches_give_the_same_numbers(tiny, tmp_path):
    small = ("--learning-rate", 1e-4, "--no-export", *HELD)
    for name, words in (("whole", ()), ("parts", ("--microbatches", 2))):
        answer = train_images(tiny, tmp_path / name, *small, *words)
        assert answer.code == 0, answer.err
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    np.testing.assert_allclose(parts, whole, rtol=5e-3)  # beta of 5000 and Adam enlarge rounding
    assert np.ptp(whole) > 0.05  # far above the tolerance


@pytest.mark.slow
def test_a_mesh_of_eight_gives_the_same_numbers(tiny, tmp_path):
    small = ("--learning-rate", 1e-4, "--no-export", *HELD)
    assert train_images(tiny, tmp_path / "one", *small).code == 0
    answer = train_images(tiny, tmp_path / "eight", *small, "--mesh-fsdp", 2, "--mesh-model", 2)
    assert answer.code == 0, answer.err
    one, eight = losses(tmp_path / "one"), losses(tmp_path / "eight")
    assert eight[0] == pytest.approx(one[0], abs=1e-3)  # beta is 5000: rounding shows
    np.testing.assert_allclose(eight, one, rtol=5e-3)  # beta of 5000 and Adam enlarge rounding


@pytest.mark.slow
def test_a_shared_cache_is_filled_once(tiny, whole, tmp_path, monkeypatch):
    from dpo_jax.cli.images import data as image_data

    def never(*arguments):
        raise AssertionError("everything is in the cache")

    for name in ("image_encoder", "text_encoder", "load_image"):
        monkeypatch.setattr(image_data, name, never)
    cache = ("--cache", whole / "cache")
    answer = train_images(tiny, tmp_path, *EXACT, *cache, steps=1)
    assert answer.code == 0, answer.err
    assert losses(tmp_path)[0] == losses(whole)[0]


@pytest.mark.slow
def test_adapters_alone_are_trained_kept_and_exported(tiny, adapted, tmp_path):
    assert losses(adapted)[0] == pytest.approx(math.log(2), abs=1e-3)  # beta is 5000: rounding shows
    kept = [name for name in leaves(adapted, STEPS) if name.startswith(("params/", "reference/", "frozen/"))]
    assert kept and all("/lora_" in name for name in kept)
    same_bytes(tiny.model, adapted / "export", "unet")
    merged = generate(adapted, tmp_path / "merged", *PROMPTS)
    beside = generate(tiny.model, tmp_path / "beside", *PROMPTS, "--adapter", adapted / "adapter")
    base = generate(tiny.model, tmp_path / "base", *PROMPTS)
    assert gap(merged, beside) <= 1 < gap(merged, base)


@pytest.mark.slow
def test_export_of_an_older_step_and_of_either_weights(tiny, whole, tmp_path):
    def unet(folder):
        return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")

    def exported(*words):
        out = tmp_path / "-".join(map(str, words)) if words else tmp_path / "plain"
        answer = command("export", "--run", whole, "--out", out, "--json", *words)
        assert answer.code == 0, answer.err
        return answer.result, unet(out)

    own = unet(whole / "export")
    plain, ema = exported(), exported("--weights", "ema")
    for said, weights in (plain, ema):
        assert (said["step"], said["weights"]) == (STEPS, "ema")
        assert all((weights[name] == own[name]).all() for name in own)
    said, params = exported("--weights", "params")
    assert said["weights"] == "params" and any((params[name] != own[name]).any() for name in own)
    said, older = exported("--step", 2, "--weights", "params")
    assert said["step"] == 2 and any((params[name] != older[name]).any() for name in own)
    same_bytes(tiny.model, tmp_path / "plain", "unet")
    answer = command("export", "--run", whole, "--out", tmp_path / "none", "--step", 3)
    assert answer.code != 0 and "3" in answer.err and "Traceback" not in answer.err


@pytest.mark.slow
def test_export_of_a_run_of_adapters(adapted, tmp_path):
    answer = command("export", "--run", adapted, "--out", tmp_path / "o")
    assert answer.code == 0, answer.err
    for name in ("unet/diffusion_pytorch_model.safetensors", "adapter/pytorch_lora_weights.safetensors"):
        mine = load_file(tmp_path / "o" / name)
        theirs = load_file(adapted / "export" / name if name.startswith("unet") else adapted / name)
        assert mine.keys() == theirs.keys()
        for key in mine:  # kernels are merged on another mesh
            np.testing.assert_allclose(mine[key], theirs[key], atol=1e-6)
    answer = command("export", "--run", adapted, "--out", tmp_path / "ema", "--weights", "ema")
    assert answer.code == 2 and "keeps no moving average" in answer.err


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [("ddim",), ("ddim", "--eta", 1.0), ("ddpm",)])
def test_the_same_seed_gives_the_same_images_in_any_company(tiny, tmp_path, sampler):
    options = ("--samples", 3, "--sampler", *sampler)
    first = generate(tiny.model, tmp_path / "a", *PROMPTS, *options)
    assert sorted(first) == [f"{prompt:04d}_{number:02d}.png" for prompt in (0, 1) for number in range(3)]
    for number, batch in enumerate((1, 4)):
        again = generate(tiny.model, tmp_path / f"b{number}", *PROMPTS, *options, "--batch-size", batch)
        assert gap(first, again) <= 1
    alone = generate(tiny.model, tmp_path / "c", "--prompt", "a blue square", *options)
    assert gap({name.replace("0000", "0001"): image for name, image in alone.items()}, first) <= 1
    other = generate(tiny.model, tmp_path / "d", *PROMPTS, *options, "--seed", 1)
    assert gap(first, other) > 10
    values = list(first.values())
    assert min(np.abs(a - b).max() for i, a in enumerate(values[:3]) for b in values[:i]) > 10


@pytest.mark.slow
def test_what_generate_writes(tiny, tmp_path):
    rows = change_rows(tiny.rows, lambda number, row: {"caption": row["caption"]})
    images = generate(tiny.model, tmp_path / "o", "--data", rows, "--height", 24, "--width", 8)
    assert len(images) == 20 and {image.shape for image in images.values()} == {(24, 8, 3)}
    assert np.asarray(Image.open(tmp_path / "o" / "grid.png")).shape == (3 * 26 - 2, 8 * 10 - 2, 3)
    lines = [json.loads(line) for line in (tmp_path / "o" / "images.jsonl").read_text().splitlines()]
    captions = [json.loads(line)["caption"] for line in rows.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == captions
    assert all((tmp_path / "o" / line["file_name"]).exists() for line in lines)


@pytest.mark.slow
def test_what_guidance_leads_away_from(tiny, tmp_path):
    plain = generate(tiny.model, tmp_path / "plain", *PROMPTS)
    away = generate(tiny.model, tmp_path / "away", *PROMPTS, "--negative-prompt", "bad")
    none = generate(tiny.model, tmp_path / "none", *PROMPTS, "--guidance", 1)
    itself = generate(tiny.model, tmp_path / "itself", *PROMPTS, "--negative-model", tiny.model)
    other = generate(tiny.model, tmp_path / "other", *PROMPTS, "--negative-model", tiny.other)
    assert gap(plain, itself) <= 1
    assert min(gap(plain, away), gap(plain, none), gap(plain, other)) > 1


@pytest.mark.slow
def test_evaluate_finds_a_model_as_good_as_itself(tiny, tmp_path, monkeypatch):
    class Brightness:
        def score(self, images, texts):
            assert len(images) == len(texts)
            return np.array([image.mean() for image in images])

    monkeypatch.setattr(image_evaluate, "check_reward", lambda name, folder, tokenizer: None)
    monkeypatch.setattr(image_evaluate, "load_reward", lambda name, folder, mesh, tokenizer: Brightness())
    given = ("--model", tiny.model, *PROMPTS, "--sampling-steps", 3, "--samples", 3, "--json")
    reward = ("--reward", "clip", "--reward-model", tiny.model)
    answer = command("evaluate", *given, *reward, "--reference-model", tiny.model, "--out", tmp_path / "o")
    assert answer.code == 0, answer.err
    said = answer.result
    assert said["clip_win_rate"] == 0.5 and said["clip_win_rate_low"] < 0.5 < said["clip_win_rate_high"]
    assert said["model_clip"] == said["reference_clip"] and said["model_diversity"] == said["reference_diversity"] > 0
    assert (said["prompts"], said["images"]) == (2, 6)
    assert gap(drawn(tmp_path / "o" / "model"), drawn(tmp_path / "o" / "reference")) == 0
    images = np.stack(list(drawn(tmp_path / "o" / "model").values())).astype(np.uint8)
    assert said["model_diversity"] == pytest.approx(image_evaluate.diversity(images, 3))
    answer = command("evaluate", *given, *reward, "--reference-model", tiny.other)
    brighter = answer.result["model_clip"] > answer.result["reference_clip"]
    assert (answer.result["clip_win_rate"] > 0.5) == brighter


def test_diversity_and_win_rates():
    images = np.zeros((4, 2, 2, 3), np.uint8)
    images[1], images[3, 0] = 255, 255
    assert image_evaluate.diversity(images, 2) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    rates = image_evaluate.win_rates("x", np.array([1.0, 2, 3, 3]), np.array([0.0, 2, 4, 3]))
    assert rates["x_win_rate"] == 0.5 and 0 < rates["x_win_rate_low"] < 0.5 < rates["x_win_rate_high"] < 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "form", "options"),
    [
        ("diffusion-kto", "singles", ("--flip",)),
        ("tdpo", "pairs", ()),
        ("rankdpo", "lists", ("--buckets", "aspect")),
    ],
)
def test_methods_of_other_forms(tiny, tmp_path, method, form, options):
    rows = make_image_folder(tmp_path / "rows", form, count=8)
    if form == "lists":  # lists of several lengths
        rows = change_rows(
            rows,
            lambda number, row: {
                **row,
                "images": row["images"][: 2 + number % 2],
                "scores": row["scores"][: 2 + number % 2],
            },
        )
    answer = train_images(tiny._replace(rows=rows), tmp_path / "o", *options, "--no-export", method=method, steps=2)
    assert answer.code == 0, answer.err
    assert np.isfinite(losses(tmp_path / "o")).all()
