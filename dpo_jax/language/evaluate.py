"""How well a policy ranks held-out pairs, and how far it has moved from its reference."""

from dpo_jax.ops import completion_sums, logistic_loss, masked_mean, masked_sum, pair_metrics
from dpo_jax.types import Array, LossOutput


def preference_evaluation(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_reverse_kl: Array,
    rejected_reverse_kl: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.1,
) -> LossOutput:
    """Accuracy and margin of the implicit reward, exact KL to the reference, log-probs and lengths of pairs.

    It has the form of a loss, so that `objectives.from_loss` and `train.make_eval_step` run it.

    Args:
      beta: scale of the implicit reward beta log(pi / pi_ref); the accuracy does not depend on it.

    Returns:
      loss: the DPO loss [B]. Metrics [B]: those of pairs, `kl` (KL(policy || reference) summed over a completion's
      tokens, mean of both completions, nats), `chosen_logps_per_token`, lengths of both in tokens.
    """
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    metrics = pair_metrics(chosen, rejected, beta * chosen.log_ratio, beta * rejected.log_ratio)
    metrics |= {
        "kl": 0.5 * (masked_sum(chosen_reverse_kl, chosen_mask) + masked_sum(rejected_reverse_kl, rejected_mask)),
        **_texts(policy_chosen_logps, policy_rejected_logps, chosen_mask, rejected_mask),
    }
    return LossOutput(logistic_loss(metrics["margin"]), metrics)


def likelihood_evaluation(
    *, policy_chosen_logps: Array, policy_rejected_logps: Array, chosen_mask: Array, rejected_mask: Array
) -> LossOutput:
    """The same without a reference: the reward of a completion is its log-probability.

    Returns:
      loss: -log sigma of the difference of log-probabilities [B]; metrics as `preference_evaluation`, without `kl`.
    """
    chosen = completion_sums(policy_chosen_logps, None, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, None, rejected_mask)
    metrics = pair_metrics(chosen, rejected, chosen.logps, rejected.logps)
    metrics |= _texts(policy_chosen_logps, policy_rejected_logps, chosen_mask, rejected_mask)
    return LossOutput(logistic_loss(metrics["margin"]), metrics)


def _texts(chosen_logps: Array, rejected_logps: Array, chosen_mask: Array, rejected_mask: Array) -> dict[str, Array]:
    return {
        "chosen_logps_per_token": masked_mean(chosen_logps, chosen_mask),
        "rejected_logps_per_token": masked_mean(rejected_logps, rejected_mask),
        "chosen_length": masked_sum(chosen_mask, chosen_mask),
        "rejected_length": masked_sum(rejected_mask, rejected_mask),
    }
