"""DARE, DAREx and AdamR: masks, error moments, every choice of q, and the optimizer."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax.language.methods.darex import (
    activation_masks,
    adamr,
    adamr_l1,
    bound_q,
    dare,
    error_moments,
    initial_coefficients,
    input_masks,
    kearns_saul,
    learned_q,
    magnitude_masks,
    mean_change,
    mean_square_q,
    mean_without_farthest,
    prune,
    random_masks,
    search,
    top_logits_error,
)

KEY = jax.random.key(0)


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 1, shape), dtype)


def model():
    return {"layer": {"kernel": normal(1, 40, 30), "bias": normal(2, 30)}, "other": {"kernel": normal(3, 40, 30)}}


# Masks


@pytest.mark.parametrize("masks", [random_masks, input_masks])
def test_random_masks_follow_from_key_and_name_alone(masks):
    full = masks(model(), KEY, rate=0.5)
    alone = masks({"other": model()["other"]}, KEY, rate=0.5)
    assert (alone["other"]["kernel"] == full["other"]["kernel"]).all()
    assert (full["layer"]["kernel"] != full["other"]["kernel"]).any()
    assert (masks(model(), jax.random.key(1), rate=0.5)["layer"]["kernel"] != full["layer"]["kernel"]).any()


@pytest.mark.parametrize("rate", [0.1, 0.9])
def test_random_masks_keep_the_share(rate):
    kept = np.asarray(random_masks({"kernel": jnp.zeros((300, 300))}, KEY, rate=rate)["kernel"])
    assert abs(kept.mean() - (1 - rate)) < 5 * math.sqrt(rate * (1 - rate) / kept.size)


def test_input_masks_are_constant_over_outputs():
    masks = input_masks({"kernel": normal(0, 3, 400, 7), "bias": normal(1, 9)}, KEY, rate=0.6)
    kernel = np.asarray(masks["kernel"])
    assert kernel.shape == (3, 400, 7) and (kernel == kernel[..., :1]).all()
    assert abs(kernel[..., 0].mean() - 0.4) < 0.08 and (kernel[0] != kernel[1]).any()
    assert len(set(np.asarray(masks["bias"]).tolist())) == 1


@pytest.mark.parametrize("rate", [0.0, 0.37, 0.999])
def test_magnitude_keeps_exactly_the_largest(rate):
    delta = normal(0, 17, 13)
    mask = np.asarray(magnitude_masks({"kernel": delta}, rate=rate)["kernel"])
    assert mask.sum() == round((1 - rate) * 221)
    if 0 < mask.sum() < mask.size:
        assert np.abs(delta)[mask].min() >= np.abs(delta)[~mask].max()


def test_magnitude_of_ties_keeps_the_number():
    mask = magnitude_masks({"kernel": jnp.ones((4, 5))}, rate=0.7)["kernel"]
    assert mask.sum() == 6


def test_activations_keep_the_same_number_of_every_output():
    delta, norms = normal(0, 2, 20, 6), jnp.abs(normal(1, 2, 20))
    mask = np.asarray(activation_masks({"kernel": delta}, {"kernel": norms}, rate=0.7)["kernel"])
    assert (mask.sum(-2) == 6).all()
    importance = np.abs(delta) * np.asarray(norms)[..., None]
    for layer, output in np.ndindex(2, 6):
        kept = mask[layer, :, output]
        assert importance[layer, kept, output].min() > importance[layer, ~kept, output].max()


def test_activations_of_one_size_are_magnitude_per_output():
    delta = normal(0, 20, 1)
    by_input = activation_masks({"k": delta}, {"k": jnp.full(20, 3.0)}, rate=0.5)["k"]
    np.testing.assert_array_equal(by_input, magnitude_masks({"k": delta}, rate=0.5)["k"])


# Pruning


def test_rate_zero_and_full_masks_restore_the_delta():
    delta = model()
    jax.tree.map(np.testing.assert_array_equal, dare(delta, KEY, rate=0.0), delta)
    full = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), delta)
    jax.tree.map(np.testing.assert_array_equal, prune(delta, full, q=1.0), delta)


def test_dare_divides_what_it_keeps_by_the_kept_share():
    delta = model()
    pruned, masks = dare(delta, KEY, rate=0.8), random_masks(delta, KEY, rate=0.8)
    for values, mask, out in zip(*map(jax.tree.leaves, (delta, masks, pruned))):
        np.testing.assert_allclose(out, np.where(mask, values, 0) / (1 - 0.8), rtol=1e-6)


def test_pruning_is_linear_in_the_delta():
    delta = model()
    masks = random_masks(delta, KEY, rate=0.5)
    double = prune(jax.tree.map(lambda leaf: 2 * leaf, delta), masks, q=0.6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 2 * b, rtol=1e-6), double, prune(delta, masks, q=0.6))


def test_q_by_name_and_the_mean_for_the_others():
    delta, full = model(), jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), model())
    pruned = prune(delta, full, q={"layer/kernel": 0.5, "other/kernel": 0.25})
    for leaf, part, q in ((delta["layer"]["kernel"], pruned["layer"]["kernel"], 0.5),
                          (delta["other"]["kernel"], pruned["other"]["kernel"], 0.25),
                          (delta["layer"]["bias"], pruned["layer"]["bias"], 0.375)):  # fmt: skip
        np.testing.assert_allclose(part, leaf / q, rtol=1e-6)


def test_bfloat16_deltas_come_out_in_float32():
    delta = {"k": normal(0, 8, 8, dtype=jnp.bfloat16)}
    pruned = prune(delta, magnitude_masks(delta, rate=0.5), q=0.3)["k"]
    assert pruned.dtype == jnp.float32 and jnp.isfinite(pruned).all()


# Error moments and q


def enumerated_error(delta, x, rate, q):
    """Exact mean and variance over all 2^n masks of one output, float64."""
    terms = np.asarray(delta, np.float64)[:, 0] * np.asarray(x, np.float64)
    masks = np.array(list(itertools.product([0, 1], repeat=len(terms))))
    chance = np.prod(np.where(masks, 1 - rate, rate), axis=1)
    error = terms.sum() - masks @ terms / q
    mean = chance @ error
    return mean, chance @ (error - mean) ** 2


@pytest.mark.parametrize(("rate", "q"), [(0.9, 0.1), (0.9, 0.3), (0.5, 0.7), (0.0, 1.0)])
def test_error_moments_are_those_of_all_masks(rate, q):
    delta, x = normal(0, 8, 1), normal(1, 1, 8)
    moments = error_moments(delta, x, rate=rate, q=q)
    mean, variance = enumerated_error(delta, x[0], rate, q)
    np.testing.assert_allclose(moments.mean[0, 0], mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(moments.variance[0, 0], variance, rtol=1e-5, atol=1e-5)


def test_dare_is_unbiased_and_has_the_variance_of_the_paper():
    delta, x = normal(0, 12, 3), normal(1, 4, 12)
    moments = error_moments(delta, x, rate=0.9, q=1 - 0.9)
    np.testing.assert_allclose(moments.mean, 0, atol=1e-5)
    np.testing.assert_allclose(moments.variance, 0.9 / 0.1 * np.square(x) @ np.square(delta), rtol=1e-5)


def test_error_over_drawn_masks_has_these_moments():
    delta, x, rate, q = normal(0, 12, 3), normal(1, 4, 12), 0.8, 0.35
    keys = jax.random.split(KEY, 20000)
    pruned = jax.vmap(lambda key: prune({"k": delta}, random_masks({"k": delta}, key, rate=rate), q=q)["k"])(keys)
    errors = np.asarray(x @ delta - jnp.einsum("ni,kio->kno", x, pruned))
    moments = error_moments(delta, x, rate=rate, q=q)
    spread = np.sqrt(np.asarray(moments.variance) / len(keys))
    assert (np.abs(errors.mean(0) - moments.mean) < 5 * spread).all()
    np.testing.assert_allclose(errors.var(0), moments.variance, rtol=0.06)


def test_mean_square_q_has_the_least_mean_square():
    deltas, inputs, rate = [normal(0, 12, 3), normal(1, 7, 5)], [normal(2, 4, 12), normal(3, 6, 7)], 0.9

    def square(q):
        moments = [error_moments(d, x, rate=rate, q=q) for d, x in zip(deltas, inputs)]
        return sum(float(jnp.sum(m.mean**2 + m.variance)) for m in moments)

    q = float(mean_square_q(deltas, inputs, rate=rate))
    grid = np.linspace(1 - rate, 3 * q, 400)
    assert abs(grid[np.argmin([square(g) for g in grid])] - q) < 2 * (grid[1] - grid[0])
    assert square(q) < min(square(1.02 * q), square(0.98 * q), square(1 - rate))


@pytest.mark.parametrize("rate", [1e-6, 0.5, 0.99])
def test_mean_square_q_is_never_below_the_kept_share(rate):
    q = mean_square_q([normal(0, 50, 3)], [normal(1, 4, 50)], rate=rate)
    assert q >= 1 - rate
    assert rate > 1e-3 or q == pytest.approx(1 - rate, abs=1e-5)


def test_mean_square_q_of_degenerate_layers():
    one = jnp.ones((1, 2))
    assert mean_square_q([jnp.zeros((2, 3))], [one], rate=0.9) == pytest.approx(0.1)
    cancelling = jnp.array([[1.0], [-1.0]])  # the output is 0 whatever is kept: best to drop everything
    q = mean_square_q([cancelling], [one], rate=0.9)
    assert q == jnp.inf and (prune({"k": cancelling}, {"k": jnp.ones((2, 1), bool)}, q=q)["k"] == 0).all()
    assert mean_square_q([cancelling], [one], rate=0.0) == 1


@pytest.mark.parametrize("rate", [1e-4, 0.1, 0.3, 0.4999, 0.5])
def test_kearns_saul_is_symmetric_and_bounds_the_bernoulli(rate):
    phi = kearns_saul(rate)
    assert phi == pytest.approx(kearns_saul(1 - rate), rel=1e-9) and phi <= 0.5
    if rate != 0.5:
        assert phi == pytest.approx((1 - 2 * rate) / math.log((1 - rate) / rate), rel=1e-9)
    for t in np.linspace(-20, 20, 81):
        generating = np.log(rate * np.exp(-t * (1 - rate)) + (1 - rate) * np.exp(t * rate))
        assert generating <= phi * t * t / 4 + 1e-12


def numpy_bound_q(delta, x, rate, eta, gamma, step=1e-5):
    """Mean over outputs of the minimiser on a grid a hundred times finer than the one of the code."""
    phi, found = (1 - 2 * rate) / np.log((1 - rate) / rate), []
    q = np.arange(1 - rate, 0.998, step)
    for column in (delta * x[:, None]).T:
        bias, square = column.sum(), (column**2).sum()
        bound = eta * (1 - (1 - rate) / q) * bias + eta**2 * phi * square / (4 * q**2) + np.log(2 / gamma)
        found.append(q[np.argmin(np.abs(bound))])
    return np.mean(found)


@pytest.mark.parametrize(("rate", "eta"), [(0.9, 3.0), (0.99, 0.37), (0.9, 0.5), (0.3, 5.0)])
def test_bound_q_is_the_place_of_its_objective(rate, eta):
    rng = np.random.default_rng(0)
    delta, x = rng.normal(0, 1, (40, 6)), rng.normal(0, 1, 40)
    expected = numpy_bound_q(delta, x, rate, eta, 0.05)
    assert bound_q(delta, x, rate=rate, eta=eta) == pytest.approx(expected, abs=1.1e-3)


def test_bound_q_of_ties_is_the_largest():
    """Nothing to prune: the bound is ln(2/gamma) everywhere."""
    assert bound_q(np.zeros((4, 3)), np.ones(4), rate=0.9, eta=1.0) == pytest.approx(0.998)


def test_learned_q_descends_to_the_mean_square_q():
    delta, x, rate = {"k": normal(0, 12, 3)}, normal(1, 64, 12), 0.9
    assert learned_q(initial_coefficients(delta), rate=rate)["k"] == pytest.approx(0.1001)
    keys = jax.random.split(KEY, 2000)
    masks = jax.vmap(lambda key: random_masks(delta, key, rate=rate)["k"])(keys)

    @jax.jit
    @jax.grad
    def slope(coefficient):
        q = learned_q({"k": coefficient}, rate=rate)
        pruned = jax.vmap(lambda mask: prune(delta, {"k": mask}, q=q)["k"])(masks)
        return jnp.mean(jnp.square(jnp.einsum("ni,kio->kno", x, pruned) - x @ delta["k"]))

    best = float(mean_square_q([delta["k"]], [x], rate=rate)) - (1 - rate)
    assert slope(1e-4) < 0 and slope(0.9 * best) < 0 < slope(1.1 * best)
    assert slope(-0.5) == -slope(0.5)  # q has the absolute value of the coefficient


# Scores and search


def test_changes_of_outputs():
    pruned, full = np.random.default_rng(0).normal(0, 1, (2, 4, 9))
    assert mean_change(jnp.asarray(pruned), jnp.asarray(full)) == pytest.approx(np.abs(pruned - full).mean(), rel=1e-5)
    place = np.argsort(-full, axis=-1)[:, :3]
    squares = (np.take_along_axis(pruned, place, -1) - np.take_along_axis(full, place, -1)) ** 2
    assert top_logits_error(jnp.asarray(pruned), jnp.asarray(full), k=3) == pytest.approx(squares.mean(), rel=1e-5)
    with pytest.raises(ValueError, match="k is 10"):
        top_logits_error(jnp.asarray(pruned), jnp.asarray(full), k=10)


def test_mean_without_the_farthest_seed():
    assert mean_without_farthest([1.0, 1.2, 0.9, 9.0]) == pytest.approx(3.1 / 3)
    assert mean_without_farthest([4.0]) == 4.0
    with pytest.raises(ValueError, match="no scores"):
        mean_without_farthest([])


@pytest.mark.parametrize("peak", [0.1, 0.333, 0.72, 0.9])
def test_search_finds_a_hill_to_the_fine_step(peak):
    result = search(lambda q: -((q - peak) ** 2), low=0.1, high=0.9, step=0.05)
    assert result.best == pytest.approx(peak, abs=0.0025 + 1e-9)
    assert result.score == max(score for _, score in result.tried)
    assert all(0.1 - 1e-9 <= place <= 0.9 + 1e-9 for place, _ in result.tried)


def test_search_ends_after_more_than_patience_places_without_a_new_best():
    result = search(lambda q: -q, low=0.0, high=1.0, step=0.1, patience=3)
    assert result.best == 0.0 and [place for place, _ in result.tried[:5]] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert len(result.tried) == 10  # five places of each scan
    far = search(lambda q: float(q > 0.85), low=0.0, high=1.0, step=0.1, patience=3)
    assert far.score == 0.0  # the second hill is never seen
    assert search(lambda q: float(q > 0.85), low=0.0, high=1.0, step=0.1, patience=9).score == 1.0


# AdamR


def descend(optimizer, params, grads_of, steps):
    state = optimizer.init(params)
    for number in range(steps):
        updates, state = optimizer.update(grads_of(params, number), state, params)
        params = optax.apply_updates(params, updates)
    return params


def some_gradients(params, number):
    return jax.tree.map(lambda leaf: leaf * 0.3 + normal(number, *leaf.shape), params)


def test_adamr_without_decay_is_adam():
    params = model()
    base = jax.tree.map(jnp.zeros_like, params)
    schedule = optax.linear_schedule(1e-2, 1e-3, 5)
    ours = descend(adamr(schedule, base, weight_decay=0.0), params, some_gradients, 3)
    theirs = descend(optax.adam(schedule), params, some_gradients, 3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)


@pytest.mark.parametrize(("make", "pull"), [(adamr, lambda gap: gap), (adamr_l1, np.sign)])
def test_adamr_against_numpy(make, pull):
    params = {"a": normal(1, 5, 4), "b": normal(2, 3)}
    base = {"a": normal(3, 5, 4), "b": normal(4, 3)}
    rate, b1, b2, eps, decay = 0.05, 0.8, 0.9, 1e-6, 0.3
    ours = descend(make(rate, base, b1=b1, b2=b2, eps=eps, weight_decay=decay), params, some_gradients, 6)
    theta, m, v = ({n: np.asarray(p, np.float64) * k for n, p in params.items()} for k in (1, 0, 0))
    for t in range(6):
        g = {
            n: np.asarray(x, np.float64)
            for n, x in some_gradients({n: jnp.asarray(p) for n, p in theta.items()}, t).items()
        }
        m = {n: b1 * m[n] + (1 - b1) * g[n] for n in g}
        v = {n: b2 * v[n] + (1 - b2) * g[n] ** 2 for n in g}
        m_hat, v_hat = ({n: x[n] / (1 - b ** (t + 1)) for n in g} for x, b in ((m, b1), (v, b2)))
        v_bar = np.sqrt(np.concatenate([x.ravel() for x in v_hat.values()]).mean())
        theta = {n: p - rate * decay / v_bar * pull(p - np.asarray(base[n], np.float64)) for n, p in theta.items()}
        theta = {n: p - rate * m_hat[n] / (np.sqrt(v_hat[n]) + eps) for n, p in theta.items()}
    for name in theta:
        np.testing.assert_allclose(ours[name], theta[name], rtol=1e-4, atol=1e-5)


def test_without_gradients_the_delta_shrinks_geometrically():
    params, base = model(), jax.tree.map(lambda leaf: 0.5 * leaf, model())
    after = descend(adamr(0.1, base, weight_decay=0.5), params, lambda p, _: jax.tree.map(jnp.zeros_like, p), 4)
    for start, anchor, end in zip(*map(jax.tree.leaves, (params, base, after))):
        np.testing.assert_allclose(end - anchor, (start - anchor) * (1 - 0.1 * 0.5) ** 4, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [adamr, adamr_l1])
def test_the_base_is_a_fixed_point_of_the_decay(make):
    params = model()
    after = descend(make(0.1, params, weight_decay=3.0), params, lambda p, _: jax.tree.map(jnp.zeros_like, p), 2)
    jax.tree.map(np.testing.assert_array_equal, after, params)


def test_adamr_is_an_optax_transformation_that_chains_and_compiles():
    params = {"k": normal(0, 4, 4, dtype=jnp.bfloat16)}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamr(1e-2, params, weight_decay=0.1))
    assert isinstance(adamr(1e-2, params), optax.GradientTransformation)
    state = optimizer.init(params)
    updates, state = jax.jit(optimizer.update)({"k": params["k"]}, state, params)
    assert updates["k"].dtype == jnp.bfloat16 and jnp.isfinite(updates["k"].astype(jnp.float32)).all()
    assert state[1].mu["k"].dtype == jnp.float32 and state[1].count == 1  # pyright: ignore


# Failures


@pytest.mark.parametrize("rate", [-0.1, 1.0, math.nan])
@pytest.mark.parametrize(
    "function",
    [
        lambda rate: random_masks(model(), KEY, rate=rate),
        lambda rate: input_masks(model(), KEY, rate=rate),
        lambda rate: magnitude_masks(model(), rate=rate),
        lambda rate: dare(model(), KEY, rate=rate),
        lambda rate: mean_square_q([jnp.ones((2, 2))], [jnp.ones((1, 2))], rate=rate),
        lambda rate: learned_q({}, rate=rate),
        kearns_saul,
    ],
)
def test_rates_out_of_range_are_named(function, rate):
    with pytest.raises(ValueError, match="rate is"):
        function(rate)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prune(model(), model(), q={"layer/kernels": 0.5}), "layer/kernels"),
        (lambda: bound_q(np.ones((2, 2)), np.ones(2), rate=0.9, eta=0.0), "eta is 0.0"),
        (lambda: bound_q(np.ones((2, 2)), np.ones(2), rate=0.001, eta=1.0), "rate is 0.001"),
        (lambda: search(lambda q: q, low=1.0, high=0.0), "low 1.0"),
        (lambda: search(lambda q: q, low=0.0, high=1.0, step=0.0), "step is 0.0"),
        (lambda: adamr(1e-3, model(), weight_decay=-1.0), "weight_decay is -1.0"),
        (lambda: adamr(1e-3, model(), b2=1.0), "b2 is 1.0"),
        (lambda: adamr(1e-3, model()).init({"k": jnp.ones(2)}), "not a tree like"),
        (lambda: adamr(1e-3, model()).update(model(), adamr(1e-3, model()).init(model())), "needs the parameters"),
    ],
)
def test_what_is_wrong_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
