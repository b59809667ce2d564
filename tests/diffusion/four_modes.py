"""The smallest world for online methods: four modes in the plane, an exact denoiser, a network that corrects it.

The reward of a point is minus its squared distance to the first mode, about -16 for the base model. All methods share
one loop: a rollout with the present policy, rows of it, a few passes of Adam over them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from exact_models import mixture_model

from dpo_jax.diffusion.process import Process
from dpo_jax.diffusion.schedule import leading_timesteps, linear_schedule, per_example, predicts_flow, predicts_noise
from dpo_jax.diffusion.transitions import ddim_steps
from dpo_jax.train import init_state, make_train_step

CENTRES = 2.0 * np.array([[1, 1], [-1, 1], [1, -1], [-1, -1]])
SPREAD = 0.4
SCHEDULE = linear_schedule()
DIFFUSION, FLOW = Process(predicts_noise, SCHEDULE), Process(predicts_flow)
STEPS = ddim_steps(SCHEDULE, leading_timesteps(10), eta=1.0)
WIDTH = 64


def initial(seed=0):
    """A network whose last layer is zero: the policy starts as the exact denoiser."""
    sizes = (3, WIDTH, WIDTH, 2)
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    layers = [
        {"kernel": jax.random.normal(k, (m, n)) * m**-0.5, "bias": jnp.zeros(n)}
        for k, m, n in zip(keys, sizes, sizes[1:])
    ]
    return [*layers[:-1], jax.tree.map(jnp.zeros_like, layers[-1])]


def predict(params, latents, timesteps, condition, *, process=DIFFUSION):
    """The exact prediction and the network's, for points [N, 2]; the condition is not read."""
    exact = mixture_model(process.schedule, process.parameterisation, CENTRES, SPREAD)(latents, timesteps, None)
    x = jnp.concatenate([latents, per_example(timesteps / 1000, latents[:, :1]) * jnp.ones_like(latents[:, :1])], -1)
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return exact + x @ params[-1]["kernel"] + params[-1]["bias"]


def reward(points):
    """Minus the squared distance to the first mode, [N]."""
    return -jnp.sum(jnp.square(points - jnp.asarray(CENTRES[0], jnp.float32)), axis=-1)


def score(clean, times, condition):
    """The reward as pools ask for it."""
    return reward(clean)


def learn(objective, turn, *, turns, passes=1, batches=1, rate=3e-4, seed=0, process=DIFFUSION, reference=True):
    """Parameters and the mean reward of each turn.

    Args:
      objective: of recorded steps, or any that `make_train_step` takes.
      turn: (predict, key) -> (batch, rewards) with the policy as it is.
      turns: rollouts; each is trained on `passes` times, in `batches` parts.
    """
    apply = functools.partial(predict, process=process)
    rule = optax.adam(rate)
    state = init_state(initial(seed), rule, jax.random.key(seed), reference=reference)
    step = make_train_step(objective, apply, rule)

    @jax.jit
    def whole(state, key):
        turn_key, order_key = jax.random.split(key)
        batch, rewards = turn(functools.partial(apply, state.params), turn_key)
        rows = len(batch.weight) // batches
        metrics = {}
        for key in jax.random.split(order_key, passes):
            order = jax.random.permutation(key, rows * batches).reshape(batches, rows)

            def part(state, index, batch=batch):
                return step(state, jax.tree.map(lambda leaf: leaf[index], batch))

            state, metrics = jax.lax.scan(part, state, order)
        return state, (jnp.mean(rewards), jax.tree.map(jnp.mean, metrics))

    state, (rewards, metrics) = jax.lax.scan(whole, state, jax.random.split(jax.random.key(seed + 100), turns))
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves((state.params, metrics)))
    return state.params, np.asarray(rewards)


def noise(key, count=256):
    return jax.random.normal(key, (count, 2))
