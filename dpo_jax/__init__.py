"""Preference optimisation of language models and diffusion models in JAX."""

__version__ = "0.1.0"
