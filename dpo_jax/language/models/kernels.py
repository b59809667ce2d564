"""Products with the kernels of linear layers, as they are or in few bits (`dpo_jax.quantize`), and their adapters."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dpo_jax.lora import adapt
from dpo_jax.quantize import Kind, dequantize, quantize
from dpo_jax.types import Array


class SmallKernel(nnx.Module):
    """A frozen kernel in few bits."""

    def __init__(self, parts: Mapping[str, Array]):
        for name, leaf in parts.items():
            setattr(self, name, nnx.data(nnx.Param(leaf)))
        self.names = tuple(parts)

    def parts(self) -> dict[str, Array]:
        """As `dpo_jax.quantize` has them."""
        return {name: getattr(self, name)[...] for name in self.names}


def linear_product(
    rows: Array, kernel: nnx.Param | SmallKernel, adapter: Mapping[str, Any] | None, dtype: jnp.dtype
) -> Array:
    """rows @ kernel, and what the adapter makes of it.

    Args:
      rows: [N, in], in the compute dtype.
      adapter: arguments of `dpo_jax.lora.adapt` for this layer; None for none.
      dtype: that of the computation.
    """
    product = partial(_product, dtype=dtype)
    if isinstance(kernel, SmallKernel):
        # Otherwise the backward pass would keep the whole kernels of all layers. In a scan nothing is merged anyway.
        return jax.checkpoint(product, prevent_cse=False)(rows, kernel.parts(), adapter)
    return product(rows, kernel[...], adapter)


def _product(
    rows: Array, kernel: Array | dict[str, Array], adapter: Mapping[str, Any] | None, *, dtype: jnp.dtype
) -> Array:
    whole = dequantize(kernel) if isinstance(kernel, dict) else kernel
    y = rows @ whole.astype(dtype)
    return y if adapter is None else adapt(y, rows, whole, **adapter)


def set_small_kernels(model: nnx.Module, kind: Kind) -> None:
    """Make room for kernels in few bits in the linear layers of an abstract module (`nnx.eval_shape`), in place."""
    for _, module in list(nnx.iter_modules(model)):
        kernel = getattr(module, "kernel", None)
        if isinstance(kernel, nnx.Param):
            small = SmallKernel(jax.eval_shape(partial(quantize, kind=kind), kernel.get_value()))
            setattr(module, "kernel", nnx.data(small))  # noqa: B010
