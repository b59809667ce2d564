"""SFT against float64 NumPy: value, gradient, and which completion it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.language.methods import sft_loss

RNG = np.random.default_rng(1)
LOGPS = -RNG.gamma(2.0, size=(5, 2, 6))
MASK = np.arange(6) < np.array([6, 3, 1, 4, 0])[:, None, None] * np.ones((1, 2, 1))


@pytest.mark.parametrize("completions", [1, 2])
def test_value_and_gradient(completions):
    logps, mask = LOGPS[:, :completions], MASK[:, :completions]
    count = np.maximum(mask[:, 0].sum(-1), 1)
    expected = -(logps[:, 0] * mask[:, 0]).sum(-1) / count
    arguments = dict(policy_logps=jnp.asarray(logps, jnp.float32), mask=jnp.asarray(mask))
    output = sft_loss(**arguments)
    np.testing.assert_allclose(output.loss, expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(output.metrics["perplexity"], np.exp(expected), rtol=1e-5)
    np.testing.assert_allclose(output.metrics["chosen_logps"], (logps[:, 0] * mask[:, 0]).sum(-1), rtol=1e-6)
    np.testing.assert_array_equal(output.metrics["chosen_length"], mask[:, 0].sum(-1))
    gradient = jax.grad(lambda p: sft_loss(policy_logps=p, mask=arguments["mask"]).loss.sum())(
        arguments["policy_logps"]
    )
    by_hand = np.zeros_like(logps)
    by_hand[:, 0] = -1.0 * mask[:, 0] / count[:, None]
    np.testing.assert_allclose(gradient, by_hand, rtol=1e-6)


def test_pairs_need_the_completion_axis():
    with pytest.raises(AssertionError):
        sft_loss(policy_logps=jnp.zeros((2, 3)), mask=jnp.ones((2, 3)))
