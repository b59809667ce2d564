"""NNX modules as functions: what the module says, gradients, abstract modules, states that are no parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dpo_jax.functional import functional, set_adapters
from dpo_jax.tree import named_leaves


class Branch(nnx.Module):
    def __init__(self, size_in, size_out, *, rngs):
        self.linear = nnx.Linear(size_in, size_out, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, *, scale=1.0, deterministic=True):
        return self.drop(jnp.tanh(self.linear(x)), deterministic=deterministic) * scale


class Trunk(nnx.Module):
    def __init__(self, *, rngs):
        self.first = Branch(3, 5, rngs=rngs)
        self.second = Branch(5, 2, rngs=rngs)
        self.calls = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(self, x, *, scale=1.0, deterministic=True):
        self.calls[...] += 1
        return self.second(self.first(x), scale=scale, deterministic=deterministic)

    def features(self, x):
        return self.first(x)


def trunk():
    return Trunk(rngs=nnx.Rngs(params=0, dropout=1))


X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)


def test_variables_are_the_parameters_under_their_names():
    _, variables = functional(trunk())
    assert list(named_leaves(variables)) == [
        f"{branch}/linear/{name}" for branch in ("first", "second") for name in ("bias", "kernel")
    ]
    assert all(type(key) is str for key in variables) and type(variables["first"]["linear"]) is dict
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(variables))


def test_the_function_says_what_the_module_says():
    apply_fn, variables = functional(trunk())
    hidden = np.tanh(X @ variables["first"]["linear"]["kernel"] + variables["first"]["linear"]["bias"])
    want = np.tanh(hidden @ variables["second"]["linear"]["kernel"] + variables["second"]["linear"]["bias"])
    np.testing.assert_allclose(apply_fn(variables, X), want, atol=1e-6)
    np.testing.assert_allclose(jax.jit(apply_fn)(variables, X, scale=3.0), 3 * want, atol=1e-6)
    np.testing.assert_allclose(apply_fn(variables, X, method="features"), hidden, atol=1e-6)
    batched = jax.vmap(apply_fn, in_axes=(None, 0))(variables, X)
    np.testing.assert_allclose(batched, want, atol=1e-6)


def test_it_is_pure_and_depends_on_the_variables_alone():
    apply_fn, variables = functional(trunk())
    other = jax.tree.map(lambda leaf: leaf + 0.5, variables)
    before = apply_fn(variables, X)
    assert float(jnp.abs(apply_fn(other, X) - before).max()) > 0.1
    np.testing.assert_array_equal(apply_fn(variables, X), before)
    gradient = jax.grad(lambda v: jnp.sum(apply_fn(v, X) ** 2))(variables)
    direction = jax.tree.map(
        lambda leaf: jnp.sin(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), variables
    )
    slope = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction)))

    def value(step):
        return jnp.sum(apply_fn(jax.tree.map(lambda a, b: a + step * b, variables, direction), X) ** 2)

    assert float(slope) == pytest.approx(float(value(1e-2) - value(-1e-2)) / 2e-2, rel=1e-2)


def test_random_streams_are_no_variables_and_start_the_same():
    apply_fn, variables = functional(trunk())
    one = apply_fn(variables, X, deterministic=False)
    np.testing.assert_array_equal(one, apply_fn(variables, X, deterministic=False))
    assert not np.array_equal(one, apply_fn(variables, X))


def test_an_abstract_module_makes_a_function_without_weights():
    apply_fn, abstract = functional(nnx.eval_shape(trunk))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))
    module_fn, variables = functional(trunk())
    assert jax.tree.structure(abstract) == jax.tree.structure(variables)
    assert jax.eval_shape(module_fn, abstract, X).shape == (4, 2)
    np.testing.assert_array_equal(apply_fn(variables, X, method="features"), module_fn(variables, X, method="features"))


def test_unknown_variables_are_refused():
    apply_fn, variables = functional(trunk())
    with pytest.raises(ValueError, match="third"):
        apply_fn({**variables, "third": X}, X)


class Adapted(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.eye(3))
        self.lora_a = None

    def __call__(self, x):
        return x @ self.kernel[...] + (0 if self.lora_a is None else x @ self.lora_a[...])


class Chain(nnx.Module):
    def __init__(self):
        self.links = nnx.List([Adapted() for _ in range(11)])

    def __call__(self, x):
        for link in self.links:
            x = link(x)
        return x


def test_places_in_lists_are_digits_and_take_adapters():
    variables = functional(Chain())[1]
    assert "links/10/kernel" in named_leaves(variables)
    model = nnx.eval_shape(Chain)
    set_adapters(model, {"links": {"10": {"lora_a": jax.ShapeDtypeStruct((3, 3), jnp.float32)}}})
    apply_fn, abstract = functional(model)
    assert [name for name in named_leaves(abstract) if name.endswith("lora_a")] == ["links/10/lora_a"]
    variables["links"]["10"]["lora_a"] = 2 * jnp.eye(3)
    np.testing.assert_allclose(apply_fn(variables, X), 3 * X, rtol=1e-6)


@pytest.mark.parametrize("path", ["links/11/lora_a", "links/x/lora_a", "links/lora_a", "links/0/lora_b", "0/lora_a"])
def test_adapters_of_another_model_are_refused(path):
    adapters = jax.ShapeDtypeStruct((3, 3), jnp.float32)
    for part in reversed(path.split("/")):
        adapters = {part: adapters}
    with pytest.raises(ValueError, match=f"{path}: the model has no linear layer there"):
        set_adapters(nnx.eval_shape(Chain), adapters)
