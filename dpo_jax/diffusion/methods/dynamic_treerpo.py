"""Dynamic-TreeRPO: the group of GRPO is the leaves of a tree of stochastic steps, so that prefixes are shared.

Fu et al. 2025, arXiv 2509.23352. Evidence: abstract and public reviews for tree, growing noise, reward-dependent
clipping and the regression to the best path; the exact formulas are reconstructed. A common prefix of ODE steps, d
stochastic steps in which every state has b children, an ODE suffix for each of the b^d leaves. Layer k has b^k nodes;
leaf l descends from node l // b^(d-k) of it. With A the advantages of the leaves (unbiased deviation),

    noise of step w + k:  K_base (1 + growth (k + 1) / d)
    s_l  = 1 + eta tanh(A_l);   bounds 1 - eps_low s_l  and  1 + eps_high s_l
    L_RL = mean_k max( -A_l rho, -A_l clip(rho, bounds) )   of the leaf's own path, rho = exp(logp - old logp)
    L    = L_RL + lambda omega_l mean_k mean (v(x_k) - V*_k)^2,   omega_l = (R_max - R_l) / (R_max - R_min + 1e-8)

V* is what the model predicts on the path of the best leaf, a constant. An edge under several leaves counts once for
each, as if its advantage were the sum of theirs. Reduces to: GRPO at eta = lambda = 0, without sharing.

A turn: `tree_rollout` of a table with `tree_noise_scales`, scores of the leaves, `tree_objective` on their paths, which
asks the model once per node.

>>> import jax.numpy as jnp
>>> tree_layout(2, 2).nodes, [row.tolist() for row in tree_layout(2, 2).ancestors]
((1, 2, 4), [[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 2, 3]])
>>> out = tree_grpo_loss(policy_step_logps=jnp.full((1, 2), 1.0), old_step_logps=jnp.zeros((1, 2)),
...                      advantages=jnp.array([1.0]), clip_high=0.5, reward_sensitivity=0.0)
>>> float(out.loss[0])
-1.5
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.diffusion.ops import clipped_surrogate, group_advantages
from dpo_jax.diffusion.process import Process
from dpo_jax.diffusion.sampler import denoise, guided, sample
from dpo_jax.diffusion.schedule import denoised
from dpo_jax.diffusion.transitions import draw, log_prob, take_steps, transition
from dpo_jax.diffusion.types import (
    Parameterisation,
    Predict,
    Sample,
    Step,
    Trajectory,
    TrajectoryBatch,
    Transition,
)
from dpo_jax.ops import require_between
from dpo_jax.types import Array, LossOutput, PyTree


def tree_grpo_loss(
    *,
    policy_step_logps: Array,
    old_step_logps: Array,
    advantages: Array,
    clip_low: float = 1e-4,
    clip_high: float = 2e-4,
    reward_sensitivity: float = 0.3,
) -> LossOutput:
    """The clipped surrogate on the path of a leaf; better leaves may move the policy further.

    Args:
      policy_step_logps: [B, S] of a path's steps, divided by the number of elements.
      old_step_logps: [B, S] of the policy that made the tree; constants.
      advantages: [B] of leaves, or [B, S] of their steps; constants.
      clip_low, clip_high: how far the ratio may fall below one and rise above it at advantage 0.
      reward_sensitivity: eta, share by which the advantage widens or narrows both, in [0, 1).

    Raises:
      ValueError: an option out of its range.
    """
    require_between(0.0, 1.0, reward_sensitivity=reward_sensitivity, clip_low=clip_low)
    require_between(0.0, 1e6, clip_high=clip_high)
    gains = jax.lax.stop_gradient(advantages.astype(jnp.float32))
    gains = gains if gains.ndim == 2 else gains[:, None]
    trust = 1 + reward_sensitivity * jnp.tanh(gains)
    low, high = jnp.maximum(1 - clip_low * trust, 0.0), 1 + clip_high * trust
    steps = clipped_surrogate(policy_step_logps, old_step_logps, gains, low, high)
    metrics = {"ratio": steps.ratio, "clip_share": steps.clipped}
    return LossOutput(jnp.mean(steps.loss, axis=-1), {name: jnp.mean(x, axis=-1) for name, x in metrics.items()})


def velocity_regression(velocity_gap: Array, scores: Array) -> Array:
    """Regression of each leaf's path to the best one (LayerTuning-RL), [P, L].

    Args:
      velocity_gap: [P, L, S] mean squared distance of the prediction at the nodes of a path to the best path's.
      scores: [P, L] of the leaves, constants; the best leaf has weight 0 and the worst 1.
    """
    scores = jax.lax.stop_gradient(scores.astype(jnp.float32))
    best, worst = (reduce(scores, axis=1, keepdims=True) for reduce in (jnp.max, jnp.min))
    return (best - scores) / (best - worst + 1e-8) * jnp.mean(velocity_gap, axis=-1)


def leaf_advantages(scores: Array, *, branch: int) -> Array:
    """Advantages [P, L] of the leaves among all leaves of their tree."""
    return group_advantages(scores, ddof=1, floor=1e-8)


def sibling_advantages(scores: Array, *, branch: int) -> Array:
    """Advantages [P, L, S] of each step of a leaf's path: the mean score of the leaves below among the siblings'."""
    leaves = scores.shape[1]
    steps = []
    for width in (branch ** (k + 1) for k in range(_depth(leaves, branch))):  # nodes of layer k + 1
        below = jnp.mean(scores.astype(jnp.float32).reshape(-1, width, leaves // width), axis=-1)
        siblings = group_advantages(below.reshape(-1, width // branch, branch), ddof=1, floor=1e-8)
        steps.append(jnp.repeat(siblings.reshape(-1, width), leaves // width, axis=1))
    return jnp.stack(steps, axis=-1)


class TreeLayout(NamedTuple):
    """Number of nodes of layers 0 to d, and int [d + 1, b^d] the node of each layer that each leaf descends from."""

    nodes: tuple[int, ...]
    ancestors: np.ndarray


def tree_layout(branch: int, depth: int) -> TreeLayout:
    """The full tree with so many children of each node and so many steps."""
    if branch < 1 or depth < 1:
        raise ValueError(f"no tree with {branch} branches and {depth} steps; give at least 1 of each")
    leaves = np.arange(branch**depth)
    layers = range(depth + 1)
    return TreeLayout(tuple(branch**k for k in layers), np.stack([leaves // branch ** (depth - k) for k in layers]))


def noise_growth(depth: int, *, growth: float = 0.5) -> np.ndarray:
    """Factors [d] of the noise, which rise with the layer to 1 + growth."""
    return 1 + growth * np.arange(1, depth + 1) / depth


def tree_noise_scales(noise_scales: np.ndarray, window: tuple[int, int], *, growth: float = 0.5) -> np.ndarray:
    """Noise scales [S] for `flow_sde_steps`: those of the window grown layer by layer, zero outside of it."""
    first, last = window
    scales = np.zeros(len(noise_scales))
    scales[first:last] = np.asarray(noise_scales, np.float64)[first:last] * noise_growth(last - first, growth=growth)
    return scales


def tree_rollout(
    predict: Predict,
    latents: Array,
    steps: Step,
    condition: PyTree = None,
    *,
    parameterisation: Parameterisation,
    key: Array,
    window: tuple[int, int],
    branch: int = 2,
) -> Sample:
    """Sample a tree from each row's latents: the states of the window branch, all else is shared or follows a leaf.

    The model is called w + (b^d - 1) / (b - 1) + (S - w - d) b^d times per row.

    Args:
      predict, latents, condition, parameterisation: as in `sampler.sample`.
      steps: a table [S], stochastic in the window; steps outside are drawn from the table as it is.
      key: of all draws.
      window: first and last (exclusive) step that branches.
      branch: b, children of each node.

    Returns:
      Latents [B, L, ...] of the leaves, and their paths: states [B, L, d + 1, ...], log-probabilities [B, L, d] summed
      over elements; constants.

    Raises:
      ValueError: a deterministic table, or a window outside of the steps.
    """
    first, last = window
    if steps.std is None or steps.history is not None or not 0 <= first < last <= len(steps.time):
        raise ValueError(f"a tree in the steps {window} needs a stochastic table without history that has them")
    prefix_key, suffix_key, *keys = jax.random.split(key, 2 + last - first)
    tables = jax.tree.map(jnp.asarray, steps)
    rows, depth = latents.shape[0], last - first
    state = latents.astype(jnp.float32)
    if first:
        part = take_steps(steps, slice(0, first))
        state = sample(predict, state, part, condition, parameterisation=parameterisation, key=prefix_key).latents
    layers, edges = [state], []
    for k, layer_key in enumerate(keys):
        told = jax.tree.map(lambda leaf, width=branch**k: jnp.repeat(leaf, width, axis=0), condition)
        step = take_steps(tables, first + k)
        given = transition(step, denoise(predict, state, step, told, parameterisation))
        given = Transition(jnp.repeat(given.mean, branch, axis=0), given.std)
        state = draw(given, layer_key)  # [B b^(k+1), ...], children neighbours
        layers.append(state)
        edges.append(log_prob(given, state))
    leaves = branch**depth
    if last < len(steps.time):
        told = jax.tree.map(lambda leaf: jnp.repeat(leaf, leaves, axis=0), condition)
        part = take_steps(steps, slice(last, None))
        state = sample(predict, state, part, told, parameterisation=parameterisation, key=suffix_key).latents

    def of_leaves(array: Array) -> Array:
        array = array.reshape(rows, -1, *array.shape[1:])
        return jnp.repeat(array, leaves // array.shape[1], axis=1)  # [B, L, ...]

    paths = Trajectory(
        jnp.stack([of_leaves(layer) for layer in layers], axis=2),
        jnp.stack([of_leaves(edge) for edge in edges], axis=2),
    )
    return jax.lax.stop_gradient(Sample(of_leaves(state), paths))


def tree_objective(
    process: Process,
    *,
    branch: int = 2,
    guidance: float = 1.0,
    sft_coef: float = 0.1,
    advantages: Callable[..., Array] = leaf_advantages,
    **hyper: Any,
):
    """Objective `(policy, reference, batch, key, loss_state) -> LossOutput` of rows that are whole trees.

    The batch is a `TrajectoryBatch` whose K trajectories of a row are the paths of a `tree_rollout`, with the columns
    `old_step_logps` [B, L, S], divided by the number of elements, and `scores` [B, L]. Each node is asked once.

    Args:
      process: what the models were trained to undo.
      branch: b of the rollout.
      guidance: scale that the rollout was made with; other than 1 the batch's condition is a `Guidance`.
      sft_coef: lambda; a large one pulls all paths together, also to a poor best one.
      advantages: `leaf_advantages` or `sibling_advantages`.
      hyper: hyper-parameters of `tree_grpo_loss`.
    """

    def objective(
        policy: Predict, reference: Predict | None, batch: TrajectoryBatch, key: Array, loss_state: PyTree = None
    ) -> LossOutput:
        scores, old = (jnp.asarray(batch.columns[name]) for name in ("scores", "old_step_logps"))
        model = policy if guidance == 1 else guided(policy, guidance)
        logps, gap = tree_values(model, batch, scores, process.parameterisation, branch=branch)
        rows, leaves, depth = logps.shape
        gains = advantages(scores, branch=branch)
        flat = tree_grpo_loss(
            policy_step_logps=logps.reshape(-1, depth),
            old_step_logps=old.reshape(-1, depth),
            advantages=gains.reshape(rows * leaves, *gains.shape[2:]),
            **hyper,
        )
        flat = jax.tree.map(lambda array: jnp.mean(array.reshape(rows, leaves), axis=1), flat)
        regression = jnp.mean(velocity_regression(gap, scores), axis=1)
        metrics = flat.metrics | {"regression": jax.lax.stop_gradient(regression)}
        return LossOutput(flat.loss + sft_coef * regression, metrics)

    return objective


class TreeValues(NamedTuple):
    """Log-probabilities per element and squared distances to the best path's predictions, float32 [B, L, S]."""

    logps: Array
    velocity_gap: Array


def tree_values(
    predict: Predict, batch: TrajectoryBatch, scores: Array, parameterisation: Parameterisation, *, branch: int
) -> TreeValues:
    """What `tree_objective` computes of the paths, with one call of the model on the nodes of each layer."""
    latents = jax.lax.stop_gradient(jnp.asarray(batch.latents, jnp.float32))
    rows, leaves, states = latents.shape[:3]
    if leaves != branch ** (states - 1):
        raise ValueError(f"{leaves} paths of {states - 1} steps are no tree with {branch} branches")
    best = jnp.argmax(scores, axis=1)
    logps, gaps = [], []
    for k in range(states - 1):
        width, below = branch**k, leaves // branch**k  # nodes of the layer, leaves under each

        def of_nodes(array: Array, width: int = width) -> Array:
            return jnp.repeat(array, width, axis=0)  # [B, ...] -> [B b^k, ...]

        nodes = latents[:, ::below, k].reshape(rows * width, *latents.shape[3:])
        children = latents[:, :: below // branch, k + 1].reshape(rows * width * branch, *latents.shape[3:])
        step = jax.tree.map(lambda table, k=k: of_nodes(table[:, k]), batch.steps)
        condition = jax.tree.map(lambda leaf: of_nodes(leaf[:, 0]), batch.condition)
        velocity = predict(nodes, step.time, condition).astype(jnp.float32)
        given = transition(step, denoised(velocity, nodes, step.level, parameterisation))
        wide = Transition(*(jnp.repeat(field, branch, axis=0) for field in (given.mean, given.std)))
        edge = log_prob(wide, children) / nodes[0].size
        logps.append(jnp.repeat(edge.reshape(rows, -1), below // branch, axis=1))
        velocity = velocity.reshape(rows, width, -1)
        target = jax.lax.stop_gradient(velocity[jnp.arange(rows), best // below])  # V*, a constant
        gap = jnp.mean(jnp.square(velocity - target[:, None]), axis=-1)
        gaps.append(jnp.repeat(gap, below, axis=1))
    return TreeValues(jnp.stack(logps, axis=-1), jnp.stack(gaps, axis=-1))


def _depth(leaves: int, branch: int) -> int:
    depth = round(np.log(leaves) / np.log(branch)) if branch > 1 else 1
    if branch**depth != leaves:
        raise ValueError(f"{leaves} leaves are no tree with {branch} branches")
    return depth
