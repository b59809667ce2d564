"""The demo's gain is real, and what it leaves behind can be used."""

import json

import numpy as np
import pytest
from real_processes import finish, starting

from dpo_jax.cli import main
from dpo_jax.language.models.folder import load_tokenizer
from dpo_jax.language.models.weights import load_hf
from dpo_jax.report import read_metrics
from dpo_jax.worlds import digits


@pytest.mark.slow
def test_demo_gains_fifteen_points(tmp_path, capsys):
    out = tmp_path / "demo"
    shorter = ["--warm-steps", "200", "--prompts", "300", "--steps", "80", "--test-prompts", "500"]
    as_users_run_it = {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    with starting() as start:
        printed, said = finish([start(1, ["demo", "--out", out, "--json", *shorter], as_users_run_it)])[0]
    values = json.loads(printed)
    assert len(printed.strip().splitlines()) == 1 and "warm start" in said
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
