"""Completions as text: decoding, stop strings, the best of several."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dpo_jax.language.sampling.engine import Completion, EndTest


def text_of(tokenizer: Any, tokens: np.ndarray, *, special: bool = False) -> str:
    """Text of token ids exactly as they say it, with or without special tokens."""
    return tokenizer.decode(tokens.tolist(), skip_special_tokens=not special, clean_up_tokenization_spaces=False)


def cut_at(text: str, strings: Sequence[str]) -> str:
    """The text before the first of the strings that comes."""
    return text[: min((place for place in map(text.find, strings) if place >= 0), default=len(text))]


def held_back(text: str, strings: Sequence[str]) -> str:
    """The text without an end that may yet change: half a character, or the beginning of one of the strings."""
    text = cut_at(text, strings).rstrip("\N{REPLACEMENT CHARACTER}")
    for size in range(max(map(len, strings), default=0), 0, -1):
        if any(string.startswith(text[-size:]) for string in strings if len(text) >= size):
            return text[:-size]
    return text


def stop_strings(tokenizer: Any, strings: Sequence[str]) -> EndTest:
    """Ends a completion with the token that completes one of the strings, wherever the borders of tokens fall.

    Raises:
      ValueError: an empty string.
    """
    if "" in strings:
        raise ValueError("a stop string is empty; give text that ends a completion")

    def holds(tokens: np.ndarray) -> bool:
        text = text_of(tokenizer, tokens, special=True)
        return any(string in text for string in strings)

    def kept(tokens: np.ndarray) -> int | None:
        if not holds(tokens):
            return None
        # What begins with tokens that hold a string holds it too: the first such place by halving.
        low, high = 1, len(tokens)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if holds(tokens[:middle]) else (middle + 1, high)
        return low

    return kept


def best_of(
    answers: Sequence[Sequence[Completion]], scorer: Callable[[int, Sequence[Completion]], Sequence[float]]
) -> list[Completion]:
    """For each prompt the completion with the largest score, the first of equals (best-of-n sampling).

    Args:
      answers: of `generate`.
      scorer: (place of the prompt, its completions) -> a score for each.
    """
    scores = [scorer(place, several) for place, several in enumerate(answers)]
    return [several[int(np.argmax(values))] for several, values in zip(answers, scores, strict=True)]
