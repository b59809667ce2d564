"""What the losses of both wings must satisfy, whatever arrays they ask for; each wing makes arrays of its own.

A check takes a loss and the wing's two functions: `make_inputs(loss, seed=...)` and `run(loss, inputs)`.
"""

import doctest
import functools
import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import docstring_parser
import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.signatures import read_needs
from dpo_jax.types import LossOutput

B = 6  # rows
Loss = Callable[..., LossOutput]
Arrays = dict[str, np.ndarray]
Run = Callable[[Loss, Arrays], tuple[LossOutput, Arrays]]

GARBAGE = np.array([np.nan, np.inf, -np.inf, 1e30], np.float32)
TOLERANCE: dict[str, Any] = dict(rtol=1e-5, atol=1e-6)  # two float32 evaluations of one formula in another order


def modules_of(methods: ModuleType) -> list[str]:
    return [info.name for info in pkgutil.iter_modules(methods.__path__, methods.__name__ + ".")]


def losses_of(methods: ModuleType) -> dict[str, Loss]:
    """`module.name` -> every public `*_loss` defined in a module of a package."""
    found = {}
    for path in modules_of(methods):
        module = importlib.import_module(path)
        for name, value in inspect.getmembers(module, inspect.isfunction):
            if name.endswith("_loss") and not name.startswith("_") and value.__module__ == module.__name__:
                found[f"{path.rpartition('.')[2]}.{name}"] = value
    return found


def assert_examples_hold(name: str, losses: dict[str, Loss]) -> None:
    """The doctests of a module of methods, which has some if it has a loss."""
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
    if any(loss.__module__ == name for loss in losses.values()):
        assert result.attempted > 0, "a card shows at least one small exact example"


def assert_loads_only_jax_and_chex(statement: str) -> None:
    """An import in a process of its own brings none of the heavy libraries."""
    heavy = ("flax", "optax", "orbax", "transformers", "datasets", "grain", "tyro", "matplotlib", "torch", "PIL")
    code = f"import sys; {statement}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def as_32_bits(inputs: Arrays) -> Arrays:
    """Integers as int32, everything else as float32."""
    return {n: v.astype(np.int32 if v.dtype.kind == "i" else np.float32) for n, v in inputs.items()}


def state_of(loss: Loss) -> dict:
    """What a loss takes that is neither array nor option: its state before the first step, a random key."""
    needs, special = read_needs(loss), {}
    if needs.state:
        special["loss_state"] = getattr(sys.modules[loss.__module__], loss.__name__.removesuffix("_loss") + "_state")()
    if needs.key:
        special["key"] = jax.random.key(0)
    return special


@functools.cache
def compiled(loss: Loss, **options: float) -> Callable[[Arrays, dict], tuple[LossOutput, Arrays]]:
    """(arrays, state) -> output and the gradient of the weighted sum of the loss by each float array; compiled once."""

    def evaluate(arrays: Arrays, state: dict) -> tuple[LossOutput, Arrays]:
        floats = {n: v for n, v in arrays.items() if jnp.issubdtype(v.dtype, jnp.floating)}
        others = {n: v for n, v in arrays.items() if n not in floats}

        def total(floats: Arrays) -> tuple[jax.Array, LossOutput]:
            output = loss(**floats, **others, **state, **options)
            weight = jax.lax.stop_gradient(arrays.get("weight", 1.0))  # as the train step weighs rows
            return jnp.sum(output.loss * weight), output

        gradient, output = jax.grad(total, has_aux=True)(floats)
        return output, gradient

    return jax.jit(evaluate)


def assert_same(actual: LossOutput, expected: LossOutput) -> None:
    assert actual.metrics.keys() == expected.metrics.keys()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), actual, expected)


def assert_finite(tree: object, what: str) -> None:
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        assert np.isfinite(np.asarray(leaf, np.float32)).all(), f"{what}: {jax.tree_util.keystr(path)} is {leaf}"


def assert_form(function: Callable, result: type) -> None:
    """Keyword-only, typed, every hyper-parameter with an immutable default and a line in the docstring."""
    signature = inspect.signature(function)
    for parameter in signature.parameters.values():
        assert parameter.kind is parameter.KEYWORD_ONLY, f"{parameter.name} is not keyword-only"
        assert parameter.annotation is not parameter.empty, f"{parameter.name} has no type"
    assert signature.return_annotation is result
    assert function.__doc__, "no docstring"
    parsed = docstring_parser.parse(function.__doc__)
    documented = {name.strip(): p.description for p in parsed.params for name in p.arg_name.split(",")}
    assert parsed.short_description, "no line of purpose"
    assert set(documented) <= set(signature.parameters), f"documents arguments that do not exist: {documented}"
    for name, default in read_needs(function).hyper.items():
        hash(default)  # immutable
        assert documented.get(name), f"hyper-parameter {name} has no line under Args"


def assert_refuses_bad_values(loss: Loss, inputs: Arrays) -> None:
    """The hyper-parameters that all papers have say what is wrong with a value."""
    for name in {"beta", "gamma", "label_smoothing"} & read_needs(loss).hyper.keys():
        for value in (-1.0, float("nan")):
            try:
                loss(**inputs, **state_of(loss), **{name: value})
            except ValueError as error:
                assert name in str(error), f"the error does not name {name}: {error}"
            else:
                raise AssertionError(f"{name}={value} was accepted")


def assert_output(loss: Loss, make_inputs: Callable[..., Arrays], run: Run, **options: float) -> None:
    """Loss and metrics float32 [B]; eager (with boolean masks), compiled and vmapped evaluation agree."""
    inputs, given = make_inputs(loss), {**state_of(loss), **options}
    output, _ = run(loss, inputs)
    for name, value in {"loss": output.loss, **output.metrics}.items():
        assert value.shape == (B,) and value.dtype == np.float32, f"{name} is {value.dtype}{value.shape}"
    boolean = {n: jnp.asarray(v, bool if n.endswith("mask") else v.dtype) for n, v in inputs.items()}
    with jax.numpy_rank_promotion("raise"):
        assert_same(loss(**boolean, **given), output)
    other = make_inputs(loss, seed=1)
    stacked = {n: jnp.stack([inputs[n], other[n]]) for n in inputs}
    both = jax.vmap(lambda arrays: loss(**arrays, **given))(stacked)
    assert_same(jax.tree.map(lambda v: v[0], both), output)
    assert_same(jax.tree.map(lambda v: v[1], both), run(loss, other)[0])


def assert_computed_in_float32(loss: Loss, inputs: Arrays, of_models: list[str], run: Run, **options: float) -> None:
    """What models say in bfloat16 gives the float32 loss of the rounded values."""
    half = {n: jnp.asarray(v, jnp.bfloat16 if n in of_models else v.dtype) for n, v in inputs.items()}
    rounded = {n: np.asarray(v, inputs[n].dtype) for n, v in half.items()}
    # Not compiled: XLA may keep the digits between two fused bfloat16 operations and so hide the second one.
    output = loss(**half, **state_of(loss), **options)
    assert output.loss.dtype == np.float32
    assert_same(output, run(loss, rounded)[0])


def mixed_rows(taken: np.ndarray, inputs: Arrays, other: Arrays) -> Arrays:
    """The rows that are taken from `inputs`, and the others from `other`."""
    return {n: np.where(taken.reshape(-1, *[1] * (v.ndim - 1)), v, other[n]) for n, v in inputs.items()}


def assert_rows_apart(loss: Loss, make_inputs: Callable[..., Arrays], run: Run) -> None:
    """Rows do not know each other, unless the docstring says batch-coupled."""
    if is_batch_coupled(loss):
        return
    inputs = make_inputs(loss)
    output, gradient = run(loss, inputs)
    order = np.array([3, 0, 5, 1, 4, 2])
    permuted, permuted_gradient = run(loss, {n: v[order] for n, v in inputs.items()})
    assert_same(permuted, jax.tree.map(lambda v: v[order] if np.shape(v)[:1] == (B,) else v, output))
    for name in gradient:
        np.testing.assert_allclose(permuted_gradient[name], gradient[name][order], err_msg=name, **TOLERANCE)
    # Other neighbours: the even rows stay, the odd ones come from another draw.
    even = np.arange(B) % 2 == 0
    mixed = mixed_rows(even, inputs, make_inputs(loss, seed=1))
    np.testing.assert_allclose(run(loss, mixed)[0].loss[even], output.loss[even], **TOLERANCE)


def is_batch_coupled(loss: Loss) -> bool:
    return "batch-coupled" in (loss.__doc__ or "")


def assert_flow(gradient: Arrays, learns: Callable[[str], bool | None]) -> None:
    """A gradient reaches the arrays that learn and none that do not; None says that it is nobody's."""
    for name, value in gradient.items():
        if learns(name):
            assert (value != 0).any(), f"no gradient reaches {name}"
        elif learns(name) is not None:
            assert (value == 0).all(), f"gradient flows into {name}"
