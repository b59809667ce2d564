"""Merging: soups, TIES, SLERP, WARP and adapters against float64 NumPy, and what each promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.language.methods.model_merging import (
    LowRank,
    agreeing_max,
    agreeing_mean,
    agreeing_sum,
    apply_task_vector,
    greedy_soup,
    merge_lora_concat,
    merge_lora_delta,
    merge_lora_svd,
    slerp,
    slerp_global,
    task_vector,
    ties_merge,
    trim,
    trim_tensors,
    warp_merge,
    weighted_mean,
    weighted_sum,
)
from dpo_jax.tree import interpolate

TOLERANCE = dict(rtol=1e-5, atol=1e-6)


def model(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {
        "layer": {
            "kernel": jnp.asarray(rng.normal(0, 1, (6, 5)), dtype),
            "bias": jnp.asarray(rng.normal(0, 1, 5), dtype),
        },
        "norm": jnp.asarray(rng.normal(0, 1, 7), dtype),
    }


def flat(tree):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def assert_close(a, b):
    np.testing.assert_allclose(flat(a), flat(b), **TOLERANCE)


BASE, MODELS = model(0), [model(seed) for seed in (1, 2, 3)]
VECTORS = [task_vector(m, BASE) for m in MODELS]


# Task arithmetic and soups


def test_a_task_vector_leads_back_to_its_model():
    assert_close(apply_task_vector(BASE, VECTORS[0]), MODELS[0])
    assert_close(apply_task_vector(BASE, VECTORS[0], scale=0.0), BASE)
    assert_close(apply_task_vector(BASE, VECTORS[0], scale=0.3), interpolate(BASE, MODELS[0], 0.3))  # WiSE-FT


def test_differences_are_kept_in_float32_and_models_in_their_dtype():
    base, tuned = model(0, jnp.bfloat16), model(1, jnp.bfloat16)
    vector = task_vector(tuned, base)
    assert {leaf.dtype for leaf in jax.tree.leaves(vector)} == {jnp.dtype("float32")}
    back = apply_task_vector(base, vector)
    assert back["norm"].dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, back, tuned)


def test_sums_of_bfloat16_models_do_not_round_on_the_way():
    trees = [{"k": jnp.full(3, value, jnp.bfloat16)} for value in (1.0, 2.0**-9, 2.0**-9, 2.0**-9, 2.0**-9)]
    summed = weighted_sum(trees, [1.0] * 5)["k"]
    assert summed.dtype == jnp.bfloat16 and (summed == 1 + 2.0**-7).all()


def test_task_arithmetic_and_weighted_means():
    weights = [0.5, -0.2, 0.9]
    expected = sum(w * flat(v) for w, v in zip(weights, VECTORS))
    np.testing.assert_allclose(flat(weighted_sum(VECTORS, weights)), expected, **TOLERANCE)
    np.testing.assert_allclose(flat(weighted_mean(VECTORS, weights)), expected / 1.2, **TOLERANCE)
    assert_close(weighted_sum(VECTORS[::-1], weights[::-1]), weighted_sum(VECTORS, weights))


def test_a_soup_is_the_base_plus_the_mean_task_vector():
    assert_close(weighted_mean(MODELS), apply_task_vector(BASE, weighted_mean(VECTORS)))
    assert_close(weighted_mean(MODELS[:1]), MODELS[0])


def test_soup_of_a_convex_loss_is_no_worse_than_the_mean():
    def loss(tree):
        return float(np.logaddexp.reduce(flat(tree) * np.linspace(-1, 2, 42)))

    for weights in ([1, 1, 1], [0.1, 3, 0.4]):
        losses = [loss(m) for m in MODELS]
        assert loss(weighted_mean(MODELS, weights)) <= np.average(losses, weights=weights) + 1e-6


def test_greedy_soup_takes_what_does_not_hurt():
    trees = [{"x": jnp.array([v])} for v in (3.0, 1.0, -1.0, 1.0)]
    # Scores -9, -1, -1, -1: 1 starts, -1 brings the mean to 0 (better), the second 1 to 1/3 (worse), 3 to 1 (worse).
    soup = greedy_soup(trees, lambda tree: -(float(tree["x"][0]) ** 2))
    assert soup.members == (1, 2) and soup.score == 0.0 and soup.params["x"] == 0.0
    constant = greedy_soup(trees, lambda tree: 1.0)
    assert constant.members == (0, 1, 2, 3) and constant.params["x"] == 1.0
    assert greedy_soup(trees[:1], lambda tree: -5.0).members == (0,)


def test_greedy_soup_is_never_below_the_best_single():
    score = lambda tree: -float(np.square(flat(tree) - 0.1).sum())  # noqa: E731
    assert greedy_soup(MODELS, score).score >= max(map(score, MODELS))


# TIES


def numpy_trim(tau, density):
    count = int(density * tau.size + 1e-9)
    kept = np.zeros_like(tau)
    order = np.argsort(-np.abs(tau), kind="stable")[:count]
    kept[order] = tau[order]
    return kept


def numpy_ties(taus, density, aggregate):
    """The published procedure for one flat vector per model, float64."""
    trimmed = np.stack([numpy_trim(tau, density) for tau in taus])
    sign = np.sign(trimmed.sum(0))
    sign[sign == 0] = np.sign(sign.sum()) or 1.0
    kept = np.where(np.sign(trimmed) == sign, trimmed, 0.0)
    if aggregate == "mean":
        return kept.sum(0) / np.maximum((kept != 0).sum(0), 1)
    return kept.sum(0) if aggregate == "sum" else np.abs(kept).max(0) * sign


@pytest.mark.parametrize("density", [0.2, 0.7])
@pytest.mark.parametrize(
    ("aggregate", "name"),
    [(agreeing_mean, "mean"), (agreeing_sum, "sum"), (agreeing_max, "max")],
    ids=lambda v: str(v)[:20],
)
def test_ties_is_the_published_procedure(aggregate, name, density):
    merged = ties_merge(VECTORS, density=density, aggregate=aggregate)
    np.testing.assert_allclose(flat(merged), numpy_ties([flat(v) for v in VECTORS], density, name), **TOLERANCE)
    assert jax.tree.structure(merged) == jax.tree.structure(BASE)


@pytest.mark.parametrize(("density", "count"), [(0.0, 0), (0.2, 8), (0.29, 12), (1.0, 42)])
def test_trim_keeps_exactly_the_largest(density, count):
    trimmed = flat(trim(VECTORS[0], density=density))
    assert (trimmed != 0).sum() == count
    np.testing.assert_allclose(trimmed, numpy_trim(flat(VECTORS[0]), density), **TOLERANCE)


def test_trim_counts_ties_and_binary_fractions_exactly():
    assert (flat(trim({"k": jnp.ones(100)}, density=0.29)) != 0).sum() == 29


def test_scopes_differ_where_one_tensor_is_larger():
    vector = {"small": jnp.arange(1.0, 11.0) / 100, "large": jnp.arange(1.0, 11.0)}
    whole, each = trim(vector, density=0.3), trim_tensors(vector, density=0.3)
    assert ((whole["small"] != 0).sum(), (whole["large"] != 0).sum()) == (0, 6)
    assert ((each["small"] != 0).sum(), (each["large"] != 0).sum()) == (3, 3)
    merged = ties_merge([vector], density=0.3, trimmed=trim_tensors)
    assert_close(merged, each)


def test_one_model_at_full_density_is_itself():
    assert_close(apply_task_vector(BASE, ties_merge(VECTORS[:1], density=1.0)), MODELS[0])


def test_ties_does_not_depend_on_the_order_and_scales():
    merged = ties_merge(VECTORS, density=0.4)
    assert_close(ties_merge(VECTORS[::-1], density=0.4), merged)
    scaled = ties_merge([jax.tree.map(lambda x: 2.5 * x, v) for v in VECTORS], density=0.4)
    assert_close(scaled, jax.tree.map(lambda x: 2.5 * x, merged))


def test_elected_signs():
    """Agreement is a mean; a minority is left out; a tie takes the sign of the model's majority."""
    a = {"k": jnp.array([1.0, 3.0, 2.0, -2.0, -2.0])}
    b = {"k": jnp.array([3.0, -1.0, -2.0, -4.0, -6.0])}
    np.testing.assert_allclose(ties_merge([a, b], density=1.0)["k"], [2.0, 3.0, 2.0, -3.0, -4.0])  # signs + + 0 - -
    c = {"k": b["k"].at[1].set(-5.0)}
    np.testing.assert_allclose(ties_merge([a, c], density=1.0)["k"], [2.0, -5.0, -2.0, -3.0, -4.0])  # + - 0 - -


def test_weights_count_in_election_and_mean():
    a, b, c = ({"k": jnp.array([value])} for value in (1.0, -1.5, 4.0))
    np.testing.assert_allclose(ties_merge([a, b], density=1.0)["k"], [-1.5])
    np.testing.assert_allclose(ties_merge([a, b], density=1.0, weights=[2.0, 1.0])["k"], [1.0])
    np.testing.assert_allclose(ties_merge([a, c], density=1.0, weights=[2.0, 1.0])["k"], [2.0])
    np.testing.assert_allclose(ties_merge([a, c], density=1.0, weights=[2.0, 1.0], aggregate=agreeing_sum)["k"], [6.0])


# SLERP and WARP


def numpy_slerp(a, b, t, threshold=0.9995):
    cosine = a @ b / np.sqrt((a @ a) * (b @ b))
    if abs(cosine) > threshold:
        return (1 - t) * a + t * b
    w = np.arccos(cosine)
    return np.sin((1 - t) * w) / np.sin(w) * a + np.sin(t * w) / np.sin(w) * b


@pytest.mark.parametrize("t", [0.25, 0.5])
def test_slerp_by_tensor_and_of_the_whole_model(t):
    for name in ("layer", "norm"):
        for a, b, out in zip(*(jax.tree.leaves(x[name]) for x in (VECTORS[0], VECTORS[1], slerp(*VECTORS[:2], t)))):
            np.testing.assert_allclose(out.ravel(), numpy_slerp(flat(a), flat(b), t), rtol=1e-4, atol=1e-5)
    whole = slerp_global(*VECTORS[:2], t)
    np.testing.assert_allclose(flat(whole), numpy_slerp(flat(VECTORS[0]), flat(VECTORS[1]), t), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("merge", [slerp, slerp_global])
def test_slerp_ends_swaps_and_scales(merge):
    a, b = VECTORS[:2]
    assert_close(merge(a, b, 0.0), a)
    assert_close(merge(a, b, 1.0), b)
    assert_close(merge(a, b, 0.3), merge(b, a, 0.7))
    double = [jax.tree.map(lambda x: 3.0 * x, v) for v in (a, b)]
    assert_close(merge(*double, 0.3), jax.tree.map(lambda x: 3.0 * x, merge(a, b, 0.3)))


@pytest.mark.parametrize("t", [0.2, 0.5])
def test_slerp_keeps_equal_norms(t):
    unit = [jax.tree.map(lambda x: 2 * x / jnp.linalg.norm(x), v) for v in VECTORS[:2]]
    for leaf in jax.tree.leaves(slerp(*unit, t)):
        assert jnp.linalg.norm(leaf) == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 2.0, -1.0, 1e-20])
def test_slerp_of_parallel_tensors_is_linear(scale):
    a = {"k": jnp.array([1.0, -2.0, 0.5])}
    b = {"k": a["k"] * scale}
    np.testing.assert_allclose(slerp(a, b, 0.25)["k"], 0.75 * a["k"] + 0.25 * b["k"], **TOLERANCE)


def test_slerp_with_a_zero_tensor_is_finite():
    a, zero = {"k": jnp.array([1.0, 2.0])}, {"k": jnp.zeros(2)}
    np.testing.assert_allclose(slerp(a, zero, 0.5)["k"], a["k"] * np.sqrt(0.5), rtol=1e-6)
    assert (slerp(zero, zero, 0.5)["k"] == 0).all()


def test_warp_is_iterated_slerp_drawn_back_to_the_start():
    for name in ("layer", "norm"):
        leaves = [jax.tree.leaves(tree[name]) for tree in (BASE, *VECTORS, warp_merge(BASE, MODELS, eta=0.3))]
        for start, *taus, out in zip(*leaves):
            two = numpy_slerp(flat(taus[0]), flat(taus[1]), 1 / 2)
            expected = flat(start) + 0.3 * numpy_slerp(two, flat(taus[2]), 1 / 3)
            np.testing.assert_allclose(out.ravel(), expected, rtol=1e-4, atol=1e-5)


def test_warp_ends():
    assert_close(warp_merge(BASE, MODELS, eta=0.0), BASE)
    assert_close(warp_merge(BASE, MODELS[:1], eta=1.0), MODELS[0])
    assert_close(warp_merge(BASE, MODELS[:2]), warp_merge(BASE, MODELS[1::-1]))


# Adapters


def adapter(seed, rank, layers=()):
    rng = np.random.default_rng(seed)

    def low_rank(inputs, outputs):
        shapes = (*layers, inputs, rank), (*layers, rank, outputs)
        return LowRank(*(jnp.asarray(rng.normal(0, 1, shape), jnp.float32) for shape in shapes))

    return {"query": low_rank(9, 7), "up": low_rank(9, 12)}


def numpy_delta(adapters, weights, name):
    return sum(
        w * np.asarray(x[name].a, np.float64) @ np.asarray(x[name].b, np.float64) for w, x in zip(weights, adapters)
    )


@pytest.mark.parametrize("layers", [(), (3,)])
def test_joined_ranks_are_the_exact_sum(layers):
    adapters, weights = [adapter(0, 2, layers), adapter(1, 4, layers)], [0.7, -0.4]
    joined, delta = merge_lora_concat(adapters, weights), merge_lora_delta(adapters, weights)
    for name in joined:
        expected = numpy_delta(adapters, weights, name)
        assert joined[name].a.shape[-1] == 6
        np.testing.assert_allclose(joined[name].a @ joined[name].b, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(delta[name], expected, rtol=1e-4, atol=1e-5)


def test_the_average_of_products_is_not_the_product_of_averages():
    adapters = [adapter(0, 2), adapter(1, 2)]
    averaged = weighted_mean(adapters)["query"]
    assert np.abs(averaged.a @ averaged.b - numpy_delta(adapters, [0.5, 0.5], "query")).max() > 0.1


@pytest.mark.parametrize("layers", [(), (3,)])
@pytest.mark.parametrize("rank", [1, 3, 50])
def test_svd_is_the_best_approximation_of_its_rank(rank, layers):
    adapters, weights = [adapter(0, 2, layers), adapter(1, 4, layers)], [1.0, 0.5]
    for name, cut in merge_lora_svd(adapters, weights, rank=rank).items():
        delta = numpy_delta(adapters, weights, name)
        left = np.linalg.svd(delta, compute_uv=False)[..., rank:]
        error = np.linalg.norm(delta - np.asarray(cut.a @ cut.b, np.float64), axis=(-2, -1))
        np.testing.assert_allclose(error, np.sqrt((left**2).sum(-1)), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(cut.a, axis=-2), np.linalg.norm(cut.b, axis=-1), rtol=1e-4, atol=1e-3)


# Failures


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: weighted_sum(MODELS, [1.0]), "3 trees and 1 weights"),
        (lambda: weighted_sum([], []), "0 trees"),
        (lambda: weighted_mean([]), "0 trees"),
        (lambda: weighted_mean(MODELS[:2], [1.0, -1.0]), "sum to 0"),
        (lambda: greedy_soup([], lambda tree: 0.0), "no models"),
        (lambda: slerp(BASE, BASE, 1.5), "t is 1.5"),
        (lambda: slerp(BASE, BASE, 0.5, threshold=1.0), "threshold is 1.0"),
        (lambda: warp_merge(BASE, []), "no policies"),
        (lambda: warp_merge(BASE, MODELS, eta=2.0), "eta is 2.0"),
        (lambda: trim(BASE, density=1.2), "density is 1.2"),
        (lambda: ties_merge([]), "0 vectors"),
        (lambda: ties_merge(VECTORS, weights=[1.0, 0.0, 1.0]), "above 0"),
        (lambda: merge_lora_concat([adapter(0, 2)], []), "1 adapters and 0 weights"),
        (lambda: merge_lora_svd([adapter(0, 2)], [1.0], rank=0), "rank is 0"),
    ],
)
def test_what_is_wrong_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
