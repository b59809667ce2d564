"""The demo's gain is real, and what it leaves behind can be used."""

import json

import numpy as np
import pytest

from dpo_jax.cli import main
from dpo_jax.language.models.folder import load_tokenizer
from dpo_jax.language.models.weights import load_hf
from dpo_jax.report import read_metrics
from dpo_jax.worlds import digits


@pytest.mark.slow
def test_demo_gains_fifteen_points(tmp_path, capsys):
    out = tmp_path / "demo"
    shorter = ["--warm-steps", "200", "--prompts", "300", "--steps", "80", "--test-prompts", "500"]
    assert main(["demo", "--out", str(out), "--json", *shorter]) == 0
    printed = capsys.readouterr()
    values = json.loads(printed.out.strip().splitlines()[-1])
    assert len(printed.out.strip().splitlines()) == 1 and "warm start" in printed.err
    assert values["accuracy_after"] > values["accuracy_before"] + 0.15
    assert values["accuracy_before_interval"][1] < values["accuracy_after_interval"][0]
    assert 0.05 < values["kl"] < 3 and values["margin"] > 0.5
    config, variables = load_hf(out / "export")
    assert config.vocabulary_size == digits.VOCABULARY_SIZE
    assert np.isfinite(np.asarray(variables["head"]["embedding"])).all()
    assert load_tokenizer(out / "export").eos_token_id == digits.EOS
    assert read_metrics(out)[-1]["step"] == 80
    assert main(["demo", "--out", str(out)]) == 2
    assert "already holds a run" in capsys.readouterr().err
