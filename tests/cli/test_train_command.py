"""Whole training runs: what they compute, print and write; splits of a batch change nothing."""

import json
import math

import jax
import numpy as np
import pytest
from tiny_runs import Answer, command, losses, make_pairs, train, write_rows

from dpo_jax.checkpoint import open_checkpoints
from dpo_jax.language.models.weights import load_hf
from dpo_jax.tree import named_leaves

STEPS = 8


def saved_params(out, step=STEPS) -> dict[str, np.ndarray]:
    """The parameters in a checkpoint, as NumPy arrays by name."""
    variables = load_hf(out / "export")[1]
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), variables)
    with open_checkpoints(out / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore({"params": abstract}, step=step, subset=True).state["params"]
    return jax.tree.map(np.asarray, named_leaves(restored))


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """(folder, answer) of the run that the others are compared with."""
    out = tmp_path_factory.mktemp("run")
    answer = train(tiny, out, "--eval-every", 4, "--held-out", 6.0, steps=STEPS)
    assert answer.code == 0, answer.err
    return out, answer


def hand_scored(folder, texts: list[tuple[str, str]]) -> np.ndarray:
    """Log-probabilities of completions (with the EOS after them) by torch's model of the same folder, float64 [N]."""
    torch = pytest.importorskip("torch", reason="compares reference log-probabilities with torch's")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    values = []
    for prompt, completion in texts:
        prefix = tokenizer(prompt)["input_ids"]
        ids = [*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]
        assert ids[: len(prefix)] == prefix
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        values.append(sum(float(logps[i - 1, ids[i]]) for i in range(len(prefix), len(ids))))
    return np.array(values)


def test_loss_begins_at_log_two_and_falls(run):
    _, answer = run
    assert abs(answer.result["loss_first"] - math.log(2)) < 1e-4
    assert answer.result["loss_last"] < 0.6
    assert answer.result["accuracy_train"] == 1.0


def test_standard_output_is_one_json_object_and_the_log_is_on_standard_error(run):
    _, answer = run
    assert len(answer.out.splitlines()) == 1
    assert {"loss_first", "loss_last", "accuracy", "tokens_per_second", "fill_rate", "resumed_from"} <= set(
        answer.result
    )
    assert answer.result["resumed_from"] == 0 and answer.result["steps"] == STEPS
    assert 0.3 < answer.result["fill_rate"] <= 1
    assert answer.result["tokens_per_second"] > 0
    assert answer.err.index("each device needs") < answer.err.index(f"train dpo 1/{STEPS}")
    needs = answer.result["needs"]
    assert needs["policy"] == needs["reference"] and needs["optimizer"] >= 2 * needs["policy"]


def test_metrics_hold_every_step_and_the_evaluations(run):
    out, answer = run
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"] == list(range(1, STEPS + 1))
    evaluations = [line for line in lines if line["split"] == "eval"]
    assert [line["step"] for line in evaluations] == [4, 8]
    assert all(line["examples"] == 6 for line in evaluations)
    assert evaluations[-1]["accuracy"] == answer.result["accuracy"]
    assert evaluations[1]["loss"] < evaluations[0]["loss"] < math.log(2)
    assert list((out / "tensorboard").glob("events.*"))


def test_export_is_the_trained_policy(run):
    out, _ = run
    exported = jax.tree.map(np.asarray, named_leaves(load_hf(out / "export")[1]))
    for name, array in saved_params(out).items():
        np.testing.assert_array_equal(exported[name], array, err_msg=name)


def test_config_of_a_run_gives_the_same_run(run, tmp_path):
    out, _ = run
    answer = command("train", "dpo", "--config", out / "run.json", "--out", tmp_path / "again", "--json")
    assert answer.code == 0, answer.err
    assert losses(tmp_path / "again") == losses(out)
    assert losses(tmp_path / "again", "eval") == losses(out, "eval")


def test_first_loss_against_another_reference_is_the_one_computed_by_hand(tiny, tmp_path):
    rows = [json.loads(line) for line in tiny.rows.read_text().splitlines()][:8]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "out"
    options = ("--data", data, "--held-out", 0.0, "--reference-model", tiny.other, "--beta", 0.3, "--no-export")
    answer = train(tiny, out, *options, steps=1)
    assert answer.code == 0, answer.err
    sides = [[(row["prompt"], row[side]) for row in rows] for side in ("chosen", "rejected")]
    ratios = [hand_scored(tiny.model, side) - hand_scored(tiny.other, side) for side in sides]
    margins = 0.3 * (ratios[0] - ratios[1])
    expected = np.log1p(np.exp(-margins)).mean()
    assert abs(expected - math.log(2)) > 0.01
    np.testing.assert_allclose(answer.result["loss_first"], expected, rtol=1e-5)
    np.testing.assert_allclose(answer.result["accuracy"], (margins > 0).mean(), atol=1e-6)


SPLITS = {
    "padded": ("--layout", "padded"),
    "microbatches": ("--microbatches", 2),
    "data": ("--mesh-data", 8),
    "fsdp": ("--mesh-data", 2, "--mesh-fsdp", 4),
    "tensor parallel": ("--mesh-data", 1, "--mesh-fsdp", 4, "--mesh-model", 2),
    "microbatches on a mesh": ("--mesh-fsdp", 2, "--mesh-model", 4, "--microbatches", 4),
    "remat": ("--remat", "full", "--mesh-model", 8),
    "reference columns": ("--reference", "columns"),
}


@pytest.mark.parametrize("options", SPLITS.values(), ids=SPLITS.keys())
def test_splits_and_layouts_change_nothing(run, tiny, tmp_path, options):
    out, _ = run
    answer = train(tiny, tmp_path, "--eval-every", 4, "--held-out", 6.0, *options, steps=STEPS)
    assert answer.code == 0, answer.err
    np.testing.assert_allclose(losses(tmp_path), losses(out), rtol=0, atol=1e-5)
    np.testing.assert_allclose(losses(tmp_path, "eval"), losses(out, "eval"), rtol=0, atol=1e-5)
    other = saved_params(tmp_path)
    for name, array in saved_params(out).items():
        np.testing.assert_allclose(other[name], array, rtol=0, atol=1e-5, err_msg=name)


def test_one_device_alone_takes_the_same_course(run, tiny):
    """The same batches through the library's functions on a mesh of one device, padded rows, no command line."""
    from dpo_jax.cli.configs import DataConfig, ModelConfig
    from dpo_jax.cli.data import Wanted, layout_of, read_examples
    from dpo_jax.cli.models import open_model
    from dpo_jax.language.data.batches import BatchSource, split_examples
    from dpo_jax.language.methods import dpo_loss
    from dpo_jax.language.objectives import from_loss
    from dpo_jax.optimizers import OptimizerConfig, make_optimizer
    from dpo_jax.sharding import make_mesh
    from dpo_jax.train import init_state, make_train_step

    out, _ = run
    model = open_model(str(tiny.model), ModelConfig())
    examples = read_examples([str(tiny.rows)], model.tokenizer, DataConfig(), None, Wanted("pairs"))
    examples, _ = split_examples(examples, held_out=6.0, seed=0)
    layout = layout_of(examples, batch_size=8, row_multiple=1, seed=0, padded=True).layout
    source = BatchSource(examples, layout, batch_size=8, seed=0, padded=True)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.01), STEPS)
    variables = model.load(make_mesh(devices=jax.devices()[:1]))
    state = init_state(variables, optimizer, jax.random.key(0))
    step = jax.jit(make_train_step(from_loss(dpo_loss, beta=0.1), model.apply_fn, optimizer))
    found = []
    for number in range(STEPS):
        state, metrics = step(state, source[number])
        found.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses(out), found, rtol=0, atol=1e-5)


def test_reference_columns_are_read_back_until_weights_or_rows_change(tiny, tmp_path):
    def columns(name: str, *options) -> Answer:
        answer = train(tiny, tmp_path / name, "--reference", "columns", "--no-export", *options, steps=1)
        assert answer.code == 0, answer.err
        return answer

    assert "computed and kept" in columns("a").err
    cached = sorted((tmp_path / "a").glob("reference_logps_*.npz"))
    assert len(cached) == 2  # training and held-out rows
    again = columns("a")
    assert "read from" in again.err and "computed and kept" not in again.err
    # A damaged file is no file.
    for path in cached:
        path.write_bytes(path.read_bytes()[:100])
    assert "read from" not in columns("a").err
    (tmp_path / "b").mkdir()
    for path in cached:
        (tmp_path / "b" / path.name).write_bytes(path.read_bytes())
    other_weights = columns("b", "--reference-model", tiny.other)
    assert "read from" not in other_weights.err
    assert abs(other_weights.result["loss_first"] - math.log(2)) > 1e-3
    rows = make_pairs(tmp_path / "rows.jsonl", seed=5)
    assert "read from" not in columns("b2", "--data", rows).err


def test_reference_columns_take_a_reference_of_another_shape(tiny, tmp_path):
    from tiny_runs import make_tiny

    wide = make_tiny(tmp_path / "wide", tiny.rows, intermediate_size=48)
    answer = train(tiny, tmp_path / "a", "--reference", "columns", "--reference-model", wide, "--no-export", steps=1)
    assert answer.code == 0, answer.err
    assert abs(answer.result["loss_first"] - math.log(2)) > 1e-3


def test_batch_larger_than_the_data_counts_every_row_once(tiny, tmp_path):
    rows = make_pairs(tmp_path / "rows.jsonl", count=5)
    answer = train(tiny, tmp_path / "a", "--data", rows, "--held-out", 0.0, "--no-export", steps=2, batch_size=16)
    assert answer.code == 0, answer.err
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [line["examples"] for line in lines] == [5, 5]
    assert abs(answer.result["loss_first"] - math.log(2)) < 1e-4


def test_sft_trains_on_single_completions(tiny, tmp_path):
    pairs = [json.loads(line) for line in tiny.rows.read_text().splitlines()]
    rows = write_rows(tmp_path / "r.jsonl", [{"prompt": r["prompt"], "completion": r["chosen"]} for r in pairs])
    answer = train(tiny, tmp_path / "out", "--data", rows, "--no-export", method="sft")
    assert answer.code == 0, answer.err
    assert answer.result["loss_last"] < answer.result["loss_first"]


def test_every_option_is_read():
    """Each field of the training config is looked up somewhere in the commands: none is silently ignored."""
    from dataclasses import fields
    from pathlib import Path

    import dpo_jax.cli as package
    from dpo_jax import optimizers
    from dpo_jax.cli.configs import DataConfig, LoopConfig, MeshConfig, ModelConfig

    files = [path for path in Path(package.__file__).parent.glob("*.py") if path.name not in ("configs.py", "demo.py")]
    code = "".join(path.read_text() for path in [*files, Path(optimizers.__file__)])
    for part in (ModelConfig, DataConfig, LoopConfig, MeshConfig, optimizers.OptimizerConfig):
        for field in fields(part):
            assert f".{field.name}" in code, f"{part.__name__}.{field.name} is read nowhere"
