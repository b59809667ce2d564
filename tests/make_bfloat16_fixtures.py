"""What bfloat16 costs torch transformers on the fixtures of the families, kept in tests/fixtures/bfloat16.json.

    python tests/make_bfloat16_fixtures.py

For each family the largest difference and the root of the mean square of the differences between the log-probs of the
next tokens when weights and computation are bfloat16 and when they are float32.
"""

import json
from pathlib import Path

import numpy as np
from make_family_fixtures import FOLDER, LATER, VARIANTS, inputs

FILE = Path(__file__).parent / "fixtures" / "bfloat16.json"
# In a mixture of experts one rounding may choose another expert: no tolerance holds there.
DENSE = tuple(variant for variant in VARIANTS if variant not in LATER or variant == "phi3_longrope")


def torch_errors(variant: str) -> dict[str, float]:
    """`largest` and `rms` of a family."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(FOLDER / variant, dtype=torch.bfloat16, attn_implementation="eager")
    given, exact = inputs(), np.load(FOLDER / variant / "expected.npz")["logps"]
    errors = []
    for row, length in enumerate(given["lengths"]):
        tokens = torch.tensor(given["tokens"][row : row + 1, :length], dtype=torch.long)
        with torch.no_grad():
            logits = model(tokens).logits.float()
        logps = torch.log_softmax(logits[:, :-1], -1).gather(-1, tokens[:, 1:, None])[0, :, 0].numpy()
        errors.append(logps - exact[row, : length - 1])
    return errors_of(np.concatenate(errors))


def errors_of(differences: np.ndarray) -> dict[str, float]:
    """The two numbers of some differences."""
    rms = float(np.sqrt(np.mean(np.square(differences))))
    return {"largest": round(float(np.abs(differences).max()), 4), "rms": round(rms, 5)}


def main() -> None:
    FILE.write_text(json.dumps({variant: torch_errors(variant) for variant in DENSE}, indent=1) + "\n")


if __name__ == "__main__":
    main()
