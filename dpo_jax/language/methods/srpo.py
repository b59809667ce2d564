"""SRPO: train a writer and its in-context reviser together, with an optimum that no data distribution moves.

Choi et al. 2024, arXiv 2406.01660 (Self-Improving Robust Preference Optimization). Evidence: the min-max objective from
public text; the offline loss is derived from it; the scale of its two terms and alpha are reconstructed. The objective

    min_pi max_pi' E_{b ~ pi, a ~ pi'(.|b)} [p(a > b)] - beta KL(pi' || pi'_ref) + beta KL(pi || pi_ref)

has pi'(a|b) = pi'_ref(a|b) exp(p(a > b) / beta) / Z(b) and pi(y) ~ pi_ref(y) / Z(y). With log ratios R(y) of the writer
and R(a|b) of the reviser that sees b, each to the reference under the SAME prompt, the optimum satisfies

    p(a > b) = 1/2 + beta (R(a|b) - R(b|b)) = 1/2 + beta/2 (R(a|b) - R(b|a) + R(a) - R(b))

and the least squares of both identities with the observed label in place of p are, w over l,

    improve = 1/2 (1/2 - beta (R(w|l) - R(l|l)))^2 + 1/2 (1/2 - beta (R(w|w) - R(l|w)))^2
    robust  = (1/2 - beta/2 (R(w|l) - R(l|w) + R(w) - R(l)))^2
    loss    = (1 - alpha) robust + alpha improve

Labels of 0 and 1 are fine, the squares estimate p. Residuals grow with length: clip gradients.
Shapes: log-probabilities and masks [B, T] (T may differ between the six completions), results [B] float32.
`policy_chosen_given_rejected_logps` scores the chosen answer under the revision prompt with the rejected one, a = w and
b = l; reference and masks are constants.
Reduces to: 1/4 at the reference; beta^2 times IPO on sums where the reviser does not look, R(a|b) = R(a).

>>> import jax.numpy as jnp
>>> one, names = jnp.ones((1, 1)), ("chosen", "rejected")
>>> sides = [*names, *(f"{a}_given_{b}" for a in names for b in names)]
>>> arrays = {f"{who}_{side}_logps": -one for who in ("policy", "reference") for side in sides}
>>> arrays |= {f"{side}_mask": one for side in sides}
>>> print(f"{srpo_loss(**arrays).loss[0]:.2f}")
0.25
>>> arrays["policy_chosen_given_rejected_logps"] = 0 * one  # R(w|l) = 1: (1/2 - 1/4)^2 / 2 + (0^2 + 1/4) / 4
>>> print(f"{srpo_loss(**arrays, beta=0.5).loss[0]:.5f}")
0.09375
"""

import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from dpo_jax.ops import completion_sums, pair_metrics, require_between, require_positive
from dpo_jax.types import Array, LossOutput

REVISION_TEMPLATE = "{prompt}\n\nHere is an answer:\n{answer}\n\nWrite a better answer to the same request."

Prompt = str | Sequence[Mapping[str, str]]


def srpo_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    policy_chosen_given_chosen_logps: Array,
    policy_chosen_given_rejected_logps: Array,
    policy_rejected_given_chosen_logps: Array,
    policy_rejected_given_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    reference_chosen_given_chosen_logps: Array,
    reference_chosen_given_rejected_logps: Array,
    reference_rejected_given_chosen_logps: Array,
    reference_rejected_given_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    chosen_given_chosen_mask: Array,
    chosen_given_rejected_mask: Array,
    rejected_given_chosen_mask: Array,
    rejected_given_rejected_mask: Array,
    beta: float = 0.1,
    alpha: float = 0.5,
) -> LossOutput:
    """Least squares on the two identities of the optimum; gradients flow through all six policy terms.

    Metrics add `improve_loss`, `robust_loss` and `preference_estimate`, what the second identity says p(w > l) is.

    Args:
      beta: strength of both KL constraints, above 0.
      alpha: weight of the improve term, in [0, 1]; at 1 nothing trains the writer pi(y|x).
    """
    require_positive(beta=beta)
    require_between(0.0, 1.0, alpha=alpha)
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    w_given_w = completion_sums(
        policy_chosen_given_chosen_logps, reference_chosen_given_chosen_logps, chosen_given_chosen_mask
    ).log_ratio
    w_given_l = completion_sums(
        policy_chosen_given_rejected_logps, reference_chosen_given_rejected_logps, chosen_given_rejected_mask
    ).log_ratio
    l_given_w = completion_sums(
        policy_rejected_given_chosen_logps, reference_rejected_given_chosen_logps, rejected_given_chosen_mask
    ).log_ratio
    l_given_l = completion_sums(
        policy_rejected_given_rejected_logps, reference_rejected_given_rejected_logps, rejected_given_rejected_mask
    ).log_ratio
    improve = 0.5 * (
        jnp.square(0.5 - beta * (w_given_l - l_given_l)) + jnp.square(0.5 - beta * (w_given_w - l_given_w))
    )
    estimate = 0.5 + 0.5 * beta * (w_given_l - l_given_w + chosen.log_ratio - rejected.log_ratio)
    robust = jnp.square(1 - estimate)
    metrics = {
        **pair_metrics(chosen, rejected, beta * chosen.log_ratio, beta * rejected.log_ratio),
        "improve_loss": improve,
        "robust_loss": robust,
        "preference_estimate": estimate,
    }
    return LossOutput((1 - alpha) * robust + alpha * improve, metrics)


class SrpoOptimum(NamedTuple):
    """The optimum over K answers to one prompt, float32.

    Attributes:
      reviser: [K, K], row b the distribution pi'(. | b) of the revision of answer b.
      log_partition: [K], log Z(b): beta times it is the value of revising b.
      writer: [K], pi.
    """

    reviser: Array
    log_partition: Array
    writer: Array


def srpo_tabular_optimum(
    preference: Array, reference: Array, reference_reviser: Array, *, beta: float = 0.1
) -> SrpoOptimum:
    """Closed form of the min-max objective's optimum for K answers; preferences need not be transitive.

    Args:
      preference: [K, K], entry (a, b) the probability p(a > b) that a is preferred to b, in [0, 1].
      reference: [K] probabilities pi_ref(y).
      reference_reviser: [K, K], row b the probabilities pi'_ref(. | b).
      beta: strength of both KL constraints, above 0.
    """
    require_positive(beta=beta)
    chex.assert_equal_shape([preference, reference_reviser])
    chex.assert_shape(preference, (*reference.shape, *reference.shape))
    logits = jnp.log(reference_reviser.astype(jnp.float32)) + preference.astype(jnp.float32).T / beta  # [b, a]
    log_partition = jax.nn.logsumexp(logits, axis=-1)
    writer = jax.nn.softmax(jnp.log(reference.astype(jnp.float32)) - log_partition)
    return SrpoOptimum(jnp.exp(logits - log_partition[:, None]), log_partition, writer)


def revision_prompt(prompt: Prompt, answer: str, template: str = REVISION_TEMPLATE) -> str | list[dict[str, str]]:
    """The prompt that asks for a better answer than the given one, text or messages as the prompt is. Host.

    Args:
      prompt: text, or messages of which the last one's content is put into the template.
      answer: the answer to improve.
      template: text with the fields {prompt} and {answer}.

    Raises:
      ValueError: other fields, or an empty list of messages.
    """
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"the revision template {template!r} cannot be read: {error}; double braces of text") from None
    if fields != {"prompt", "answer"}:
        raise ValueError(f"the revision template has the fields {sorted(fields)}; give {{prompt}} and {{answer}}")
    if isinstance(prompt, str):
        return template.format(prompt=prompt, answer=answer)
    if not prompt:
        raise ValueError("the prompt has no messages; give text or at least one message")
    *before, last = (dict(message) for message in prompt)
    return [*before, {**last, "content": template.format(prompt=last["content"], answer=answer)}]


def revision_rows(row: Mapping[str, Any], template: str = REVISION_TEMPLATE) -> dict[str, tuple[Any, str]]:
    """The six (context, completion) pairs that one preference row is scored on. Host.

    Args:
      row: `prompt` (text or messages), `chosen` and `rejected` (texts).
      template: text with the fields {prompt} and {answer}.

    Returns:
      `chosen`, `rejected` under the prompt, and `a_given_b` under the revision prompt with answer b.

    Raises:
      ValueError: a missing key, an answer that is no text, a template without its two fields.
    """
    if missing := [key for key in ("prompt", "chosen", "rejected") if key not in row]:
        raise ValueError(f"the row has no {missing}, only {sorted(row)}; give prompt, chosen and rejected")
    answers = {side: row[side] for side in ("chosen", "rejected")}
    for side, text in answers.items():
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{side} is {text!r}; give a text that is not empty")
    rows = {side: (row["prompt"], text) for side, text in answers.items()}
    for given, seen in answers.items():
        context = revision_prompt(row["prompt"], seen, template)
        rows |= {f"{side}_given_{given}": (context, text) for side, text in answers.items()}
    return rows


def self_revise(
    generate: Callable[[Any], str], prompt: Prompt, *, revisions: int = 1, template: str = REVISION_TEMPLATE
) -> list[str]:
    """Answer a prompt and revise the answer again and again; all answers, the last revision last. Host.

    Args:
      generate: prompt -> sampled answer.
      prompt: text or messages.
      revisions: how often to revise, at least 0; the paper reports up to 5.
      template: text with the fields {prompt} and {answer}.
    """
    if revisions < 0:
        raise ValueError(f"revisions is {revisions}; give 0 or more")
    answers = [generate(prompt)]
    for _ in range(revisions):
        answers.append(generate(revision_prompt(prompt, answers[-1], template)))
    return answers
