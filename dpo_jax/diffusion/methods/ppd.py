"""PPD: one model for many users, whose few labelled pairs are a condition next to the text.

Dang et al. 2025, "Personalized Preference Fine-tuning of Diffusion Models", arXiv 2501.06655 (CVPR 2025).
Evidence: groups of pairs and embeddings from the official partial release, objective and attention from public
summaries; how the embedding enters the network is reconstructed.

    loss = Diffusion-DPO's; the policy is told text and user, the reference only the text
    Z    = softmax(Q K^T / sqrt(d)) V + scale softmax(Q K_u^T / sqrt(d)) V_u,   K_u = u W_k,  V_u = u W_v

W_v starts at zero and there are no biases, so a reference that is the start of training knows no user whatever it is
told: with `diffusion_dpo_loss`, a condition that has the user's tokens in it, and only W_k, W_v (and the encoder)
trainable, nothing else is needed. The pair that is trained on is never in the user's group: `few_shot_groups` makes
disjoint groups, and a pair takes another one than its own.

>>> import jax
>>> params = user_kernels(jax.random.key(0), features=4, heads=2, head_size=3)
>>> {name: leaf.shape for name, leaf in params.items()}, float(abs(params["value"]).max())
({'key': (4, 2, 3), 'value': (4, 2, 3)}, 0.0)
"""

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.ops import safe_divide
from dpo_jax.types import Array, PyTree


def user_kernels(key: Array, *, features: int, heads: int, head_size: int) -> dict[str, Array]:
    """New parameters of one attention layer, float32 `key` and `value` [D_u, heads, head_size]; the latter are zero."""
    shape = (features, heads, head_size)
    return {"key": jax.random.normal(key, shape, jnp.float32) * features**-0.5, "value": jnp.zeros(shape, jnp.float32)}


def decoupled_attention(
    query: Array, attended: Array, user: Array, kernels: PyTree, *, mask: Array | None = None, scale: float = 1.0
) -> Array:
    """Attention to the text plus attention to the user's tokens, [N, L, heads, head_size], before the output's matrix.

    Args:
      query: [N, L, heads, head_size], that of the text's attention.
      attended: the text's result, of the query's shape.
      user: [N, M, D_u] tokens of the users.
      kernels: of `user_kernels`.
      mask: [N, M], zero at tokens that are not there; a row without any token adds nothing. All by default.
      scale: of the user's part; 0 leaves it out.
    """
    there = jnp.ones(user.shape[:2], bool) if mask is None else mask != 0  # [N, M]
    user = jnp.where(there[..., None], user, 0)  # 0 * nan of an absent token would be nan
    keys, values = (jnp.einsum("nmd,dhk->nmhk", user, kernels[name].astype(user.dtype)) for name in ("key", "value"))
    scores = jnp.einsum("nlhk,nmhk->nhlm", query, keys).astype(jnp.float32) * query.shape[-1] ** -0.5
    seen = there[:, None, None]  # [N, 1, 1, M]
    # A softmax whose empty rows are zero, not nan.
    top = jax.lax.stop_gradient(jnp.max(jnp.where(seen, scores, -1e30), axis=-1, keepdims=True))
    mass = jnp.where(seen, jnp.exp(jnp.where(seen, scores - top, 0.0)), 0.0)
    shares = safe_divide(mass, jnp.sum(mass, axis=-1, keepdims=True))
    told = jnp.einsum("nhlm,nmhk->nlhk", shares.astype(values.dtype), values)
    return attended + scale * told.astype(attended.dtype)


def interpolate_users(users: Array, weights: Array) -> Array:
    """Tokens between users, sum_r weights_r users_r: users [R, M, D_u], weights [R] -> [M, D_u]."""
    return jnp.einsum("r,rmd->md", weights, users)


def few_shot_groups(seed: int, pairs: np.ndarray, *, size: int = 4) -> np.ndarray:
    """A user's pairs shuffled and cut into disjoint groups, [G, size]; what is left over is in none.

    Args:
      seed: of the shuffle.
      pairs: [P] indices of the user's pairs.
      size: pairs of a group, the paper's shots.
    """
    if size < 1:
        raise ValueError(f"groups of {size} pairs; give at least 1")
    shuffled = np.random.default_rng(seed).permutation(np.asarray(pairs))
    return shuffled[: len(shuffled) // size * size].reshape(-1, size)


def group_without(seed: int, groups: np.ndarray, pair: int) -> int:
    """Index of a random group that does not hold the pair.

    Raises:
      ValueError: there is none.
    """
    others = np.flatnonzero((groups != pair).all(axis=1))
    if not len(others):
        raise ValueError(f"every group of the user holds pair {pair}; give the user another group")
    return int(np.random.default_rng(seed).choice(others))


def set_encoder_parameters(key: Array, *, features: int, width: int, tokens: int, user_size: int) -> PyTree:
    """Parameters of `encode_users`, float32, in the order of use."""
    sizes = {"inner": (2 * features, width), "outer": (width, tokens * user_size)}
    keys = jax.random.split(key, len(sizes))
    return {
        name: {"kernel": jax.random.normal(k, shape) * shape[0] ** -0.5, "bias": jnp.zeros(shape[1])}
        for k, (name, shape) in zip(keys, sizes.items())
    }


def encode_users(params: PyTree, chosen: Array, rejected: Array, *, tokens: int) -> Array:
    """Tokens float32 [N, tokens, D_u] of users, from features of a few labelled pairs each; their order is no matter.

    Each pair's difference and mean go through one layer, the mean over the pairs through another.

    Args:
      params: of `set_encoder_parameters`.
      chosen, rejected: [N, P, D] features of the pairs' images.
      tokens: as when the parameters were made.
    """
    chosen, rejected = chosen.astype(jnp.float32), rejected.astype(jnp.float32)
    pairs = jnp.concatenate([chosen - rejected, 0.5 * (chosen + rejected)], axis=-1)  # [N, P, 2 D]
    inner, outer = params["inner"], params["outer"]
    hidden = jnp.mean(jax.nn.gelu(pairs @ inner["kernel"] + inner["bias"]), axis=1)
    told = hidden @ outer["kernel"] + outer["bias"]
    return told.reshape(told.shape[0], tokens, -1)
