"""From a loss to an objective: the argument names of the loss say which models run and what is computed."""

import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.language.score import DIVERGENCES, VOCABULARY_STATISTICS, completion_mask, rewards, score
from dpo_jax.language.types import COMPLETIONS, Batch, LanguageModel, Prediction, Routing
from dpo_jax.signatures import read_needs
from dpo_jax.types import Array, LossOutput, PyTree

Loss = Callable[..., LossOutput]

_NAMES = {name for names in COMPLETIONS.values() for name in names}
_SIDE = f"(?:({'|'.join(sorted(_NAMES, key=len, reverse=True))})_)?"  # longest first: chosen_given_rejected, chosen
_OF_ONE_MODEL = re.compile(rf"(policy|reference)_{_SIDE}(logps|{'|'.join(VOCABULARY_STATISTICS)})")
_OF_BOTH_MODELS = re.compile(rf"{_SIDE}({'|'.join(DIVERGENCES)})")
_OF_THE_REWARD_MODEL = re.compile(rf"policy_{_SIDE}reward")
_OF_THE_BATCH = re.compile(rf"{_SIDE}mask")
# Token columns that another frozen model makes for all completions at once.
_OF_A_FROZEN_MODEL = re.compile(rf"(guidance|contrastive)_{_SIDE}(logps)")
_OF_STEPS = re.compile(rf"{_SIDE}step_ids")


class Origin(NamedTuple):
    """Where an array argument comes from.

    Attributes:
      maker: "policy", "reference", "both" (a divergence between them), "batch" (a mask) or "column".
      statistic: `logps`, `entropy`, `kl`, `reward`, `mask`, ...; the argument's own name for a column.
      side: name of one completion ("chosen", "rejected", "gold", ...), or None for all of them.
    """

    maker: str
    statistic: str
    side: str | None


def origin(name: str) -> Origin:
    """Where an argument of this name comes from, unless a column of the data gives it."""
    if match := _OF_ONE_MODEL.fullmatch(name):
        return Origin(match[1], match[3], match[2])
    if match := _OF_BOTH_MODELS.fullmatch(name):
        return Origin("both", match[2], match[1])
    if match := _OF_THE_REWARD_MODEL.fullmatch(name):
        return Origin("policy", "reward", match[1])
    if match := _OF_THE_BATCH.fullmatch(name):
        return Origin("batch", "mask", match[1])
    return Origin("column", name, None)


def form_of(loss: Loss) -> str:
    """The form of row that a loss reads (a key of `COMPLETIONS`): that of the completions that its arguments name."""
    named = {side for name in read_needs(loss).arrays for side in _sides_in(name)}
    fitting = (form for form, names in COMPLETIONS.items() if named and named <= set(names))
    return "lists" if not named else next(fitting)


def _sides_in(name: str) -> list[str]:
    """Completions that an argument's name speaks of."""
    if side := origin(name).side:
        return [side]
    if name == "labels":
        return ["completion"]
    match = re.match(rf"(?:(?:guidance|contrastive)_)?{_SIDE}", name)
    return [match[1]] if match and match[1] in ("chosen", "rejected") else []


def serving_column(name: str, columns: Collection[str]) -> str | None:
    """The column that gives an argument: its own, or that of all completions (`reference_logps` for both sides)."""
    if name in columns:
        return name
    whole = whole_column(name)
    return whole if whole in columns else None


def whole_column(name: str) -> str:
    """The column of all completions that an argument about one of them is taken from; else its own name."""
    if match := _OF_A_FROZEN_MODEL.fullmatch(name):
        return f"{match[1]}_{match[3]}"
    if _OF_STEPS.fullmatch(name):
        return "step_ids"
    maker, statistic, side = origin(name)
    return f"{maker}_{statistic}" if side else name


def needs_reference(loss: Loss, columns: Collection[str] = ()) -> bool:
    """Whether a reference model must run, given the columns that the data has."""
    asked = (name for name in read_needs(loss).arrays if not serving_column(name, columns))
    return any(origin(name).maker in ("reference", "both") for name in asked)


def column_names(loss: Loss) -> tuple[str, ...]:
    """Arguments that only the data can give."""
    return tuple(name for name in read_needs(loss).arrays if origin(name).maker == "column")


def from_loss(loss: Loss, *, frozen_head: bool = False, **hyper: Any):
    """Objective `(policy, reference, batch, key, loss_state) -> LossOutput` of a loss.

    What the loss names is computed and handed over, nothing else: a loss that names no `reference_*` never runs the
    reference, and a column of the batch wins over a computation. A policy that is a mixture of experts adds what its
    router did: metrics (`router_metrics`), and its penalty to the loss of every example.

    Args:
      loss: keyword-only function of the arrays in the name table.
      frozen_head: the model's head is not trained, so its gradient is not computed.
      hyper: hyper-parameters of the loss.

    Raises:
      TypeError: a hyper-parameter that the loss does not have; when traced, a column, a reference or a second
        completion that is missing.
    """
    needs, form = read_needs(loss), form_of(loss)
    if unknown := set(hyper) - set(needs.hyper):
        raise TypeError(f"{loss.__name__} has no option {sorted(unknown)}; its options are {sorted(needs.hyper)}")

    def objective(
        policy: LanguageModel, reference: LanguageModel | None, batch: Batch, key: Array, loss_state: PyTree = None
    ) -> LossOutput:
        places = batch.weight.size
        columns = {name: jnp.asarray(x).reshape(places, *x.shape[2:]) for name, x in batch.columns.items()}
        served = {name: serving_column(name, columns) for name in needs.arrays}
        origins = {name: origin(name) for name, column in served.items() if column is None}
        if missing := [name for name, source in origins.items() if source.maker == "column"]:
            have = f"the columns {sorted(columns)}" if columns else "no columns"
            raise TypeError(f"{loss.__name__} needs the columns {missing}, and the data has {have}")
        routings: list[Routing] = []

        def watched(*rows: Array) -> Prediction | Array:
            answer = policy(*rows)
            if isinstance(answer, Prediction) and answer.routing is not None:
                routings.append(answer.routing)
            return answer

        computed = _compute(set(origins.values()), watched, reference, batch, frozen_head)
        arrays = {}
        for name, column in served.items():
            whole = computed[origins[name]] if column is None else columns[column]
            arrays[name] = whole if column == name else _side(whole, name, form)
        special = {"loss_state": loss_state} if needs.state else {}
        special |= {"key": key} if needs.key else {}
        output = loss(**arrays, **special, **hyper)
        return _with_routing(output, routings[0]) if routings else output

    return objective


def router_metrics(routing: Routing) -> dict[str, Array]:
    """Load-balancing loss, mean entropy of the router (nats) and share of the choices that fell on each expert, which
    is the mean over the layers; float32 []."""
    shares = jnp.mean(routing.shares, axis=0)
    each = {f"expert_share_{number}": shares[number] for number in range(shares.size)}
    return {"router_load_balance": routing.load_balance, "router_entropy": jnp.mean(routing.entropy), **each}


def _with_routing(output: LossOutput, routing: Routing) -> LossOutput:
    # The router's numbers are those of the batch; each of its examples carries them, so that their mean is them.
    metrics = {name: jnp.broadcast_to(x, output.loss.shape) for name, x in router_metrics(routing).items()}
    return output._replace(loss=output.loss + routing.penalty, metrics={**output.metrics, **metrics})


def _side(whole: Array, name: str, form: str) -> Array:
    """[B, K, ...] -> [B, ...] of the completion that an argument's name speaks of, or all of them."""
    sides = _sides_in(name)
    if not sides:
        return whole
    if whole.shape[1] != len(COMPLETIONS[form]):
        raise TypeError(f"{name} needs {form}, and the rows have {whole.shape[1]} completions each")
    return whole[:, COMPLETIONS[form].index(sides[0])]


def _compute(
    origins: set[Origin], policy: LanguageModel, reference: LanguageModel | None, batch: Batch, frozen_head: bool
) -> dict[Origin, Array]:
    """[B, K, T] (a reward: [B, K]) of each origin, with one forward of each model that is needed."""

    def asked(maker: str) -> set[str]:
        return {source.statistic for source in origins if source.maker == maker}

    of_policy, of_reference, of_both = asked("policy"), asked("reference"), asked("both")
    if (of_reference or of_both) and reference is None:
        raise TypeError(
            f"{sorted(of_reference | of_both)} of a reference are needed: give the state a reference, "
            "or the data the reference's log-probs as columns"
        )
    values: dict[tuple[str, str], Array] = {("batch", "mask"): completion_mask(batch)}
    if "reward" in of_policy:
        values["policy", "reward"] = rewards(policy, batch)
        of_policy.remove("reward")
    if of_policy or of_both:
        wanted = tuple(sorted((of_policy | of_both) - {"logps"}))
        both = reference if of_both else None
        scores = score(policy, batch, statistics=wanted, reference=both, frozen_head=frozen_head)
        values |= {("both" if name in of_both else "policy", name): array for name, array in scores.items()}
        if "reference_logps" in scores:
            values["reference", "logps"] = scores["reference_logps"]
    if any(("reference", name) not in values for name in of_reference):
        assert reference is not None
        scores = score(reference, batch, statistics=tuple(sorted(of_reference - {"logps"})), frozen_head=True)
        values |= {("reference", name): jax.lax.stop_gradient(array) for name, array in scores.items()}
    return {source: values[source.maker, source.statistic] for source in origins}
