"""Noise at the start of a policy: of the asked size, where it is asked for, the same for the same key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.lora import LoraConfig, init_adapters, is_trainable, merge, with_adapters
from dpo_jax.perturb import perturb
from dpo_jax.tree import named_leaves

KEY = jax.random.key(0)


def base():
    """Kernels of different deviations, one of them stacked and in half precision, and leaves that are constant."""
    one, two = jax.random.split(KEY)
    return {
        "up": {"kernel": 0.02 * jax.random.normal(one, (64, 48)), "bias": jnp.zeros(48)},
        "layers": {"kernel": (3 * jax.random.normal(two, (2, 48, 64))).astype(jnp.bfloat16)},
        "norm": {"scale": jnp.ones(64)},
    }


def test_each_leaf_gets_its_share_and_constant_ones_stay():
    before, after = (named_leaves(tree) for tree in (base(), perturb(base(), KEY, 0.1, trainable=lambda name: True)))
    assert {name: (x.shape, x.dtype) for name, x in after.items()} == {n: (x.shape, x.dtype) for n, x in before.items()}
    for name in ("up/kernel", "layers/kernel"):
        old, new = (np.asarray(x[name], np.float64) for x in (before, after))
        assert np.std(new - old) / np.std(old) == pytest.approx(0.1, rel=0.05)
        assert abs(np.corrcoef((new - old).ravel(), old.ravel())[0, 1]) < 0.05
    for name in ("up/bias", "norm/scale"):
        np.testing.assert_array_equal(after[name], before[name])


def test_leaves_that_are_not_trained_stay_and_keys_repeat():
    first, again, other = (
        perturb(base(), k, 0.1, trainable=lambda n: "up" in n) for k in (KEY, KEY, jax.random.key(1))
    )
    np.testing.assert_array_equal(first["layers"]["kernel"], base()["layers"]["kernel"])
    np.testing.assert_array_equal(first["up"]["kernel"], again["up"]["kernel"])
    assert not np.array_equal(first["up"]["kernel"], other["up"]["kernel"])


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_adapters_move_their_kernels_by_the_share(kind):
    variables = {name: base()[name] for name in ("up", "norm")} | {"layers": {"kernel": jnp.ones((2, 48, 64))}}
    variables["layers"]["kernel"] += jax.random.normal(KEY, (2, 48, 64))
    config = LoraConfig(8, 32.0, ".*kernel", rslora=kind == "rslora", dora=kind == "dora")
    adapted = with_adapters(variables, init_adapters(KEY, variables, config))
    moved = perturb(adapted, KEY, 1e-2, trainable=is_trainable)
    changed = {n for n, x in named_leaves(moved).items() if not np.array_equal(x, named_leaves(adapted)[n])}
    assert changed == {"up/lora_b", "layers/lora_b"}
    for name in ("up", "layers"):
        old, new = (np.asarray(merge(tree)[name]["kernel"], np.float64) for tree in (adapted, moved))
        # Magnitudes hold each output's norm, so that the noise loses its part along the kernel.
        assert np.std(new - old) / np.std(old) == pytest.approx(1e-2, rel=0.3)


@pytest.mark.parametrize("share", [0.0, -1.0, float("nan")])
def test_a_share_that_is_no_share_is_refused(share):
    with pytest.raises(ValueError, match="share"):
        perturb(base(), KEY, share, trainable=lambda name: True)
