"""Token statistics against float64 NumPy: values, gradients, memory, work, and eight devices."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import logprobs
from dpo_jax.language.types import IGNORE as BATCH_IGNORE
from dpo_jax.logprobs import IGNORE, logits_logps
from dpo_jax.sharding import P, make_mesh

R, S, D, V = 8, 5, 16, 24

# One compiled program instead of many small ones: the tests are bound by compilation.
STATIC = ("softcap", "reference_softcap", "chunk_size", "statistics", "frozen_head")
token_logps = jax.jit(logprobs.token_logps, static_argnames=[n for n in STATIC if n != "reference_softcap"])
forward_kl = jax.jit(logprobs.forward_kl, static_argnames=[n for n in STATIC if n != "statistics"])
reverse_kl = jax.jit(logprobs.reverse_kl, static_argnames=[n for n in STATIC if n != "statistics"])


def softmax64(h, w, b, c):
    """Logits, log-probabilities and the soft-cap's derivative in float64."""
    z = np.asarray(h, np.float64) @ np.asarray(w, np.float64).T + (0 if b is None else np.asarray(b, np.float64))
    slope = np.ones_like(z)
    if c is not None:
        z = c * np.tanh(z / c)
        slope = 1 - (z / c) ** 2
    top = z.max(-1, keepdims=True)
    return z, z - top - np.log(np.exp(z - top).sum(-1, keepdims=True)), slope


def pull_back64(dz, slope, h, w):
    """Gradients of hidden states, head and bias from the gradient of the logits."""
    du = dz * slope
    flat = du.reshape(-1, du.shape[-1])
    return du @ w, flat.T @ h.reshape(-1, h.shape[-1]), flat.sum(0)


def logps64(h, w, b, c, y):
    keep = y != IGNORE
    logp = softmax64(h, w, b, c)[1]
    return np.where(keep, np.take_along_axis(logp, np.where(keep, y, 0)[..., None], -1)[..., 0], 0)


def gradient64(h, w, b, c, y, g):
    h, w = np.asarray(h, np.float64), np.asarray(w, np.float64)
    _, logp, slope = softmax64(h, w, b, c)
    onehot = np.arange(w.shape[0]) == y[..., None]
    return pull_back64(np.where((y != IGNORE)[..., None], g[..., None] * (onehot - np.exp(logp)), 0), slope, h, w)


def case(seed=0, shape=(R, S), scale=1.0, ignored=0.3, width=D, words=V):
    rng = np.random.default_rng(seed)
    h = rng.normal(size=(*shape, width)).astype(np.float32) * scale
    w, b = rng.normal(size=(words, width)).astype(np.float32), rng.normal(size=words).astype(np.float32)
    y = np.where(rng.random(shape) < ignored, IGNORE, rng.integers(0, words, shape)).astype(np.int32)
    return h, w, b, y, rng.normal(size=shape).astype(np.float32)


def weighted(h, w, b, y, g, **options):
    return jnp.sum(g * token_logps(h, w, y, bias=b, **options)["logps"])


gradients = jax.jit(jax.grad(weighted, (0, 1, 2)), static_argnames=("softcap", "chunk_size"))
values_and_gradients = jax.jit(jax.value_and_grad(weighted, (0, 1, 2)), static_argnames="chunk_size")


def assert_close(actual, expected, tolerance=2e-5):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), e, rtol=tolerance, atol=tolerance)


def test_ignore_is_the_batch_s_own():
    assert IGNORE == BATCH_IGNORE


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("shape", "chunk"), [((7,), 1), ((R, S), 7), ((2, 3, 4), 1024)])
def test_values_and_gradients_equal_float64(shape, chunk, softcap):
    h, w, b, y, g = case(1, shape)
    logps = token_logps(h, w, y, bias=b, softcap=softcap, chunk_size=chunk)["logps"]
    assert logps.shape == shape and logps.dtype == jnp.float32
    assert_close(logps, logps64(h, w, b, softcap, y))
    gradient = gradients(h, w, b, y, g, softcap=softcap, chunk_size=chunk)
    assert_close(gradient, gradient64(h, w, b, softcap, y, g))


def test_without_bias():
    h, w, _, y, g = case(2)
    assert_close(token_logps(h, w, y)["logps"], logps64(h, w, None, None, y))
    assert_close(gradients(h, w, None, y, g)[:2], gradient64(h, w, None, None, y, g)[:2])


def test_all_ignored_gives_zeros_even_behind_nan():
    h, w, b, y, g = case(3)
    y[:] = IGNORE
    h[:] = np.nan
    value, gradient = values_and_gradients(h, w, b, y, g)
    assert value == 0 and all(not np.any(x) for x in gradient)
    assert not np.any(logits_logps(h, np.full((R, S), IGNORE)))
    assert token_logps(h[:0], w, y[:0])["logps"].shape == (0, S)


def test_nan_behind_an_ignored_place_changes_nothing():
    h, w, b, y, g = case(4)
    dirty = np.where((y == IGNORE)[..., None], np.nan, h).astype(np.float32)
    clean = values_and_gradients(h, w, b, y, g, chunk_size=6)
    for a, e in zip(
        jax.tree.leaves(values_and_gradients(dirty, w, b, y, g, chunk_size=6)),
        jax.tree.leaves(clean),
    ):
        np.testing.assert_array_equal(a, e)


def test_logits_near_ten_thousand():
    h, w, _, y, g = case(5, scale=1.0)
    h, w = np.round(h * 8) * 32, np.round(w * 8) * 4  # products exact in float32, |z| up to about 1e4
    z = softmax64(h, w, None, None)[0]
    assert np.abs(z).max() > 1e4
    # The label is the most likely word at even places, the second at odd ones.
    rank = np.broadcast_to(-1 - np.arange(S) % 2, (R, S))[..., None]
    likely = np.take_along_axis(np.argsort(z, -1), rank % V, -1)[..., 0]
    y = np.where(y == IGNORE, IGNORE, likely).astype(np.int32)
    # 1e-3 absolute would be the rounding of lse itself; largest logit and rest kept apart are exact.
    assert_close(token_logps(h, w, y)["logps"], logps64(h, w, None, None, y), 1e-6)
    dh, dw = gradients(h, w, None, y, g)[:2]
    expected = gradient64(h, w, None, None, y, g)
    np.testing.assert_allclose(dh, expected[0], atol=1e-5 * np.abs(expected[0]).max())
    np.testing.assert_allclose(dw, expected[1], atol=1e-5 * np.abs(expected[1]).max())


def test_label_outside_the_vocabulary_is_nan_and_minus_hundred_is_not():
    h, w, _, _, _ = case(6, (4,))
    logps = token_logps(h, w, np.array([V, -1, IGNORE, V - 1], np.int32))["logps"]
    np.testing.assert_array_equal(np.isnan(logps), [True, True, False, False])


def test_bias_of_minus_infinity_removes_words():
    h, w, b, y, g = case(7)
    padded = np.concatenate([w, np.ones((8, D), np.float32)])
    closed = np.concatenate([b, np.full(8, -np.inf, np.float32)])
    names = ("entropy", "collision", "lse")
    assert_close(
        token_logps(h, padded, y, bias=closed, statistics=names), token_logps(h, w, y, bias=b, statistics=names)
    )
    dh, dw, db = gradients(h, padded, closed, y, g)
    assert_close((dh, dw[:V], db[:V]), gradients(h, w, b, y, g))
    assert not np.any(dw[V:]) and not np.any(db[V:])
    for kl in (forward_kl, reverse_kl):
        options = {"bias": closed, "reference_bias": closed}
        gradient = jax.grad(lambda h: jnp.sum(kl(h, padded, h * 2, padded, y, **options)))(h)  # noqa: B023
        expected = jax.grad(lambda h: jnp.sum(kl(h, w, h * 2, w, y, bias=b, reference_bias=b)))(h)  # noqa: B023
        assert_close(gradient, expected)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_statistics(softcap):
    h, w, b, y, _ = case(8, scale=2.0)
    z, logp, _ = softmax64(h, w, b, softcap)
    values = token_logps(h, w, y, bias=b, softcap=softcap, chunk_size=7, statistics=("entropy", "collision", "lse"))
    assert set(values) == {"logps", "entropy", "collision", "lse"}
    keep, p = y != IGNORE, np.exp(logp)
    expected = {
        "logps": logps64(h, w, b, softcap, y),
        "entropy": np.where(keep, -(p * logp).sum(-1), 0),
        "collision": np.where(keep, np.log((p**2).sum(-1)), 0),
        "lse": np.where(keep, (z - logp)[..., 0], 0),
    }
    assert_close(values, expected)


def test_uniform_distribution_has_known_statistics():
    values = token_logps(jnp.zeros((3, D)), jnp.ones((V, D)), jnp.arange(3), statistics=("entropy", "collision", "lse"))
    for name, sign in {"logps": -1, "entropy": 1, "collision": -1, "lse": 1}.items():
        np.testing.assert_allclose(values[name], sign * np.log(V), rtol=1e-6)


def test_gradient_of_lse_is_the_softmax_and_constants_have_none():
    h, w, b, y, _ = case(9, ignored=0)
    total = lambda b, name: jnp.sum(token_logps(h, w, y, bias=b, statistics=(name,))[name])  # noqa: E731
    assert_close(jax.grad(total)(b, "lse"), np.exp(softmax64(h, w, b, None)[1]).sum((0, 1)))
    assert not np.any(jax.grad(total)(b, "entropy")) and not np.any(jax.grad(total)(b, "collision"))


def test_bf16_is_as_accurate_as_dense_logits():
    h, w, b, y, g = case(10, (64, 16), ignored=0.1, width=64, words=256)
    h, w = jnp.asarray(h, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16) * jnp.bfloat16(0.25)
    logps = token_logps(h, w, y, bias=b, chunk_size=16)["logps"]
    assert logps.dtype == jnp.float32
    # Values: only float32 rounding is left over bf16 inputs.
    assert_close(logps, logps64(h, w, b, None, y), 1e-5)
    gradient = gradients(h, w, b, y, g, chunk_size=16)
    assert [x.dtype for x in gradient] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]

    def dense(h, w, b):
        return jnp.sum(g * logits_logps(jnp.einsum("rsd,vd->rsv", h, w, preferred_element_type=jnp.float32) + b, y))

    def error(gradient):
        exact = gradient64(h, w, b, None, y, g)
        return [np.linalg.norm(np.asarray(a, np.float64) - e) / np.linalg.norm(e) for a, e in zip(gradient, exact)]

    # 64 chunks: a sum over chunks in bf16 would cost the head's gradient 1 % and more.
    fused, naive = error(gradient), error(jax.grad(dense, (0, 1, 2))(h, w, b))
    assert all(f < max(1.5 * n, 3e-3) for f, n in zip(fused, naive)), (fused, naive)


def test_float32_head_under_bf16_states_keeps_a_float32_gradient():
    h, w, b, y, g = case(11)
    gradient = jax.grad(weighted, 1)(jnp.asarray(h, jnp.bfloat16), w, b, y, g)
    assert gradient.dtype == jnp.float32


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("reverse", [False, True])
def test_divergences_equal_float64(reverse, softcap):
    h, w, b, y, g = case(12)
    other_h, other_w, other_b, _, _ = case(13, width=D // 2)
    kl = reverse_kl if reverse else forward_kl
    options = {"softcap": softcap, "reference_softcap": 5.0, "reference_bias": other_b, "chunk_size": 7}

    def total(h, w, b, other_h, other_w):
        return jnp.sum(g * kl(h, w, other_h, other_w, y, bias=b, **options))

    _, logp, slope = softmax64(h, w, b, softcap)
    _, logq, _ = softmax64(other_h, other_w, other_b, 5.0)
    p, q, keep = np.exp(logp), np.exp(logq), y != IGNORE
    expected = np.where(keep, (p * (logp - logq)).sum(-1) if reverse else (q * (logq - logp)).sum(-1), 0)
    assert_close(kl(h, w, other_h, other_w, y, bias=b, **options), expected)
    dz = p * (logp - logq - expected[..., None]) if reverse else p - q
    dz = np.where(keep, g, 0)[..., None] * dz
    gradient = jax.grad(total, (0, 1, 2, 3, 4))(h, w, b, other_h, other_w)
    assert_close(gradient[:3], pull_back64(dz, slope, h.astype(np.float64), w.astype(np.float64)))
    assert not np.any(gradient[3]) and not np.any(gradient[4])


@pytest.mark.parametrize("kl", [forward_kl, reverse_kl])
def test_divergence_of_a_model_from_itself_is_zero(kl):
    h, w, b, y, _ = case(14, scale=5.0)
    total = lambda x: jnp.sum(kl(x, w, h, w, y, bias=b, reference_bias=b))  # noqa: E731
    assert_close(kl(h, w, h, w, y, bias=b, reference_bias=b), np.zeros((R, S)), 1e-6)
    assert_close(jax.grad(total)(h), np.zeros_like(h), 1e-5)
    assert np.all(np.asarray(kl(h[::-1], w, h, w, y))[y != IGNORE] > 1e-4)
    frozen = jax.grad(lambda w: jnp.sum(kl(h * 0.5, w, h, w, y, frozen_head=True)))(w)
    assert not np.any(frozen)


def test_logits_logps_equals_float64():
    h, w, b, y, g = case(15)
    logits = h @ w.T + b
    assert_close(logits_logps(logits, y), logps64(h, w, b, None, y))
    gradient = jax.grad(lambda z: jnp.sum(g * logits_logps(z, y)))(logits)
    assert not np.any(gradient[y == IGNORE]) and np.any(gradient)


def test_vmap_jit_remat_and_scan():
    h, w, b, y, g = case(16)
    plain = values_and_gradients(h, w, b, y, g, chunk_size=4)

    def by_row(h, w, b, y, g):
        return jnp.sum(jax.vmap(partial(weighted, chunk_size=4), (0, None, None, 0, 0))(h, w, b, y, g))

    def by_scan(h, w, b, y, g):
        def add(total, row):
            return total + weighted(row[0], w, b, *row[1:], chunk_size=4), None

        return jax.lax.scan(jax.checkpoint(add), 0.0, (h, y, g))[0]

    for form in (by_row, by_scan):
        assert_close(jax.jit(jax.value_and_grad(form, (0, 1, 2)))(h, w, b, y, g), plain)


def test_errors_name_what_does_not_fit():
    h, w, b, y, _ = case(17)
    with pytest.raises(ValueError, match="unknown statistics"):
        token_logps(h, w, y, statistics=("entropie",))
    with pytest.raises(ValueError, match="labels"):
        token_logps(h, w, y[:-1])
    with pytest.raises(ValueError, match="head"):
        token_logps(h, w.T, y)
    with pytest.raises(ValueError, match="bias"):
        token_logps(h, w, y, bias=b[:-1])
    with pytest.raises(ValueError, match="vocabularies"):
        forward_kl(h, w, h, w[:-1], y)


# Memory and work, read from the compiled program.


def compile_gradient(function, tokens, words, width=32, **options):
    h = jax.ShapeDtypeStruct((tokens, width), jnp.float32)
    w = jax.ShapeDtypeStruct((words, width), jnp.float32)
    y = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    gradient = jax.grad(lambda h, w, y: jnp.sum(jnp.square(function(h, w, y, **options))), (0, 1))
    return jax.jit(gradient).lower(h, w, y).compile()


def fused(h, w, y, **options):
    return token_logps(h, w, y, **options)["logps"]


def fused_kl(h, w, y, **options):
    return forward_kl(h, w, h * 0.5, w, y, **options)


def temporaries(compiled):
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("function", "live"), [(fused, 4), (fused_kl, 6)])
def test_temporaries_do_not_grow_with_tokens_times_vocabulary(function, live):
    words, chunk = 4096, 64
    short = compile_gradient(function, 1024, words, chunk_size=chunk)
    long = compile_gradient(function, 8192, words, chunk_size=chunk)
    assert temporaries(long) < 8192 * words * 4 / 10
    # A few [chunk, V] of float32, the head's gradient and per-token vectors: nothing else grows.
    assert temporaries(short) < live * chunk * words * 4 + 4 * words * 32 * 4 + 1024 * 32 * 4 * 6
    assert temporaries(long) - temporaries(short) <= 7 * 1024 * (32 * 6 + 32) * 4
    for tokens, compiled in ((1024, short), (8192, long)):
        sizes = [np.prod([int(n) for n in s.split(",")]) for s in re.findall(r"\[(\d+(?:,\d+)*)\]", compiled.as_text())]
        assert max(sizes) < tokens * words / 8
    dense = compile_gradient(lambda h, w, y: logits_logps(h @ w.T, y), 1024, words)
    assert temporaries(dense) >= 1024 * words * 4  # the measure can fail


def test_frozen_head_saves_a_quarter_of_the_work():
    def products(**options):
        # Four chunks: the cost analysis counts the body of a loop once, and a single chunk would not be computed twice.
        compiled = compile_gradient(fused, 512, 1024, width=128, chunk_size=128, **options)
        return compiled.cost_analysis()["flops"] / (2 * 128 * 1024 * 128)

    assert 4.0 <= products() < 4.5
    assert 3.0 <= products(frozen_head=True) < 3.5


# Eight devices.


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 4, 2), (1, 1, 8)])
def test_mesh_equals_one_device(sizes):
    h, w, b, y, g = case(18)
    names = ("entropy", "collision", "lse")

    def losses(h, w, b):
        values = token_logps(h, w, y, bias=b, softcap=4.0, chunk_size=3, statistics=names)
        options = {"bias": b, "reference_bias": b, "softcap": 4.0, "chunk_size": 3}
        values["forward"] = forward_kl(h, w, h[::-1], w, y, **options)
        values["reverse"] = reverse_kl(h, w, h[::-1], w, y, **options)
        total = sum(jnp.sum(g * (i + 1) * values[n]) for i, n in enumerate(("logps", "lse", "forward", "reverse")))
        return total, values

    step = jax.value_and_grad(losses, (0, 1, 2), has_aux=True)
    expected = jax.jit(step)(h, w, b)
    with jax.set_mesh(make_mesh(data=sizes[0], fsdp=sizes[1], model=sizes[2])):
        h, b = jax.device_put(h, P(("data", "fsdp"))), jax.device_put(b, P())
        w = jax.device_put(w, P("model", "fsdp"))
        assert_close(jax.jit(step)(h, w, b), expected)


def test_mesh_that_divides_neither_rows_nor_words():
    h, w, b, y, g = case(19, shape=(3, 5), words=23)
    expected = values_and_gradients(h, w, b, y, g, chunk_size=4)
    with jax.set_mesh(make_mesh(data=2, fsdp=2, model=2)):
        actual = jax.jit(jax.value_and_grad(partial(weighted, chunk_size=4), (0, 1, 2)))(h, w, b, y, g)
        assert_close(actual, expected)


def test_a_part_of_the_vocabulary_without_words():
    h, w, b, y, g = case(20)
    y = np.where(y == IGNORE, y, y % (V // 2))
    b[V // 2 :] = -np.inf
    names = ("entropy", "collision", "lse")
    step = jax.value_and_grad(weighted, (0, 1, 2))

    def both(h, w, b):
        return step(h, w, b, y, g), token_logps(h, w, y, bias=b, statistics=names)

    expected = jax.jit(both)(h, w, b)
    with jax.set_mesh(make_mesh(data=4, fsdp=1, model=2)):
        assert_close(jax.jit(both)(h, w, b), expected)


def test_collectives_stand_outside_the_loop_and_move_no_logits():
    rows, length, words, width = 16, 32, 512, 32
    mesh = make_mesh(data=2, fsdp=2, model=2)
    by_row, by_word = jax.NamedSharding(mesh, P(("data", "fsdp"))), jax.NamedSharding(mesh, P("model", "fsdp"))
    h = jax.ShapeDtypeStruct((rows, length, width), jnp.float32, sharding=by_row)
    w = jax.ShapeDtypeStruct((words, width), jnp.float32, sharding=by_word)
    y = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=by_row)
    with jax.set_mesh(mesh):
        step = jax.grad(lambda h, w, y: jnp.sum(jnp.square(fused(h, w, y, chunk_size=16))), (0, 1))
        text = jax.jit(step).lower(h, w, y).compile().as_text()
    collective = re.compile(r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(-start)?\(")
    found = [match for line in text.splitlines() if (match := collective.search(line))]
    local_logits = (rows * length // 4) * (words // 2)
    for match in found:
        assert all(
            np.prod([int(n) for n in s.split(",")]) < local_logits for s in re.findall(r"\[(\d[\d,]*)\]", match[1])
        )
    assert 1 <= sum(match[2] == "all-gather" for match in found) <= 2  # the head, in the forward and backward pass
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    assert len(bodies) >= 2
    for name in bodies:
        body = re.search(rf"^%?{re.escape(name)} .*?^}}", text, re.M | re.S)
        assert body and not collective.search(body[0])
