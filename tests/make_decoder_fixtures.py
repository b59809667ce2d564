"""Tiny Llama checkpoints with the numbers that torch transformers gives for them, kept under tests/fixtures/decoder.

    python tests/make_decoder_fixtures.py

Each folder holds config.json, model.safetensors and expected.npz: tokens [R, L], lengths [R], weights [R, L - 1], and
from torch in float32: logits [R, L, V], logps [R, L - 1] of the next tokens, and `gradient:NAME` of the weighted sum of
the log-probs for each tensor. Places behind a row's length hold zeros.
"""

import json
from pathlib import Path

import numpy as np
from make_tiny_checkpoint import llama_config, llama_tensors
from safetensors.numpy import save_file

FOLDER = Path(__file__).parent / "fixtures" / "decoder"
LENGTHS = (24, 9, 17)
TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": None,  # torch gives the padding word no gradient, and here every word is compared
}
BAND = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
# Keys of config.json in which a variant differs; None takes a key away.
VARIANTS: dict[str, dict] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
    # Neither layout gives a base: the class's own default holds.
    "no_base": {"rope_parameters": None},
    "llama3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, **BAND}},
    "linear_old_layout": {
        "rope_parameters": None,
        "rope_theta": 5e5,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "yarn_mscale": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 8.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        }
    },
}


def write_checkpoint(folder: Path, variant: str) -> Path:
    """config.json and model.safetensors of a variant."""
    folder.mkdir(parents=True, exist_ok=True)
    config = llama_config(**TINY, **VARIANTS[variant])
    tensors = llama_tensors(config, seed=sorted(VARIANTS).index(variant), scale=0.3)
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def inputs() -> dict[str, np.ndarray]:
    """Ragged rows of random tokens, padded on the right with zeros, and the weights of the scalar to differentiate."""
    rng = np.random.default_rng(7)
    lengths, longest = np.array(LENGTHS, np.int32), max(LENGTHS)
    kept = np.arange(longest) < lengths[:, None]
    tokens = rng.integers(0, TINY["vocab_size"], kept.shape).astype(np.int32) * kept
    weights = rng.normal(size=(len(LENGTHS), longest - 1)).astype(np.float32) * kept[:, 1:]
    return {"tokens": tokens, "lengths": lengths, "weights": weights}


def torch_numbers(folder: Path, given: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """Logits, log-probs and gradients by torch transformers, float32; `given` as `inputs`, which it is by default.

    Row by row, for some models look at the longest row of a call.
    """
    import torch
    from transformers import AutoModelForCausalLM

    given = given or inputs()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    rows, longest = given["tokens"].shape
    values = {
        "logits": np.zeros((rows, longest, model.config.vocab_size), np.float32),
        "logps": np.zeros((rows, longest - 1), np.float32),
    }
    for row, length in enumerate(given["lengths"]):
        tokens = torch.tensor(given["tokens"][row : row + 1, :length], dtype=torch.long)
        logits = model(tokens).logits
        logps = torch.log_softmax(logits[:, :-1], -1).gather(-1, tokens[:, 1:, None])[..., 0]
        (logps * torch.tensor(given["weights"][row, : length - 1])).sum().backward()
        values["logits"][row, :length] = logits[0].detach().numpy()
        values["logps"][row, : length - 1] = logps[0].detach().numpy()
    gradients = {f"gradient:{name}": p.grad.numpy() for name, p in model.named_parameters()}
    return given | values | gradients


def main() -> None:
    for variant in VARIANTS:
        folder = write_checkpoint(FOLDER / variant, variant)
        np.savez_compressed(folder / "expected.npz", **torch_numbers(folder))
        print(folder, sum(file.stat().st_size for file in folder.iterdir()), "bytes")


if __name__ == "__main__":
    main()
