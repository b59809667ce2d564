"""Direct preference alignment as logic: the log ratio of two weighted counts of worlds, as a loss on pairs.

Richardson, Srikumar, Sabharwal 2024, arXiv 2412.17696. Evidence: the paper's definitions, reconstructed; CE, CEUnl,
CPO, ORPO and DPO come out exactly, which code belongs to the names unCPO, cCPO, cUNL, fUNL, cfUNL, qfUNL is our guess.
The propositions w and l, "the model accepts the chosen (rejected) answer", hold independently with the probabilities

    p_w = exp(mean log pi(y_w)),  p_l = exp(mean log pi(y_l))      (or of sums, `length_normalize=False`)
    WMC(F) = sum over the worlds in which F holds of the product of p_v or 1 - p_v
    rho = log WMC(top) - log WMC(bottom)
    log  -log sigma(beta rho)      squared  (rho - 1/(2 beta))^2      margin  max(0, beta - rho)
    reference form: rho - rho_ref in place of rho, the reference constant

A code (`preference_logic`) marks the worlds (w, l) = TT, TF, FT, FF: T top only, B bottom only, X both, - neither.

    CEUnl BTBB  p_w (1 - p_l) / (1 - p_w (1 - p_l))           cCPO TTB-   p_w / (p_l (1 - p_w))
    unCPO TTBT  (1 - p_l + p_w p_l) / (p_l (1 - p_w))         cUNL BTB-   p_w (1 - p_l) / p_l
    fUNL BTBT   (1 - p_l) / p_l                               cfUNL -TBT  (1 - p_l) / (p_l (1 - p_w))
    qfUNL -TBX  (1 - p_l) / (1 - p_w)

Shapes: log-probabilities and masks [B, T]; results [B] float32. With sums of long answers 1 - p is 1 and much of the
logic is lost, so the losses below normalise lengths. Metrics: pairs', rewards beta log p; `log_count_ratio`, rho.
Reduces to: NLL of p_w (CE TTBB, log form, beta 1), NLL plus unlikelihood (CEUnl), DPO (reference form of CPO XTB- with
sums), SimPO (CPO with a constant rho_ref), IPO (squared reference form of CPO), ORPO's odds-ratio term (-TB-).

>>> import jax.numpy as jnp
>>> half = jnp.log(jnp.array([[0.5]]))
>>> pair = dict(policy_chosen_logps=half, policy_rejected_logps=half, chosen_mask=jnp.ones((1, 1)),
...             rejected_mask=jnp.ones((1, 1)))
>>> output = ccpo_loss(**pair)  # rho = log 2
>>> print(f"{output.loss[0]:.4f} {output.metrics['log_count_ratio'][0]:.4f}")
0.4055 0.6931
>>> print(f"{logic_loss(**pair, code='TTBB').loss[0]:.4f}")  # CE: -log p_w
0.6931
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from dpo_jax.ops import (
    completion_sums,
    log1mexp,
    log_odds,
    logistic_loss,
    masked_mean,
    masked_sum,
    pair_metrics,
    require_positive,
)
from dpo_jax.types import Array, LossOutput

_PAIR, _REFERENCE = ("w", "l"), ("ref_w", "ref_l")

Table = tuple[bool, ...]


def log_wmc(table: Table, log_probs: Mapping[str, Array]) -> Array:
    """Log of the weighted count of the worlds that a table marks true, float32 [B].

    A variable on which the table does not depend is summed out exactly, so CPO's log p_w - log p_l loses no digits.

    Args:
      table: 2^n truth values, the first variable slowest and true first, not all false (ValueError).
      log_probs: the n variables in the table's order -> [B] log-probability that each holds, at most 0.
    """
    if len(table) != 2 ** len(log_probs) or not any(table):
        raise ValueError(f"{table} is no satisfiable truth table of the variables {tuple(log_probs)}")
    logs = [(logp.astype(jnp.float32), log1mexp(logp)) for logp in log_probs.values()]
    count = _log_count(table, logs)
    return jnp.zeros_like(logs[0][0]) if count is None else count


def compile_code(
    code: str,
    variables: Sequence[str] = _PAIR,
    *,
    form: Literal["log", "squared", "margin"] = "log",
    beta: float = 1.0,
    length_normalize: bool = True,
    reference: bool = False,
) -> Callable[..., LossOutput]:
    """The loss of a code, with the keyword-only arrays of a pair; hand it to an objective like any other.

    It asks for `reference_*` arrays if and only if `reference` is set or the variables have `ref_w` or `ref_l`.
    Metrics: `log_count_ratio` is rho (less rho_ref), rewards are beta log p (less the reference's).

    Args:
      code: one mark per world; a `preference_logic.PreferenceStructure` has it as `.code`. ValueError that names it
        for other marks, a wrong length, or a top or bottom without a world.
      variables: those of the code in its order, of `w`, `l`, `ref_w`, `ref_l`; ValueError for others.
      form: the outer function of rho.
      beta: scale of rho (log), 1/(2 beta) or beta the margin that is aimed at (squared, margin); above 0.
      length_normalize: probabilities from mean log-probabilities per token; otherwise from sums.
      reference: subtract the rho of the reference; not for codes that speak of the reference themselves.
    """
    require_positive(beta=beta)
    if form not in ("log", "squared", "margin"):
        raise ValueError(f"form is {form!r}; give log, squared or margin")
    speaks_of_reference = bool(set(variables) & set(_REFERENCE))
    if not variables or set(variables) - {*_PAIR, *_REFERENCE} or (reference and speaks_of_reference):
        raise ValueError(f"variables {tuple(variables)} cannot be compiled with reference={reference}")
    top, bottom = _tables(code, len(variables))
    reduce = masked_mean if length_normalize else masked_sum

    def ratio(log_probs: Mapping[str, Array], names: Sequence[str]) -> Array:
        counted = {name: log_probs[name] for name in names}
        return log_wmc(top, counted) - log_wmc(bottom, counted)

    def outer(rho: Array) -> Array:
        if form == "squared":
            return jnp.square(rho - 1 / (2 * beta))
        return logistic_loss(beta * rho) if form == "log" else jax.nn.relu(beta - rho)

    def compiled(
        *, policy_chosen_logps: Array, policy_rejected_logps: Array, chosen_mask: Array, rejected_mask: Array
    ) -> LossOutput:
        chosen = completion_sums(policy_chosen_logps, None, chosen_mask)
        rejected = completion_sums(policy_rejected_logps, None, rejected_mask)
        log_probs = {"w": reduce(policy_chosen_logps, chosen_mask), "l": reduce(policy_rejected_logps, rejected_mask)}
        rho = ratio(log_probs, variables)
        metrics = pair_metrics(chosen, rejected, beta * log_probs["w"], beta * log_probs["l"])
        return LossOutput(outer(rho), {**metrics, "log_count_ratio": rho})

    def compiled_with_reference(
        *,
        policy_chosen_logps: Array,
        policy_rejected_logps: Array,
        reference_chosen_logps: Array,
        reference_rejected_logps: Array,
        chosen_mask: Array,
        rejected_mask: Array,
    ) -> LossOutput:
        chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
        rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
        log_probs = {
            "w": reduce(policy_chosen_logps, chosen_mask),
            "l": reduce(policy_rejected_logps, rejected_mask),
            "ref_w": jax.lax.stop_gradient(reduce(reference_chosen_logps, chosen_mask)),
            "ref_l": jax.lax.stop_gradient(reduce(reference_rejected_logps, rejected_mask)),
        }
        rho = ratio(log_probs, variables)
        if reference:
            of_reference = {name: log_probs[f"ref_{name}"] for name in variables}
            rho = rho - ratio(of_reference, variables)
        rewards = (beta * (log_probs[name] - log_probs[f"ref_{name}"]) for name in _PAIR)
        return LossOutput(outer(rho), {**pair_metrics(chosen, rejected, *rewards), "log_count_ratio": rho})

    return compiled_with_reference if reference or speaks_of_reference else compiled


def logic_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 1.0,
    code: str = "TTB-",
) -> LossOutput:
    """Log loss of any of the 225 codes over (w, l) whose top and bottom can be satisfied, lengths normalised.

    Args:
      beta: scale of the log ratio of counts, above 0.
      code: marks T (top), B (bottom), X (both) or - (neither) of the worlds TT, TF, FT, FF of (w, l).
    """
    return _of_code(code, policy_chosen_logps, policy_rejected_logps, chosen_mask, rejected_mask, beta)


def ccpo_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 1.0,
) -> LossOutput:
    """cCPO, ratio p_w / (p_l (1 - p_w)): accepting the loser implies accepting the winner, if either is accepted.

    Args:
      beta: scale of the log ratio of counts, above 0.
    """
    return _of_code("TTB-", policy_chosen_logps, policy_rejected_logps, chosen_mask, rejected_mask, beta)


def uncpo_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 1.0,
) -> LossOutput:
    """unCPO, ratio (1 - p_l + p_w p_l) / (p_l (1 - p_w)): accepting the loser implies accepting the winner.

    Lowering p_l alone satisfies it.

    Args:
      beta: scale of the log ratio of counts, above 0.
    """
    return _of_code("TTBT", policy_chosen_logps, policy_rejected_logps, chosen_mask, rejected_mask, beta)


def cunl_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 1.0,
) -> LossOutput:
    """cUNL, ratio p_w (1 - p_l) / p_l: the winner and not the loser, if either is accepted.

    Args:
      beta: scale of the log ratio of counts, above 0.
    """
    return _of_code("BTB-", policy_chosen_logps, policy_rejected_logps, chosen_mask, rejected_mask, beta)


def cfunl_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 1.0,
) -> LossOutput:
    """cfUNL, ratio (1 - p_l) / (p_l (1 - p_w)): not the loser, unless both are accepted.

    Args:
      beta: scale of the log ratio of counts, above 0.
    """
    return _of_code("-TBT", policy_chosen_logps, policy_rejected_logps, chosen_mask, rejected_mask, beta)


def qfunl_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 1.0,
) -> LossOutput:
    """qfUNL, ratio (1 - p_l) / (1 - p_w): as CPO, with rejection in the place of acceptance.

    Args:
      beta: scale of the log ratio of counts, above 0.
    """
    return _of_code("-TBX", policy_chosen_logps, policy_rejected_logps, chosen_mask, rejected_mask, beta)


def ceunl_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 1.0,
) -> LossOutput:
    """CEUnl: the winner and not the loser; -log p_w - log(1 - p_l), likelihood and unlikelihood, at beta 1.

    Args:
      beta: scale of the log ratio of counts, above 0.
    """
    return _of_code("BTBB", policy_chosen_logps, policy_rejected_logps, chosen_mask, rejected_mask, beta)


def funl_loss(*, policy_rejected_logps: Array, rejected_mask: Array, beta: float = 1.0) -> LossOutput:
    """fUNL, ratio (1 - p_l) / p_l: not the loser; the chosen answer is not looked at. -log(1 - p_l) at beta 1.

    Args:
      beta: scale of the log ratio of counts, above 0.
    """
    require_positive(beta=beta)
    rejected = completion_sums(policy_rejected_logps, None, rejected_mask)
    log_prob = masked_mean(policy_rejected_logps, rejected_mask)
    rho = -log_odds(log_prob)
    metrics = {"rejected_reward": beta * log_prob, "rejected_logps": rejected.logps, "log_count_ratio": rho}
    return LossOutput(logistic_loss(beta * rho), metrics)


def _of_code(
    code: str, chosen: Array, rejected: Array, chosen_mask: Array, rejected_mask: Array, beta: float
) -> LossOutput:
    return compile_code(code, beta=beta)(
        policy_chosen_logps=chosen,
        policy_rejected_logps=rejected,
        chosen_mask=chosen_mask,
        rejected_mask=rejected_mask,
    )


def _tables(code: str, n: int) -> tuple[Table, Table]:
    """Worlds of the top and of the bottom."""
    if len(code) != 2**n or set(code) - set("TBX-"):
        raise ValueError(f"code {code!r} is not made of {2**n} marks T, B, X or -")
    top, bottom = tuple(mark in "TX" for mark in code), tuple(mark in "BX" for mark in code)
    if not (any(top) and any(bottom)):
        raise ValueError(f"code {code!r} has no world in its top or none in its bottom: no finite ratio")
    return top, bottom


def _log_count(table: Table, logs: Sequence[tuple[Array, Array]]) -> Array | None:
    """Log count of a satisfiable table by cases of the first variable; None for the log 1 of an all-true table."""
    if all(table):
        return None
    half = len(table) // 2
    if table[:half] == table[half:]:
        return _log_count(table[:half], logs[1:])
    terms = []
    for rest, log in zip((table[:half], table[half:]), logs[0]):
        if any(rest):
            deeper = _log_count(rest, logs[1:])
            terms.append(log if deeper is None else log + deeper)
    return terms[0] if len(terms) == 1 else jnp.logaddexp(*terms)
