"""LN-DPO: DPO on the mean log-ratio per token, so that rewards do not grow with the length of an answer.

Ahrabian et al. 2024, arXiv 2407.15229 (The Hitchhiker's Guide to Human Alignment with *PO). Evidence: the formula
from other libraries that agree (as `dpo_norm`, `sigmoid_norm`); the study itself from its abstract. With
r_t = log pi(y_t) - log pi_ref(y_t),

    u = 1/|y_w| sum_t r_t over y_w,   v = 1/|y_l| sum_t r_t over y_l,   loss = -log sigma(beta (u - v))

Each side is divided by its own number of completion tokens, never by a padded length. beta weighs nats per token:
10 to 100 times that of DPO.
Shapes: log-probabilities and masks [B, T]; results [B] float32. Reference and masks are constants.
Reduces to: DPO with beta / L where all answers have L tokens; SimPO without its margin for a reference of zero; log 2
at the reference.

>>> import jax.numpy as jnp
>>> pair = dict(policy_chosen_logps=jnp.array([[-1.0, -2.0]]), reference_chosen_logps=jnp.array([[-2.0, -3.0]]),
...             policy_rejected_logps=jnp.array([[-4.0, -9.0]]), reference_rejected_logps=jnp.array([[-3.0, -9.0]]),
...             chosen_mask=jnp.array([[1, 1]]), rejected_mask=jnp.array([[1, 0]]))
>>> output = ln_dpo_loss(**pair, beta=0.5)  # u = 2/2, v = -1/1
>>> print(f"{output.loss[0]:.4f} {output.metrics['margin'][0]:.2f}")
0.3133 1.00
"""

import chex
import jax.numpy as jnp

from dpo_jax.ops import (
    batch_mean,
    completion_sums,
    masked_sum,
    pair_metrics,
    present,
    require_between,
    require_positive,
    safe_divide,
    smoothed_logistic_loss,
)
from dpo_jax.types import Array, LossOutput


def ln_dpo_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 5.0,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """DPO on length-normalised log ratios; an empty completion counts as a log ratio of 0.

    Args:
      beta: strength of the constraint to the reference in units of 1 / (nats per token), above 0; the study sweeps it,
        the default is that of the Tulu 3 models (arXiv 2411.15124).
      label_smoothing: probability that a label is flipped, in [0, 1/2].
    """
    require_positive(beta=beta)
    require_between(0.0, 0.5, label_smoothing=label_smoothing)
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    u = safe_divide(chosen.log_ratio, chosen.length)
    v = safe_divide(rejected.log_ratio, rejected.length)
    loss = smoothed_logistic_loss(beta * (u - v), label_smoothing)
    return LossOutput(loss, pair_metrics(chosen, rejected, beta * u, beta * v))


def generation_stats(
    *, policy_logps: Array, reference_logps: Array, mask: Array, scores: Array, baseline_scores: Array
) -> dict[str, Array]:
    """What the study compares at equal quality: drift from the reference, length and win rate of sampled answers.

    The log-probabilities must be those of answers sampled from the policy: only then are the two means of log ratios
    estimates of KL(policy || reference), in nats. Rows without tokens are left out.

    Args:
      policy_logps, reference_logps: [B, T] log-probabilities of the sampled tokens, any float dtype.
      mask: [B, T], one at sampled tokens.
      scores, baseline_scores: [B] of the answer and of the baseline's answer to the same prompt; larger is better.

    Returns:
      Float32 scalars: `kl_sequence` (mean over answers of the summed log ratio), `kl_token` (mean over all tokens),
      `length_mean`, `length_std` (of the population), `length_median`, `score_mean`, `win_rate` (a tie counts 1/2). All
      zero if no row has tokens.
    """
    chex.assert_equal_shape([scores, baseline_scores])
    sums = completion_sums(policy_logps, reference_logps, mask)
    there = present(mask)
    length_mean = batch_mean(sums.length, there)
    median = jnp.nanmedian(jnp.where(there != 0, sums.length, jnp.nan))
    scores, baseline_scores = scores.astype(jnp.float32), baseline_scores.astype(jnp.float32)
    wins = (scores > baseline_scores) + 0.5 * (scores == baseline_scores)
    return {
        "kl_sequence": batch_mean(sums.log_ratio, there),
        "kl_token": safe_divide(masked_sum(sums.log_ratio, there), masked_sum(sums.length, there)),
        "length_mean": length_mean,
        "length_std": jnp.sqrt(batch_mean(jnp.square(sums.length - length_mean), there)),
        "length_median": jnp.where(there.any(), median, 0.0),
        "score_mean": batch_mean(scores, there),
        "win_rate": batch_mean(wins, there),
    }
