"""States of a T5 in files: what is written comes back, and what does not fit is named."""

import os

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dpo_jax.diffusion.data import t5_states
from dpo_jax.diffusion.data.cache import content_key
from dpo_jax.diffusion.data.t5_states import open_t5_states, write_t5_states
from dpo_jax.keys import WeightsError


def states(number, shape=(3, 4), dtype=np.float32):
    return np.random.default_rng(number).normal(size=shape).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_states_come_back_by_their_text(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(t5_states, "_FILE_BYTES", 2 * states(0, dtype=dtype).nbytes)
    texts = ["", "a red circle", "a blue square", "ein grüner Kreis", "A red circle"]
    count = write_t5_states(tmp_path / "t5", ((text, states(i, dtype=dtype)) for i, text in enumerate(texts)))
    assert count == 5 and len(list((tmp_path / "t5").iterdir())) == 3
    write_t5_states(tmp_path / "t5", [("later", states(9, dtype=dtype))])
    opened = open_t5_states(tmp_path / "t5")
    assert opened.shape == (3, 4) and "later" in opened and "a green circle" not in opened
    for number, text in enumerate(texts):
        np.testing.assert_array_equal(opened[text], states(number, dtype=dtype))
    one = open_t5_states(next((tmp_path / "t5").iterdir()))
    assert sum(text in one for text in [*texts, "later"]) < 3


def test_the_newest_states_of_a_text_count(tmp_path):
    for number in range(8):  # names are keys of what the files hold, so that they come in any order
        before = set(tmp_path.iterdir())
        write_t5_states(tmp_path, [("a", states(number)), (f"text {number}", states(100))])
        (new,) = set(tmp_path.iterdir()) - before
        os.utime(new, ns=(number, number))
    np.testing.assert_array_equal(open_t5_states(tmp_path)["a"], states(7))


def test_a_fingerprint_changes_with_the_file_of_the_text_alone(tmp_path):
    for name, text in (("one", "a"), ("two", "b")):
        save_file({content_key(text): states(0)}, tmp_path / f"{name}.safetensors")
    before = open_t5_states(tmp_path)
    np.testing.assert_array_equal(before["b"], states(0))
    marks = [before.fingerprint(text) for text in "ab"]
    save_file({content_key("b"): states(1), content_key("c"): states(2)}, tmp_path / "two.safetensors")
    np.testing.assert_array_equal(before["a"], states(0))
    after = open_t5_states(tmp_path)
    np.testing.assert_array_equal(after["b"], states(1))
    assert after.fingerprint("a") == marks[0] and after.fingerprint("b") != marks[1]


def test_what_does_not_fit_is_named(tmp_path):
    with pytest.raises(WeightsError, match="has no states"):
        open_t5_states(tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match=r"broken\.safetensors: not a safetensors file"):
        open_t5_states(tmp_path)
    key = content_key("b")
    for other in (states(0, (2, 4)), states(0, (3,)), states(0).astype(np.int32)):
        file = tmp_path / "1.safetensors"
        save_file({content_key("a"): states(0)}, tmp_path / "0.safetensors")
        save_file({key: other}, file)
        (tmp_path / "broken.safetensors").unlink(missing_ok=True)
        with pytest.raises(WeightsError, match=rf"{key} is .*; expected F32, F16, BF16 \[L, D\], the same shape"):
            open_t5_states(tmp_path)
        file.unlink()
    for wrong in (
        [("a", states(0, (1, 3, 4)))],
        [("a", states(0)), ("b", states(0, (2, 4)))],
        [("a", np.ones((2, 2)))],
    ):
        with pytest.raises(ValueError, match=r"states of '[ab]' are .*; give floats"):
            write_t5_states(tmp_path / "t5", wrong)
    assert not list((tmp_path / "t5").iterdir())
