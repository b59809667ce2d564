"""scheduler_config.json of diffusers' folders: the process that a model was trained to undo, and its usual grid.

Sampling itself is `dpo_jax.diffusion.sampler`; of diffusers' many samplers only what they share is read: betas or the
shift of straight paths, what is predicted, and where the timesteps of a grid stand.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_jax.diffusion import schedule as schedules
from dpo_jax.diffusion.process import Process
from dpo_jax.diffusion.schedule import Schedule, predicts_clean, predicts_flow, predicts_noise, predicts_velocity
from dpo_jax.diffusion.types import Parameterisation
from dpo_jax.keys import WeightsError, choice, flag, integer, number, refuse

_PREDICTIONS: dict[str, Parameterisation] = {
    "epsilon": predicts_noise,
    "sample": predicts_clean,
    "v_prediction": predicts_velocity,
}
_SPACINGS = {name: name for name in ("leading", "trailing", "linspace")}
_BETAS = {name: name for name in ("linear", "scaled_linear", "squaredcos_cap_v2")}
_FLOW = "FlowMatchEulerDiscreteScheduler"
# Class -> where its grid stands if the file does not say.
_CLASSES = {
    "DDIMScheduler": "leading",
    "DDPMScheduler": "leading",
    "PNDMScheduler": "leading",
    "EulerDiscreteScheduler": "linspace",
    "EulerAncestralDiscreteScheduler": "linspace",
    "DPMSolverMultistepScheduler": "linspace",
    "UniPCMultistepScheduler": "linspace",
    "LMSDiscreteScheduler": "linspace",
    "HeunDiscreteScheduler": "linspace",
}
# Features that there are not here, as key -> the value that leaves them out.
_USUAL: dict[str, Any] = {
    "clip_sample": False,
    "thresholding": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "use_dynamic_shifting": False,
    "invert_sigmas": False,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "timestep_type": "discrete",
    "final_sigmas_type": "zero",
    "time_shift_type": "exponential",
}
# Of diffusers' own samplers, or of features that are refused above.
_PASSED_OVER = (
    *("skip_prk_steps", "clip_sample_range", "sample_max_value", "dynamic_thresholding_ratio", "interpolation_type"),
    *("sigma_min", "sigma_max", "variance_type", "algorithm_type", "solver_type", "solver_order", "solver_p"),
    *("lower_order_final", "euler_at_final", "lambda_min_clipped", "predict_x0", "disable_corrector"),
    *("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "flow_shift", "use_clipped_model_output"),
)
_READ = {
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"),
    *("rescale_betas_zero_snr", "timestep_spacing", "steps_offset", "set_alpha_to_one"),
}


@dataclass(frozen=True, eq=False)
class Noising:
    """What scheduler_config.json says.

    Attributes:
      process: the noise that a model was trained to undo.
      timestep_spacing: "leading", "trailing" or "linspace", the grid of a variance-preserving process.
      steps_offset: of the leading grid.
      clean_end: whether the last step of a sampler ends at clean latents and not at the first timestep's level.
    """

    process: Process
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    clean_end: bool = True

    def timesteps(self, steps: int) -> np.ndarray:
        """The falling grid [steps] of a variance-preserving process.

        Raises:
          ValueError: a flow model, whose grid is `flow_sigmas`.
        """
        if self.process.schedule is None:
            raise ValueError("a flow model has no grid of whole timesteps; use flow_sigmas with the process's shift")
        count = self.process.schedule.timesteps
        if self.timestep_spacing == "leading":
            return schedules.leading_timesteps(steps, timesteps=count, steps_offset=self.steps_offset)
        grids = {"trailing": schedules.trailing_timesteps, "linspace": schedules.linspace_timesteps}
        return grids[self.timestep_spacing](steps, timesteps=count)


def noising_from_dict(config: Mapping[str, Any], place: str = "scheduler_config.json") -> Noising:
    """What a scheduler's config says.

    Raises:
      WeightsError: a class or a feature that there is not here, or a key with a wrong value.
    """
    name = config.get("_class_name")
    if name != _FLOW and name not in _CLASSES:
        raise WeightsError(f"{place}: _class_name is {name!r}; there is {', '.join((*_CLASSES, _FLOW))}")
    known = {*_USUAL, *_PASSED_OVER, *({"num_train_timesteps", "shift"} if name == _FLOW else _READ)}
    if unknown := [key for key in config if not key.startswith("_") and key not in known]:
        raise WeightsError(f"{place}: {', '.join(unknown)}: not supported")
    refuse(config, place, _USUAL)
    if name == _FLOW:
        refuse(config, place, {"num_train_timesteps": 1000})
        return Noising(Process(predicts_flow, shift=number(config, place, "shift", 1.0)))
    if "clip_sample" not in config and name in ("DDIMScheduler", "DDPMScheduler"):
        raise WeightsError(f"{place}: clip_sample is missing, which means true here; latents are not clipped")
    parameterisation = choice(config, place, "prediction_type", "epsilon", _PREDICTIONS)
    return Noising(
        Process(parameterisation, _schedule(config, place)),
        choice(config, place, "timestep_spacing", _CLASSES[name], _SPACINGS),
        _offset(config, place),
        flag(config, place, "set_alpha_to_one", name != "PNDMScheduler"),
    )


def _offset(config: Mapping[str, Any], place: str) -> int:
    value = config.get("steps_offset", 0)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise WeightsError(f"{place}: steps_offset is {value!r}; expected an integer from 0")
    return value


def _schedule(config: Mapping[str, Any], place: str) -> Schedule:
    count = integer(config, place, "num_train_timesteps", 1000)
    kind = choice(config, place, "beta_schedule", "linear", _BETAS)
    betas = config.get("trained_betas")
    try:
        if betas is not None:
            schedule = schedules.schedule_of_betas(np.asarray(betas, np.float64))
        elif kind == "squaredcos_cap_v2":
            schedule = schedules.cosine_schedule(count)
        else:
            ends = {"start": number(config, place, "beta_start", 1e-4), "end": number(config, place, "beta_end", 0.02)}
            made = schedules.linear_schedule if kind == "linear" else schedules.scaled_linear_schedule
            schedule = made(count, **ends)
    except WeightsError:
        raise
    except (ValueError, TypeError) as error:
        key = "beta_start, beta_end" if betas is None else "trained_betas"
        raise WeightsError(f"{place}: {key}: {error}") from error
    if flag(config, place, "rescale_betas_zero_snr", False):
        return schedules.with_zero_terminal_snr(schedule)
    return schedule
