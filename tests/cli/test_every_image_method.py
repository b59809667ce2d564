"""Every method of the diffusion wing that learns from data trains through the command line on the shapes world."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_runs import command, losses, write_rows

from dpo_jax.cli.catalogue import Method, methods
from dpo_jax.diffusion.objectives import origin
from dpo_jax.report import read_metrics
from dpo_jax.signatures import read_needs
from dpo_jax.worlds import shape_models, shapes

STEPS, SIZE = 20, 8
METHODS = {slug: method for slug, method in methods().items() if method.wing == "diffusion" and not method.online}
# What a user has to give: grids that fit a run of seconds, scores of another range than PickScore's.
OPTIONS = {
    "inversion-dpo": ("--trajectory-steps", 3, "--beta", 1e7),
    "inpo": ("--inversion-steps", 4),
    "smpo": ("--inversion-steps", 4, "--score-min", 0, "--score-max", 1),
    "self-npo": ("--rollout-steps", 2, "--grid", 5),
    "self-npo-velocity": ("--rollout-steps", 2, "--grid", 5),
    "dspo": ("--beta", 1.0),
    **{f"diffusion-kto{name}": ("--beta", 10) for name in ("", "-averse", "-seeking", "-signed", "-exponential")},
    **{f"diffusion-kto-{name}": ("--beta", 10) for name in ("balanced", "mismatched")},
}
FORMS = {"mismatched": "captions", "experts": "pairs"}


class World(NamedTuple):
    """Files of rows by form, and a pipeline of pixels."""

    rows: dict[str, Path]
    model: Path


def make_world(folder: Path) -> World:
    """A tiny pipeline of the shapes world, and files of every form."""
    config = shape_models.denoiser_config((8,), size=SIZE)
    variables = shape_models.init_variables(config, jax.random.key(0))
    model = shape_models.save_shape_pipeline(folder / "model", config, variables)
    random = np.random.default_rng(0)

    def saved(image: np.ndarray) -> str:
        name = f"{len(list(folder.glob('*.png')))}.png"
        Image.fromarray(image).save(folder / name)
        return name

    files: dict[str, list[dict]] = {name: [] for name in ("pairs", "singles", "lists", "captions", "patches", "videos")}
    for form in ("pairs", "singles", "lists"):
        for row in shapes.make_rows(form, 24, seed=3, size=SIZE):
            for key in {"chosen", "rejected", "image"} & row.keys():
                row[key] = saved(row[key])
            if form == "lists":
                row["images"] = [saved(image) for image in row["images"]]
            if form == "pairs":
                row["reward_gap"] = row["chosen_score"] - row["rejected_score"]
            files[form].append(row)
    for row in files["pairs"]:
        caption, image, other = row["caption"], row["chosen"], row["rejected"]
        files["captions"].append(
            {"caption": caption, "image": image, "rejected_caption": shapes.edit_caption(caption, random)}
        )
        maps = {f"{side}_quality": random.random((SIZE, SIZE)).tolist() for side in ("entity", "generated")}
        files["patches"].append({"caption": caption, "entity": image, "generated": other, **maps})
        videos = {"chosen_frames": [image, other, image, other], "rejected_frames": [other, image, other, other]}
        files["videos"].append({"caption": caption, **videos, "segment_labels": [1, 0, -1, 1]})
    return World({name: write_rows(folder / f"{name}.jsonl", rows) for name, rows in files.items()}, model)


def rows_for(method: Method) -> str:
    """The file that a method's rows are made of."""
    video = any(origin(name).statistic == "frame_error" for name in read_needs(method.loss).arrays)
    if method.form == "mismatched" and "labels" in method.columns:
        return "singles"
    return "videos" if video else FORMS.get(method.form, method.form)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.slow
@pytest.mark.parametrize("slug", METHODS)
def test_method_trains(slug, world, tmp_path):
    method, out = METHODS[slug], tmp_path / "run"
    cache = world.model.parent / "cache"  # latents and text states are the same for all
    answer = command(
        *("train", slug, "--model", world.model, "--data", world.rows[rows_for(method)], "--out", out),
        *("--steps", STEPS, "--batch-size", 8, "--learning-rate", 1e-3, "--held-out", 0),
        *("--log-every", STEPS, "--save-every", 0, "--no-export", "--cache", cache, "--json"),
        *OPTIONS.get(slug, ()),
    )
    assert answer.code == 0, answer.err
    found = losses(out)
    assert len(found) == STEPS and all(map(math.isfinite, found))
    assert len(set(found)) > STEPS // 2
    assert max(line["gradient_norm"] for line in read_metrics(out)) > 0
    assert json.loads((out / "run.json").read_text())["method"] == slug
