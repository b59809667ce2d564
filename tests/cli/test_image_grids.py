"""The timesteps of `--sampler` are those of diffusers' scheduler of that name with the same config."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from make_scheduler_fixtures import CASES, FILE, SCALED

from dpo_jax.cli.console import UsageError
from dpo_jax.cli.images.sampling import Sampler, SamplingConfig, steps_of
from dpo_jax.diffusion.models.scheduler import noising_from_dict

EXPECTED = np.load(FILE)
SAMPLERS: dict[str, Sampler] = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "EulerDiscreteScheduler": "euler",
    "DPMSolverMultistepScheduler": "dpm-solver",
}
KNOWN = [name for name, (kind, *_) in CASES.items() if kind in SAMPLERS]


def times_of(kind, config, count):
    """Times of the command's table for a pipeline whose scheduler_config.json has a config."""
    noising = noising_from_dict({"_class_name": kind, **config})
    model: Any = SimpleNamespace(pipeline=SimpleNamespace(noising=noising), process=noising.process)
    return steps_of(model, SamplingConfig(sampler=SAMPLERS[kind], sampling_steps=count)).time


@pytest.mark.parametrize("name", KNOWN)
def test_grids_are_those_of_the_fixtures(name):
    kind, config, count, _ = CASES[name]
    np.testing.assert_allclose(times_of(kind, config, count), EXPECTED[f"{name}/times"], rtol=1e-6)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("kind", SAMPLERS)
def test_grids_are_those_of_diffusers(kind, spacing):
    diffusers = pytest.importorskip("diffusers", reason="compares grids with diffusers' schedulers")
    config = {**SCALED, "timestep_spacing": spacing, "steps_offset": 1}
    config |= {"clip_sample": False} if kind.startswith("DD") else {}
    scheduler = getattr(diffusers, kind)(**config)
    for count in (2, 7, 20, 50):
        scheduler.set_timesteps(count)
        np.testing.assert_allclose(times_of(kind, config, count), np.asarray(scheduler.timesteps), rtol=1e-6)


def test_more_steps_than_timesteps_are_refused():
    with pytest.raises(UsageError, match="--sampling-steps"):
        times_of("DPMSolverMultistepScheduler", SCALED, 1001)
