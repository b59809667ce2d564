"""Accelerated preference optimisation: Nesterov's extrapolation between the rounds of iterative DPO or SPPO.

He, Yuan and Gu 2024, arXiv 2410.06293. Evidence: abstract and published summaries; the recursions are derived again and
agree with the rate O((1 - alpha) / t); extrapolation of parameters for language models is rebuilt. Round t samples from
the extrapolated policy hat_t, trains from it with it as the reference (log-probabilities cached once), and then

    log hat_{t+1} = (1 + alpha) log pi_{t+1} - alpha log pi_t - log Z        (tables, or each token's distribution)
    theta_hat     = theta_{t+1} + alpha (theta_{t+1} - theta_t)              (parameters; equal for linear logits)

where pi_t is the policy before extrapolation: the extrapolated one in its place gives a longer step and no momentum.
The report is on the last pi, not hat. The optimiser starts afresh each round. With exact DPO steps pi_t is proportional
to pi_ref exp(s_t r / beta), s_t = `cumulative_steps`, near t / (1 - alpha). Low-rank adapters are extrapolated as
deltas, never factor by factor: concatenate ranks with weights 1 + alpha and -alpha. A round with alpha = 0 is a
restart, for when the validation reward has dropped. Not Anchored PO (also "APO"), not Adversarial PO.

Shapes: any pytree of parameters; log-probabilities [..., Y]. Results in the dtypes of the new parameters, float32 else.
Reduces to: iterative DPO or SPPO at alpha = 0; the first round does not depend on alpha.

>>> import jax.numpy as jnp
>>> extrapolate({"w": jnp.array([2.0])}, {"w": jnp.array([1.0])}, alpha=0.5)["w"].tolist()
[2.5]
>>> cumulative_steps(3, alpha=0.5).tolist()  # 1, 1 + 1.5, 1 + 1.5 + 1.75
[0.0, 1.0, 2.5, 4.25]
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.ops import require_between
from dpo_jax.types import Array, PyTree


def extrapolate(new: PyTree, previous: PyTree, *, alpha: float = 0.3) -> PyTree:
    """Leafwise new + alpha (new - previous), computed in float32 and kept in the dtype of `new`.

    Args:
      new: parameters after the round; leaves that are no floats (counters, codes) are kept as they are.
      previous: parameters after the round before, not extrapolated; the same structure and shapes.
      alpha: momentum, in [0, 1); 0 gives `new`.

    Raises:
      ValueError: alpha out of its range, or trees that do not match.
    """
    _require_momentum(alpha)

    def move(path: tuple, new: Array, previous: Array) -> Array:
        if new.shape != previous.shape:
            name = jax.tree_util.keystr(path)
            raise ValueError(f"{name} is {new.shape} in the new tree and {previous.shape} in the previous one")
        if not jnp.issubdtype(new.dtype, jnp.floating):
            return new
        new32, previous32 = new.astype(jnp.float32), previous.astype(jnp.float32)
        return (new32 + alpha * (new32 - previous32)).astype(new.dtype)

    return jax.tree_util.tree_map_with_path(move, new, previous)


def extrapolate_log_probs(new_logps: Array, previous_logps: Array, *, alpha: float = 0.3, axis: int = -1) -> Array:
    """Normalised (1 + alpha) log pi_new - alpha log pi_previous, float32: the exact extrapolation of one distribution.

    Args:
      new_logps, previous_logps: [..., Y] log-probabilities or logits over all Y outcomes; an outcome impossible (-inf)
        under the new policy stays so, one impossible under the previous policy only has no momentum.
      alpha: momentum, in [0, 1).
      axis: that of the outcomes.

    Raises:
      ValueError: alpha out of its range.
    """
    _require_momentum(alpha)
    chex.assert_equal_shape([new_logps, previous_logps])
    new = jax.nn.log_softmax(new_logps.astype(jnp.float32), axis)
    previous = jax.nn.log_softmax(previous_logps.astype(jnp.float32), axis)
    step = jnp.where(jnp.isfinite(new) & jnp.isfinite(previous), new - previous, 0.0)
    return jax.nn.log_softmax(new + alpha * step, axis)


def cumulative_steps(rounds: int, *, alpha: float) -> np.ndarray:
    """s_t for t = 0 ... rounds, float64 [rounds + 1]: after round t the policy is pi_ref exp(s_t r / beta).

    s_t = t / (1 - alpha) - alpha (1 - alpha^t) / (1 - alpha)^2, the sum of d_1 = 1, d_{t+1} = 1 + alpha d_t. Host.

    Args:
      rounds: number of rounds, at least 0.
      alpha: momentum, in [0, 1]; t at 0 and t (t + 1) / 2 at 1.

    Raises:
      ValueError: alpha or rounds out of their range.
    """
    require_between(0.0, 1.0, alpha=alpha)
    if rounds < 0:
        raise ValueError(f"rounds is {rounds}; give a number of at least 0")
    # Sums of powers: the closed form loses all digits next to alpha = 1.
    steps = np.cumsum(np.float64(alpha) ** np.arange(rounds))
    return np.concatenate([[0.0], np.cumsum(steps)])


def _require_momentum(alpha: float) -> None:
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha is {alpha}; give a momentum in [0, 1)")
