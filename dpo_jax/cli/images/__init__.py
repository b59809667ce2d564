"""The commands for diffusion models: what they do otherwise than those for language models."""
