"""KTO: single answers labelled desirable or undesirable, judged against what the policy gains over the reference.

Ethayarajh et al. 2024, arXiv 2402.01306. Evidence: official code (loss, reference point, rotation of the data), another
library (apo_zero_unpaired, the retired kto_pair, range of the weights). With S the sum over completion tokens,

    u = S(log pi(y|x)) - S(log pi_ref(y|x)),   k likewise for another row's answer y' under this row's prompt x
    z0 = max(0, mean of k over the batch), a constant

    kto    desirable   w_D (1 - sigma(beta (u - z0)))
           undesirable w_U (1 - sigma(beta (z0 - u)))
    apo_zero_unpaired  kto with z0 = 0 and no mismatched answers (APO-zero of a pair is the sum of its two rows)
    kto_pair           pairs: z0 of a chosen answer = max(0, mean of v), of a rejected one = max(0, mean of u)

Shapes: log-probabilities [B, T] in any float dtype, masks [B, T] one at completion tokens, labels [B] integers, 1 for
desirable; every result [B] float32. Reference arrays, masks and z0 are constants: the mismatched answers need a forward
of the policy, but no backward.
Each loss lies in (0, w) and is w/2 where policy and reference agree; its slope beta w s (1 - s), s = loss/w, is largest
at u = z0 and vanishes far from it, so that hopeless and mislabelled answers count little. z0 is a statistic of the
batch: give many rows in shuffled order; each microbatch estimates its own z0.

>>> import jax.numpy as jnp
>>> rows = dict(policy_completion_logps=jnp.array([[-1.0], [-3.0]]), labels=jnp.array([1, 0]),
...             reference_completion_logps=jnp.array([[-3.0], [-3.0]]), completion_mask=jnp.ones((2, 1)))
>>> other = dict(policy_mismatched_logps=jnp.array([[-4.0], [-4.0]]), mismatched_mask=jnp.ones((2, 1)),
...              reference_mismatched_logps=jnp.array([[-6.0], [-4.0]]))
>>> output = kto_loss(**rows, **other, beta=1.0)  # u = 2, 0; z0 = max(0, (2 + 0)/2) = 1
>>> print([f"{x:.4f}" for x in output.loss])  # sigma(-(2 - 1)), sigma(0 - 1)
['0.2689', '0.2689']
>>> print([f"{x:.4f}" for x in apo_zero_unpaired_loss(**rows, beta=1.0).loss])
['0.1192', '0.5000']
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.ops import (
    CompletionSums,
    batch_mean,
    completion_sums,
    pair_metrics,
    present,
    require_between,
    require_positive,
)
from dpo_jax.types import Array, LossOutput


def kto_loss(
    *,
    policy_completion_logps: Array,
    reference_completion_logps: Array,
    completion_mask: Array,
    policy_mismatched_logps: Array,
    reference_mismatched_logps: Array,
    mismatched_mask: Array,
    labels: Array,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossOutput:
    """Kahneman-Tversky optimisation; batch-coupled through the reference point z0.

    z0 averages over the rows that have a mismatched answer and is then clamped, in this order. The metric `kl` is z0 in
    nats, `accuracy` the share of rows on the side of z0 that their label asks for.

    Args:
      beta: how fast the value saturates with the log ratio, above 0.
      desirable_weight: w_D, weight of rows labelled 1, at least 0; see `kto_weight_range`.
      undesirable_weight: w_U, weight of rows labelled 0, at least 0.
    """
    own = completion_sums(policy_completion_logps, reference_completion_logps, completion_mask)
    other = completion_sums(policy_mismatched_logps, reference_mismatched_logps, mismatched_mask)
    z0 = _reference_point(other, mismatched_mask)
    return _singles(own, labels, z0, beta, desirable_weight, undesirable_weight)


def apo_zero_unpaired_loss(
    *,
    policy_completion_logps: Array,
    reference_completion_logps: Array,
    completion_mask: Array,
    labels: Array,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossOutput:
    """APO-zero (arXiv 2408.06266) on single answers: KTO whose reference point is 0, so rows do not know each other.

    Args:
      beta: how fast the value saturates with the log ratio, above 0.
      desirable_weight: weight of rows labelled 1, at least 0.
      undesirable_weight: weight of rows labelled 0, at least 0.
    """
    own = completion_sums(policy_completion_logps, reference_completion_logps, completion_mask)
    return _singles(own, labels, jnp.zeros((), jnp.float32), beta, desirable_weight, undesirable_weight)


def kto_pair_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossOutput:
    """KTO on pairs without mismatched answers, kept for comparisons; batch-coupled through both reference points.

    A pair's value is the mean of its two losses, so that the mean over B pairs is the mean over their 2B losses.
    The metrics `chosen_kl` and `rejected_kl` are the reference points that chosen and rejected answers are judged by.

    Args:
      beta: how fast the value saturates with the log ratio, above 0.
      desirable_weight: weight of chosen answers, at least 0.
      undesirable_weight: weight of rejected answers, at least 0.
    """
    _check_options(beta, desirable_weight, undesirable_weight)
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    chosen_z0, rejected_z0 = _reference_point(rejected, rejected_mask), _reference_point(chosen, chosen_mask)
    u, v = chosen.log_ratio, rejected.log_ratio
    loss = desirable_weight * jax.nn.sigmoid(-beta * (u - chosen_z0))
    loss = (loss + undesirable_weight * jax.nn.sigmoid(beta * (v - rejected_z0))) / 2
    metrics = pair_metrics(chosen, rejected, beta * u, beta * v)
    metrics |= {"chosen_kl": jnp.full_like(loss, chosen_z0), "rejected_kl": jnp.full_like(loss, rejected_z0)}
    return LossOutput(loss, metrics)


class KTOWeightRange(NamedTuple):
    """Weights that balance the two labels; take one of the two intervals and leave the other weight at 1.

    Attributes:
      desirable: least and largest w_D while w_U = 1.
      undesirable: least and largest w_U while w_D = 1.
    """

    desirable: tuple[float, float]
    undesirable: tuple[float, float]


def kto_weight_range(n_desirable: int, n_undesirable: int) -> KTOWeightRange:
    """Weights for which w_D n_D / (w_U n_U) lies in [1, 4/3], as the paper advises; host, not rounded.

    Args:
      n_desirable: number of rows labelled 1, above 0.
      n_undesirable: number of rows labelled 0, above 0.

    Raises:
      ValueError: a label without rows: no weight balances it.
    """
    require_positive(n_desirable=n_desirable, n_undesirable=n_undesirable)
    ratio = n_undesirable / n_desirable
    return KTOWeightRange((ratio, ratio * 4 / 3), (3 / (4 * ratio), 1 / ratio))


def pairs_to_unpaired(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Two rows {prompt, completion, labels} for every pair: the chosen answer with label 1, the rejected one with 0.

    Host. Both rows keep the other keys of the pair, except those that speak of one side (chosen_score,
    reference_rejected_logps). Rows of either label may be dropped afterwards: none needs its partner.

    Args:
      rows: mappings with prompt, chosen and rejected.

    Raises:
      ValueError: a row without one of the three keys.
    """
    unpaired = []
    for number, row in enumerate(rows):
        if missing := [name for name in ("prompt", "chosen", "rejected") if name not in row]:
            raise ValueError(f"row {number} has no {' and no '.join(missing)}; its keys are {sorted(row)}")
        shared = {name: value for name, value in row.items() if not {"chosen", "rejected"} & set(name.split("_"))}
        unpaired.append({**shared, "completion": row["chosen"], "labels": 1})
        unpaired.append({**shared, "completion": row["rejected"], "labels": 0})
    return unpaired


def mismatched_indices(prompts: Sequence[Any]) -> np.ndarray:
    """Which row lends its answer to each row: the next one, cyclically, with another prompt; host, int32 [N].

    With distinct prompts in shuffled order this is the official rotation by one. Rows that share a prompt are passed
    over, because their answers are matched and would push the reference point up. The assignment does not depend on
    batches, so log-probabilities of the reference can be computed once.

    Args:
      prompts: N prompts in shuffled order, texts or messages; compared by ==.

    Raises:
      ValueError: fewer than two different prompts.
    """
    n = len(prompts)
    following = np.full(n, -1, np.int32)
    for place in reversed(range(2 * n)):  # twice round the circle: the first turn finds what the end of the list needs
        row, successor = place % n, (place + 1) % n
        following[row] = successor if prompts[row] != prompts[successor] else following[successor]
    if n == 0 or np.any(following < 0):
        raise ValueError(f"{n} rows hold fewer than two different prompts; a mismatched answer needs another prompt")
    return following


def _check_options(beta: float, desirable_weight: float, undesirable_weight: float) -> None:
    require_positive(beta=beta)
    require_between(0.0, float("inf"), desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)


def _reference_point(other: CompletionSums, mask: Array) -> Array:
    """z0, float32 scalar: first the mean over the batch, then the clamp; the paper lets no gradient through it."""
    return jax.lax.stop_gradient(jnp.maximum(batch_mean(other.log_ratio, present(mask)), 0.0))


def _singles(
    own: CompletionSums, labels: Array, z0: Array, beta: float, desirable_weight: float, undesirable_weight: float
) -> LossOutput:
    _check_options(beta, desirable_weight, undesirable_weight)
    chex.assert_equal_shape([own.log_ratio, labels])
    desirable = labels > 0
    gain = jnp.where(desirable, 1.0, -1.0) * (own.log_ratio - z0)  # how far on the right side of z0, in nats
    loss = jnp.where(desirable, desirable_weight, undesirable_weight) * jax.nn.sigmoid(-beta * gain)
    metrics = {
        "reward": beta * own.log_ratio,
        "accuracy": (gain > 0).astype(jnp.float32),
        "kl": jnp.full_like(loss, z0),
        "completion_logps": own.logps,
        "completion_log_ratio": own.log_ratio,
    }
    return LossOutput(loss, metrics)
