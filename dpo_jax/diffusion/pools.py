"""Pools of candidates: at each step several next states are drawn from one state, and judged by what becomes of them.

    x_i -> candidates x_{i+1}^1 ... x_{i+1}^K -> predicted clean latents of each -> scores -> a pair, and the next state

The members of a pair differ by one step's noise only. Any stochastic one-step table serves (`ddim_steps` with eta,
`flow_sde_steps`). What a score is given at a step is what the model predicts from the candidate at the next level, a
prediction that is needed anyway where the rollout goes on; the candidates of the last step are scored as they are.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.diffusion.sampler import denoise, require_clean, sample
from dpo_jax.diffusion.transitions import draw, take_steps, transition
from dpo_jax.diffusion.types import Denoised, Parameterisation, Predict, Step, TrajectoryBatch, Transition
from dpo_jax.types import Array, PyTree

# score(clean latents [N, ...], timesteps [N], condition) -> [N]; the timestep is 0 for finished images.
Score = Callable[[Array, Array, PyTree], Array]
# follow(key, scores [B, K]) -> int [B], the candidate that the rollout goes on from.
Follow = Callable[[Array, Array], Array]
# refine(chosen [B, ...], reward, std [] or [B]) -> [B, ...]; reward(latents) -> [B], differentiable where the score is.
Refine = Callable[[Array, Callable[[Array], Array], Array], Array]


class Choice(NamedTuple):
    """The best and the worst candidate of each pool, int [B], and 1 where they are far enough apart, float32 [B]."""

    chosen: Array
    rejected: Array
    valid: Array


class StepPairs(NamedTuple):
    """Pairs of next states of one state; constants.

    Attributes:
      before, chosen, rejected: float32 [B, S, ...].
      valid: float32 [B, S].
      scores: float32 [B, S, K] of the whole pools.
    """

    before: Array
    chosen: Array
    rejected: Array
    valid: Array
    scores: Array


class PoolSample(NamedTuple):
    """Final latents float32 [B, ...] and the pairs of the steps from `start` on."""

    latents: Array
    pairs: StepPairs


def select_pairs(scores: Array, *, threshold: float = 0.0) -> Choice:
    """Best and worst of each pool; ties go to the first.

    Args:
      scores: [B, K], log odds of being preferred.
      threshold: a pair counts if softmax of its scores differs by more, tanh(gap / 2) > threshold.
    """
    scores = jax.lax.stop_gradient(scores.astype(jnp.float32))
    gap = jnp.max(scores, axis=-1) - jnp.min(scores, axis=-1)
    valid = jnp.tanh(0.5 * gap) > threshold
    return Choice(jnp.argmax(scores, axis=-1), jnp.argmin(scores, axis=-1), valid.astype(jnp.float32))


def follow_random(key: Array, scores: Array) -> Array:
    """Any candidate: the rollout is distributed as without pools."""
    return jax.random.randint(key, scores.shape[:1], 0, scores.shape[1])


def follow_best(key: Array, scores: Array) -> Array:
    """The candidate with the highest score."""
    return jnp.argmax(scores, axis=-1)


def pool_rollout(
    predict: Predict,
    latents: Array,
    steps: Step,
    condition: PyTree = None,
    *,
    parameterisation: Parameterisation,
    score: Score,
    key: Array,
    candidates: int,
    start: int,
    threshold: float,
    follow: Follow,
    refine: Refine | None = None,
) -> PoolSample:
    """Sample with a pool at each step from `start` on, and keep the pair of each.

    The model is called start + 1 + (S - start - 1) K times per row (one more per step with `refine`).

    Args:
      predict, latents, condition, parameterisation: as in `sampler.sample`.
      steps: a stochastic table [S] without history.
      score: of predicted clean latents; finite.
      key: of all draws.
      candidates: K, at least 2.
      start: steps before it are ordinary ones.
      threshold: see `select_pairs`.
      follow: which candidate comes next.
      refine: moves the chosen candidate before it is kept, given its reward at the next level and the step's std.

    Raises:
      ValueError: a table that is deterministic or has a history, fewer than two candidates, no step left for pools.
    """
    count = len(steps.time)
    if steps.std is None or steps.history is not None:
        raise ValueError("a pool of candidates needs a stochastic table without history; see ddim_steps and its eta")
    if candidates < 2 or not 0 <= start < count:
        raise ValueError(f"{candidates} candidates from step {start} of {count}; give 2 or more and an earlier start")
    require_clean(steps, parameterisation)
    prefix_key, pool_key, last_key = jax.random.split(key, 3)
    state = latents.astype(jnp.float32)
    if start:
        before = take_steps(steps, slice(0, start))
        state = sample(predict, state, before, condition, parameterisation=parameterisation, key=prefix_key).latents
    rows = state.shape[0]

    def spread(array: Array) -> Array:
        return jnp.repeat(array, candidates, axis=0)  # [B, ...] -> [B K, ...], those of a row neighbours

    def pool(state: Array, said: Denoised, step: Step, key: Array) -> Array:
        given = transition(step, said)
        return draw(Transition(spread(given.mean), spread(given.std) if given.std.ndim else given.std), key)

    def member(array: Array, index: Array) -> Array:
        return array.reshape(rows, candidates, *array.shape[1:])[jnp.arange(rows), index]

    def pair(
        state: Array, drawn: Array, scores: Array, std: Array, reward: Callable[[Array], Array]
    ) -> tuple[Array, StepPairs]:
        """The pool, in which the chosen candidate may have moved, and the pair."""
        choice = select_pairs(scores, threshold=threshold)
        chosen = member(drawn, choice.chosen)
        if refine is not None:
            chosen = refine(chosen, reward, std)
            places = drawn.reshape(rows, candidates, *drawn.shape[1:])
            drawn = places.at[jnp.arange(rows), choice.chosen].set(chosen).reshape(drawn.shape)
        return drawn, StepPairs(state, chosen, member(drawn, choice.rejected), choice.valid, scores)

    def advance(carry: tuple[Array, Denoised], inputs: tuple[Step, Step, Array]):
        (state, said), (step, after, key) = carry, inputs
        draw_key, follow_key = jax.random.split(key)
        drawn = pool(state, said, step, draw_key)
        wide = jax.tree.map(lambda table: spread(table) if table.ndim else table, after)
        drawn_said = denoise(predict, drawn, wide, jax.tree.map(spread, condition), parameterisation)
        times = jnp.broadcast_to(wide.time, drawn.shape[:1])
        scores = score(drawn_said.clean, times, jax.tree.map(spread, condition)).reshape(rows, candidates)

        def reward(latents: Array) -> Array:
            clean = denoise(predict, latents, after, condition, parameterisation).clean
            return score(clean, jnp.broadcast_to(after.time, latents.shape[:1]), condition)

        moved, kept = pair(state, drawn, scores, jnp.asarray(step.std), reward)
        index = follow(follow_key, scores)
        state = member(moved, index)
        said = Denoised(*(member(field, index) for field in drawn_said))
        if refine is not None:
            said = denoise(predict, state, after, condition, parameterisation)
        return (state, said), kept

    tables = jax.tree.map(jnp.asarray, steps)
    said = denoise(predict, state, take_steps(tables, start), condition, parameterisation)
    keys = jax.random.split(pool_key, count - 1 - start)
    inputs = (take_steps(tables, slice(start, count - 1)), take_steps(tables, slice(start + 1, count)), keys)
    (state, said), kept = jax.lax.scan(advance, (state, said), inputs)

    draw_key, follow_key = jax.random.split(last_key)
    last = take_steps(tables, count - 1)
    drawn = pool(state, said, last, draw_key)
    finished = jnp.zeros(len(drawn))
    scores = score(drawn, finished, jax.tree.map(spread, condition)).reshape(rows, candidates)
    moved, kept_last = pair(
        state, drawn, scores, jnp.asarray(last.std), lambda latents: score(latents, finished[:rows], condition)
    )
    pairs = jax.tree.map(lambda many, one: jnp.moveaxis(jnp.concatenate([many, one[None]]), 0, 1), kept, kept_last)
    return jax.lax.stop_gradient(PoolSample(member(moved, follow(follow_key, scores)), pairs))


def pair_rows(pairs: StepPairs, steps: Step, condition: PyTree = None) -> TrajectoryBatch:
    """A row for every pair, [B S] of them, one step long; pairs that are not valid have weight 0.

    Args:
      pairs: of S steps.
      steps: the table's last S rows, [S] or [S, B].
      condition: of the rollout, leaves [B, ...].
    """
    rows, count = pairs.valid.shape
    latents = jnp.stack([jnp.stack([pairs.before, after], axis=2) for after in (pairs.chosen, pairs.rejected)], axis=2)

    def of_rows(table: Array) -> Array:
        table = jnp.asarray(table)
        table = jnp.broadcast_to(table, (rows, count)) if table.ndim == 1 else table.T
        return table.reshape(-1, 1)

    return TrajectoryBatch(
        latents=latents.reshape(rows * count, *latents.shape[2:]),  # [B, S, 2, 2, ...] -> [B S, 2, 2, ...]
        steps=jax.tree.map(of_rows, steps),
        condition=jax.tree.map(lambda leaf: jnp.repeat(leaf, count, axis=0)[:, None], condition),
        weight=pairs.valid.reshape(-1),
        columns={},
    )
