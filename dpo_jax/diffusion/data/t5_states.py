"""States of a T5 encoder, made once by another program and kept as safetensors, read text by text.

A tensor stands under its text's `content_key`, [L, D] and of one shape for all texts. The empty text is one of them: it
stands for captions that are dropped and for what guidance leads away from. With transformers, for Stable Diffusion 3
(L is 256 and D 4096):

    tokenizer = AutoTokenizer.from_pretrained(PIPELINE, subfolder="tokenizer_3")
    encoder = T5EncoderModel.from_pretrained(PIPELINE, subfolder="text_encoder_3", dtype=torch.bfloat16)

    @torch.no_grad()
    def states(text):
        told = tokenizer(text, padding="max_length", max_length=256, truncation=True, return_tensors="pt")
        return encoder(told.input_ids)[0][0].half().numpy()

    write_t5_states("t5", ((text, states(text)) for text in ["", *captions]))
"""

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from dpo_jax.diffusion.data.cache import content_key
from dpo_jax.keys import WeightsError
from dpo_jax.weights import DTYPES, open_tensors

_FILE_BYTES = 1_000_000_000
_OPEN_FILES = 64


@dataclass(frozen=True, eq=False)
class T5States:
    """States of texts; those of a text are read when they are asked for.

    Attributes:
      place: the file or folder.
      shape: (L, D) of every text's states.
      files: key of a text -> the file with its states.
    """

    place: Path
    shape: tuple[int, int]
    files: Mapping[str, Path]

    def __contains__(self, text: str) -> bool:
        return content_key(text) in self.files

    def __getitem__(self, text: str) -> np.ndarray:
        key = content_key(text)
        return _opened(self.files[key]).get_tensor(key)

    def fingerprint(self, text: str) -> str:
        """Says which file a text's states come from: its name, size and time, but not its bytes."""
        file = self.files[content_key(text)]
        facts = file.stat()
        return content_key(file.name, facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=_OPEN_FILES)
def _opened(file: Path) -> Any:
    return safe_open(file, framework="numpy")


def open_t5_states(place: str | Path) -> T5States:
    """States of a file, or of all safetensors of a folder; their names and shapes are read, but no states.

    Of a text that several files have, the states of the newest file count.

    Raises:
      WeightsError: no such place, a file that is not what its name says, states of several shapes or none.
    """
    place = Path(place)
    _opened.cache_clear()  # a file of the same name may have been written again
    files = [place]
    if place.is_dir():
        files = sorted(place.glob("*.safetensors"), key=lambda file: (file.stat().st_mtime_ns, file.name))
    where: dict[str, Path] = {}
    shape: tuple[int, ...] | None = None
    for file in files:
        with open_tensors([file]) as tensors:
            for key, tensor in tensors.items():
                found, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
                shape = shape or found
                if len(found) != 2 or found != shape or dtype not in DTYPES:
                    kinds = f"expected {', '.join(DTYPES)} [L, D], the same shape everywhere"
                    raise WeightsError(f"{file}: {key} is {dtype} {list(found)}; {kinds} (here {list(shape)})")
                where[key] = file
    if shape is None:
        raise WeightsError(f"{place} has no states; give a file of safetensors, or a folder of them")
    return T5States(place, (shape[0], shape[1]), where)


def write_t5_states(folder: str | Path, states: Iterable[tuple[str, np.ndarray]]) -> int:
    """Add states of texts to a folder, in files of about a gigabyte that appear whole or not at all; how many texts.

    Args:
      states: texts and their states [L, D], float32, float16 or bfloat16; they are taken one by one.

    Raises:
      ValueError: states that are not [L, D], or not all of one shape.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    part: dict[str, np.ndarray] = {}
    shape, count = None, 0
    for text, given in states:
        one = np.ascontiguousarray(given)
        shape = shape or one.shape
        if one.ndim != 2 or one.shape != shape or one.dtype not in DTYPES.values():
            wanted = f"give floats [L, D], the same shape for all texts (here {list(shape)})"
            raise ValueError(f"states of {text!r} are {one.dtype} {list(one.shape)}; {wanted}")
        part[content_key(text)] = one
        count += 1
        if sum(array.nbytes for array in part.values()) >= _FILE_BYTES:
            _write(folder, part)
            part = {}
    if part:
        _write(folder, part)
    return count


def _write(folder: Path, part: Mapping[str, np.ndarray]) -> None:
    beside = folder / f"{uuid.uuid4().hex}.partial"
    save_file(dict(part), beside)
    beside.rename(folder / f"{content_key(*sorted(part))}.safetensors")
