"""`evaluate` with a CLIP of its own: the numbers that are printed are the reward's of the images that are written."""

from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_pipelines import WORDS, make_tiny_pipeline, random_variables
from tiny_runs import command

from dpo_jax.cli.images import evaluate as image_evaluate
from dpo_jax.diffusion.models import clip, clip_config
from dpo_jax.diffusion.models.clip_config import ClipConfig, TextConfig, VisionConfig
from dpo_jax.diffusion.models.weights import TRANSFORMERS, save_model
from dpo_jax.diffusion.rewards import load_reward
from dpo_jax.worlds.shape_models import END, clip_vocabulary, write_clip_tokenizer

PROMPTS = ("a red circle", "the large blue square and a small triangle")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("model"), "sd")


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A CLIP of both towers without a tokenizer, as HPSv2 and PickScore are published, and a tokenizer."""
    folder = tmp_path_factory.mktemp("judge")
    vocabulary, _ = clip_vocabulary(WORDS)
    common: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 16, "layers": 2, "heads": 2}
    text = TextConfig(vocabulary_size=len(vocabulary), positions=12, end_token=vocabulary[END], **common)
    config = ClipConfig(text, VisionConfig(image_size=16, patch_size=4, **common), projection=6)
    variables = random_variables(clip.abstract_variables(config), seed=3)
    table, keys = clip.weight_table(config), clip_config.config_to_dict(config)
    save_model(folder / "clip", variables, table, keys, stem=TRANSFORMERS)
    write_clip_tokenizer(folder / "words", WORDS, length=12)
    return folder / "clip", folder / "words"


@pytest.mark.slow
def test_scores_are_the_rewards_of_the_images_that_were_drawn(model, judge, tmp_path):
    weights, words = judge
    out, given = tmp_path / "o", ("--prompt", *PROMPTS, "--samples", 2, "--sampling-steps", 2, "--json")
    rewards = ("--reward", "clip", "hps", "--reward-model", weights, weights, "--reward-tokenizer", words)
    answer = command("evaluate", "--model", model, *given, *rewards, "--out", out)
    assert answer.code == 0, answer.err
    images = [np.asarray(Image.open(path)) for path in sorted((out / "model").glob("0*.png"))]
    texts = [prompt for prompt in PROMPTS for _ in range(2)]
    for name in ("clip", "hps"):
        scores = load_reward(name, weights, tokenizer=words).score(images, texts)
        assert answer.result[f"model_{name}"] == pytest.approx(scores.mean(), abs=1e-5)
        swapped = load_reward(name, weights, tokenizer=words).score(images, texts[::-1])
        assert abs(swapped.mean() - scores.mean()) > 1e-3  # the text counts


@pytest.mark.parametrize(
    ("options", "said", "code"),
    [
        ("--reward clip --reward-model CLIP", "no vocab.json; give `tokenizer` (--reward-tokenizer)", 1),
        (
            "--reward clip --reward-model none --reward-tokenizer WORDS",
            "--reward-model none: no such file or folder",
            2,
        ),
        ("--reward clip --reward-model CLIP --reward-tokenizer none", "--reward-tokenizer none: no such file", 2),
        ("--reward aesthetic --reward-model CLIP --reward-tokenizer WORDS", "--reward-tokenizer has no effect", 2),
        ("--samples 2 --reward-tokenizer WORDS", "--reward-tokenizer has no effect", 2),
        ("--reward aesthetic --reward-model CLIP", "the aesthetic head's tensors are", 1),
    ],
)
def test_rewards_are_found_before_images_are_drawn(model, judge, tmp_path, options, said, code, monkeypatch):
    def never(*arguments, **more):
        raise AssertionError("drawn")

    monkeypatch.setattr(image_evaluate, "ImageSampler", never)
    names = {"CLIP": judge[0], "WORDS": judge[1]}
    words = [names.get(word, word) for word in options.split()]
    answer = command("evaluate", "--model", model, "--prompt", "a circle", *words)
    assert answer.code == code and said in answer.err and "Traceback" not in answer.err, answer.err
