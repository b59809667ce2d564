"""evaluate against float64 arithmetic on torch's softmax; export against the run's own weights."""

import json

import jax
import numpy as np
import pytest
from tiny_runs import command, train

from dpo_jax.language.models.weights import load_hf
from dpo_jax.tree import named_leaves

torch = pytest.importorskip("torch", reason="compares the measures with torch's softmax")


def weights(folder) -> dict[str, np.ndarray]:
    return jax.tree.map(np.asarray, named_leaves(load_hf(folder)[1]))


def expected_measures(policy_folder, reference_folder, rows, beta: float) -> dict[str, float]:
    """Every measure from the whole softmax of both models, float64."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    models = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64) for f in (policy_folder, reference_folder)]
    sums: dict[str, list[float]] = {}
    for row in rows:
        kl = []
        for side in ("chosen", "rejected"):
            prefix = tokenizer(row["prompt"])["input_ids"]
            ids = [*tokenizer(row["prompt"] + row[side])["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                policy, reference = (m(torch.tensor([ids])).logits[0].log_softmax(-1).numpy() for m in models)
            places = np.arange(len(prefix), len(ids))
            chosen_ids = np.array(ids)[places]
            policy, reference = policy[places - 1], reference[places - 1]
            own, other = (logps[np.arange(len(places)), chosen_ids] for logps in (policy, reference))
            kl.append((np.exp(policy) * (policy - reference)).sum())
            for name, value in (
                (f"{side}_logps", own.sum()),
                (f"{side}_reward", beta * (own - other).sum()),
                (f"{side}_length", len(places)),
                (f"{side}_logps_per_token", own.mean()),
            ):
                sums.setdefault(name, []).append(value)
        sums.setdefault("kl", []).append(np.mean(kl))
    margins = np.array(sums["chosen_reward"]) - np.array(sums["rejected_reward"])
    of_logps = np.array(sums["chosen_logps"]) > np.array(sums["rejected_logps"])
    means = {name: float(np.mean(values)) for name, values in sums.items()}
    more = {"margin": margins.mean(), "accuracy": (margins > 0).mean(), "loss": np.log1p(np.exp(-margins)).mean()}
    return {**means, **more, "likelihood_accuracy": of_logps.mean(), "examples": len(rows)}


@pytest.fixture(scope="module")
def rows(tiny):
    return [json.loads(line) for line in tiny.rows.read_text().splitlines()]


def test_measures_are_those_of_the_whole_softmax(tiny, rows):
    options = ("--reference-model", tiny.other, "--beta", 0.3, "--batch-size", 16, "--json")
    answer = command("evaluate", "--model", tiny.model, "--data", tiny.rows, *options)
    assert answer.code == 0, answer.err
    expected = expected_measures(tiny.model, tiny.other, rows, beta=0.3)
    assert 0 < expected["accuracy"] < 1 and expected["kl"] > 0.01
    likelihood = expected.pop("likelihood_accuracy")
    for name, value in expected.items():
        np.testing.assert_allclose(answer.result[name], value, rtol=2e-5, atol=1e-5, err_msg=name)
    assert answer.result["accuracy_low"] < expected["accuracy"] < answer.result["accuracy_high"]
    alone = command("evaluate", "--model", tiny.model, "--data", tiny.rows, "--batch-size", 16, "--json")
    assert alone.code == 0, alone.err
    assert "kl" not in alone.result
    np.testing.assert_allclose(alone.result["accuracy"], likelihood, atol=1e-6)
    for name in ("chosen_logps", "rejected_logps", "chosen_length", "rejected_logps_per_token"):
        np.testing.assert_allclose(alone.result[name], expected[name], rtol=2e-5, err_msg=name)


def test_a_run_is_evaluated_and_exported_with_and_without_its_moving_average(tiny, tmp_path):
    run = tmp_path / "run"
    options = ("--ema-decay", 0.5, "--save-every", 2)
    answer = train(tiny, run, *options, steps=4)
    assert answer.code == 0, answer.err
    evaluated = command("evaluate", "--model", run, "--data", tiny.rows, "--reference-model", tiny.model, "--json")
    assert evaluated.code == 0, evaluated.err
    assert evaluated.result["model"] == str(run / "export")
    assert evaluated.result["accuracy"] > 0.5 and evaluated.result["kl"] > 0

    def export(name: str, *words) -> dict[str, np.ndarray]:
        answer = command("export", "--run", run, "--out", tmp_path / name, "--json", *words)
        assert answer.code == 0, answer.err
        answers[name] = answer.result
        return weights(tmp_path / name)

    answers: dict[str, dict] = {}
    own, average, params = weights(run / "export"), export("auto"), export("params", "--weights", "params")
    early = export("early", "--step", 2, "--weights", "params")
    assert [answers[name]["step"] for name in ("auto", "params", "early")] == [4, 4, 2]
    assert answers["auto"]["weights"] == "ema"
    begun = weights(tiny.model)
    for name, array in own.items():
        np.testing.assert_array_equal(average[name], array, err_msg=name)
        assert np.abs(params[name] - array).max() > 0 and np.abs(params[name] - early[name]).max() > 0
        # decay 1/2 over four steps keeps 1/16 of the beginning: the average lies behind the parameters.
        assert np.linalg.norm(array - begun[name]) < np.linalg.norm(params[name] - begun[name])
    missing = command("export", "--run", run, "--out", tmp_path / "x", "--step", 3)
    assert missing.code == 1 and "not step 3" in missing.err and "Traceback" not in missing.err


def test_a_run_without_moving_average_refuses_to_export_one(tiny, tmp_path):
    assert train(tiny, tmp_path / "run", "--no-export", steps=1).code == 0
    refused = command("export", "--run", tmp_path / "run", "--out", tmp_path / "x", "--weights", "ema")
    assert refused.code == 2 and "keeps no moving average" in refused.err
    evaluated = command("evaluate", "--model", tmp_path / "run", "--data", tiny.rows)
    assert evaluated.code != 0 and str(tmp_path / "run") in evaluated.err
