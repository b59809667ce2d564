"""A two-layer attention model in plain functions: what tests of layouts, objectives and the loop train."""

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.attention import attention
from dpo_jax.language.types import Example, Prediction

VOCABULARY, WIDTH, HEADS = 29, 16, 2


def toy_variables(seed=0, scale=0.4):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)

    layers = {f"layer{i}": {"qkv": normal(WIDTH, 3 * WIDTH), "out": normal(WIDTH, WIDTH)} for i in range(2)}
    return {
        "embedding": normal(VOCABULARY, WIDTH),
        "place": normal(64, WIDTH),
        "head": normal(VOCABULARY, WIDTH),
        **layers,
    }


def toy_model(variables, tokens, positions, subtree_end):
    """int32 [R, L] three times -> Prediction."""
    x = variables["embedding"][tokens] + variables["place"][positions]
    for name in ("layer0", "layer1"):
        q, k, v = jnp.split((x @ variables[name]["qkv"]).reshape(*x.shape[:2], HEADS, -1), 3, axis=-1)
        seen = attention(q, k, v, subtree_end=subtree_end)
        x = x + jnp.tanh(seen.reshape(x.shape) @ variables[name]["out"])
    return Prediction(x, variables["head"])


def toy_logits(variables, tokens, positions, subtree_end):
    """The same as a foreign model that hands over logits."""
    prediction = toy_model(variables, tokens, positions, subtree_end)
    return prediction.hidden @ prediction.head.T


def ragged_examples(count, *, seed=0, completions=2, longest=9, columns=None):
    """Random examples with one-token prompts and completions among them."""
    rng = np.random.default_rng(seed)

    def ids(low=1):
        return rng.integers(1, VOCABULARY, size=rng.integers(low, longest)).astype(np.int32)

    return [
        Example(ids(), tuple(ids() for _ in range(completions)), columns(rng) if columns else {}) for _ in range(count)
    ]


@jax.jit
def _all_logps(variables, ids):
    length = ids.shape[1]
    logits = toy_logits(variables, ids, jnp.arange(length)[None], jnp.full((1, length), length))
    return jax.nn.log_softmax(logits[0])


def logps_one_by_one(variables, example, room=32):
    """List of K arrays: log-probabilities of each completion token, each sequence computed alone."""
    results = []
    for completion in example.completions:
        ids = np.concatenate([example.prompt, completion])
        # What comes later cannot be seen, so that one length serves all sequences.
        logps = np.asarray(_all_logps(variables, jnp.asarray(np.pad(ids, (0, room - len(ids))))[None]))
        start = len(example.prompt)
        results.append(np.array([logps[start - 1 + i, t] for i, t in enumerate(completion)]))
    return results
