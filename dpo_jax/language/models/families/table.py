"""Weight tables: which tensor of a checkpoint a variable is, or which part of one."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Part(NamedTuple):
    """Where a variable stands in a tensor that holds several, along the variable's last axis.

    The tensor's axis falls into `groups` equal groups (such as heads) of `whole` entries; the variable has the `size`
    entries from `start` of each group.
    """

    start: int
    size: int
    whole: int
    groups: int = 1

    def places(self, index: np.ndarray) -> np.ndarray:
        """Where entries of the variable stand in the tensor."""
        return index // self.size * self.whole + self.start + index % self.size


class Place(NamedTuple):
    """Where a variable stands in a checkpoint.

    Attributes:
      name: of the tensor; `{layer}` stands for the number of the layer, `{expert}` for that of the expert in it.
      transposed: torch keeps linear weights as [out, in], kernels here are [in, out].
      part: if the tensor holds other variables too.
    """

    name: str
    transposed: bool = False
    part: Part | None = None


# Path name of a variable -> place in the checkpoint. Tables also hold variables that a config leaves out.
Table = Mapping[str, Place]


def linears(names: Mapping[str, str], *, transposed: bool = True) -> dict[str, Place]:
    """Kernels and biases of projections, as our name in a layer -> the checkpoint's full name."""
    ends = {"kernel": ("weight", transposed), "bias": ("bias", False)}
    return {
        f"layers/{ours}/{kind}": Place(f"{theirs}.{end}", turned)
        for ours, theirs in names.items()
        for kind, (end, turned) in ends.items()
    }


def fused(theirs: str, parts: Mapping[str, Part], *, transposed: bool = True) -> dict[str, Place]:
    """Kernels and biases of projections that the checkpoint keeps in one, as our name in a layer -> its part."""
    whole = linears({ours: theirs for ours in parts}, transposed=transposed)
    return {path: place._replace(part=parts[path.split("/", 1)[1].rsplit("/", 1)[0]]) for path, place in whole.items()}


def side_by_side(sizes: Mapping[str, int]) -> dict[str, Part]:
    """Parts that follow each other, by their sizes."""
    whole, parts, start = sum(sizes.values()), {}, 0
    for name, size in sizes.items():
        parts[name] = Part(start, size, whole)
        start += size
    return parts


def experts(router: str, *, gate: str, up: str, down: str) -> dict[str, Place]:
    """The router's and the experts' kernels, by the checkpoint's full names."""
    stacks = {"gate": gate, "up": up, "down": down}
    places = {f"layers/experts/{ours}/kernels": Place(f"{name}.weight", True) for ours, name in stacks.items()}
    return {"layers/experts/router/weight": Place(f"{router}.weight", True), **places}


def norms(names: Mapping[str, str]) -> dict[str, Place]:
    """Scales and biases of norms, as our full name -> the checkpoint's full name."""
    ends = {"scale": "weight", "bias": "bias"}
    return {f"{ours}/{kind}": Place(f"{theirs}.{end}") for ours, theirs in names.items() for kind, end in ends.items()}


def ends(embedding: str, norm: str, *, head: str = "lm_head", score: str = "score") -> dict[str, Place]:
    """What stands before and behind the layers."""
    return {
        "embed/embedding": Place(f"{embedding}.weight"),
        "head/embedding": Place(f"{head}.weight"),
        "head_bias/bias": Place(f"{head}.bias"),
        "score/weight": Place(f"{score}.weight"),
        **norms({"norm": norm}),
    }
