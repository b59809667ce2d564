"""A small denoiser of the two-mode world, its training on rows with any objective, and samples from it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpo_jax.diffusion.objectives import from_loss
from dpo_jax.diffusion.process import Process
from dpo_jax.diffusion.sampler import Guidance, guided, sample
from dpo_jax.diffusion.schedule import (
    add_noise,
    leading_timesteps,
    level_at,
    linear_schedule,
    predicts_noise,
)
from dpo_jax.diffusion.transitions import ddim_steps
from dpo_jax.diffusion.types import DiffusionBatch
from dpo_jax.worlds import two_modes

SCHEDULE = linear_schedule()
EMPTY = two_modes.WORLD.classes  # the class of the empty prompt
PROCESS = Process(predicts_noise, SCHEDULE, empty=jnp.array([EMPTY]))
WIDTH = 128
FREQUENCIES = np.geomspace(1.0, 100.0, 8)


def initial(key):
    """Parameters of three layers that see the point, eight waves of the time, and the class (one more is empty)."""
    sizes = (2 + 2 * len(FREQUENCIES) + EMPTY + 1, WIDTH, WIDTH, 2)
    keys = jax.random.split(key, 3)
    return [
        {"kernel": jax.random.normal(k, (m, n)) * (m**-0.5), "bias": jnp.zeros(n)}
        for k, m, n in zip(keys, sizes, sizes[1:])
    ]


def predict(params, latents, timesteps, classes):
    """Predicted noise [N, 2] of points [N, 2] at timesteps [N] for classes int [N]."""
    angles = timesteps[:, None] / 1000 * FREQUENCIES.astype(np.float32)
    x = jnp.concatenate([latents, jnp.sin(angles), jnp.cos(angles), jax.nn.one_hot(classes, EMPTY + 1)], axis=-1)
    for layer in params[:-1]:
        x = jax.nn.silu(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


@functools.cache
def base_model(seed=0, steps=2500, *, dropout=0.0, points=20_000, random_classes=0.0, schedule=SCHEDULE):
    """Parameters fitted to the world's points; a share `dropout` of them is shown without its class."""
    data = two_modes.make_points(points, seed, random_classes=random_classes)
    clean, classes = jnp.asarray(data.points), jnp.asarray(data.classes)
    rule = optax.adam(optax.cosine_decay_schedule(2e-3, steps))

    def loss(params, key):
        rows, times, noise, drop = jax.random.split(key, 4)
        index = jax.random.randint(rows, (256,), 0, len(clean))
        t = jax.random.randint(times, (256,), 0, schedule.timesteps)
        eps = jax.random.normal(noise, (256, 2))
        told = jnp.where(jax.random.bernoulli(drop, dropout, (256,)), EMPTY, classes[index])
        said = predict(params, add_noise(clean[index], eps, level_at(schedule, t)), t.astype(jnp.float32), told)
        return jnp.mean((said - eps) ** 2)

    @jax.jit
    def run(params, key):
        def body(carry, key):
            params, state = carry
            updates, state = rule.update(jax.grad(loss)(params, key), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (params, rule.init(params)), jax.random.split(key, steps))[0][0]

    start, order = jax.random.split(jax.random.key(seed))
    return run(initial(start), order)


def rows_of(images, classes, **columns):
    """Rows [B] of K images each, from a list of K arrays [B, 2] and classes [B]."""
    return DiffusionBatch(
        latents=jnp.stack([jnp.asarray(x) for x in images], axis=1),
        condition=jnp.asarray(classes)[:, None],
        weight=jnp.ones(len(classes)),
        columns={name: jnp.asarray(column) for name, column in columns.items()},
    )


def pairs_of(pairs, **columns):
    """Rows of the world's pairs."""
    return rows_of([pairs.chosen, pairs.rejected], pairs.classes, **columns)


def train(
    loss,
    rows,
    *,
    steps=300,
    seed=0,
    start=None,
    reference=None,
    learning_rate=3e-4,
    batch=256,
    process=PROCESS,
    **hyper,
):
    """Parameters after `steps` of Adam on a loss of noised images, from `start` (the base if not given).

    Args:
      loss: as `objectives.from_loss` takes it; `hyper` are its options, and `inputs`.
      rows: a `DiffusionBatch` of all rows on the device, of which each step draws `batch`.
      reference: parameters; the base if not given.
    """
    reference = base_model() if reference is None else reference
    start = reference if start is None else start
    objective = from_loss(loss, process, **hyper)
    rule = optax.adam(learning_rate)

    def mean_loss(params, reference, rows, key):
        draw, key = jax.random.split(key)
        index = jax.random.randint(draw, (batch,), 0, len(rows.weight))
        taken = jax.tree.map(lambda leaf: leaf[index], rows)
        policy, frozen = functools.partial(predict, params), functools.partial(predict, reference)
        return jnp.mean(objective(policy, frozen, taken, key).loss)

    @jax.jit
    def run(params, reference, rows, key):
        def body(carry, key):
            params, state = carry
            updates, state = rule.update(jax.grad(mean_loss)(params, reference, rows, key), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (params, rule.init(params)), jax.random.split(key, steps))[0][0]

    return run(start, reference, rows, jax.random.key(seed))


def samples(params, count=2000, *, seed=0, steps=20, scale=1.0, negative=None, schedule=SCHEDULE):
    """Points [N, 2] of deterministic sampling and their classes; with a scale, guided by the empty class.

    Args:
      negative: parameters of the negative branch, the same if not given.
    """
    classes = jnp.arange(count) % two_modes.WORLD.classes
    noise = jax.random.normal(jax.random.key(seed), (count, 2))
    table = ddim_steps(schedule, leading_timesteps(steps))

    @jax.jit
    def run(params, negative, noise):
        model, condition = functools.partial(predict, params), classes
        if scale != 1.0:
            other = functools.partial(predict, negative)
            model = guided(model, scale, negative_predict=other)
            condition = Guidance(classes, jnp.full(count, EMPTY))
        return sample(model, noise, table, condition, parameterisation=predicts_noise).latents

    return np.asarray(run(params, params if negative is None else negative, noise)), np.asarray(classes)


def measures(params, **options):
    """Exact measures of samples of a model; options of `samples`."""
    return two_modes.measure(*samples(params, **options))
