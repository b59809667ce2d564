"""SFT: maximum likelihood of the (first) completion, the step before every preference method.

    loss = -1/|y| sum_t log pi(y_t | x, y_<t)                 per row, |y| = number of completion tokens

Experiment: dpo_jax/cli/demo.py
Measured: 250 steps on chains of which 53 % are right give a policy that samples right answers to 51 % of fresh prompts.
Shapes: policy_logps, mask [B, K, T]; result [B]. Each row counts alike whatever its length (sequence mean). With K > 1
completion 0 is learned, the chosen one of pairs and lists; the others change nothing.

>>> import jax.numpy as jnp
>>> logps = jnp.log(jnp.array([[[0.5, 0.125, 1.0]]]))
>>> output = sft_loss(policy_logps=logps, mask=jnp.array([[[1, 1, 0]]]))
>>> print(f"{output.loss[0] / jnp.log(2.0):.4f} {output.metrics['perplexity'][0]:.4f}")
2.0000 4.0000
"""

import chex
import jax.numpy as jnp

from dpo_jax.ops import MAX_EXPONENT, masked_count, masked_mean, masked_sum
from dpo_jax.types import Array, LossOutput


def sft_loss(*, policy_logps: Array, mask: Array) -> LossOutput:
    """Negative log-likelihood per token of completion 0 of every row; zero for an empty completion.

    Args:
      policy_logps: [B, K, T] log-probabilities of completion tokens, any float dtype.
      mask: [B, K, T], one at completion tokens.
    """
    chex.assert_rank([policy_logps, mask], 3)
    chex.assert_equal_shape([policy_logps, mask])
    logps, mask = policy_logps[:, 0], mask[:, 0]  # [B, K, T] -> [B, T]
    nll = -masked_mean(logps, mask)  # [B, T] -> [B]
    metrics = {
        "nll": nll,
        "perplexity": jnp.exp(jnp.minimum(nll, MAX_EXPONENT)),
        "chosen_logps": masked_sum(logps, mask),
        "chosen_length": masked_count(mask),
    }
    return LossOutput(nll, metrics)
