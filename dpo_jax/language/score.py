"""Log-probabilities and other token statistics of a batch of prefix trees: the layout ends here."""

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.language.types import Batch, LanguageModel, Prediction
from dpo_jax.logprobs import forward_kl, logits_logps, reverse_kl, token_logps
from dpo_jax.types import Array

VOCABULARY_STATISTICS = ("entropy", "collision")  # of one model
DIVERGENCES = {"kl": forward_kl, "reverse_kl": reverse_kl}  # between policy and reference


def predict(model: LanguageModel, batch: Batch) -> Prediction | Array:
    """The model on the batch's rows, each segment as a sequence of its own; [R, L, ...] again afterwards."""
    rows, length = batch.tokens.shape

    def segments(x: Array | np.ndarray) -> Array:
        return jnp.asarray(x).reshape(rows * batch.split, length // batch.split)  # [R, L] -> [R * split, L / split]

    answer = model(segments(batch.tokens), segments(batch.positions), segments(batch.subtree_end))
    if isinstance(answer, Prediction):
        return answer._replace(hidden=answer.hidden.reshape(rows, length, -1))
    return answer.reshape(rows, length, -1)


def gather_rows(values: Array, index: Array) -> Array:
    """values[r, index[r, ...]] for [R, N, ...] values; stays within the row, so that nothing crosses chips."""
    return jax.vmap(lambda row, i: row[i])(values, index)


def to_examples(values: Array, batch: Batch) -> Array:
    """[R, S] per predicted token -> [B, K, T] per example, completion and token; zero where there is no token."""
    slots = jnp.asarray(batch.slots)  # [R, E, K, T]
    picked = gather_rows(values, jnp.maximum(slots, 0))
    return jnp.where(slots >= 0, picked, 0.0).reshape(-1, *slots.shape[2:])


def completion_mask(batch: Batch) -> Array:
    """Float32 [B, K, T]: one at each completion token."""
    slots = jnp.asarray(batch.slots)
    return (slots >= 0).astype(jnp.float32).reshape(-1, *slots.shape[2:])


def rewards(model: LanguageModel, batch: Batch) -> Array:
    """What a reward model says of each completion, from the hidden state at its last token.

    Args:
      model: answers a `Prediction` whose head has one row.

    Returns:
      float32 [B, K], zero where there is no completion.

    Raises:
      ValueError: the model's head is not that of a reward model.
    """
    answer = predict(model, batch)
    if not isinstance(answer, Prediction) or answer.head.shape[0] != 1:
        raise ValueError("rewards need a model with a reward head [1, D]; give one, not a language model")
    ends = jnp.asarray(batch.ends)  # [R, E, K]
    hidden = gather_rows(answer.hidden, jnp.maximum(ends, 0)).astype(jnp.float32)  # [R, L, D] -> [R, E, K, D]
    values = hidden @ answer.head[0].astype(jnp.float32)
    values = values if answer.bias is None else values + answer.bias[0]
    return jnp.where(ends >= 0, values, 0.0).reshape(-1, ends.shape[-1])


def score(
    model: LanguageModel,
    batch: Batch,
    *,
    statistics: tuple[str, ...] = (),
    reference: LanguageModel | None = None,
    frozen_head: bool = False,
) -> dict[str, Array]:
    """Log-probability of each completion token, and statistics over the vocabulary at the same places.

    Args:
      model: answers hidden states and head (`Prediction`), or logits [R, L, V] if it is a foreign one.
      statistics: any of `entropy`, `collision` (log sum p^2), both without gradient; `kl` (reference to policy) and
        `reverse_kl` (policy to reference), with gradient to the policy.
      reference: needed by the divergences; if given, its own log-probs are returned as `reference_logps`.
      frozen_head: do not compute the head's gradient.

    Returns:
      name -> float32 [B, K, T], with `logps` always; zero where there is no token.

    Raises:
      ValueError: an unknown statistic, or one that this kind of model cannot give.
    """
    unknown = set(statistics) - set(VOCABULARY_STATISTICS) - set(DIVERGENCES)
    if unknown:
        raise ValueError(f"unknown statistics {sorted(unknown)}; there are {[*VOCABULARY_STATISTICS, *DIVERGENCES]}")
    source, target = jnp.asarray(batch.source), jnp.asarray(batch.target)
    answer = predict(model, batch)
    if not isinstance(answer, Prediction):
        if statistics:
            raise ValueError(f"statistics {statistics} need a model that answers a Prediction, not plain logits")
        return {"logps": to_examples(logits_logps(gather_rows(answer, source), target), batch)}
    hidden = gather_rows(answer.hidden, source)  # [R, L, D] -> [R, S, D]
    options = {"bias": answer.bias, "softcap": answer.softcap}
    own = tuple(name for name in statistics if name in VOCABULARY_STATISTICS)
    values = token_logps(hidden, answer.head, target, statistics=own, frozen_head=frozen_head, **options)
    if reference is not None:
        other = predict(reference, batch)
        if not isinstance(other, Prediction):
            raise ValueError("the reference must answer a Prediction, as the policy does")
        other = jax.lax.stop_gradient(other._replace(hidden=gather_rows(other.hidden, source), softcap=None))._replace(
            softcap=other.softcap
        )
        scored = token_logps(other.hidden, other.head, target, bias=other.bias, softcap=other.softcap, frozen_head=True)
        values["reference_logps"] = scored["logps"]
        for name in set(statistics) & set(DIVERGENCES):
            values[name] = DIVERGENCES[name](
                hidden,
                answer.head,
                other.hidden,
                other.head,
                target,
                reference_bias=other.bias,
                reference_softcap=other.softcap,
                frozen_head=frozen_head,
                **options,
            )
    return {name: to_examples(value, batch) for name, value in values.items()}
