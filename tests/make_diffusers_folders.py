"""Tiny random pipelines that diffusers itself has written, one folder for each kind.

    python tests/make_diffusers_folders.py --out DIR

Needs torch and diffusers; `tiny_pipelines.make_tiny_pipeline` makes folders of the same layout without them.
"""

import argparse
import json
import tempfile
from pathlib import Path

from tiny_pipelines import CLASSES, make_tiny_pipeline

from dpo_jax.diffusion.models.folder import Kind


def make_diffusers_folder(folder: Path, kind: Kind, *, seed: int = 0) -> Path:
    """Write a pipeline of the sizes of `make_tiny_pipeline` with torch's random weights."""
    import diffusers
    import torch

    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as start:
        pipeline = read_pipeline(make_tiny_pipeline(Path(start) / kind, kind))
    for name in ("unet", "transformer", "vae", "text_encoder", "text_encoder_2"):
        if (model := getattr(pipeline, name, None)) is not None:
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    assert isinstance(pipeline, getattr(diffusers, CLASSES[kind]))
    pipeline.save_pretrained(folder)
    return folder


def read_pipeline(folder: Path):
    """The pipeline in diffusers."""
    from diffusers import DiffusionPipeline

    parts = json.loads((folder / "model_index.json").read_text())
    # A third encoder that is not there must be said to be none.
    absent = {name: None for name in ("text_encoder_3", "tokenizer_3") if name in parts}
    return DiffusionPipeline.from_pretrained(folder, local_files_only=True, **absent)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    for kind in CLASSES:
        print(make_diffusers_folder(out / kind, kind))


if __name__ == "__main__":
    main()
