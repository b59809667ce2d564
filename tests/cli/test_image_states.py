"""What models are told besides CLIP's states: a T5's of SD3 from files, and SDXL's two empty prompts."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_images import change_rows, make_tiny_images, train_images
from tiny_runs import command

from dpo_jax.cli.images import generate as image_generate
from dpo_jax.cli.images.configs import ImageDataConfig, ImageModelConfig
from dpo_jax.cli.images.data import encode_rows, read_image_rows
from dpo_jax.cli.images.models import open_images
from dpo_jax.cli.images.sampling import SamplingConfig
from dpo_jax.cli.images.texts import halved, open_t5
from dpo_jax.diffusion.data.cache import Cache
from dpo_jax.diffusion.data.t5_states import open_t5_states, write_t5_states
from dpo_jax.diffusion.models.folder import load_encoders
from dpo_jax.diffusion.models.text import encode_text
from dpo_jax.sharding import make_mesh

PROMPT, OTHER = "a red circle", "a blue square"
LENGTH, WIDTH, LENGTH_OF_CLIP = 5, 24, 12


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return make_tiny_images(tmp_path_factory.mktemp("sd3"), "sd3")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return make_tiny_images(tmp_path_factory.mktemp("sdxl"), "sdxl")


def captions(rows):
    return [json.loads(line)["caption"] for line in (rows / "metadata.jsonl").read_text().splitlines()]


def states_of(text, seed=0):
    """Of a text alone, so that two texts differ."""
    return np.random.default_rng([seed, *text.encode()]).normal(size=(LENGTH, WIDTH)).astype(np.float16)


def write_states(folder, texts, seed=0):
    write_t5_states(folder, ((text, states_of(text, seed)) for text in dict.fromkeys(texts)))
    return folder


def images_of(model, out, *words):
    given = ("--prompt", PROMPT, OTHER, "--sampling-steps", 2, "--guidance", 2.0, "--json", *words)
    answer = command("generate", "--model", model, "--out", out, *given)
    assert answer.code == 0, answer.err
    return np.stack([np.asarray(Image.open(path)).astype(int) for path in sorted(out.glob("0*.png"))]), answer.err


def assert_refused(answer, code, *words):
    assert answer.code == code and "Traceback" not in answer.err, answer.err
    for word in words:
        assert word in answer.err.strip().splitlines()[-1], answer.err


@pytest.mark.slow
def test_states_of_a_t5_are_read_by_train_generate_and_evaluate(sd3, tmp_path):
    given = write_states(tmp_path / "t5", ["", PROMPT, OTHER, *captions(sd3.rows)])
    words = ("--held-out", 0, "--caption-dropout", 0.3)
    told = train_images(sd3, tmp_path / "told", *words, "--t5-states", given, steps=2)
    assert told.code == 0 and "zeros" not in told.err, told.err
    cache = Cache(tmp_path / "told" / "cache")
    kept = [entry["states"][LENGTH_OF_CLIP:] for entry in cache.values() if "states" in entry]
    texts = {"", *captions(sd3.rows)}
    assert len(kept) == len(texts)
    assert all(any((states_of(text) == states).all() for states in kept) for text in texts)
    model = tmp_path / "told" / "export"
    without, said = images_of(model, tmp_path / "without")
    assert said.count("reads a T5, and has none: zeros stand for them") == 1
    first, said = images_of(model, tmp_path / "first", "--t5-states", given)
    assert "zeros" not in said
    assert min(np.abs(a - b).max() for a, b in zip(first, without)) > 3
    # Each prompt reads its own states: another text's leave it as it is, whatever they are.
    changed = tmp_path / "changed"
    write_t5_states(changed, [(text, states_of(text, int(text == OTHER))) for text in ("", PROMPT, OTHER)])
    second, _ = images_of(model, tmp_path / "second", "--t5-states", changed)
    assert np.abs(first[0] - second[0]).max() <= 1 and np.abs(first[1] - second[1]).max() > 3
    write_t5_states(tmp_path / "empty", [(text, states_of(text, int(not text))) for text in ("", PROMPT, OTHER)])
    third, _ = images_of(model, tmp_path / "third", "--t5-states", tmp_path / "empty")
    assert min(np.abs(a - b).max() for a, b in zip(first, third)) > 3  # guidance leads away from the empty text
    judged = ("evaluate", "--model", model, "--prompt", PROMPT, OTHER, "--samples", 2, "--sampling-steps", 2, "--json")
    values = [command(*judged, *more) for more in ((), ("--t5-states", given))]
    assert all(answer.code == 0 for answer in values), values[1].err
    assert values[0].result["model_diversity"] != values[1].result["model_diversity"]


def test_both_captions_of_a_row_have_their_own_states(sd3, tmp_path):
    def own(number, row):
        return {**row, "chosen_caption": PROMPT, "rejected_caption": OTHER} if number == 1 else row

    given = open_t5_states(write_states(tmp_path / "t5", ["", PROMPT, OTHER, *captions(sd3.rows)]))
    model, config = open_images(str(sd3.model), ImageModelConfig()), ImageDataConfig(encode_batch=8)
    rows, seen = read_image_rows([str(change_rows(sd3.rows, own))], config, "pairs", None, 0)
    mesh, cache = make_mesh(devices=jax.devices()[:1]), Cache(tmp_path / "cache")
    encoded = encode_rows(rows, seen, (), config, model, mesh, cache, given)
    for row, example in zip(rows, encoded.examples, strict=True):
        expected = [states_of(text) for text in row.captions or (row.caption,) * 2]
        found = [cache[key]["states"][LENGTH_OF_CLIP:] for key in example.captions]
        np.testing.assert_array_equal(found, expected)
    assert rows[1].captions == (PROMPT, OTHER)
    assert encoded.empty == encoded.no_text
    np.testing.assert_array_equal(cache[encoded.empty]["states"][LENGTH_OF_CLIP:], states_of(""))


def test_texts_without_states_are_named(sd3, tmp_path):
    texts = captions(sd3.rows)
    some = write_states(tmp_path / "some", ["", *(text for text in texts if text != texts[2])])
    words = ("--held-out", 0, "--no-export", "--t5-states")
    number = 1 + texts.index(texts[2])
    refused = train_images(sd3, tmp_path / "a", *words, some, steps=1)
    assert_refused(refused, 1, f"metadata.jsonl, row {number}: --t5-states {some} has no states of the text", texts[2])
    whole = write_states(tmp_path / "whole", texts)
    assert_refused(train_images(sd3, tmp_path / "b", *words, whole, steps=1), 2, "has no states of the text ''")
    for name in ("generate", "evaluate"):
        given = (name, "--model", sd3.model, "--prompt", "never seen", "--samples", 2, "--t5-states", whole)
        out = ("--out", tmp_path / "o")
        assert_refused(command(*given, *out), 2, "has no states of the text 'never seen'")
    assert not (tmp_path / "o").exists()


def test_states_that_do_not_fit(sd3, tmp_path):
    given = ("generate", "--model", sd3.model, "--prompt", PROMPT, "--out", tmp_path / "o", "--t5-states")
    assert_refused(command(*given, tmp_path / "none"), 2, f"--t5-states {tmp_path / 'none'}: no such file")
    write_t5_states(tmp_path / "wide", [("", np.ones((LENGTH, 7), np.float16))])
    assert_refused(command(*given, tmp_path / "wide"), 2, "states of 7 numbers; the model reads 24")
    (tmp_path / "bare").mkdir()
    assert_refused(command(*given, tmp_path / "bare"), 1, f"{tmp_path / 'bare'} has no states")


def test_a_dropped_caption_is_not_a_missing_prompt(sdxl, tmp_path):
    """SDXL: zeros stand for no prompt at all; the empty caption and an empty prompt are encoded."""
    model, config = open_images(str(sdxl.model), ImageModelConfig()), ImageDataConfig(encode_batch=8)
    expected = encode_text(model.pipeline, load_encoders(model.pipeline), ["", PROMPT])
    rows, seen = read_image_rows([str(sdxl.rows)], config, "pairs", None, 0)
    cache = Cache(tmp_path / "cache")
    encoded = encode_rows(rows, seen, (), config, model, make_mesh(devices=jax.devices()[:1]), cache)
    prompts, away = image_generate.conditions_of(model, ["", PROMPT], SamplingConfig())
    for name in ("states", "pooled"):
        wanted = np.asarray(getattr(expected, name))
        assert np.abs(wanted[0]).max() > 0.1
        kept = cache[encoded.empty][name]
        assert kept.dtype == np.float16
        np.testing.assert_allclose(kept, wanted[0], rtol=2**-11, atol=1e-5)
        np.testing.assert_array_equal(cache[encoded.no_text][name], np.zeros_like(wanted[0]))
        np.testing.assert_allclose(np.concatenate([getattr(one, name) for one in prompts]), wanted, atol=1e-5)
        np.testing.assert_array_equal(getattr(away, name)[0], np.zeros_like(wanted[0]))
    _, away = image_generate.conditions_of(model, [PROMPT], SamplingConfig(negative_prompt="bad"))
    assert np.abs(away.states).max() > 0.1


@pytest.mark.parametrize("number", [7e4, np.inf, np.nan])
def test_states_beyond_half_precision_are_refused(number):
    entry = {"states": np.full((2, 3), 6.5e4, np.float32), "pooled": np.full(4, number, np.float32)}
    with pytest.raises(ValueError, match="pooled of a text reach"):
        halved(entry)
    assert halved({"states": entry["states"]})["states"].dtype == np.float16


def test_what_stands_for_a_t5_that_is_not_given(sd3, sdxl, tmp_path, capsys):
    named = shutil.copytree(sd3.model, tmp_path / "named")
    index = json.loads((named / "model_index.json").read_text())
    index |= {"text_encoder_3": ["transformers", "T5EncoderModel"], "tokenizer_3": ["transformers", "T5TokenizerFast"]}
    (named / "model_index.json").write_text(json.dumps(index))
    for folder, said in ((sd3.model, "and has none: zeros"), (named, "which is not run here; --t5-states gives")):
        assert open_t5(open_images(str(folder), ImageModelConfig()), None) is None
        assert said in capsys.readouterr().err
    assert open_t5(open_images(str(sdxl.model), ImageModelConfig()), None) is None
    assert capsys.readouterr().err == ""
    answer = command(
        "generate", "--model", sdxl.model, "--prompt", "x", "--out", tmp_path / "o", "--t5-states", tmp_path
    )
    assert_refused(answer, 2, f"--t5-states has no effect: {sdxl.model} reads no T5")
