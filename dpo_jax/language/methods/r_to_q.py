"""From r to Q*: a preference-trained policy read as the optimal Q-function of a reward per token.

Rafailov et al. 2024, arXiv 2404.12358. Evidence: paper (slips of its print corrected: the sign of V in the search
equation, 1/beta in the bandit solution, the temperature of guided decoding). No loss of its own: DPO trains the policy,
these functions read it. With s_t the prompt and the tokens before t,

    A_t = beta (log pi(y_t | s_t) - log pi_ref(y_t | s_t))                     token reward as DPO learns it
    Q_t = beta logit(y_t),   V_t = beta logsumexp(logits),   pi = exp((Q - V) / beta)
    r_t = Q_t - beta log pi_ref(y_t | s_t) - V_{t+1},   V = 0 after the last token
    A_t = r_t + V_{t+1} - V_t,   so   sum_t r_t = V_first + sum_t A_t         potential shaping: same optimal policy

A is an advantage: it compares tokens of one answer, not of two prompts, and late tokens of a lost answer may look well.
Q, V and r move with arbitrary constants of the logits; A and sum r - V_first do not. Since the best path maximises
sum_t log pi alone, likelihood search (beam search) on the policy is search on reward plus value. The end-of-text token
is an action and belongs to the mask.
Shapes: logits [B, T, V] aligned with labels, log-probabilities and masks [B, T]; results float32.

>>> import jax.numpy as jnp
>>> policy, reference = jnp.log(jnp.array([[0.5, 0.1]])), jnp.log(jnp.array([[0.25, 0.4]]))
>>> rewards = token_rewards(policy_logps=policy, reference_logps=reference, mask=jnp.ones((1, 2)), beta=0.5)
>>> print([round(float(reward / jnp.log(2.0)), 3) for reward in rewards[0]])
[0.5, -1.0]
"""

from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.ops import kl_divergence, require_between, require_positive
from dpo_jax.types import Array


def token_rewards(*, policy_logps: Array, reference_logps: Array, mask: Array, beta: float) -> Array:
    """A_t of each completion token, float32 [..., T]; 0 behind the mask. Their sum is DPO's reward of the answer.

    Args:
      policy_logps: [..., T] log-probability of each completion token.
      reference_logps: [..., T] the same under the reference.
      mask: [..., T], one at completion tokens.
      beta: strength of the KL constraint that the policy was trained with, above 0; the unit of rewards.
    """
    require_positive(beta=beta)
    chex.assert_equal_shape([policy_logps, reference_logps, mask])
    ratios = policy_logps.astype(jnp.float32) - reference_logps.astype(jnp.float32)
    return jnp.where(mask != 0, beta * ratios, 0.0)


class TokenValues(NamedTuple):
    """What a policy says about each completion token; every field float32 [B, T], 0 behind the mask.

    Attributes:
      q: beta times the token's logit.
      v: beta logsumexp of the logits before the token.
      advantage: A_t.
      reward: r_t, by the Bellman equation from q, the reference and the next token's v.
    """

    q: Array
    v: Array
    advantage: Array
    reward: Array


def q_values(*, policy_logits: Array, reference_logits: Array, labels: Array, mask: Array, beta: float) -> TokenValues:
    """Q, V, advantage and reward of the completion's tokens.

    Args:
      policy_logits: [B, T, V], position t predicts token t.
      reference_logits: [B, T, V].
      labels: int [B, T] the tokens; any number behind the mask.
      mask: [B, T], one at completion tokens; the next state of a token is that of the next one in the mask.
      beta: strength of the KL constraint, above 0.
    """
    require_positive(beta=beta)
    chex.assert_equal_shape([policy_logits, reference_logits])
    chex.assert_equal_shape([labels, mask])
    there = mask != 0
    words = jnp.clip(labels, 0, policy_logits.shape[-1] - 1)[..., None]
    logits = jnp.where(there[..., None], policy_logits.astype(jnp.float32), 0.0)
    log_ref = jax.nn.log_softmax(jnp.where(there[..., None], reference_logits.astype(jnp.float32), 0.0), axis=-1)
    log_pi = jax.nn.log_softmax(logits, axis=-1)
    log_ref, log_pi = (jnp.take_along_axis(values, words, axis=-1)[..., 0] for values in (log_ref, log_pi))
    q = jnp.where(there, beta * jnp.take_along_axis(logits, words, axis=-1)[..., 0], 0.0)
    v = jnp.where(there, beta * jax.nn.logsumexp(logits, axis=-1), 0.0)
    reward = jnp.where(there, q - beta * log_ref - _value_of_next(v, there), 0.0)
    return TokenValues(q, v, jnp.where(there, beta * (log_pi - log_ref), 0.0), reward)


def expected_implicit_reward(*, policy_logits: Array, reference_logits: Array, mask: Array, beta: float) -> Array:
    """Expectation of A over the reference's next token, -beta KL(pi_ref || pi) <= 0 per state, float32 [B, T].

    Why implicit rewards of typical text fall in training; log it next to the mean A of chosen and rejected answers.

    Args:
      policy_logits: [B, T, V], position t predicts token t.
      reference_logits: [B, T, V]; words at -inf count nothing.
      mask: [B, T], one at completion tokens; 0 behind it.
      beta: strength of the KL constraint, above 0.
    """
    require_positive(beta=beta)
    return jnp.where(mask != 0, -beta * kl_divergence(reference_logits, policy_logits), 0.0)


def proxy_logits(*, base_logits: Array, tuned_logits: Array, reference_logits: Array, strength: float = 1.0) -> Array:
    """Guided decoding: log-probabilities of a base model moved by what tuning did to another one, float32 [..., V].

    log base + strength (log tuned - log reference), normalised; the bracket is A / beta of the tuned model.

    Args:
      base_logits: [..., V] of the model to decode from.
      tuned_logits: [..., V] of the (usually smaller) model after tuning; finite where the reference is.
      reference_logits: [..., V] of that model before tuning.
      strength: 0 is the base model; 1 with base and reference equal is the tuned one. Not negative.
    """
    require_between(0.0, float("inf"), strength=strength)
    chex.assert_equal_shape([base_logits, tuned_logits, reference_logits])
    base, tuned, reference = (
        jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        for logits in (base_logits, tuned_logits, reference_logits)
    )
    possible = jnp.isfinite(reference)
    guidance = jnp.where(possible, tuned, 0.0) - jnp.where(possible, reference, 0.0)
    return jax.nn.log_softmax(base + strength * guidance, axis=-1)


class SoftOptimum(NamedTuple):
    """Soft-optimal solution of a token tree, one float64 array per depth.

    Attributes:
      q: depth t -> [V] * (t + 1): value of each action after each prefix of t tokens, log pi_ref included.
      v: depth t -> [V] * t.
      policy: probabilities of the actions, shaped as q.
    """

    q: list[np.ndarray]
    v: list[np.ndarray]
    policy: list[np.ndarray]


def soft_value_iteration(
    *, rewards: Sequence[np.ndarray], reference_probs: Sequence[np.ndarray], beta: float
) -> SoftOptimum:
    """The best policy for given token rewards under a KL constraint, by backward induction on all prefixes (host).

    Q = r + beta log pi_ref + V', V = beta logsumexp(Q / beta), pi = exp((Q - V) / beta), V = 0 after the last token.
    For small trees: depth t holds every prefix. Answers that end early keep one action of probability 1 and reward 0.

    Args:
      rewards: depth t -> [V] * (t + 1), the reward of the action after each prefix.
      reference_probs: shaped alike, summing to 1 over the last axis; 0 rules an action out.
      beta: strength of the KL constraint, above 0.

    Raises:
      ValueError: a depth of another shape.
    """
    require_positive(beta=beta)
    if len(rewards) != len(reference_probs):
        raise ValueError(f"rewards have {len(rewards)} depths and reference_probs {len(reference_probs)}")
    qs: list[np.ndarray] = []
    vs: list[np.ndarray] = []
    following: np.ndarray | float = 0.0
    for depth in reversed(range(len(rewards))):
        reward, probs = (np.asarray(table[depth], np.float64) for table in (rewards, reference_probs))
        expected = (probs.shape[-1],) * (depth + 1)
        if reward.shape != expected or probs.shape != expected:
            raise ValueError(f"depth {depth} has shapes {reward.shape} and {probs.shape}; give {expected} for both")
        with np.errstate(divide="ignore"):
            q = reward + beta * np.log(probs) + following
        following = beta * np.logaddexp.reduce(q / beta, axis=-1)
        qs.append(q)
        vs.append(np.asarray(following))
    qs.reverse()
    vs.reverse()
    policy = [np.exp((q - v[..., None]) / beta) for q, v in zip(qs, vs, strict=True)]
    return SoftOptimum(qs, vs, policy)


def credit_auc(*, token_rewards: Array, is_error: Array, mask: Array) -> float:
    """Share of pairs (erroneous token, other token of the same answer) in which the error has the lower reward (host).

    1 is perfect credit assignment, 1/2 is chance; ties count half. Long answers hold more pairs and weigh more.

    Args:
      token_rewards: [B, T].
      is_error: [B, T], true at erroneous tokens.
      mask: [B, T], one at completion tokens; others are left out.

    Raises:
      ValueError: no answer has both an erroneous token and another one.
    """
    rewards, errors, there = np.asarray(token_rewards, np.float64), np.asarray(is_error) != 0, np.asarray(mask) != 0
    lower = ties = pairs = 0
    for reward, error, kept in zip(rewards, errors, there, strict=True):
        gap = reward[kept & error][:, None] - reward[kept & ~error][None, :]
        lower, ties, pairs = lower + (gap < 0).sum(), ties + (gap == 0).sum(), pairs + gap.size
    if not pairs:
        raise ValueError("no answer has an erroneous token and another one; credit cannot be measured")
    return float((lower + ties / 2) / pairs)


def _value_of_next(v: Array, there: Array) -> Array:
    """For each position the v of the next one that is there, 0 after the last; float32 [..., T]."""
    length = v.shape[-1]
    places = jnp.where(there, jnp.arange(length), length)
    after = jax.lax.cummin(places, axis=places.ndim - 1, reverse=True)  # first place that is there from here on
    end = jnp.zeros_like(v[..., :1])
    after = jnp.concatenate([after[..., 1:], jnp.full_like(after[..., :1], length)], axis=-1)
    return jnp.take_along_axis(jnp.concatenate([v, end], axis=-1), after, axis=-1)
