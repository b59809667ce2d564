"""From rows to examples: what is decoded and how often, keys of latents, lists of several lengths, captions."""

import json
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_images import make_image_folder
from tiny_runs import write_rows

from dpo_jax.cli.catalogue import method
from dpo_jax.cli.configs import LoopConfig
from dpo_jax.cli.images import data as image_data
from dpo_jax.cli.images.configs import ImageDataConfig, image_train_config_class
from dpo_jax.cli.images.data import encode_rows, prepare_images, read_image_rows
from dpo_jax.diffusion.data import decoding
from dpo_jax.diffusion.data.batches import collate
from dpo_jax.diffusion.data.cache import Cache
from dpo_jax.sharding import make_mesh


@pytest.fixture
def model(monkeypatch) -> Any:
    """Images are their own latents, texts their lengths; `made` lists what was encoded."""
    made: list[Any] = []

    def image_encoder(model, mesh):
        def encode(images):
            made.extend(images)
            return [{"latents": image} for image in images]

        return encode

    def text_encoder(model, t5):
        def encode(texts):
            made.extend(texts)
            return [{"states": np.full((1, 1), len(text), np.float32)} for text in texts]

        return encode

    monkeypatch.setattr(image_data, "image_encoder", image_encoder)
    monkeypatch.setattr(image_data, "text_encoder", text_encoder)
    return SimpleNamespace(
        image_fingerprint=lambda: "images",
        text_fingerprint=lambda: "texts",
        resolution=16,
        size_step=4,
        wants_sizes=True,
        zeroes_no_text=False,
        t5_width=None,
        made=made,
    )


def encoded(model, folder, form, *, cache=None, columns=(), **options):
    """Examples of a folder's rows, and the cache."""
    config = ImageDataConfig(encode_batch=3, **options)
    rows, seen = read_image_rows([str(folder)], config, form, None, 0)
    cache = Cache(folder / "cache") if cache is None else cache
    mesh = make_mesh(devices=jax.devices()[:1])
    encoded = encode_rows(rows, seen, columns, config, model, mesh, cache)
    assert encoded.empty in cache and encoded.no_text == encoded.empty
    return encoded.examples, cache


@pytest.fixture
def decoded(monkeypatch):
    """Places of the images that were decoded, one after another."""
    places, real = [], decoding.decode

    def decode(place, **options):
        places.append(place)
        return real(place, **options)

    monkeypatch.setattr(decoding, "decode", decode)
    return places


def test_every_image_is_decoded_once_to_check_and_once_to_encode(model, tmp_path, decoded):
    folder = make_image_folder(tmp_path / "rows", count=5)
    examples, cache = encoded(model, folder, "pairs")
    assert len(decoded) == 10 + 12 and len(model.made) >= 10  # the last three of four times three are filled up
    for example in examples:
        assert all(cache[key]["latents"].shape == (16, 16, 3) for key in example.images)
    before = len(model.made)
    again, _ = encoded(model, folder, "pairs")
    assert len(model.made) == before
    assert [example.images for example in again] == [example.images for example in examples]


def test_latents_are_those_of_their_image(model, tmp_path):
    folder = make_image_folder(tmp_path / "rows", count=4)
    examples, cache = encoded(model, folder, "pairs", columns=("chosen_score",))
    for number, example in enumerate(examples):
        for name, key in zip(("chosen", "rejected"), example.images):
            image = np.asarray(Image.open(folder / f"{number}_{name}.png"))
            np.testing.assert_allclose(cache[key]["latents"], image / 127.5 - 1, atol=1e-6)
        assert example.columns == {"chosen_score": 1.0}
        assert example.sizes is not None
        np.testing.assert_array_equal(example.sizes, [[16, 16, 0, 0, 16, 16]] * 2)


def blank_folder(folder, sizes, **row):
    folder.mkdir()
    for number, size in enumerate(sizes):
        Image.new("RGB", size, (9, 9, 9)).save(folder / f"{number}.png")
    rows = [{"caption": f"{number}", "image": f"{number}.png", **row} for number in range(len(sizes))]
    write_rows(folder / "metadata.jsonl", rows)
    return folder


def test_equal_pixels_of_two_buckets_are_two_entries(model, tmp_path):
    folder = blank_folder(tmp_path / "rows", [(16, 16), (32, 16), (16, 32), (16, 16)])
    examples, cache = encoded(model, folder, "singles", buckets="aspect")
    assert len({example.bucket for example in examples}) == 3
    for example in examples:
        assert cache[example.images[0]]["latents"].shape[:2] == example.bucket
    assert examples[0].images == examples[3].images


def test_flips_turn_about_half_of_the_images_and_the_same_ones_in_every_run(model, tmp_path):
    folder = make_image_folder(tmp_path / "rows", "singles", count=40)
    examples, cache = encoded(model, folder, "singles", flip=True)
    turned = []
    for number, example in enumerate(examples):
        image = np.asarray(Image.open(folder / f"{number}_image.png")) / 127.5 - 1
        latents = cache[example.images[0]]["latents"]
        turned.append(np.allclose(latents, image[:, ::-1], atol=1e-5))
        assert turned[-1] or np.allclose(latents, image, atol=1e-5)
    assert 8 < sum(turned) < 32
    again, _ = encoded(model, folder, "singles", flip=True, cache=Cache(tmp_path / "other"))
    assert [example.images for example in again] == [example.images for example in examples]
    plain, _ = encoded(model, folder, "singles", cache=cache)
    other = [a.images != b.images for a, b in zip(plain, examples)]
    assert 8 < sum(other) < 32
    assert all(left_right or not differs for left_right, differs in zip(turned, other))


def test_lists_of_several_lengths_have_places_that_are_not_valid(model, tmp_path):
    folder = make_image_folder(tmp_path / "rows", "lists", count=2)

    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[1] = {**rows[1], "images": rows[1]["images"][:2], "scores": rows[1]["scores"][:2]}
    write_rows(folder / "metadata.jsonl", rows)
    examples, cache = encoded(model, folder, "lists", columns=("scores",))
    batch = collate(examples, np.array([0, 1]), cache, filler=0)
    assert batch.latents.shape == (2, 3, 16, 16, 3)
    np.testing.assert_array_equal(batch.columns["valid"], [[1, 1, 1], [1, 1, 0]])
    np.testing.assert_allclose(batch.columns["scores"][1], [*rows[1]["scores"], 0])
    assert batch.condition.states.shape == (2, 1, 1, 1) and batch.condition.sizes.shape == (2, 3, 6)


def test_rows_with_and_without_captions_of_their_own_share_a_batch(model, tmp_path):
    folder = make_image_folder(tmp_path / "rows", count=3)

    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[1] |= {"chosen_caption": "a", "rejected_caption": "bb"}
    write_rows(folder / "metadata.jsonl", rows)
    examples, cache = encoded(model, folder, "pairs")
    states = np.asarray(collate(examples, np.arange(3), cache, filler=0).condition.states)[..., 0, 0]
    whole = [len(row["caption"]) for row in rows]
    np.testing.assert_array_equal(states, [[whole[0]] * 2, [1, 2], [whole[2]] * 2])


def test_entries_come_back_after_a_broken_file(model, tmp_path):
    folder = make_image_folder(tmp_path / "rows", count=4)
    examples, cache = encoded(model, folder, "pairs")
    expected = {key: cache[key]["latents"] for example in examples for key in example.images}
    for path in sorted(cache.folder.glob("*"))[:2]:
        path.write_bytes(path.read_bytes()[:-5])
    before = len(model.made)
    _, again = encoded(model, folder, "pairs")
    assert len(model.made) > before
    for key, latents in expected.items():
        np.testing.assert_array_equal(again[key]["latents"], latents)


def test_a_second_start_decodes_nothing(model, tmp_path, decoded):
    folder = make_image_folder(tmp_path / "rows", count=4)
    others = make_image_folder(tmp_path / "others", count=2, seed=1)
    (folder / "2_rejected.png").write_bytes(b"no image")

    def start(name="diffusion-dpo"):
        data = ImageDataConfig(data=(str(folder),), eval_data=(str(others),), encode_batch=3, resolution=16)
        chosen = method(name)
        config = image_train_config_class(chosen)(data=data, loop=LoopConfig(batch_size=2))
        return prepare_images(config, chosen, model, make_mesh(devices=jax.devices()[:1]), tmp_path / "out")

    first = start()
    checked = 8 + 4
    assert len(decoded) >= checked + 10  # and once more to encode them
    listed = (tmp_path / "out" / "skipped_rows.jsonl").read_bytes()
    before = len(decoded)
    again = start()
    assert len(decoded) == before
    assert [row.images for row in again.train + again.held_out] == [row.images for row in first.train + first.held_out]
    assert (tmp_path / "out" / "skipped_rows.jsonl").read_bytes() == listed
    Image.new("RGB", (16, 16), (1, 2, 3)).save(folder / "2_rejected.png")
    assert len(start().train) == len(first.train) + 1
    assert len(decoded) == before + 1 + 3  # looked at; its pair is encoded, as three
