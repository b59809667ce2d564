"""The data types of the language wing: an encoded example, a batch of prefix trees, a model's answer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np

from dpo_jax.logprobs import IGNORE
from dpo_jax.types import Array

__all__ = ["COMPLETIONS", "IGNORE", "Batch", "Example", "LanguageModel", "Prediction", "Routing"]

# What the completions of an example are, by the form of its row: `policy_chosen_logps` is completion 0 of a pair.
# The items of a list have no names.
COMPLETIONS: Mapping[str, tuple[str, ...]] = {
    "pairs": ("chosen", "rejected"),
    "triples": ("chosen", "rejected", "gold"),
    "singles": ("completion",),
    "mismatched": ("completion", "mismatched"),
    "revisions": (
        "chosen",
        "rejected",
        "chosen_given_chosen",
        "rejected_given_chosen",
        "chosen_given_rejected",
        "rejected_given_rejected",
    ),
    "lists": (),
}


@dataclass(frozen=True)
class Example:
    """One prompt with its K completions as token ids.

    Attributes:
      prompt: int32 [P], P >= 1.
      completions: K arrays int32 [C_k], in the order of COMPLETIONS, the best of a list first; an absent item of a
        shorter list has C_k = 0.
      columns: name -> scalar or array that belongs to this example (a reward margin, per-token weights [K, C], ...).
      contexts: K arrays int32 of tokens that stand between the prompt and each completion and are not predicted (an
        earlier answer that is to be revised), or () if no completion has any.
    """

    prompt: np.ndarray
    completions: tuple[np.ndarray, ...]
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    contexts: tuple[np.ndarray, ...] = ()

    def branches(self) -> list[np.ndarray]:
        """What follows the prompt on each path: context and completion, K arrays int32; empty for an absent item."""
        if not self.contexts:
            return list(self.completions)
        pairs = zip(self.contexts, self.completions, strict=True)
        return [np.concatenate([c, ids]) if len(ids) else ids for c, ids in pairs]


@dataclass(frozen=True)
class Batch:
    """Examples laid out as forests in depth-first order; NumPy on the host, jax arrays on devices.

    Query q sees key k iff `k <= q < subtree_end[k]`: causal attention, packing and prompt sharing in one rule.
    Every array leads with the rows R, so that one sharding and one microbatch split serve all of them.
    B = R * E examples, some of them empty places of weight 0.

    Attributes:
      tokens: int32 [R, L].
      positions: int32 [R, L], position along the token's own path from its root.
      subtree_end: int32 [R, L], index at which the subtree of the token's node ends; 0 for padding.
      source: int32 [R, S], index of the hidden state that predicts the target.
      target: int32 [R, S], token id to predict, or IGNORE.
      slots: int32 [R, E, K, T], index into S of each completion token, or -1.
      ends: int32 [R, E, K], index into L of each completion's last token, or -1.
      weight: float32 [R, E].
      columns: name -> [R, E, ...].
      split: number of equal segments a row falls into before the model sees it (static): 1 for packed rows, K for the
        padded layout, where each completion has a segment and a copy of the prompt to itself. `source` counts over the
        whole row, `subtree_end` within the segment.
    """

    tokens: Array | np.ndarray
    positions: Array | np.ndarray
    subtree_end: Array | np.ndarray
    source: Array | np.ndarray
    target: Array | np.ndarray
    slots: Array | np.ndarray
    ends: Array | np.ndarray
    weight: Array | np.ndarray
    columns: Mapping[str, Array | np.ndarray]
    split: int = 1


jax.tree_util.register_dataclass(
    Batch,
    data_fields=["tokens", "positions", "subtree_end", "source", "target", "slots", "ends", "weight", "columns"],
    meta_fields=["split"],
)


class Routing(NamedTuple):
    """How a mixture of experts routed the tokens of a batch, each counted once and padding not at all; float32.

    Attributes:
      shares: [layers, E], share of the tokens' k choices that fell on each expert; each layer's sum to 1.
      load_balance: [], E * sum over e of (choices of e per token) * (mean probability of e), both means over layers and
        tokens: the loss of the Switch Transformer (arXiv 2101.03961, eq. 4) in the form of Mixtral, k if balanced.
      entropy: [layers], mean of the router's, nats.
      penalty: [], what the model wants added to its loss: the load-balancing loss times the config's weight of it.
    """

    shares: Array
    load_balance: Array
    entropy: Array
    penalty: Array


class Prediction(NamedTuple):
    """What a language model answers: last hidden states and the head that turns them into logits.

    Attributes:
      hidden: [R, L, D] in the compute dtype, after the final norm.
      head: [V, D].
      bias: [V] or None.
      softcap: logits become `softcap * tanh(logits / softcap)`, or None.
      routing: of a mixture of experts, else None.
    """

    hidden: Array
    head: Array
    bias: Array | None = None
    softcap: float | None = None
    routing: Routing | None = None


# (tokens, positions, subtree_end), each int32 [R, L] -> Prediction, or plain logits [R, L, V] of a foreign model.
LanguageModel = Callable[[Array, Array, Array], Prediction | Array]
