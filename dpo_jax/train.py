"""One jitted, sharded train step for any model and any objective, and the ten-line loop around it.

A model is `apply_fn(variables, *inputs)` and its variables are any pytree; an objective is
`(policy, reference, batch, key, loss_state) -> LossOutput`, where policy and reference are apply_fn with its variables
filled in. Nothing here knows language from images.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpo_jax.sharding import Rules, data_shards, like_parameters, tree_shardings
from dpo_jax.tree import combine, interpolate, partition
from dpo_jax.types import Array, LossOutput, PyTree

ApplyFn = Callable[..., Any]
Objective = Callable[[Callable[..., Any], Callable[..., Any] | None, PyTree, Array, PyTree], LossOutput]
Step = Callable[["TrainState", PyTree], tuple["TrainState", dict[str, Array]]]


@dataclass(frozen=True)
class TrainState:
    """All that a run needs to go on.

    Attributes:
      step: int32 [], optimizer steps done.
      params: trainable leaves of the variables, None elsewhere.
      opt_state: of the optax optimizer.
      frozen: the other leaves of the variables, None where trainable.
      reference: a second set of the trainable leaves, or None where no frozen reference runs.
      ema: float32 moving average of params, or None.
      loss_state: what the loss remembers between steps, or None.
      key: typed PRNG key of the run; step n uses fold_in(key, n).
    """

    step: Array
    params: PyTree
    opt_state: PyTree
    frozen: PyTree
    reference: PyTree
    ema: PyTree
    loss_state: PyTree
    key: Array


jax.tree_util.register_dataclass(
    TrainState,
    data_fields=["step", "params", "opt_state", "frozen", "reference", "ema", "loss_state", "key"],
    meta_fields=[],
)


class ReferenceUpdate(NamedTuple):
    """Moving reference of TR-DPO (arXiv 2404.09656): every so many steps reference <- mix(reference, policy, rate)."""

    rate: float
    every: int


def init_state(
    variables: PyTree,
    optimizer: optax.GradientTransformation,
    key: Array,
    *,
    trainable: Callable[[str], bool] = lambda name: True,
    reference: bool | PyTree = True,
    ema: bool = False,
    loss_state: PyTree = None,
) -> TrainState:
    """State at step 0.

    Args:
      variables: of the model; the leaves stay where they are laid out. The first compiled step uses them up (it donates
        its state): give a copy of what shall be kept.
      optimizer: sees the trainable leaves only.
      key: typed PRNG key (`jax.random.key(seed)`).
      trainable: of a leaf's path name.
      reference: True starts the reference as a copy of the policy, False runs none, a tree of variables is a reference
        of its own (its frozen leaves must equal the policy's: they are shared).
      ema: keep a moving average of the parameters.
      loss_state: the loss's first state.
    """
    params, frozen = partition(variables, trainable)
    reference_params = None
    if reference is True:
        # A copy, because the step donates its state and an alias would be eaten with it.
        reference_params = jax.tree.map(jnp.copy, params)
    elif reference is not False:
        reference_params = jax.tree.map(jnp.copy, partition(reference, trainable)[0])
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        frozen=frozen,
        reference=reference_params,
        ema=jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), params) if ema else None,
        loss_state=loss_state,
        key=key,
    )


def variables_of(state: TrainState) -> PyTree:
    """The policy's whole tree of variables."""
    return combine(state.params, state.frozen)


def batch_weight(batch: PyTree) -> Array | None:
    """Float32 [B] weight of each example: the batch's `weight`, flattened, or None where it has none."""
    weight = batch.get("weight") if isinstance(batch, dict) else getattr(batch, "weight", None)
    return None if weight is None else jnp.asarray(weight, jnp.float32).reshape(-1)


def split_microbatches(batch: PyTree, microbatches: int) -> PyTree:
    """[n, ...] -> [M, n / M, ...] for every leaf; rows stay on their chips, because the sharded axis is the outer one.

    Raises:
      ValueError: the leading axis of a leaf is not a multiple of the number of microbatches.
    """

    def split(leaf: Array) -> Array:
        if leaf.shape[0] % microbatches:
            raise ValueError(
                f"leading axis of {leaf.shape[0]} is not a multiple of {microbatches} microbatches; "
                "pad the batch with rows of weight 0 or choose another number"
            )
        return jnp.swapaxes(leaf.reshape(leaf.shape[0] // microbatches, microbatches, *leaf.shape[1:]), 0, 1)

    return jax.tree.map(split, batch)


class _Sums(NamedTuple):
    loss: Array
    metrics: dict[str, Array]


def _weighted_sums(output: LossOutput, weight: Array | None) -> tuple[_Sums, Array]:
    """Numerators of the means over the batch, and the denominator that this part adds."""
    weight = jnp.ones_like(output.loss, jnp.float32) if weight is None else weight

    def total(values: Array) -> Array:
        # An empty place may hold anything; its weight of 0 must win even over nan.
        return jnp.sum(jnp.where(weight != 0, values.astype(jnp.float32), 0.0) * weight)

    return _Sums(total(output.loss), {name: total(values) for name, values in output.metrics.items()}), weight.sum()


def make_train_step(
    objective: Objective,
    apply_fn: ApplyFn,
    optimizer: optax.GradientTransformation,
    *,
    microbatches: int = 1,
    ema_decay: float | None = None,
    reference_update: ReferenceUpdate | None = None,
) -> Step:
    """Pure `(state, batch) -> (state, metrics)`: forward, backward, update.

    The loss is sum(weight * loss) / sum(weight) over the whole batch: numerators are summed over the microbatches and
    divided once, so that neither microbatches nor devices nor hosts change it (losses that couple the examples of a
    batch see one microbatch at a time; objectives that draw from the key, and not from seeds of the rows, draw other
    numbers in each).

    Args:
      microbatches: parts that are computed one after another to save memory; sums of gradients are float32.
      ema_decay: of the moving average, if the state holds one.
      reference_update: moves the reference; None leaves it frozen.

    Returns:
      The step. Its metrics are float32 scalars: `loss`, `gradient_norm`, `examples` (sum of the weights) and the
      weighted means of the loss's own.
    """

    def numerators(params: PyTree, state: TrainState, batch: PyTree, total: Array, key: Array, loss_state: PyTree):
        policy = partial(apply_fn, combine(params, state.frozen))
        reference = None
        if state.reference is not None:
            reference = partial(apply_fn, jax.lax.stop_gradient(combine(state.reference, state.frozen)))
        output = objective(policy, reference, batch, key, loss_state)
        sums, count = _weighted_sums(output, batch_weight(batch))
        return sums.loss / jnp.where(total > 0, total, count), (sums, count, output.state)

    gradient = jax.grad(numerators, has_aux=True)

    def accumulate(state: TrainState, batch: PyTree, key: Array):
        weight = batch_weight(batch)
        if microbatches == 1:
            total = jnp.zeros(()) if weight is None else jnp.maximum(weight.sum(), 1e-30)
            grads, aux = gradient(state.params, state, batch, total, key, state.loss_state)
            return grads, *aux
        parts = split_microbatches(batch, microbatches)
        # Without weights every example counts 1 and the parts are equal: each divides by its own count, then by M.
        total = jnp.zeros(()) if weight is None else jnp.maximum(weight.sum(), 1e-30)
        scale = 1.0 / microbatches if weight is None else 1.0

        def body(carry, part):
            sums, loss_state = carry
            index, micro = part
            grads, (numerator, count, loss_state) = gradient(
                state.params, state, micro, total, jax.random.fold_in(key, index), loss_state
            )
            grads = jax.tree.map(lambda g: g.astype(jnp.float32) * scale, grads)
            return (jax.tree.map(jnp.add, sums, (grads, numerator, count)), loss_state), None

        first = jax.tree.map(lambda leaf: leaf[0], parts)
        shapes = jax.eval_shape(gradient, state.params, state, first, total, key, state.loss_state)[1][:2]
        zeros = (
            jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), state.params),
            *jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes),
        )
        (sums, loss_state), _ = jax.lax.scan(body, (zeros, state.loss_state), (jnp.arange(microbatches), parts))
        return *sums, loss_state

    def step(state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, Array]]:
        grads, sums, count, loss_state = accumulate(state, batch, jax.random.fold_in(state.key, state.step))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema_decay is not None and ema is not None:
            ema = interpolate(ema, params, 1.0 - ema_decay)
        reference = state.reference
        if reference_update is not None and reference is not None:
            rate, every = reference_update
            reference = jax.lax.cond(
                (state.step + 1) % every == 0,
                lambda: interpolate(reference, params, rate),
                lambda: reference,
            )
        denominator = jnp.maximum(count, 1e-30)
        metrics = {name: value / denominator for name, value in sums.metrics.items()}
        metrics |= {"loss": sums.loss / denominator, "gradient_norm": optax.tree.norm(grads), "examples": count}
        state = TrainState(state.step + 1, params, opt_state, state.frozen, reference, ema, loss_state, state.key)
        return state, metrics

    return step


def make_eval_step(objective: Objective, apply_fn: ApplyFn) -> Callable[[TrainState, PyTree], dict[str, Array]]:
    """Pure `(state, batch) -> sums`: weighted sums of the loss and its metrics, and `examples`, to be added up and
    divided once over a whole evaluation set."""

    def step(state: TrainState, batch: PyTree) -> dict[str, Array]:
        policy = partial(apply_fn, variables_of(state))
        reference = None if state.reference is None else partial(apply_fn, combine(state.reference, state.frozen))
        output = objective(policy, reference, batch, jax.random.fold_in(state.key, state.step), state.loss_state)
        sums, count = _weighted_sums(output, batch_weight(batch))
        return {**sums.metrics, "loss": sums.loss, "examples": count}

    return step


def evaluate_batches(step: Callable[[TrainState, PyTree], dict[str, Array]], state: TrainState, batches: Iterable):
    """Weighted means over all batches of what an eval step sums; `examples` is their total weight."""
    totals: dict[str, float] = {}
    for batch in batches:
        for name, value in step(state, batch).items():
            totals[name] = totals.get(name, 0.0) + float(value)
    count = totals.pop("examples", 0.0)
    return {**{name: value / max(count, 1e-30) for name, value in totals.items()}, "examples": count}


def state_shardings(state: TrainState, mesh: Mesh, rules: Rules) -> TrainState:
    """Sharding of each leaf of a state: parameters and their copies by the rules, the rest replicated."""
    alone = NamedSharding(mesh, PartitionSpec())
    by_rules = partial(tree_shardings, mesh=mesh, rules=rules)
    return replace(
        state,
        step=alone,
        params=by_rules(state.params),
        opt_state=like_parameters(state.opt_state, state.params, mesh, rules),
        frozen=by_rules(state.frozen),
        reference=by_rules(state.reference),
        ema=by_rules(state.ema),
        loss_state=jax.tree.map(lambda leaf: alone, state.loss_state),
        key=alone,
    )


@dataclass(frozen=True)
class ShardedStep:
    """A jitted step together with the mesh that it is traced under; call it, or lower it to look at it."""

    function: Any
    mesh: Mesh

    def __call__(self, state: TrainState, batch: PyTree) -> Any:
        with jax.set_mesh(self.mesh):
            return self.function(state, batch)

    def lower(self, state: TrainState, batch: PyTree) -> Any:
        """The lowered program, for `.compile()`, memory and cost figures."""
        with jax.set_mesh(self.mesh):
            return self.function.lower(state, batch)


def _place(leaf: Array, sharding: NamedSharding) -> Array:
    """The leaf laid out; one that each process made for itself, the same everywhere, becomes one global array."""
    if sharding.is_fully_addressable or not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_place(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: host[index])


def compile_step(step: Step, state: TrainState, mesh: Mesh, rules: Rules = ()) -> tuple[ShardedStep, TrainState]:
    """Lay the state out over the mesh and jit the step for that layout; the step donates (uses up) its state.

    Batches come in as global arrays with the leading axis over data and fsdp (`sharding.shard_batch`).
    """
    shardings = state_shardings(state, mesh, rules)
    state = jax.tree.map(_place, state, shardings)
    function = jax.jit(step, donate_argnums=0, in_shardings=(shardings, None), out_shardings=(shardings, None))
    return ShardedStep(function, mesh), state


def compile_eval_step(step: Callable, state: TrainState, mesh: Mesh, rules: Rules = ()) -> ShardedStep:
    """Jit an eval step for a state that `compile_step` laid out; nothing is donated."""
    return ShardedStep(jax.jit(step, in_shardings=(state_shardings(state, mesh, rules), None)), mesh)


def check_rows(rows: int, mesh: Mesh, microbatches: int) -> None:
    """Raise ValueError unless the rows of a batch fall evenly on shards and microbatches."""
    parts = data_shards(mesh) * microbatches
    if rows % parts:
        raise ValueError(
            f"{rows} rows do not fall evenly on {data_shards(mesh)} batch shards x {microbatches} microbatches; "
            f"make the rows a multiple of {parts}"
        )


def fit(
    step: Step,
    state: TrainState,
    batches: Iterable[PyTree],
    *,
    steps: int,
    every: Sequence[tuple[int, Callable[[int, TrainState, dict[str, Array]], None]]] = (),
) -> TrainState:
    """Run steps until `steps` optimizer steps are done in all or the batches end; call each hook every n steps.

    Args:
      steps: total, counted from step 0: a resumed state does the rest only.
      every: pairs (n, hook); `hook(step_number, state, metrics)` runs after each n-th step. The state that a hook gets
        is used up by the next step: a hook copies or saves what it wants to keep.
    """
    number = int(state.step)
    for batch in batches if number < steps else ():
        state, metrics = step(state, batch)
        number += 1
        for period, hook in every:
            if number % period == 0:
                hook(number, state, metrics)
        if number >= steps:
            break
    return state
