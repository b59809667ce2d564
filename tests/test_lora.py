"""Adapters against the written-out formulas in float64, their starts, merges, sums and rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.lora import (
    LoraConfig,
    adapt,
    adapter_rules,
    adapter_sites,
    combine_adapters,
    init_adapters,
    is_trainable,
    join_ranks,
    merge,
    split_adapters,
    unmerge,
    with_adapters,
)
from dpo_jax.sharding import P
from dpo_jax.tree import named_leaves

LAYERS, IN, OUT = 2, 6, 5


def base():
    draw = np.random.default_rng(0)
    first, second = (jnp.asarray(draw.normal(size=(LAYERS, *s)), jnp.float32) for s in ((IN, OUT), (OUT, IN)))
    return {
        "embed": {"embedding": jnp.ones((3, IN))},
        "layers": {"up": {"kernel": first, "bias": jnp.ones((LAYERS, OUT))}, "down": {"kernel": second}},
    }


def trained(config, seed=1):
    """Adapters as training leaves them: no factor is zero and no norm is that of the kernel."""
    draw = np.random.default_rng(seed)

    def moved(name, leaf):
        kind = name.rsplit("/", 1)[-1]
        if kind == "lora_b":
            return jnp.asarray(draw.normal(size=leaf.shape), jnp.float32)
        return leaf * 1.3 if kind == "lora_magnitude" else leaf

    adapters = init_adapters(jax.random.key(seed), base(), config)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: moved(path[-1].key, leaf), adapters)


def forward(variables, x):
    """Two projections per layer, one after another."""
    for layer in range(LAYERS):
        for name in ("up", "down"):
            site = {kind: leaf[layer] for kind, leaf in variables["layers"][name].items()}
            y, parts = x @ site["kernel"], {"a": "lora_a", "b": "lora_b", "scale": "lora_scale"}
            if "lora_a" in site:
                given = {ours: site[theirs] for ours, theirs in parts.items()}
                y = adapt(y, x, site["kernel"], magnitude=site.get("lora_magnitude"), **given)
            x = y + site.get("bias", 0.0)
    return x


X = jnp.asarray(np.random.default_rng(5).normal(size=(4, IN)), jnp.float32)
KINDS = {
    "lora": LoraConfig(rank=3, alpha=6.0),
    "rslora": LoraConfig(rank=3, alpha=6.0, rslora=True),
    "dora": LoraConfig(rank=3, alpha=6.0, dora=True),
    "patterns": LoraConfig(rank=3, rank_pattern=((".*/up/.*", 2),), alpha_pattern=((".*/down/.*", 5.0),)),
}
kinds = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS.keys())


@kinds
def test_the_adapted_product_is_the_written_formula(config):
    site = {name: np.asarray(leaf[0], np.float64) for name, leaf in trained(config)["layers"]["up"].items()}
    kernel = np.asarray(base()["layers"]["up"]["kernel"][0])
    x = np.asarray(X, np.float64)
    whole = kernel + site["lora_scale"] * site["lora_a"] @ site["lora_b"]
    if config.dora:
        whole = site["lora_magnitude"] * whole / np.linalg.norm(whole, axis=0)
    given = {"a": "lora_a", "b": "lora_b", "scale": "lora_scale", "magnitude": "lora_magnitude"}
    given = {ours: jnp.asarray(site[name], jnp.float32) for ours, name in given.items() if name in site}
    got = adapt(X @ kernel, X, jnp.asarray(kernel), **given)
    np.testing.assert_allclose(got, x @ whole, rtol=2e-6, atol=2e-6)


def test_dora_gradients_are_those_of_the_formula_with_constant_norms():
    config = KINDS["dora"]
    kernel = base()["layers"]["up"]["kernel"][0]
    site = {name: leaf[0] for name, leaf in trained(config)["layers"]["up"].items()}
    whole = kernel + site["lora_scale"] * site["lora_a"] @ site["lora_b"]
    norms = jnp.linalg.norm(whole, axis=0)

    def ours(a, b, m):
        return jnp.sum(jnp.sin(adapt(X @ kernel, X, kernel, a=a, b=b, scale=site["lora_scale"], magnitude=m)))

    def written(a, b, m):
        return jnp.sum(jnp.sin(X @ (m / norms * (kernel + site["lora_scale"] * a @ b))))

    leaves = (site["lora_a"], site["lora_b"], site["lora_magnitude"])
    for got, want in zip(jax.grad(ours, (0, 1, 2))(*leaves), jax.grad(written, (0, 1, 2))(*leaves)):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@kinds
def test_scales(config):
    sites = adapter_sites(init_adapters(jax.random.key(0), base(), config))
    scales = {path: float(site["lora_scale"][0]) for path, site in sites.items()}
    want = {"lora": (2, 2), "rslora": (6 / 3**0.5,) * 2, "dora": (2, 2), "patterns": (16, 5 / 3)}
    name = next(name for name, other in KINDS.items() if other is config)
    np.testing.assert_allclose((scales["layers/up"], scales["layers/down"]), want[name], rtol=1e-6)


def test_starts():
    adapters = init_adapters(jax.random.key(0), base(), LoraConfig(rank=3, dora=True))
    for path, site in adapter_sites(adapters).items():
        kernel = base()["layers"][path.split("/")[1]]["kernel"]
        bound = 1 / np.sqrt(kernel.shape[1])
        assert site["lora_a"].shape == (LAYERS, kernel.shape[1], 3)
        assert site["lora_b"].shape == (LAYERS, 3, kernel.shape[2])
        assert 0.5 * bound < np.abs(site["lora_a"]).max() <= bound
        assert not np.any(site["lora_b"])
        np.testing.assert_allclose(site["lora_magnitude"], np.linalg.norm(kernel, axis=1), rtol=1e-6)
    a = [site["lora_a"] for site in adapter_sites(adapters).values()]
    assert a[0].shape != a[1].shape or np.any(a[0] != a[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dora", [False, True])
def test_at_the_start_the_adapted_model_is_the_base(dora, dtype):
    variables = jax.tree.map(lambda leaf: leaf.astype(dtype), base())
    adapters = init_adapters(jax.random.key(0), variables, LoraConfig(rank=3, dora=dora))
    got, want = (jax.jit(forward)(v, X.astype(dtype)) for v in (with_adapters(variables, adapters), variables))
    assert got.dtype == want.dtype
    if dora:
        np.testing.assert_allclose(got, want, rtol=1e-5 if dtype == "float32" else 1e-2)
    else:
        np.testing.assert_array_equal(got, want)


@kinds
def test_merged_kernels_give_the_same_and_can_be_unmerged(config):
    adapters = trained(config)
    variables = with_adapters(base(), adapters)
    merged = merge(variables)
    assert named_leaves(merged).keys() == named_leaves(base()).keys()
    want = forward(variables, X)
    np.testing.assert_allclose(forward(merged, X), want, rtol=0, atol=2e-6 * np.abs(want).max())
    if config.dora:
        kernel, m = merged["layers"]["up"]["kernel"], adapters["layers"]["up"]["lora_magnitude"]
        np.testing.assert_allclose(np.linalg.norm(kernel, axis=1), m, rtol=1e-6)
        with pytest.raises(ValueError, match="layers/down: a merged DoRA"):
            unmerge(merged, adapters)
    else:
        back = unmerge(merged, adapters)
        for name, leaf in named_leaves(back).items():
            np.testing.assert_allclose(leaf, named_leaves(base())[name], rtol=0, atol=1e-5)
        rank = np.linalg.matrix_rank(merged["layers"]["up"]["kernel"][0] - base()["layers"]["up"]["kernel"][0], 1e-4)
        assert rank <= config.rank


def test_several_adapters_add_up_exactly():
    one, two = trained(KINDS["lora"]), trained(KINDS["patterns"], seed=2)
    del two["layers"]["down"]
    both = combine_adapters({"one": one, "two": two, "idle": one}, {"one": 0.5, "two": -2.0})
    kernels = {name: merge(with_adapters(base(), a))["layers"] for name, a in (("one", one), ("two", two))}
    got, start = merge(with_adapters(base(), both))["layers"], base()["layers"]
    for name, weight in (("up", -2.0), ("down", 0.0)):
        want = start[name]["kernel"] + 0.5 * (kernels["one"][name]["kernel"] - start[name]["kernel"])
        want += weight * (kernels["two"][name]["kernel"] - start[name]["kernel"])
        np.testing.assert_allclose(got[name]["kernel"], want, rtol=0, atol=2e-5)
    alone = combine_adapters({"one": one}, {"one": 0.0})
    np.testing.assert_array_equal(forward(with_adapters(base(), alone), X), forward(base(), X))


def test_joined_and_split_without_loss():
    variables, adapters = base(), trained(KINDS["dora"])
    joined = with_adapters(variables, adapters)
    for got, want in zip(split_adapters(joined), (variables, adapters)):
        assert jax.tree.structure(got) == jax.tree.structure(want)
    assert joined["layers"]["up"]["kernel"] is variables["layers"]["up"]["kernel"]
    assert named_leaves(variables).keys() == named_leaves(base()).keys()
    learned = {name for name in named_leaves(joined) if is_trainable(name)}
    kinds = ("lora_a", "lora_b", "lora_magnitude")
    assert learned == {f"layers/{owner}/{kind}" for owner in ("up", "down") for kind in kinds}


def test_rules_follow_the_kernels():
    rules = adapter_rules(((r"layers/.*up/kernel$", P(None, "fsdp", "model")), (r"embedding$", P("model"))))
    assert rules == (
        (r"layers/.*up/lora_a$", P(None, "fsdp", None)),
        (r"layers/.*up/lora_b$", P(None, None, "model")),
        (r"layers/.*up/lora_magnitude$", P(None, "model")),
    )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: LoraConfig(rank=0), "rank of an adapter is 0"),
        (lambda: LoraConfig(alpha=float("nan")), "alpha of an adapter is nan"),
        (lambda: LoraConfig(targets="("), "no regular expression"),
        (lambda: init_adapters(jax.random.key(0), base(), LoraConfig(targets="up")), "there are layers/down/kernel"),
        (lambda: combine_adapters({"a": {}}, {"b": 1.0}), "no adapters named b; there are a"),
        (lambda: combine_adapters({"a": {}}, {}), "at least one"),
        (lambda: join_ranks([(X, X)], []), "1 adapters and 0 weights"),
        (lambda: combine_adapters({"a": trained(KINDS["dora"])}, {"a": 1.0}), "a is a DoRA adapter"),
        (lambda: merge({"layers": {"gate": {"lora_a": X, "lora_b": X, "lora_scale": X}}}), "layers/gate: the base"),
    ],
)
def test_wrong_use(wrong, said):
    with pytest.raises(ValueError, match=said):
        wrong()
