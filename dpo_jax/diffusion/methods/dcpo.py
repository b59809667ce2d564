"""DCPO: each image of a pair gets a caption of its own; the loss is that of Diffusion-DPO.

Saeidi et al. 2025, "Dual Caption Preference Optimization for Diffusion Models", arXiv 2502.06023. Evidence: loss,
pairing of captions and settings of the perturbation from the official code, strategies from summaries.

    c  generated_captions  chosen: generated from its image      rejected: generated from its image
    p  perturbed_prompt    chosen: the prompt                    rejected: the prompt, perturbed
    h  hybrid_captions     chosen: generated from its image      rejected: generated from its image, perturbed

A right caption of the rejected image makes the loss lower a probability that was good, so p and h perturb it. In a
batch the condition is [B, 2, ...] instead of [B, 1, ...], and with equal captions the loss is Diffusion-DPO. The
official example has beta 500 and no dropout of prompts. Captions are made outside; `perturb_caption` is a rule in
place of the paraphraser.

>>> row = dict(prompt="a circle", chosen="1.png", rejected="2.png",
...            chosen_caption="a red circle", rejected_caption="a blue square")
>>> hybrid_captions(row, perturb=str.upper)["rejected_caption"]
'A BLUE SQUARE'
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dpo_jax.ops import require_between

# Share of the words that may be replaced, of which the small experiments replace so many.
RATES: Mapping[str, float] = {"weak": 0.4, "medium": 0.6, "strong": 0.8}
Row = Mapping[str, Any]


def ordered_captions(row: Row) -> dict[str, Any] | None:
    """A labelled pair with the winner first, its captions with it; None for a tie. Host.

    Args:
      row: image_0, image_1, caption_0, caption_1 and label_0, which is 1 if the first image won, 0 or 0.5; other keys
        are kept.

    Returns:
      the row with chosen, rejected, chosen_caption and rejected_caption instead.

    Raises:
      ValueError: another label.
    """
    label = row["label_0"]
    if label not in (0, 0.5, 1):
        raise ValueError(f"label_0 is {label!r}; expected 1, 0 or, for a tie, 0.5")
    if label == 0.5:
        return None
    first, second = (0, 1) if label == 1 else (1, 0)
    used = {f"{name}_{i}" for name in ("image", "caption", "label") for i in (0, 1)}
    return {key: value for key, value in row.items() if key not in used} | {
        "chosen": row[f"image_{first}"],
        "rejected": row[f"image_{second}"],
        "chosen_caption": row[f"caption_{first}"],
        "rejected_caption": row[f"caption_{second}"],
    }


def generated_captions(row: Row) -> dict[str, Any]:
    """DCPO-c: the generated captions as they are; host."""
    return _captioned(row, row["chosen_caption"], row["rejected_caption"])


def perturbed_prompt(row: Row, *, perturb: Callable[[str], str]) -> dict[str, Any]:
    """DCPO-p: the prompt for the chosen image, the perturbed prompt for the rejected one; host."""
    return _captioned(row, row["prompt"], perturb(row["prompt"]))


def hybrid_captions(row: Row, *, perturb: Callable[[str], str]) -> dict[str, Any]:
    """DCPO-h: the chosen image's generated caption, and the perturbed one of the rejected image; host."""
    return _captioned(row, row["chosen_caption"], perturb(row["rejected_caption"]))


def perturb_caption(
    caption: str, groups: Sequence[Sequence[str]], *, rate: float = RATES["medium"], random: np.random.Generator
) -> str:
    """Replace each word that is in a group by another of the group with some probability; host.

    Args:
      groups: words that may stand for each other.
      rate: that probability, in [0, 1]; see `RATES`.
    """
    require_between(0.0, 1.0, rate=rate)
    words = caption.split(" ")
    for place, word in enumerate(words):
        others = sorted({other for group in groups if word in group for other in group} - {word})
        if others and random.random() < rate:
            words[place] = others[random.integers(len(others))]
    return " ".join(words)


def _captioned(row: Row, chosen: str, rejected: str) -> dict[str, Any]:
    return {**row, "chosen_caption": chosen, "rejected_caption": rejected}
