"""Eight forced host devices, a silent hub and programs compiled in a hurry for every test, set before jax is imported.

Tests run a program a few times and compile thousands of them: XLA compiles five times as fast without LLVM's
optimisations, in one piece, and (where jaxlib still has them) with its older emitters of fused loops.
"""

import gc
import os
from importlib.metadata import version

_MANY_OBJECTS = 1_000_000
_FLAGS = {
    "--xla_force_host_platform_device_count": "8",
    "--xla_cpu_parallel_codegen_split_count": "1",
    # Eight devices on two busy cores may be late for a collective; XLA ends the process after forty seconds.
    "--xla_cpu_collective_call_terminate_timeout_seconds": "200",
    "--xla_cpu_collective_timeout_seconds": "200",
}
if version("jaxlib").startswith("0.10."):
    _FLAGS["--xla_cpu_use_fusion_emitters"] = "false"  # an unknown flag ends the process: later ones do not have it

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# XLA's pool has a thread for each core or device, whichever are more; a program whose devices wait for each other in
# several collectives at once needs more of them, and would stand still for ever.
os.environ.setdefault("PJRT_NPROC", "32")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
_GIVEN = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([_GIVEN, *(f"{k}={v}" for k, v in _FLAGS.items() if k not in _GIVEN)]).strip()

import pytest  # noqa: E402


@pytest.fixture
def optimised():
    """Programs as users get them: for tests of what the compiler makes, and for those that compute for long."""
    import jax

    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module", autouse=True)
def _programs_are_forgotten():
    """Traced and compiled programs fill a process with objects, until collecting garbage takes most of the time."""
    yield
    if len(gc.get_objects(generation=2)) > _MANY_OBJECTS:
        import jax

        jax.clear_caches()
        gc.collect()
