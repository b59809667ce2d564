"""Kernels in few bits against the written-out formulas in float64, and the published values of NF4."""

from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.lora import LoraConfig, init_adapters, merge, with_adapters
from dpo_jax.quantize import NF4, dequantize, dequantize_kernels, quantize, quantize_kernels, quantized_rules
from dpo_jax.sharding import P
from dpo_jax.tree import named_leaves, tree_bytes

KINDS = pytest.mark.parametrize("kind", ["int8", "nf4"])


def kernel(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_nf4_has_its_published_values():
    published = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635
        -0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634
        0.33791524171829224 0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"""
    assert [float(value) for value in published.split()] == list(NF4)
    # Quantiles of the normal distribution, eight to the right of zero and seven to the left, the outermost at +-1.
    outermost = 0.9677083
    quantiles = [
        sign * NormalDist().inv_cdf(p)
        for sign, count in ((-1, 8), (1, 9))
        for p in np.linspace(outermost, 0.5, count)[:-1]
    ]
    values = np.sort(np.array([*quantiles, 0.0]) / max(quantiles))
    np.testing.assert_allclose(NF4, values, rtol=0, atol=1e-6)


@KINDS
@pytest.mark.parametrize("shape", [(64, 3), (2, 100, 5), (3, 16, 4)])
def test_each_entry_goes_to_the_nearest_value(kind, shape):
    given = kernel(*shape)
    parts, got = quantize(jnp.asarray(given), kind), np.asarray(dequantize(quantize(jnp.asarray(given), kind)))
    wide = given.astype(np.float64)
    if kind == "int8":
        values, scale = np.arange(-127, 128), np.abs(wide).max(-2, keepdims=True) / 127
        assert parts["int8"].dtype == jnp.int8 and parts["int8"].shape == shape
    else:
        blocks = [slice(start, start + 64) for start in range(0, shape[-2], 64)]
        largest = np.stack([np.abs(wide[..., block, :]).max(-2) for block in blocks], axis=-2)
        values, scale = np.array(NF4), np.repeat(largest, 64, axis=-2)[..., : shape[-2], :]
        assert parts["nf4"].dtype == jnp.uint8 and parts["nf4"].shape == (*shape[:-2], shape[-2] // 2, shape[-1])
        assert parts["scale"].shape == largest.shape
    choices = values * scale[..., None]
    want = np.take_along_axis(choices, np.abs(wide[..., None] - choices).argmin(-1)[..., None], -1)[..., 0]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    assert 0 < np.abs(got - given).max() <= np.max(np.diff(values) / 2 * scale.max()) * (1 + 1e-6)


@KINDS
def test_a_second_rounding_changes_nothing(kind):
    once = dequantize(quantize(jnp.asarray(kernel(2, 128, 6)), kind))
    again = quantize(once, kind)
    np.testing.assert_allclose(dequantize(again), once, rtol=1e-6)
    np.testing.assert_array_equal(dequantize(quantize(jnp.zeros((4, 3)), kind)), np.zeros((4, 3)))


def variables():
    return {
        "embed": {"embedding": jnp.ones((3, 64))},
        "layers": {"up": {"kernel": jnp.asarray(kernel(2, 64, 32)), "bias": jnp.ones((2, 32))}},
    }


@KINDS
def test_only_kernels_become_small(kind):
    small = quantize_kernels(variables(), kind)
    assert named_leaves(small).keys() == {
        *("embed/embedding", "layers/up/bias"),
        *(f"layers/up/kernel/{part}" for part in (kind, "scale")),
    }
    scales = 2 * 32 * 4
    assert tree_bytes(small["layers"]["up"]["kernel"]) == 2 * 64 * 32 * {"int8": 8, "nf4": 4}[kind] // 8 + scales
    whole = dequantize_kernels(small)
    assert jax.tree.structure(whole) == jax.tree.structure(variables())
    np.testing.assert_array_equal(whole["layers"]["up"]["bias"], variables()["layers"]["up"]["bias"])
    assert quantize_kernels(variables(), kind, selected=lambda name: False)["layers"]["up"]["kernel"].ndim == 3


def test_rules_are_those_of_the_kernels():
    rules = quantized_rules(((r"layers/.*up/kernel$", P(None, "fsdp", "model")), (r"embedding$", P("model"))))
    assert rules == ((r"layers/.*up/kernel/(int8|nf4|scale)$", P(None, "fsdp", "model")),)


def test_wrong_use():
    with pytest.raises(ValueError, match="up/kernel: a kernel with 3 inputs"):
        quantize_kernels({"up": {"kernel": jnp.ones((3, 4))}}, "nf4")
    adapters = init_adapters(jax.random.key(0), variables(), LoraConfig(rank=1))
    with pytest.raises(ValueError, match="layers/up: the kernel is in few bits"):
        merge(with_adapters(quantize_kernels(variables(), "int8"), adapters))
