"""DPO and its family: one classification loss on preference pairs in place of a reward model and RL.

Rafailov et al. 2023, arXiv 2305.18290, eq. 7. Evidence: official code (dpo, cdpo, ipo_sum, f-DPO), other
libraries (robust, ipo, hinge, rpo), the paper's derivation (rdpo). With S the sum over completion tokens,

    u = S(log pi(y_w)) - S(log pi_ref(y_w)),  v likewise for y_l,  x = beta (u - v)

    dpo          softplus(-x)                                    = -log sigma(x)
    cdpo         (1-e) softplus(-x) + e softplus(x)
    robust       ((1-e) softplus(-x) - e softplus(x)) / (1-2e)
    hinge        max(0, 1 - x)
    ipo          (u/|y_w| - v/|y_l| - 1/(2 beta))^2,   ipo_sum   (u - v - 1/(2 beta))^2
    f-DPO        softplus(-beta (s(u) - s(v))),  s = f': forward_kl, js, alpha_divergence; s(u) = u is dpo
    rdpo         softplus(-(x + alpha (|y_w| - |y_l|)))
    rpo          dpo + nll_coef * NLL(y_w)
    reference_free   dpo with log pi_ref = 0

Shapes: log-probabilities [B, T] in any float dtype, masks [B, T] one at completion tokens; every result [B] float32.
Reference arrays and masks are constants. Options out of their range raise ValueError.
TR-DPO (arXiv 2404.09656) is any of these with a reference that `dpo_jax.tree.interpolate` moves every 512 steps or so.
Experiment: experiments/dpo.py
Measured: with 30 % of the labels flipped the true reward is 0.88 for robust, 0.64 for dpo, 0.22 for cdpo; with the NLL
term of rpo the chosen log-ratio rises (+0.11), without it falls (-2.52); rdpo shortens answers from 62 to 19 tokens.
Metrics: rewards of both sides, margin, strict accuracy, log-probabilities and log ratios (`ops.pair_metrics`).

>>> import jax.numpy as jnp
>>> pair = dict(policy_chosen_logps=jnp.array([[-1.0, -2.0]]), reference_chosen_logps=jnp.array([[-2.0, -3.0]]),
...             policy_rejected_logps=jnp.array([[-4.0, -9.0]]), reference_rejected_logps=jnp.array([[-3.0, -9.0]]),
...             chosen_mask=jnp.array([[1, 1]]), rejected_mask=jnp.array([[1, 0]]))
>>> output = dpo_loss(**pair, beta=0.5)  # u = 2, v = -1, x = 1.5
>>> print(f"{output.loss[0]:.4f} {output.metrics['margin'][0]:.2f}")
0.2014 1.50
>>> print(f"{hinge_loss(**pair, beta=0.2).loss[0]:.2f} {ipo_sum_loss(**pair, beta=0.5).loss[0]:.2f}")
0.40 4.00
>>> print(f"{ipo_loss(**pair, beta=0.5).loss[0]:.2f}")  # u/2 - v/1 - 1 = 1
1.00
"""

import jax
import jax.numpy as jnp

from dpo_jax.ops import (
    MAX_EXPONENT,
    CompletionSums,
    completion_sums,
    logistic_loss,
    pair_metrics,
    require_between,
    require_positive,
    safe_divide,
    smoothed_logistic_loss,
    token_mean_nll,
)
from dpo_jax.types import Array, LossOutput


def dpo_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.1,
) -> LossOutput:
    """Direct preference optimisation, eq. 7.

    Args:
      beta: strength of the KL constraint to the reference, above 0.
    """
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    return LossOutput(logistic_loss(_logits(chosen, rejected, beta)), _metrics(chosen, rejected, beta))


def cdpo_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> LossOutput:
    """Conservative DPO (Mitchell 2023, note with the official code): labels are wrong with a known probability.

    The minimum lies at x = log((1 - e) / e), so margins stop growing there.

    Args:
      beta: strength of the KL constraint to the reference, above 0.
      label_smoothing: probability e that a label is flipped, in [0, 1/2].
    """
    require_between(0.0, 0.5, label_smoothing=label_smoothing)
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    loss = smoothed_logistic_loss(_logits(chosen, rejected, beta), label_smoothing)
    return LossOutput(loss, _metrics(chosen, rejected, beta))


def robust_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> LossOutput:
    """Provably robust DPO (Chowdhury et al. 2024, arXiv 2403.00409): unbiased under flipped labels.

    Its expectation over flips with probability e is the DPO loss of the clean label; it is not bounded below.

    Args:
      beta: strength of the KL constraint to the reference, above 0.
      label_smoothing: probability e that a label is flipped, in [0, 1/2).
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; give a flip rate in [0, 0.5)")
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    x = _logits(chosen, rejected, beta)
    loss = (1 - label_smoothing) * logistic_loss(x) - label_smoothing * logistic_loss(-x)
    return LossOutput(loss / (1 - 2 * label_smoothing), _metrics(chosen, rejected, beta))


def hinge_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.1,
) -> LossOutput:
    """Hinge on the reference-normalised margin (SLiC, arXiv 2305.10425, as normalised by RSO, arXiv 2309.06657).

    Args:
      beta: scale of the log-ratio margin, which stops counting at 1/beta; above 0.
    """
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    return LossOutput(jax.nn.relu(1 - _logits(chosen, rejected, beta)), _metrics(chosen, rejected, beta))


def ipo_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.1,
) -> LossOutput:
    """IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17) on log ratios per token, the authors' reading for texts.

    Args:
      beta: the paper's tau; the margin per token is drawn to 1/(2 beta), above 0.
    """
    require_positive(beta=beta)
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    u = safe_divide(chosen.log_ratio, chosen.length)
    v = safe_divide(rejected.log_ratio, rejected.length)
    return LossOutput(jnp.square(u - v - 1 / (2 * beta)), pair_metrics(chosen, rejected, beta * u, beta * v))


def ipo_sum_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.1,
) -> LossOutput:
    """IPO on log ratios summed over tokens, as in the official DPO code; `ipo_loss` takes means.

    Args:
      beta: the paper's tau; the margin per sequence is drawn to 1/(2 beta), above 0.
    """
    require_positive(beta=beta)
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    loss = jnp.square(chosen.log_ratio - rejected.log_ratio - 1 / (2 * beta))
    return LossOutput(loss, _metrics(chosen, rejected, beta))


def forward_kl_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.1,
) -> LossOutput:
    """f-DPO (Wang et al. 2023, arXiv 2309.16240, table 1) with the forward KL: s(u) = 1 - exp(-u).

    Exponents stop at 80 (no gradient beyond); the metric `clipped` is the fraction of the pair's two that did.

    Args:
      beta: strength of the divergence constraint, above 0.
    """
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    return _power_divergence(chosen, rejected, beta, alpha=1.0)


def alpha_divergence_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.1,
    alpha: float = 0.5,
) -> LossOutput:
    """f-DPO (arXiv 2309.16240, table 1) with an alpha-divergence: s(u) = (1 - exp(-alpha u)) / alpha.

    Tends to `dpo_loss` as alpha -> 0 and to `forward_kl_loss` as alpha -> 1.
    Exponents stop at 80 (no gradient beyond); the metric `clipped` is the fraction of the pair's two that did.

    Args:
      beta: strength of the divergence constraint, above 0.
      alpha: order of the divergence, in (0, 1).
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}; give a number in (0, 1): dpo_loss is the limit 0, forward_kl_loss is 1")
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    return _power_divergence(chosen, rejected, beta, alpha)


def js_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.1,
) -> LossOutput:
    """f-DPO (arXiv 2309.16240, table 1) with the Jensen-Shannon divergence: s(u) = log 2 + log sigma(u).

    Args:
      beta: strength of the divergence constraint, above 0.
    """
    require_positive(beta=beta)
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    s_u = jax.nn.log_sigmoid(chosen.log_ratio) + jnp.log(2.0)
    s_v = jax.nn.log_sigmoid(rejected.log_ratio) + jnp.log(2.0)
    return LossOutput(logistic_loss(beta * (s_u - s_v)), pair_metrics(chosen, rejected, beta * s_u, beta * s_v))


def rdpo_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.1,
    alpha: float = 0.05,
) -> LossOutput:
    """Length-regularised DPO (Park et al. 2024, arXiv 2403.19159): a longer chosen answer explains part of the label.

    Maximising E[r] - alpha |y| - beta KL gives r = beta log ratio + alpha |y| + const, hence the plus sign.
    Rewards in the metrics are beta times the log ratio; `length_gap` is |y_w| - |y_l|.

    Args:
      beta: strength of the KL constraint to the reference, above 0.
      alpha: price of a token in units of reward, at least 0; 0 is DPO.
    """
    require_between(0.0, float("inf"), alpha=alpha)
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    length_gap = chosen.length - rejected.length
    loss = logistic_loss(_logits(chosen, rejected, beta) + alpha * length_gap)
    return LossOutput(loss, {**_metrics(chosen, rejected, beta), "length_gap": length_gap})


def rpo_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.1,
    nll_coef: float = 1.0,
) -> LossOutput:
    """Iterative RPO (Pang et al. 2024, arXiv 2404.19733): DPO plus the chosen answer's NLL per token.

    Args:
      beta: strength of the KL constraint to the reference, above 0.
      nll_coef: the paper's alpha, weight of the mean NLL over the chosen answer's own tokens, at least 0.
    """
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    return _dpo_with_nll(chosen, rejected, beta, nll_coef, nll=-chosen.mean_logps)


def rpo_token_mean_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.1,
    nll_coef: float = 1.0,
) -> LossOutput:
    """`rpo_loss` with the NLL averaged over all chosen tokens of the batch: long answers weigh more (usual in code).

    This loss is batch-coupled: the mean over rows with tokens is the batch token mean, and microbatches change it.

    Args:
      beta: strength of the KL constraint to the reference, above 0.
      nll_coef: weight of the NLL, at least 0.
    """
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    return _dpo_with_nll(chosen, rejected, beta, nll_coef, nll=token_mean_nll(policy_chosen_logps, chosen_mask))


def rpo_sum_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.01,
    nll_coef: float = 0.005,
) -> LossOutput:
    """RPO with the NLL of the whole chosen answer (Liu et al. 2024, arXiv 2405.16436): a provable guard, in nats.

    Args:
      beta: strength of the KL constraint to the reference, above 0.
      nll_coef: weight of the NLL summed over the chosen answer's tokens, at least 0.
    """
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    return _dpo_with_nll(chosen, rejected, beta, nll_coef, nll=-chosen.logps)


def reference_free_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.1,
) -> LossOutput:
    """DPO with a uniform reference: its log-probabilities are taken as 0 and no reference model runs.

    Args:
      beta: scale of the log-probability margin, above 0.
    """
    chosen = completion_sums(policy_chosen_logps, None, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, None, rejected_mask)
    return LossOutput(logistic_loss(_logits(chosen, rejected, beta)), _metrics(chosen, rejected, beta))


def _logits(chosen: CompletionSums, rejected: CompletionSums, beta: float) -> Array:
    """x = beta (u - v), [B]."""
    require_positive(beta=beta)
    return beta * (chosen.log_ratio - rejected.log_ratio)


def _metrics(chosen: CompletionSums, rejected: CompletionSums, beta: float) -> dict[str, Array]:
    return pair_metrics(chosen, rejected, beta * chosen.log_ratio, beta * rejected.log_ratio)


def _power_divergence(chosen: CompletionSums, rejected: CompletionSums, beta: float, alpha: float) -> LossOutput:
    """softplus(-beta (s(u) - s(v))) with s(u) = (1 - exp(-alpha u)) / alpha, the f' of an alpha-divergence."""
    require_positive(beta=beta)

    def score(log_ratio: Array) -> tuple[Array, Array]:
        exponent = -alpha * log_ratio
        # expm1 keeps the digits of u that exp(-alpha u) loses next to 1.
        value = -jnp.expm1(jnp.minimum(exponent, MAX_EXPONENT)) / alpha
        return value, (exponent > MAX_EXPONENT).astype(jnp.float32)

    (s_u, clipped_u), (s_v, clipped_v) = score(chosen.log_ratio), score(rejected.log_ratio)
    metrics = {**pair_metrics(chosen, rejected, beta * s_u, beta * s_v), "clipped": (clipped_u + clipped_v) / 2}
    return LossOutput(logistic_loss(beta * (s_u - s_v)), metrics)


def _dpo_with_nll(
    chosen: CompletionSums, rejected: CompletionSums, beta: float, nll_coef: float, nll: Array
) -> LossOutput:
    require_between(0.0, float("inf"), nll_coef=nll_coef)
    loss = logistic_loss(_logits(chosen, rejected, beta)) + nll_coef * nll
    return LossOutput(loss, {**_metrics(chosen, rejected, beta), "nll": nll})
