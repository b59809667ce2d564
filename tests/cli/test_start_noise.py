"""Inversion-DPO cannot start at its reference: the command moves the policy first.

That the whole model moves is seen in `test_every_image_method`; here it is adapters.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest
from PIL import Image
from tiny_runs import command, losses, write_rows

from dpo_jax.cli.catalogue import method
from dpo_jax.cli.images.configs import ImageModelConfig
from dpo_jax.cli.images.train import start_noise_of
from dpo_jax.worlds import shape_models, shapes

SIZE = 8


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A command that trains a model of pixels on a few pairs for two steps."""
    folder = tmp_path_factory.mktemp("shapes")
    config = shape_models.denoiser_config((8,), size=SIZE)
    variables = shape_models.init_variables(config, jax.random.key(0))
    model = shape_models.save_shape_pipeline(folder / "model", config, variables)
    rows = shapes.make_rows("pairs", 4, seed=3, size=SIZE)
    for number, row in enumerate(rows):
        for side in ("chosen", "rejected"):
            name = f"{number}_{side}.png"
            Image.fromarray(row[side]).save(folder / name)
            row[side] = name
    data = write_rows(folder / "rows.jsonl", rows)
    fixed = ("--model", model, "--data", data, "--cache", folder / "cache", "--steps", 2, "--batch-size", 4)
    fixed = (*fixed, "--trajectory-steps", 2, "--guidance", 1.0, "--learning-rate", 1e-3, "--log-every", 1)
    return ("train", "inversion-dpo", *fixed, "--held-out", 0, "--no-export", "--save-every", 0, "--json")


@pytest.mark.slow
def test_adapters_move(words, tmp_path):
    # Pixels of an untrained model differ little: the betas of latents would not be felt in float32.
    answer = command(*words, "--out", tmp_path / "run", "--beta", 1e7, "--lora-rank", 2)
    assert answer.code == 0, answer.err
    assert "starts with noise of 0.001" in answer.err
    found = losses(tmp_path / "run")
    assert all(abs(loss - math.log(2)) > 1e-4 for loss in found) and len(set(found)) == 2, found


def test_who_starts_with_noise():
    def noise(slug, **model):
        return start_noise_of(method(slug), SimpleNamespace(model=replace(ImageModelConfig(), **model)))

    assert noise("inversion-dpo") == 1e-3
    assert noise("inversion-dpo", start_noise=0.0) == 0 and noise("inversion-dpo", start_noise=0.1) == 0.1
    assert noise("inversion-dpo", reference_model="another") == 0
    assert noise("inpo") == 0 and noise("inpo", start_noise=0.1) == 0.1


@pytest.mark.parametrize("share", [-1, 2, "nan"])
def test_shares_out_of_range_are_refused(words, tmp_path, share):
    answer = command(*words, "--out", tmp_path / "run", "--start-noise", share)
    assert answer.code == 2 and "--start-noise" in answer.err
