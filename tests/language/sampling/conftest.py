"""Programs of these tests run for milliseconds: half of their time would go into optimising them."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def _compile_fast():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
