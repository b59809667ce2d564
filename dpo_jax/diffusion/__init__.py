"""The diffusion wing: noise schedules, transitions, samplers, inversion."""
