"""Adapters of Stable Diffusion 3's transformer in diffusers' files: diffusers reads ours and predicts the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_pipelines import make_tiny_pipeline

from dpo_jax.diffusion.models.adapters import FILE, load_adapter, save_adapter
from dpo_jax.diffusion.models.folder import load_denoiser, open_pipeline, predict_function
from dpo_jax.diffusion.models.mmdit import abstract_variables, weight_table
from dpo_jax.diffusion.models.mmdit_config import MMDiTConfig
from dpo_jax.diffusion.types import TextCondition
from dpo_jax.lora import LoraConfig, init_adapters, with_adapters
from dpo_jax.tree import map_named

BOTH_STREAMS = r".*(to_(q|k|v|out/0)|add_(q|k|v)_proj|to_add_out|ff/net/2|ff_context/net/2)/kernel"


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
def test_diffusers_reads_what_we_write(dora, tmp_path):
    torch = pytest.importorskip("torch", reason="compares with torch itself")
    pytest.importorskip("peft", reason="compares with peft itself")
    diffusers = pytest.importorskip("diffusers", reason="compares with diffusers itself")
    pipeline = open_pipeline(make_tiny_pipeline(tmp_path / "model", "sd3"))
    base, config = load_denoiser(pipeline), pipeline.denoiser
    assert isinstance(config, MMDiTConfig)
    table, shapes = weight_table(config), abstract_variables(config)
    lora = LoraConfig(rank=3, alpha=5.0, targets=BOTH_STREAMS, rank_pattern=((".*to_k/kernel", 2),), dora=dora)
    random = np.random.default_rng(1)

    def moved(name, leaf):
        """A is random, B is not zero any more; scales stay."""
        return (
            leaf if name.endswith("scale") else leaf + jnp.asarray(0.3 * random.standard_normal(leaf.shape), leaf.dtype)
        )

    adapters = map_named(moved, init_adapters(jax.random.key(0), base, lora))
    save_adapter(tmp_path / "adapter", table, shapes, adapters, prefix="transformer")
    latents = random.normal(size=(2, 8, 8, 16)).astype(np.float32)
    states = random.normal(size=(2, 7, 24)).astype(np.float32)
    pooled, times = random.normal(size=(2, 20)).astype(np.float32), np.array([10.0, 800.0], np.float32)

    def ours(adapters):
        variables = with_adapters(base, adapters)
        return jax.jit(predict_function(pipeline, adapters))(variables, latents, times, TextCondition(states, pooled))

    model = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "model" / "transformer")

    def theirs():
        given = (
            torch.tensor(latents).permute(0, 3, 1, 2),
            torch.tensor(states),
            torch.tensor(pooled),
            torch.tensor(times),
        )
        with torch.no_grad():
            return model(*given).sample.permute(0, 2, 3, 1).numpy()

    plain = theirs()
    model.load_lora_adapter(tmp_path / "adapter" / FILE, prefix="transformer")
    np.testing.assert_allclose(theirs(), ours(adapters), atol=1e-4)
    assert np.abs(theirs() - plain).max() > 0.1
    np.testing.assert_allclose(
        ours(load_adapter(tmp_path / "adapter", table, shapes, prefix="transformer")), theirs(), atol=1e-4
    )
