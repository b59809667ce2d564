"""Rewards from files: both layouts of CLIP, the aesthetic head, tokens, and what is refused."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formula_weights import chirp, read, tensor
from make_clip_fixtures import VARIANTS
from safetensors.numpy import save_file

from dpo_jax.diffusion.models import clip
from dpo_jax.diffusion.models.clip_config import VIT_H_14, VIT_L_14, config_from_dict
from dpo_jax.diffusion.models.clip_weights import as_transformers
from dpo_jax.diffusion.models.table import tensor_shapes
from dpo_jax.diffusion.rewards import check_reward, load_reward, pixels
from dpo_jax.keys import WeightsError
from dpo_jax.sharding import make_mesh

KEYS = VARIANTS["both"]
CONFIG = config_from_dict(KEYS)
WORDS = ["a", "b", "c", "a</w>", "b</w>", "c</w>", "ab</w>", *(f"word{n}" for n in range(7, 17))]
PROMPTS = ["ab a", "c", "a b c a b c a b c a b", "c"]
SIZES = (6, 9, 5, 4, 3, 1)  # of the aesthetic head


def transformers_tensors(config=CONFIG):
    shapes = tensor_shapes(clip.weight_table(config), clip.abstract_variables(config))
    return {name: tensor(name, shape) for name, shape in shapes.items()}


def openai_tensors(tensors):
    """The same in the layout of OpenAI and OpenCLIP."""
    found = {"logit_scale": tensors["logit_scale"], "text_projection": tensors["text_projection.weight"].T.copy()}
    found["visual.proj"] = tensors["visual_projection.weight"].T.copy()
    for tower, prefix, names in (
        (
            "text_model.",
            "",
            {
                "embeddings.token_embedding.weight": "token_embedding.weight",
                "embeddings.position_embedding.weight": "positional_embedding",
                "final_layer_norm.weight": "ln_final.weight",
                "final_layer_norm.bias": "ln_final.bias",
            },
        ),
        (
            "vision_model.",
            "visual.",
            {
                "embeddings.class_embedding": "class_embedding",
                "embeddings.patch_embedding.weight": "conv1.weight",
                "embeddings.position_embedding.weight": "positional_embedding",
                **{
                    f"{ours}_{norm}.{kind}": f"ln_{theirs}.{kind}"
                    for ours, norm, theirs in (("pre", "layrnorm", "pre"), ("post", "layernorm", "post"))
                    for kind in ("weight", "bias")
                },
            },
        ),
    ):
        found |= {prefix + theirs: tensors[tower + ours] for ours, theirs in names.items()}
        number = 0
        while f"{tower}encoder.layers.{number}.mlp.fc1.weight" in tensors:
            ours, theirs = f"{tower}encoder.layers.{number}.", f"{prefix}transformer.resblocks.{number}."
            for kind in ("weight", "bias"):
                found[f"{theirs}attn.in_proj_{kind}"] = np.concatenate(
                    [tensors[f"{ours}self_attn.{part}_proj.{kind}"] for part in "qkv"]
                )
                for a, b in (
                    ("self_attn.out_proj", "attn.out_proj"),
                    ("mlp.fc1", "mlp.c_fc"),
                    ("mlp.fc2", "mlp.c_proj"),
                    ("layer_norm1", "ln_1"),
                    ("layer_norm2", "ln_2"),
                ):
                    found[f"{theirs}{b}.{kind}"] = tensors[f"{ours}{a}.{kind}"]
            number += 1
    return found


def write(folder, tensors, *, file="model.safetensors", tokenizer=True):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: np.array(value, order="C") for name, value in tensors.items()}, folder / file)
    (folder / "config.json").write_text(json.dumps(KEYS))
    if tokenizer:
        from transformers import CLIPTokenizer

        words = {word: place for place, word in enumerate([*WORDS, "<|startoftext|>", "<|endoftext|>"])}
        CLIPTokenizer(vocab=words, merges=[("a", "b</w>")]).save_pretrained(folder)
    return folder


def photos():
    sizes = [(20, 31), (12, 12), (40, 13), (15, 15)]
    return [np.asarray((chirp(f"photo {h} {w}", (h, w, 3)) + 1) * 127.5, np.uint8) for h, w in sizes]


def features(method, given):
    table, abstract = clip.weight_table(CONFIG), clip.abstract_variables(CONFIG)
    variables = read(abstract, table, transformers_tensors())
    apply = clip.clip_function(CONFIG)
    said = jax.jit(lambda variables: apply(variables, given, method=method).projected)(variables)
    found = np.asarray(said, np.float64)
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


def cosines(pixel):
    # start 17, end 18; "ab" is one word by the only merge.
    ids = np.full((4, 9), 18, np.int32)
    ids[:, 0] = 17
    ids[0, 1:3], ids[1, 1], ids[2, 1:8], ids[3, 1] = (6, 3), 5, (3, 4, 5, 3, 4, 5, 3), 5
    images = features("vision", np.stack([pixel(photo, 12) for photo in photos()]))
    return (images * features("text", ids)).sum(-1)


@pytest.mark.parametrize(
    ("name", "layout"), [("pickscore", "transformers"), ("clip", "openai"), ("hps", "openai")], ids=lambda word: word
)
def test_scores(name, layout, tmp_path):
    tensors = transformers_tensors()
    buffers = {"text_model.embeddings.position_ids": np.arange(9)[None]}
    if layout == "openai":
        tensors, buffers = openai_tensors(tensors), {"input_resolution": np.array(12)}
    folder = write(tmp_path, tensors | buffers, file="model.safetensors" if name == "clip" else "weights.safetensors")
    reward = load_reward(name, folder, batch=3)
    pixel = pixels.long_side_pad if name == "hps" else pixels.short_side_crop
    scale = np.exp(tensors["logit_scale"]) if name == "pickscore" else 1.0
    found = reward.score(photos(), PROMPTS)
    assert reward.name == name and found.dtype == np.float32 and found.shape == (4,)
    np.testing.assert_allclose(found, cosines(pixel) * scale, rtol=1e-4, atol=1e-5)
    assert reward.score([], []).shape == (0,)


def head_tensors():
    layers = {}
    for place, (i, o) in zip((0, 2, 4, 6, 7), itertools.pairwise(SIZES)):
        layers[f"layers.{place}.weight"] = tensor(f"layers.{place}.weight", (o, i), 1.0)
        layers[f"layers.{place}.bias"] = tensor(f"layers.{place}.bias", (o,))
    return layers


@pytest.mark.parametrize("together", [True, False])
def test_aesthetic_score(together, tmp_path):
    tensors, head = transformers_tensors(), head_tensors()
    folder = write(tmp_path, tensors | head if together else tensors, tokenizer=False)
    if not together:
        save_file(head, folder / "head.safetensors")
    reward = load_reward("aesthetic", folder)
    value = features("vision", np.stack([pixels.short_side_crop(p, 12, nearest_centre=True) for p in photos()]))
    for place in (0, 2, 4, 6, 7):
        value = value @ head[f"layers.{place}.weight"].T + head[f"layers.{place}.bias"]
    np.testing.assert_allclose(reward.score(photos(), [""] * 4), value[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_scores_on_a_mesh(tmp_path):
    folder = write(tmp_path, openai_tensors(transformers_tensors()))
    mesh = make_mesh(data=2, fsdp=2, model=2, devices=jax.devices()[:8])
    found = load_reward("clip", folder, mesh, batch=4).score(photos(), PROMPTS)
    np.testing.assert_allclose(found, cosines(pixels.short_side_crop), rtol=1e-4, atol=1e-5)


class Shaped:
    """A lazy tensor that has a shape alone."""

    def __init__(self, shape):
        self.shape = list(shape)

    def get_shape(self):
        return self.shape

    def get_dtype(self):
        return "F16"


@pytest.mark.parametrize(("config", "text", "image", "count"), [
    (VIT_L_14, (768, 12), (1024, 24, 257), 5 + 12 * 12 + 24 * 12 + 8 + 1),
    (VIT_H_14, (1024, 24), (1280, 32, 257), 5 + 24 * 12 + 32 * 12 + 8 + 1),
])  # fmt: skip
def test_released_sizes_in_openais_names(config, text, image, count):
    (width, layers), (wide, deep, places) = text, image
    shapes = {
        "logit_scale": (),
        "token_embedding.weight": (49408, width),
        "positional_embedding": (77, width),
        "text_projection": (width, config.projection),
        "visual.proj": (wide, config.projection),
        "visual.class_embedding": (wide,),
        "visual.conv1.weight": (wide, 3, 14, 14),
        "visual.positional_embedding": (places, wide),
    }
    for prefix, size, number in (("", width, layers), ("visual.", wide, deep)):
        for norm in ("ln_final",) if not prefix else ("ln_pre", "ln_post"):
            shapes |= {f"{prefix}{norm}.{kind}": (size,) for kind in ("weight", "bias")}
        for block in (f"{prefix}transformer.resblocks.{n}." for n in range(number)):
            shapes |= {f"{block}{norm}.{kind}": (size,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")}
            shapes |= {f"{block}attn.in_proj_weight": (3 * size, size), f"{block}attn.in_proj_bias": (3 * size,)}
            shapes |= {f"{block}attn.out_proj.weight": (size, size), f"{block}attn.out_proj.bias": (size,)}
            shapes |= {f"{block}mlp.c_fc.weight": (4 * size, size), f"{block}mlp.c_fc.bias": (4 * size,)}
            shapes |= {f"{block}mlp.c_proj.weight": (size, 4 * size), f"{block}mlp.c_proj.bias": (size,)}
    assert len(shapes) == count
    found = as_transformers({name: Shaped(shape) for name, shape in shapes.items()})
    expected = tensor_shapes(clip.weight_table(config), clip.abstract_variables(config))
    assert {name: tuple(t.get_shape()) for name, t in found.items()} == expected
    assert all(t.get_dtype() == "F16" for t in found.values())


# What is refused


def test_wrong_names_and_inputs(tmp_path):
    with pytest.raises(ValueError, match="no reward is called 'blip'; there is pickscore, hps, clip, aesthetic"):
        load_reward("blip", tmp_path)
    reward = load_reward("clip", write(tmp_path, transformers_tensors()))
    with pytest.raises(ValueError, match="4 images and 1 prompts"):
        reward.score(photos(), ["a"])
    with pytest.raises(ValueError, match=r"an image is float64 \[4, 4, 3\]; expected uint8"):
        reward.score([np.zeros((4, 4, 3))], ["a"])


@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_pickles_are_refused(suffix, tmp_path):
    file = tmp_path / f"HPS_v2.1_compressed{suffix}"
    file.write_bytes(b"\x80\x02.")
    for place in (tmp_path, file):
        with pytest.raises(WeightsError, match=f"HPS_v2.1_compressed{suffix}.* would run code when read: convert"):
            load_reward("hps", place)
        with pytest.raises(WeightsError, match="would run code when read"):
            check_reward("hps", place)


@pytest.mark.parametrize("nested", [True, False])
def test_the_conversion_that_is_named_works(nested, tmp_path):
    torch = pytest.importorskip("torch", reason="writes and converts a pickle")
    folder = write(tmp_path / "made", transformers_tensors())
    expected = load_reward("hps", folder).score(photos(), PROMPTS)
    tensors = {name: torch.tensor(value) for name, value in transformers_tensors().items()}
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": tensors, "epoch": 3} if nested else tensors, folder / "HPS_v2.pt")
    with pytest.raises(WeightsError) as refused:
        load_reward("hps", folder)
    code = str(refused.value).partition('python -c "')[2].removesuffix('"')
    exec(code, {})
    np.testing.assert_array_equal(load_reward("hps", folder).score(photos(), PROMPTS), expected)


def test_a_reward_is_checked_without_its_weights(tmp_path):
    bare = write(tmp_path / "bare", transformers_tensors(), tokenizer=False)
    words = write(tmp_path / "words", {"none": np.zeros(1)})
    with pytest.raises(WeightsError, match=r"no tokenizer.json and no vocab.json.*--reward-tokenizer"):
        check_reward("clip", bare)
    check_reward("clip", bare, tokenizer=words)
    with pytest.raises(WeightsError, match=r"the aesthetic head's tensors are"):
        check_reward("aesthetic", bare)
    found = load_reward("clip", bare, tokenizer=words).score(photos(), PROMPTS)
    np.testing.assert_allclose(found, cosines(pixels.short_side_crop), rtol=1e-4, atol=1e-5)


def test_hub_ids_are_asked_for_what_is_read(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path / name.partition("/")[2])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    write(tmp_path / "weights", transformers_tensors(), tokenizer=False)
    write(tmp_path / "words", {"none": np.zeros(1)})
    found = load_reward("pickscore", "there/weights", tokenizer="there/words").score(photos(), PROMPTS)
    scale = np.exp(transformers_tensors()["logit_scale"])
    np.testing.assert_allclose(found, cosines(pixels.short_side_crop) * scale, rtol=1e-4, atol=1e-5)
    (_, weights), (_, words) = asked
    assert [name for name, _ in asked] == ["there/weights", "there/words"]
    assert "model*.safetensors" in weights and not any("safetensors" in pattern for pattern in words)


def test_wrong_files_are_refused(tmp_path):
    tensors = transformers_tensors()
    with pytest.raises(WeightsError, match="neither a folder here nor"):
        load_reward("clip", tmp_path / "nowhere")
    short = {name: value for name, value in tensors.items() if not name.endswith("layers.1.mlp.fc2.bias")}
    with pytest.raises(WeightsError, match=r"2 missing: text_model.encoder.layers.1.mlp.fc2.bias"):
        load_reward("clip", write(tmp_path / "short", short))
    with pytest.raises(
        WeightsError, match=r"no tokenizer.json and no vocab.json; give `tokenizer` \(--reward-tokenizer\)"
    ):
        load_reward("clip", write(tmp_path / "bare", tensors, tokenizer=False))
    twice = write(tmp_path / "twice", tensors, file="v2.safetensors")
    save_file(tensors, twice / "v2.1.safetensors")
    with pytest.raises(WeightsError, match="stands in several files; give the file itself"):
        load_reward("hps", twice)
    assert load_reward("hps", twice / "v2.1.safetensors").score([], []).size == 0
    with pytest.raises(WeightsError, match=r"the aesthetic head's tensors are layers.0.weight"):
        load_reward("aesthetic", tmp_path / "bare")
    (tmp_path / "bare" / "config.json").write_text("[1]")
    with pytest.raises(WeightsError, match=r"config.json: expected an object"):
        load_reward("clip", tmp_path / "bare")


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path):
    from transformers import CLIPTokenizer

    words = {word: place for place, word in enumerate([*WORDS, "x", "y", "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocab=words, merges=[]).save_pretrained(tmp_path / "words")
    folder = write(tmp_path / "clip", transformers_tensors(), tokenizer=False)
    with pytest.raises(WeightsError, match="the tokenizer knows 21 words; the text tower 20"):
        load_reward("clip", folder, tokenizer=tmp_path / "words")


@pytest.mark.slow
def test_installed_library(tmp_path):
    torch = pytest.importorskip("torch", reason="compares with torch")
    from transformers import CLIPModel, CLIPTokenizer

    folder = write(tmp_path, transformers_tensors())
    model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    said = tokenizer(PROMPTS, padding=True, truncation=True, max_length=9, return_tensors="pt")
    seen = torch.tensor(np.stack([pixels.short_side_crop(p, 12) for p in photos()])).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits = model(**said, pixel_values=seen).logits_per_image
    expected = torch.diagonal(logits).numpy()
    found = load_reward("pickscore", folder).score(photos(), PROMPTS)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    half = load_reward("pickscore", folder, types=clip.Types(compute=jnp.bfloat16)).score(photos(), PROMPTS)
    np.testing.assert_allclose(half, expected, atol=0.1)
