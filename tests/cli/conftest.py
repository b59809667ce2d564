"""One tiny checkpoint and one file of pairs for all tests of the command line, and programs compiled once."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from tiny_runs import Tiny, make_pairs, make_tiny

from dpo_jax.cli import evaluate, generate, train
from dpo_jax.cli.checks import mesh_of
from dpo_jax.cli.configs import MeshConfig
from dpo_jax.cli.images import evaluate as image_evaluate
from dpo_jax.cli.images import generate as image_generate
from dpo_jax.cli.images import train as image_train
from dpo_jax.sharding import make_mesh


@pytest.fixture(scope="session")
def _cache_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module", autouse=True)
def _compile_once(_cache_folder):
    """Runs of the same shape share their compiled programs; each compilation costs more than the run."""
    options = {
        "jax_compilation_cache_dir": str(_cache_folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    rows = make_pairs(folder / "pairs.jsonl")
    return Tiny(make_tiny(folder / "model", rows), rows, make_tiny(folder / "other", rows, seed=1))


@pytest.fixture(scope="module", autouse=True)
def _one_device_unless_asked():
    """A run without a word on its mesh takes one device: programs for eight take several times as long to compile."""

    def chosen(config: MeshConfig) -> Mesh:
        alone = (config.mesh_data, config.mesh_fsdp, config.mesh_expert, config.mesh_model) == (-1, 1, 1, 1)
        return make_mesh(devices=jax.devices()[:1]) if alone and config.mesh_slices == 1 else mesh_of(config)

    with pytest.MonkeyPatch.context() as patch:
        for module in (train, evaluate, generate, image_train, image_evaluate, image_generate):
            patch.setattr(module, "mesh_of", chosen)
        yield
