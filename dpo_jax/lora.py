"""Low-rank adapters of frozen kernels: LoRA, rsLoRA and DoRA, as leaves of the variables beside the kernels.

Hu et al. 2021, arXiv 2106.09685; Kalajdzievski 2023, arXiv 2312.03732; Liu et al. 2024, arXiv 2402.09353.
    LoRA:    y = x W + s (x A) B,                    s = alpha / r
    rsLoRA:  the same with                           s = alpha / sqrt(r)
    DoRA:    y = m / ||V|| * (x W + s (x A) B),      V = W + s A B, norms over the input axis and without gradient
Shapes: kernel W [..., in, out], A [..., in, r], B [..., r, out], m [..., out], s [...]; the leading axes are stacked
layers. At the start B = 0 and m = ||W||: the adapted model is the base. So a frozen reference costs a second set of
these leaves and no second model (`train.init_state` with `trainable=is_trainable`).
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dpo_jax.tree import named_leaves
from dpo_jax.types import Array, PyTree

A, B, SCALE, MAGNITUDE = "lora_a", "lora_b", "lora_scale", "lora_magnitude"


@dataclass(frozen=True)
class LoraConfig:
    """Which kernels get adapters, and of what kind.

    Attributes:
      rank: r.
      alpha: numerator of the scale.
      targets: regular expression that must match a kernel's whole path name.
      rslora: divide alpha by sqrt(r) instead of r.
      dora: learn each output's norm apart from its direction.
      rank_pattern, alpha_pattern: pairs of a regular expression as in targets and another value; the first match wins.

    Raises:
      ValueError: a rank below 1, an alpha that is not positive, or an expression that cannot be read.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: str = "layers/.*/kernel"
    rslora: bool = False
    dora: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        for rank in (self.rank, *(value for _, value in self.rank_pattern)):
            if rank < 1:
                raise ValueError(f"the rank of an adapter is {rank}; give at least 1")
        for alpha in (self.alpha, *(value for _, value in self.alpha_pattern)):
            if not 0 < alpha < math.inf:
                raise ValueError(f"the alpha of an adapter is {alpha}; give a number above 0")
        for pattern in (self.targets, *(pattern for pattern, _ in (*self.rank_pattern, *self.alpha_pattern))):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression of path names: {error}") from error

    def rank_of(self, name: str) -> int:
        """Rank of the adapter of a kernel, by its path name."""
        return next((value for pattern, value in self.rank_pattern if re.fullmatch(pattern, name)), self.rank)

    def scale_of(self, name: str) -> float:
        """Scale of the adapter of a kernel, by its path name."""
        alpha = next((value for pattern, value in self.alpha_pattern if re.fullmatch(pattern, name)), self.alpha)
        return alpha / scale_divisor(self.rank_of(name), self.rslora)


def scale_divisor(rank: int, rslora: bool) -> float:
    """What alpha is divided by: the rank, or for rsLoRA its square root."""
    return math.sqrt(rank) if rslora else rank


def is_trainable(name: str) -> bool:
    """Whether a path name is that of a leaf that adapters learn; scales are constants."""
    return name.rsplit("/", 1)[-1] in (A, B, MAGNITUDE)


def init_adapters(key: Array, variables: PyTree, config: LoraConfig) -> PyTree:
    """Adapters at their start: A uniform within 1 / sqrt(in), B zero, m the norms of the kernel; float32.

    Args:
      variables: of the base; nested dicts of arrays.

    Returns:
      Nested dicts with `lora_a`, `lora_b`, `lora_scale` and with DoRA `lora_magnitude` where the base has `kernel`.

    Raises:
      ValueError: no kernel's name matches the targets.
    """
    kernels = {name: leaf for name, leaf in named_leaves(variables).items() if name.rsplit("/", 1)[-1] == "kernel"}
    chosen = {name: leaf for name, leaf in kernels.items() if re.fullmatch(config.targets, name)}
    if not chosen:
        raise ValueError(f"no kernel's name matches the targets {config.targets!r}; there are {', '.join(kernels)}")
    adapters: dict = {}
    for number, (name, kernel) in enumerate(chosen.items()):
        *lead, size_in, size_out = kernel.shape
        rank, bound = config.rank_of(name), 1 / math.sqrt(size_in)
        site = {
            A: jax.random.uniform(jax.random.fold_in(key, number), (*lead, size_in, rank), minval=-bound, maxval=bound),
            B: jnp.zeros((*lead, rank, size_out)),
            SCALE: jnp.full(tuple(lead), config.scale_of(name), jnp.float32),
        }
        if config.dora:
            site[MAGNITUDE] = jnp.sqrt(_squared_norms(kernel))
        _put(adapters, name.split("/")[:-1], site)
    return adapters


def _put(tree: dict, path: list[str], site: Mapping[str, Array]) -> None:
    for part in path:
        tree = tree.setdefault(part, {})
    tree.update(site)


def adapter_sites(adapters: PyTree) -> dict[str, dict[str, Array]]:
    """Path name of each adapted layer -> its leaves; other leaves of the tree are left out."""
    sites: dict[str, dict[str, Array]] = {}
    for name, leaf in named_leaves(adapters).items():
        path, _, kind = name.rpartition("/")
        if kind in (A, B, SCALE, MAGNITUDE):
            sites.setdefault(path, {})[kind] = leaf
    return sites


def with_adapters(base: PyTree, adapters: PyTree) -> PyTree:
    """The variables of the adapted model: one tree, its nested dicts new and its leaves shared."""
    joined = dict(base)
    for name, part in adapters.items():
        inner = isinstance(part, Mapping)
        joined[name] = with_adapters(joined.get(name, {}), part) if inner else part
    return joined


def split_adapters(variables: PyTree) -> tuple[PyTree, PyTree]:
    """(base, adapters) of what `with_adapters` joined."""
    base, adapters = {}, {}
    for name, part in variables.items():
        if isinstance(part, Mapping):
            base[name], inner = split_adapters(part)
            adapters |= {name: inner} if inner else {}
        else:
            (adapters if name in (A, B, SCALE, MAGNITUDE) else base)[name] = part
    return base, adapters


def adapt(
    y: Array, x: Array, kernel: Array, *, a: Array, b: Array, scale: Array, magnitude: Array | None = None
) -> Array:
    """What an adapter makes of y = x W, without ever making A B or a gradient of the kernel's size.

    Args:
      y: [N, out].
      x: [N, in], in the compute dtype.
      kernel: [in, out], read by DoRA only.
      a, b, scale, magnitude: of one layer.
    """
    low = (x @ a.astype(x.dtype)) * scale.astype(x.dtype)  # [N, in] -> [N, r]
    y = y + low @ b.astype(x.dtype)
    if magnitude is None:
        return y
    # The norm is a constant of the backward pass (section 4.3 of the DoRA paper).
    norms = jax.lax.stop_gradient(jnp.sqrt(_squared_norms(kernel, a, b, scale)))
    return y * (magnitude / norms).astype(y.dtype)


def _squared_norms(kernel: Array, a: Array | None = None, b: Array | None = None, scale: Array | None = None) -> Array:
    """||W + s A B||^2 over the input axis, float32 [..., out]; the product A B is expanded, never made."""
    wide = kernel.astype(jnp.float32)
    own = jnp.sum(jnp.square(wide), axis=-2)
    if a is None or b is None or scale is None:
        return own
    exact = jax.lax.Precision.HIGHEST
    across = jnp.sum(jnp.einsum("...ir,...io->...ro", a, wide, precision=exact) * b, axis=-2)
    gram = jnp.einsum("...ir,...is->...rs", a, a, precision=exact)
    low = jnp.sum(jnp.einsum("...rs,...so->...ro", gram, b, precision=exact) * b, axis=-2)
    scale = scale[..., None]
    # Rounding may leave a norm of zero below zero.
    return jnp.maximum(own + 2 * scale * across + scale**2 * low, 1e-30)


def _delta(site: Mapping[str, Array]) -> Array:
    """s A B, float32 [..., in, out]."""
    product = jnp.matmul(site[A], site[B], precision=jax.lax.Precision.HIGHEST)
    return product.astype(jnp.float32) * site[SCALE][..., None, None]


def merge(variables: PyTree) -> PyTree:
    """The base with its adapters written into the kernels: same function, no adapters; computed in float32."""
    base, adapters = split_adapters(variables)
    changed: dict = {}
    for path, site in adapter_sites(adapters).items():
        kernel = _kernel(base, path)
        merged = kernel.astype(jnp.float32) + _delta(site)
        if MAGNITUDE in site:
            merged *= (site[MAGNITUDE] / jnp.sqrt(jnp.sum(jnp.square(merged), axis=-2)))[..., None, :]
        _put(changed, path.split("/"), {"kernel": merged.astype(kernel.dtype)})
    return with_adapters(base, changed)


def unmerge(merged: PyTree, adapters: PyTree) -> PyTree:
    """The base of which `merge` made this, up to rounding.

    Raises:
      ValueError: a DoRA adapter, whose merging forgets the norms.
    """
    changed: dict = {}
    for path, site in adapter_sites(adapters).items():
        if MAGNITUDE in site:
            raise ValueError(f"{path}: a merged DoRA adapter cannot be taken out again; keep the base")
        kernel = _kernel(merged, path)
        _put(changed, path.split("/"), {"kernel": (kernel.astype(jnp.float32) - _delta(site)).astype(kernel.dtype)})
    return with_adapters(merged, changed)


def _kernel(base: PyTree, path: str) -> Array:
    for part in path.split("/"):
        base = base.get(part, {})
    if "kernel" not in base:
        raise ValueError(f"{path}: the base has no kernel there; these adapters belong to another model")
    if isinstance(base["kernel"], Mapping):
        raise ValueError(
            f"{path}: the kernel is in few bits, and a merge would round it again; merge into the base that was read"
        )
    return base["kernel"]


def join_ranks(factors: Sequence[tuple[Array, Array]], weights: Sequence[float | Array] | Array) -> tuple[Array, Array]:
    """One pair whose product is exactly sum_k w_k a_k b_k: factors side by side along the rank, weights in b; float32.

    Args:
      factors: pairs of [..., in, r_k] and [..., r_k, out]; ranks may differ.
      weights: one for each pair, of any sign; scalars, or arrays over the leading axes.

    Raises:
      ValueError: no pair, or another number of weights.
    """
    if not factors or len(factors) != len(weights):
        raise ValueError(f"{len(factors)} adapters and {len(weights)} weights; give one weight per adapter, and one")
    a = [pair[0].astype(jnp.float32) for pair in factors]
    b = [
        pair[1].astype(jnp.float32) * jnp.asarray(w, jnp.float32)[..., None, None] for pair, w in zip(factors, weights)
    ]
    return jnp.concatenate(a, axis=-1), jnp.concatenate(b, axis=-2)


def combine_adapters(named: Mapping[str, PyTree], weights: Mapping[str, float | Array]) -> PyTree:
    """One adapter whose change is exactly sum_k w_k s_k A_k B_k: the factors side by side, scales inside B, s = 1.

    Args:
      named: adapters by name.
      weights: of those that take part.

    Raises:
      ValueError: a name without an adapter, no weights, or DoRA, whose changes do not add up.
    """
    if unknown := sorted(set(weights) - set(named)):
        raise ValueError(f"there are no adapters named {', '.join(unknown)}; there are {', '.join(named)}")
    if not weights:
        raise ValueError("give the weight of at least one adapter")
    parts: dict[str, list[tuple[tuple[Array, Array], Array]]] = {}
    for name, weight in weights.items():
        for path, site in adapter_sites(named[name]).items():
            if MAGNITUDE in site:
                raise ValueError(f"{name} is a DoRA adapter; norms do not add up: merge it instead")
            parts.setdefault(path, []).append(((site[A], site[B]), weight * site[SCALE]))
    combined: dict = {}
    for path, pairs in parts.items():
        a, b = join_ranks(*zip(*pairs))
        _put(combined, path.split("/"), {A: a, B: b, SCALE: jnp.ones(a.shape[:-2], jnp.float32)})
    return combined


def adapter_rules(rules: tuple[tuple[str, PartitionSpec], ...]) -> tuple[tuple[str, PartitionSpec], ...]:
    """Sharding rules of adapters: A follows its kernel's input axis, B and m the output axis, r is never split."""
    made = []
    for pattern, spec in rules:
        if pattern.endswith("kernel$"):
            owner, (*lead, rows, columns) = pattern.removesuffix("kernel$"), spec
            made += [
                (f"{owner}{A}$", PartitionSpec(*lead, rows, None)),
                (f"{owner}{B}$", PartitionSpec(*lead, None, columns)),
                (f"{owner}{MAGNITUDE}$", PartitionSpec(*lead, columns)),
            ]
    return tuple(made)
