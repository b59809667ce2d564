"""The course of a run, the same for both wings: step, log, evaluate, save, stop when asked to."""

import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dpo_jax.checkpoint import Checkpoints
from dpo_jax.cli.console import say
from dpo_jax.cli.processes import is_first, true_anywhere
from dpo_jax.plan import StepNeeds, step_needs
from dpo_jax.report import MetricsWriter, Progress, human_bytes, progress
from dpo_jax.sharding import shard_batch
from dpo_jax.train import ShardedStep, TrainState, fit
from dpo_jax.types import Array, PyTree


def with_tokens(stream: Iterable[Any]) -> Iterator[tuple[Any, int]]:
    """Each batch with the number of places that hold a token."""
    return ((batch, int((np.asarray(batch.subtree_end) > 0).sum())) for batch in stream)


@dataclass(frozen=True)
class Course:
    """When what happens.

    Attributes:
      steps: optimizer steps in all.
      log_every, eval_every, save_every: periods in steps; 0 for evaluation and checkpoints means at the end only.
      description: what the progress bar says.
      unit: what the speed is counted in.
    """

    steps: int
    log_every: int
    eval_every: int
    save_every: int
    description: str
    unit: str = "tokens"


@dataclass
class Outcome:
    """How a run went.

    Attributes:
      first, last: metrics of the first and the last step of this process, floats.
      evaluation: metrics on the held-out rows at the end, or empty.
      tokens_per_second: real tokens of all processes over the time of the steps alone.
      needs: what the compiled step holds on a device; None if no step was left to do.
      stopped: a signal ended the run before its last step.
    """

    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)
    tokens_per_second: float = 0.0
    needs: StepNeeds | None = None
    stopped: bool = False


class Stopwatch:
    """Tokens per second over the steps alone: laps that are not counted and what runs inside `paused` are left out."""

    def __init__(self) -> None:
        self.tokens, self.seconds = 0, 0.0
        self._lap_tokens, self._since = 0, time.perf_counter()

    def count(self, tokens: int) -> None:
        """Add the tokens of a batch to the lap."""
        self._lap_tokens += tokens

    def lap(self, *, counted: bool = True) -> float:
        """End a lap; its tokens per second."""
        now = time.perf_counter()
        tokens, seconds = self._lap_tokens, max(now - self._since, 1e-9)
        self._lap_tokens, self._since = 0, now
        if counted:
            self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        return tokens / seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside takes no time."""
        begun = time.perf_counter()
        yield
        self._since += time.perf_counter() - begun

    @property
    def rate(self) -> float:
        """Tokens per second of all counted laps."""
        return self.tokens / self.seconds if self.seconds else 0.0


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """`asked()`: whether SIGTERM or SIGINT has come, to any process of the run. A second SIGINT interrupts at once."""
    came: list[int] = []

    def handler(number: int, frame: Any) -> None:
        if number == signal.SIGINT and came:
            raise KeyboardInterrupt
        came.append(number)

    def asked() -> bool:
        # All processes must leave at the same step, or the others would wait for a collective for ever.
        return true_anywhere(bool(came))

    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, old in before.items():
            # None stands for a handler that Python does not know, such as that of JAX's preemption service.
            signal.signal(number, signal.SIG_DFL if old is None else old)


def show_needs(needs: StepNeeds) -> str:
    """One line for people: what the compiled step holds on each device, and of how much."""
    parts = {
        "policy": needs.policy + needs.frozen,
        "reference": needs.reference,
        "optimizer": needs.optimizer,
        "moving average": needs.ema,
        "batch": needs.batch,
        "activations and gradients": needs.temporaries,
    }
    listed = ", ".join(f"{name} {human_bytes(size)}" for name, size in parts.items() if size)
    of = f" of {human_bytes(needs.available)}" if needs.available else ""
    return f"each device needs {human_bytes(needs.total)}{of}: {listed}"


def without_frozen(state: TrainState) -> TrainState:
    """What a checkpoint keeps: frozen variables are those that the run began with, and are read again from there."""
    return replace(state, frozen=None)


def _bar(course: Course, start: int) -> Progress:
    return progress(course.steps, start, description=course.description, disable=not is_first())


def run_course(
    course: Course,
    step: ShardedStep,
    state: TrainState,
    batches: Iterator[tuple[PyTree, int]],
    mesh: Mesh,
    *,
    checkpoints: Checkpoints,
    metrics: MetricsWriter,
    extras: Mapping[str, Any],
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
) -> tuple[TrainState, Outcome]:
    """Train to the end of the course or until asked to stop; ends with a checkpoint either way.

    Args:
      step: from `train.compile_step`, for the state's layout.
      batches: pairs of a batch (NumPy, this process's rows) and its number of real tokens, from the state's step on.
      extras: what is saved next to the state.
      evaluate: metrics on held-out rows.
    """
    start, outcome, watch = int(state.step), Outcome(), Stopwatch()
    compiled: Any = None
    waiting: list[tuple[int, dict[str, Array]]] = []  # metrics of steps, still on the device

    def placed(asked: Callable[[], bool]) -> Iterator[PyTree]:
        for number, (batch, tokens) in enumerate(batches, start):
            # Several processes agree by a collective, which would make every step wait for the device.
            look = jax.process_count() == 1 or number % course.log_every == 0
            if look and asked():
                outcome.stopped = True
                return
            watch.count(tokens * jax.process_count())
            yield shard_batch(batch, mesh)

    def run_step(state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, Array]]:
        nonlocal compiled
        if compiled is None:
            compiled = step.lower(state, batch).compile()
            outcome.needs = step_needs(compiled, state, batch)
            if is_first():
                say(show_needs(outcome.needs))
        return compiled(state, batch)

    def log(number: int, state: TrainState, values: dict[str, Array]) -> None:
        waiting.append((number, values))
        if number in (start + 1, course.steps) or number % course.log_every == 0:
            flush()

    def flush() -> None:
        """Write a line for every step since the last flush; only here does the host wait for the device."""
        lines = [(number, {name: float(value) for name, value in values.items()}) for number, values in waiting]
        waiting.clear()
        if lines:
            number, outcome.last = lines[-1]
            outcome.first = outcome.first or lines[0][1]
            # The first lap holds compilation; it is shown, not counted.
            rate = {f"{course.unit}_per_second": watch.lap(counted=number > start + 1)}
            for step, line in lines:
                metrics.write(step, "train", {**line, **rate})
            means = {name: float(np.mean([line[name] for _, line in lines])) for name in outcome.last}
            bar.update(number, {**means, **rate})

    def evaluation(number: int, state: TrainState, values: dict[str, Array] | None = None) -> None:
        if evaluate is not None:
            flush()
            with watch.paused():
                outcome.evaluation = evaluate(state)
                # A run that was finished before has this line already.
                if number > start:
                    metrics.write(number, "eval", outcome.evaluation)

    def save(number: int, state: TrainState, values: dict[str, Array]) -> None:
        flush()  # so that a run which goes on from here finds every line before it
        with watch.paused():
            checkpoints.save(number, without_frozen(state), extras)

    hooks = [(1, log)]
    # Evaluated before it is saved: what a checkpoint has behind it stands in the metrics.
    hooks += [(course.eval_every, evaluation)] if course.eval_every else []
    hooks += [(course.save_every, save)] if course.save_every else []
    with asked_to_stop() as asked, _bar(course, start) as bar:
        state = fit(run_step, state, placed(asked), steps=course.steps, every=hooks)
        flush()
    done = int(state.step)
    if not outcome.stopped and not (course.eval_every and done % course.eval_every == 0 and done > start):
        evaluation(done, state)
    if checkpoints.latest_step() != done:
        checkpoints.save(done, without_frozen(state), extras)
    checkpoints.wait()
    outcome.tokens_per_second = watch.rate
    return state, outcome
