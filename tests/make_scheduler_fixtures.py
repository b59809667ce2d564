"""What the schedulers of diffusers compute, kept in tests/fixtures/schedulers/expected.npz.

    python tests/make_scheduler_fixtures.py

Tables (`table/NAME` at the entries TABLE_ENTRIES), grids (`grid/NAME`), and one rollout per case of `CASES`:
`NAME/times` [S], `NAME/latents` [S + 1, B, ...], for stochastic ones `NAME/noise` [S, B, ...].
The library computes with float64 latents and float32 tables; what is kept is float32. Latents of Euler are at its own
scale, x / alpha; `sigmas` [S + 1] of Euler hold sigma / alpha, those of flow the levels.
"""

from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "fixtures" / "schedulers" / "expected.npz"
TABLE_ENTRIES = np.array([0, 1, 2, 50, 333, 700, 998, 999])
SHAPE = (2, 2, 3, 2)
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PLAIN = {"clip_sample": False}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
TRAILING = {"timestep_spacing": "trailing"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", **TRAILING}
STABLE = {**SCALED, **LEADING, **PLAIN, "set_alpha_to_one": False}
# name -> scheduler, its options, number of steps, options of its step
CASES: dict[str, tuple[str, dict, int, dict]] = {
    "ddim": ("DDIMScheduler", STABLE, 8, {}),
    "ddim_eta": ("DDIMScheduler", STABLE, 8, {"eta": 0.7}),
    "ddim_clean_end": ("DDIMScheduler", {**SCALED, **PLAIN, **TRAILING}, 8, {"eta": 1.0}),
    "ddim_velocity": ("DDIMScheduler", {**STABLE, "prediction_type": "v_prediction"}, 8, {}),
    "ddim_sample": ("DDIMScheduler", {**STABLE, "prediction_type": "sample"}, 8, {"eta": 0.3}),
    "ddim_zero_snr": ("DDIMScheduler", {**SCALED, **PLAIN, **ZERO_SNR}, 5, {"eta": 1.0}),
    "ddpm_small": ("DDPMScheduler", {**PLAIN, "timestep_spacing": "linspace"}, 6, {}),
    "ddpm_large": ("DDPMScheduler", {**PLAIN, **TRAILING, "variance_type": "fixed_large"}, 6, {}),
    "ddpm_cosine": ("DDPMScheduler", {**PLAIN, **TRAILING, "beta_schedule": "squaredcos_cap_v2"}, 6, {}),
    "euler_leading": ("EulerDiscreteScheduler", {**SCALED, **LEADING}, 8, {}),
    "euler_linspace": ("EulerDiscreteScheduler", {**SCALED, "timestep_spacing": "linspace"}, 7, {}),
    "euler_velocity": ("EulerDiscreteScheduler", {**SCALED, **TRAILING, "prediction_type": "v_prediction"}, 8, {}),
    "dpm_linspace": ("DPMSolverMultistepScheduler", {**SCALED, "timestep_spacing": "linspace"}, 8, {}),
    "dpm_leading": ("DPMSolverMultistepScheduler", {**SCALED, **LEADING}, 20, {}),
    "dpm_velocity": (
        "DPMSolverMultistepScheduler",
        {**SCALED, **TRAILING, "prediction_type": "v_prediction"},
        10,
        {},
    ),
    "flow": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 7, {}),
    "flow_dynamic": ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, 5, {}),
    "inverse": ("DDIMInverseScheduler", {**SCALED, **LEADING, **PLAIN, "set_alpha_to_one": False}, 8, {}),
}


def toy_model(xp, latents, timestep):
    """A smooth nonlinear network of latents and timestep, for NumPy and jax.numpy."""
    return xp.tanh(0.7 * latents + timestep / 1000.0) - 0.2 * latents


def rollout(name: str) -> dict[str, np.ndarray]:
    """One case as the library steps through it, the keys without the case's name."""
    import diffusers
    import torch

    kind, config, count, options = CASES[name]
    scheduler = getattr(diffusers, kind)(**config)
    if name == "flow_dynamic":
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / count, count), mu=0.9)
    else:
        scheduler.set_timesteps(count)
    stochastic = kind == "DDPMScheduler" or options.get("eta", 0) > 0
    rng = np.random.default_rng(len(name))
    latents = rng.normal(size=SHAPE) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    states, noises = [latents], []
    for index, time in enumerate(scheduler.timesteps):
        state = torch.from_numpy(latents)
        model_input = scheduler.scale_model_input(state, time) if kind == "EulerDiscreteScheduler" else state
        said = torch.from_numpy(toy_model(np, model_input.numpy(), float(time)))
        extra = dict(options)
        if stochastic:
            extra["generator"] = torch.Generator().manual_seed(index)
            again = torch.Generator().manual_seed(index)
            noises.append(torch.randn(SHAPE, generator=again, dtype=torch.float64).numpy())
        latents = scheduler.step(said, time, state, **extra).prev_sample.double().numpy()
        states.append(latents)
    result = {"times": np.asarray(scheduler.timesteps), "latents": np.stack(states).astype(np.float32)}
    if stochastic:
        result["noise"] = np.stack(noises).astype(np.float32)
    if kind in ("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"):
        result["sigmas"] = np.asarray(scheduler.sigmas)
    return result


def tables() -> dict[str, np.ndarray]:
    """Signal variances of the library's schedules and its grids."""
    import diffusers

    options = {
        "linear": {},
        "scaled_linear": SCALED,
        "cosine": {"beta_schedule": "squaredcos_cap_v2"},
        "zero_snr": {**SCALED, "rescale_betas_zero_snr": True},
    }
    result = {
        f"table/{name}": np.asarray(diffusers.DDIMScheduler(**option).alphas_cumprod)[TABLE_ENTRIES]
        for name, option in options.items()
    }
    for spacing in ("leading", "trailing", "linspace"):
        for count in (1, 7, 50):
            scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
            scheduler.set_timesteps(count)
            result[f"grid/{spacing}_{count}"] = np.asarray(scheduler.timesteps).astype(np.int16)
    return result


def everything() -> dict[str, np.ndarray]:
    """All that the file holds."""
    rollouts = {f"{name}/{key}": value for name in CASES for key, value in rollout(name).items()}
    return {**tables(), **rollouts}


if __name__ == "__main__":
    FILE.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(FILE, **everything())  # pyright: ignore[reportArgumentType]
    print(f"{FILE} {FILE.stat().st_size} bytes")
