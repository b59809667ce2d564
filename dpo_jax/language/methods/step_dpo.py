r"""Step-DPO: the preference is about one reasoning step, given the right steps before it.

Lai et al. 2024, arXiv 2406.18629. Evidence: official code (loss, data pipeline) and the paper's text. With c the
prompt and the right steps 1 .. k-1, s_w and s_l a right and a wrong step k,

    loss = -log sigma(beta (log pi(s_w|c)/pi_ref(s_w|c) - log pi(s_l|c)/pi_ref(s_l|c)))

The loss is DPO on masks of step k; the method is how the pairs are made: find the first wrong step of a sampled
solution (`parse_step_verdict` or an exact judge), cut there, sample again from the right steps, and pair each new right
step with the wrong one (`build_step_pairs`, `join_prefix`). No EOS may follow an inner step (`cut_eos`).

Shapes: log-probabilities [B, T] in any float dtype, masks [B, T] one at the tokens of step k; every result [B] float32.
Reference arrays and masks are constants. Steps of a text count from 1, step ids of tokens from 0.
Reduces to: DPO if the step is the whole completion. Tokens of the shared steps may stay in both masks: their log ratios
cancel.

>>> import jax.numpy as jnp
>>> pair = dict(policy_chosen_logps=jnp.array([[-1.0, -2.0]]), reference_chosen_logps=jnp.array([[-2.0, -3.0]]),
...             policy_rejected_logps=jnp.array([[-4.0, -9.0]]), reference_rejected_logps=jnp.array([[-3.0, -9.0]]),
...             chosen_mask=jnp.array([[0, 1]]), rejected_mask=jnp.array([[1, 0]]))
>>> print(f"{step_dpo_loss(**pair, beta=0.5).loss[0]:.4f}")  # log(1 + e^-1)
0.3133
>>> split_steps("Step 1: two\nStep 2: and two")
[(1, ' two'), (2, ' and two')]
>>> parse_step_verdict("Final decision: step 1: correct; step 2: incorrect")
2
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np

from dpo_jax.ops import completion_sums, logistic_loss, pair_metrics, require_positive
from dpo_jax.types import Array, LossOutput

STEP_HEADER = r"(?m)^Step (\d+):"
VERDICT_HEADERS = ("final decision", "summary decision:")


def step_dpo_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.4,
) -> LossOutput:
    """DPO over the tokens of one step; the masks say which.

    Args:
      beta: strength of the KL constraint to the reference, above 0; the paper takes 0.4, and 0.5 for its largest model.
    """
    require_positive(beta=beta)
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    loss = logistic_loss(beta * (chosen.log_ratio - rejected.log_ratio))
    return LossOutput(loss, pair_metrics(chosen, rejected, beta * chosen.log_ratio, beta * rejected.log_ratio))


def step_mask(step_ids: Array, step: Array) -> Array:
    """Float32 [B, T]: one at the tokens of one step of each row.

    Args:
      step_ids: int [B, T] step of each token, -1 outside.
      step: int [B], counted as in step_ids; a row without such a step, or with -1, is all zero.
    """
    chex.assert_equal_shape_prefix([step_ids, step], 1)
    return ((step_ids == step[:, None]) & (step_ids >= 0)).astype(jnp.float32)


# Host: texts and token ids


def split_steps(text: str, *, step_pattern: str = STEP_HEADER) -> list[tuple[int, str]]:
    """Numbers, from 1, and bodies of the steps of a solution; host.

    A body begins right after its header and ends before the next one, without the white space at its end. Text before
    the first header belongs to no step. A header whose number is not the next one is text, as in "see Step 1: ...".

    Args:
      text: a solution.
      step_pattern: regular expression of a header; if it has a group, that is the step's number.
    """
    headers = _headers(text, step_pattern)
    ends = [header.start() for header in headers[1:]] + [len(text)]
    return [(k, text[header.end() : end].rstrip()) for k, (header, end) in enumerate(zip(headers, ends), 1)]


def parse_step_verdict(text: str) -> int | None:
    """Number of the first step that a judge calls incorrect or neutral, or None if that cannot be read; host.

    After the last "final decision" (or "summary decision:"), the piece between semicolons or line ends that holds the
    first such word must name exactly one step, as "step 3:" (the official code's rule).

    Args:
      text: the judge's answer.
    """
    text = text.lower()
    header = next((h for h in VERDICT_HEADERS if h in text), None)
    if header is None:
        return None
    found = re.search("neutral|incorrect", decision := text.rpartition(header)[2])
    if found is None:
        return None
    piece = re.split("[;\n]", decision[: found.start()])[-1]
    number = re.search(r"step\s*(\d+)\s*:", piece)
    return int(number[1]) if number and piece.count("step") == 1 else None


def build_step_pairs(
    prompt: str,
    completion: str,
    error_step: int,
    continuations: Sequence[str],
    correct: Sequence[bool],
    *,
    step_pattern: str = STEP_HEADER,
) -> list[dict[str, Any]]:
    """One row for each different right step that was sampled in the place of a wrong one; host.

    Args:
      prompt: the problem.
      completion: a solution whose first wrong step is `error_step`.
      error_step: number of that step, from 1.
      continuations: texts sampled after the row's prefix: the solution up to and with the header of the wrong step
        (`split_steps(prefix)` gives k - 1 whole steps and an empty one).
      correct: whether each continuation ends in the right answer, and its first step is right if somebody judged that.
      step_pattern: as for `split_steps`.

    Returns:
      Rows with `prompt`, `prefix`, `chosen`, `rejected` (bodies of step k), `step_number`, `full_chosen`,
      `full_rejected` and, as numbers, `chosen_is_last`, `rejected_is_last`: 1 where the step ends its solution.

    Raises:
      ValueError: the completion has no such step; as many verdicts as continuations are needed.
    """
    if len(continuations) != len(correct):
        raise ValueError(f"{len(continuations)} continuations with {len(correct)} verdicts; give one for each")
    steps = split_steps(completion, step_pattern=step_pattern)
    if not 1 <= error_step <= len(steps):
        raise ValueError(f"error_step is {error_step}, but the completion has the steps 1 to {len(steps)}")
    prefix = step_prefix(completion, error_step, step_pattern=step_pattern)
    rejected = steps[error_step - 1][1]
    seen, rows = {rejected.strip(), ""}, []
    for continuation, right in zip(continuations, correct):
        solution = split_steps(prefix + continuation, step_pattern=step_pattern)
        chosen = solution[error_step - 1][1] if len(solution) >= error_step else ""
        if not right or chosen.strip() in seen:
            continue
        seen.add(chosen.strip())
        rows.append(
            {
                "prompt": prompt,
                "prefix": prefix,
                "chosen": chosen,
                "rejected": rejected,
                "step_number": error_step,
                "full_chosen": prefix + continuation,
                "full_rejected": completion,
                "chosen_is_last": int(len(solution) == error_step),
                "rejected_is_last": int(len(steps) == error_step),
            }
        )
    return rows


def step_prefix(completion: str, step: int, *, step_pattern: str = STEP_HEADER) -> str:
    """The solution up to and with the header of a step, from which new solutions are sampled; host.

    Args:
      completion: a solution.
      step: number of the step, from 1.
      step_pattern: as for `split_steps`.

    Raises:
      ValueError: there is no such step.
    """
    headers = _headers(completion, step_pattern)
    if not 1 <= step <= len(headers):
        raise ValueError(f"step is {step}, but the completion has the steps 1 to {len(headers)}")
    return completion[: headers[step - 1].end()]


def join_prefix(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with its right steps at the end of a text prompt, ready to be read as a pair; host.

    The steps are `prefix`, or `initial_reason_steps` as the public data set calls them.

    Raises:
      ValueError: the row has neither, or a prompt that is no text.
    """
    name = next((n for n in ("prefix", "initial_reason_steps") if n in row), None)
    if name is None or not isinstance(row.get("prompt"), str):
        raise ValueError(f"a text prompt and a prefix or initial_reason_steps are needed, not the keys {sorted(row)}")
    return {**{k: v for k, v in row.items() if k != name}, "prompt": row["prompt"] + row[name]}


def cut_eos(completion: np.ndarray, is_last: bool, *, eos: int) -> np.ndarray:
    """Token ids without the EOS that tokenising a text put behind an inner step; host.

    With it, the model would learn to stop in the middle of a solution.

    Args:
      completion: int [C] ids of a step.
      is_last: the step ends its solution, so that its EOS stays.
      eos: id of the EOS token.
    """
    ends = not is_last and len(completion) > 1 and completion[-1] == eos
    return completion[:-1] if ends else completion


def first_divergent_step(
    tokens_a: np.ndarray, step_ids_a: np.ndarray, tokens_b: np.ndarray, step_ids_b: np.ndarray
) -> int | None:
    """The first step at which two solutions differ, counted as in the step ids, or None if none does; host.

    Args:
      tokens_a, tokens_b: int [T] token ids.
      step_ids_a, step_ids_b: int [T] step of each token, -1 outside; a step that one solution lacks is empty there.
    """
    last = max(np.max(step_ids_a, initial=-1), np.max(step_ids_b, initial=-1))
    for step in range(last + 1):
        a, b = tokens_a[step_ids_a == step], tokens_b[step_ids_b == step]
        if not np.array_equal(a, b):
            return step
    return None


def _headers(text: str, step_pattern: str) -> list[re.Match]:
    """Headers of the steps 1, 2, ... in order."""
    headers = []
    for header in re.finditer(step_pattern, text):
        if not header.re.groups or int(header[1]) == len(headers) + 1:
            headers.append(header)
    return headers
