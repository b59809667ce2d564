"""BCO: a binary classifier of desirable answers whose logit is the implicit reward, centred by its running mean.

Jung et al. 2024, arXiv 2404.04656. Evidence: another library, to which the authors' group contributed it (loss, running
shift, density ratios); the theory from the paper. With S the sum over completion tokens,

    a = beta (S(log pi(y|x)) - S(log pi_ref(y|x)))
    delta = mean of a over all rows seen so far, this batch included, a constant
    bco      desirable softplus(-(a - delta)),  undesirable softplus(a - delta)
    bco_udm  undesirable rows times w = clip(p / (1 - p), 0.5, 10), p = P(desirable | prompt): underlying distribution
             matching, for when desirable and undesirable answers belong to different prompts

For every delta, softplus(-(a - delta)) + softplus(b - delta) > softplus(-(a - b)): the pair's DPO loss is bounded from
above, more tightly if rewards are centred. The paper's delta is the mean of the two classes' mean rewards; the
running mean over a mixed stream equals it for balanced data only.

Shapes: log-probabilities [B, T] in any float dtype, masks [B, T] one at completion tokens, labels [B] integers, 1 for
desirable; every result [B] float32. Reference arrays, masks, columns and delta are constants.
State: {"mean", "count"}, float32 scalars, first `bco_state()`; every microbatch updates it before it is used, so delta
never forgets and lags behind a policy that moves fast.

>>> import jax.numpy as jnp
>>> rows = dict(policy_completion_logps=jnp.array([[-1.0], [-3.0]]), labels=jnp.array([1, 0]),
...             reference_completion_logps=jnp.array([[-3.0], [-5.0]]), completion_mask=jnp.ones((2, 1)))
>>> output = bco_loss(**rows, loss_state=bco_state(), beta=1.0)  # a = 2, 2; delta = 2
>>> print([f"{x:.4f}" for x in output.loss], {name: float(value) for name, value in output.state.items()})
['0.6931', '0.6931'] {'count': 2.0, 'mean': 2.0}
>>> weighted = bco_udm_loss(**rows, loss_state=bco_state(), prob_desirable=jnp.array([0.5, 0.75]), beta=1.0)
>>> print([f"{x:.4f}" for x in weighted.loss])  # the undesirable row counts three times
['0.6931', '2.0794']
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.ops import CompletionSums, batch_mean, completion_sums, logistic_loss, present, require_positive
from dpo_jax.statistics import logistic_regression
from dpo_jax.types import Array, LossOutput

BCOState = dict[str, Array]


def bco_state() -> BCOState:
    """The state before the first step: mean reward 0 over no rows, float32 scalars."""
    return {"count": jnp.zeros((), jnp.float32), "mean": jnp.zeros((), jnp.float32)}


def bco_udm_state() -> BCOState:
    """The state of `bco_udm_loss`, that of `bco_loss`."""
    return bco_state()


def bco_loss(
    *,
    policy_completion_logps: Array,
    reference_completion_logps: Array,
    completion_mask: Array,
    labels: Array,
    loss_state: BCOState,
    beta: float = 0.01,
) -> LossOutput:
    """Binary cross-entropy of the centred reward; batch-coupled through the reward shift delta.

    Metrics: `reward` is a, `shift` delta, `accuracy` the share of rows on the side of delta that their label asks for.

    Args:
      loss_state: {"mean", "count"} of the rewards seen before; the output's state has this batch's rows in it.
      beta: strength of the KL constraint to the reference, above 0.
    """
    own = completion_sums(policy_completion_logps, reference_completion_logps, completion_mask)
    return _classify(own, present(completion_mask), labels, jnp.ones_like(own.log_ratio), loss_state, beta)


def bco_udm_loss(
    *,
    policy_completion_logps: Array,
    reference_completion_logps: Array,
    completion_mask: Array,
    labels: Array,
    prob_desirable: Array,
    loss_state: BCOState,
    beta: float = 0.01,
    min_density_ratio: float = 0.5,
    max_density_ratio: float = 10.0,
) -> LossOutput:
    """`bco_loss` whose undesirable rows count as often as desirable rows have such prompts; batch-coupled likewise.

    Args:
      prob_desirable: [B], probability that the prompt comes from a desirable row; see `fit_prompt_classifier`.
      loss_state: {"mean", "count"} of the rewards seen before; the output's state has this batch's rows in it.
      beta: strength of the KL constraint to the reference, above 0.
      min_density_ratio: least weight of an undesirable row, above 0.
      max_density_ratio: largest weight of an undesirable row, at least min_density_ratio.
    """
    own = completion_sums(policy_completion_logps, reference_completion_logps, completion_mask)
    weights = density_ratio_weights(
        prob_desirable, labels, min_density_ratio=min_density_ratio, max_density_ratio=max_density_ratio
    )
    output = _classify(own, present(completion_mask), labels, weights, loss_state, beta)
    return output._replace(metrics={**output.metrics, "row_weight": weights})


def density_ratio_weights(
    prob_desirable: Array, labels: Array, *, min_density_ratio: float = 0.5, max_density_ratio: float = 10.0
) -> Array:
    """Weight of each row, float32 [B], a constant: clip(p / (1 - p)) for undesirable rows, 1 for desirable ones.

    Args:
      prob_desirable: [B] probabilities in [0, 1] that the prompt comes from a desirable row.
      labels: [B] integers, 1 for desirable.
      min_density_ratio: least weight of an undesirable row, above 0.
      max_density_ratio: largest weight of an undesirable row, at least min_density_ratio.

    Raises:
      ValueError: ratios that are not an interval above 0.
    """
    require_positive(min_density_ratio=min_density_ratio, max_density_ratio=max_density_ratio)
    if min_density_ratio > max_density_ratio:
        raise ValueError(f"min_density_ratio {min_density_ratio} is above max_density_ratio {max_density_ratio}")
    chex.assert_equal_shape([prob_desirable, labels])
    p = jax.lax.stop_gradient(prob_desirable.astype(jnp.float32))
    ratio = jnp.clip(p / (1 - p + 1e-8), min_density_ratio, max_density_ratio)  # p = 1 gives 1e8, not inf
    return jnp.where(labels > 0, 1.0, ratio)


class PromptClassifier(NamedTuple):
    """Logistic regression on prompt embeddings.

    Attributes:
      coefficients: float32 [D].
      intercept: float32 scalar.
    """

    coefficients: Array
    intercept: Array


def fit_prompt_classifier(embeddings: Array, labels: Array, *, inverse_penalty: float = 1.0) -> PromptClassifier:
    """Logistic regression that tells the prompts of desirable rows from those of undesirable ones; host.

    Minimises |coefficients|^2 / 2 + inverse_penalty * sum_i c_i NLL_i c_i the balancing weight
    N / (2 N_label), the intercept free. Usual input: at most 1024 prompts of each label.

    Args:
      embeddings: [N, D] of the prompts from any frozen encoder, finite, entries of order 1.
      labels: [N] integers, 1 for prompts of desirable rows.
      inverse_penalty: weight of the data against the ridge, above 0.

    Raises:
      ValueError: arrays of other shapes, or prompts of one label only.
    """
    require_positive(inverse_penalty=inverse_penalty)
    desirable = np.asarray(labels) > 0
    if np.ndim(embeddings) != 2 or desirable.shape != np.shape(embeddings)[:1]:
        raise ValueError(f"embeddings {np.shape(embeddings)} and labels {desirable.shape}; give [N, D] and [N]")
    if desirable.all() or not desirable.any():
        raise ValueError(f"all {desirable.size} prompts have one label; a classifier needs both")
    share = desirable.mean()
    balance = inverse_penalty * np.where(desirable, 0.5 / share, 0.5 / (1 - share))
    features = np.concatenate([np.asarray(embeddings), np.ones((desirable.size, 1))], axis=1)  # [N, D + 1]
    penalty = np.append(np.ones(features.shape[1] - 1), 0.0)
    theta = jnp.asarray(logistic_regression(features, desirable, weights=balance, penalty=penalty), jnp.float32)
    return PromptClassifier(theta[:-1], theta[-1])


def classify_prompts(classifier: PromptClassifier, embeddings: Array) -> Array:
    """The column `prob_desirable`, float32 [N], of embeddings [N, D]."""
    features = embeddings.astype(jnp.float32)
    # Full float32: the default of accelerators rounds factors to eleven bits or fewer.
    logits = jnp.matmul(features, classifier.coefficients, precision=jax.lax.Precision.HIGHEST)
    return jax.nn.sigmoid(logits + classifier.intercept)


def _classify(
    own: CompletionSums, there: Array, labels: Array, weights: Array, loss_state: BCOState, beta: float
) -> LossOutput:
    require_positive(beta=beta)
    chex.assert_equal_shape([own.log_ratio, labels])
    reward = beta * own.log_ratio
    state = _update(loss_state, jax.lax.stop_gradient(reward), there)  # the paper lets no gradient through delta
    desirable = labels > 0
    logits = jnp.where(desirable, 1.0, -1.0) * (reward - state["mean"])
    metrics = {
        "reward": reward,
        "accuracy": (logits > 0).astype(jnp.float32),
        "shift": jnp.full_like(reward, state["mean"]),
        "completion_logps": own.logps,
        "completion_log_ratio": own.log_ratio,
    }
    return LossOutput(weights * logistic_loss(logits), metrics, state)


def _update(state: BCOState, rewards: Array, there: Array) -> BCOState:
    """Running mean with the rows that are there; an empty batch changes nothing."""
    rows = jnp.sum(there)
    count = state["count"] + rows
    step = rows / jnp.maximum(count, 1.0)
    return {"count": count, "mean": state["mean"] + (batch_mean(rewards, there) - state["mean"]) * step}
