"""Adapters through the command line: only they move, they start at the reference, go on and are exported."""

import json
import os
import signal

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_runs import command, losses, train

from dpo_jax.checkpoint import open_checkpoints
from dpo_jax.cli import loop
from dpo_jax.language.models.adapters import load_adapter
from dpo_jax.language.models.decoder import decoder_function
from dpo_jax.language.models.weights import load_hf
from dpo_jax.lora import merge, with_adapters
from dpo_jax.tree import named_leaves

LORA = ("--lora-rank", 2, "--held-out", 4.0)
KINDS = {
    "lora": ("--mesh-fsdp", 2, "--mesh-model", 2),
    "small": ("--base-quantization", "nf4", "--mesh-fsdp", 2),
    "dora": ("--dora", "--rslora", "--lora-alpha", 3.0, "--lora-targets", "layers/attention/(query|value)/kernel"),
}


@pytest.fixture(scope="module", params=KINDS.values(), ids=list(KINDS))
def run(request, tiny, tmp_path_factory):
    """(options, folder) of a finished run."""
    out = tmp_path_factory.mktemp("adapters")
    answer = train(tiny, out, *LORA, *request.param, steps=6)
    assert answer.code == 0, answer.err
    assert "training adapters: " in answer.err and answer.result["loss_last"] < answer.result["loss_first"]
    assert ("the base is rounded to nf4: " in answer.err) == ("nf4" in request.param)
    return request.param, out


def leaves_of(out, step=6):
    with open_checkpoints(out / "checkpoints", read_only=True) as checkpoints:
        record, reason = checkpoints._read_record(step)
    assert record is not None, reason
    return record["leaves"]


def test_the_first_loss_is_log_two(run):
    assert abs(losses(run[1])[0] - np.log(2)) < 1e-6


def test_only_adapters_are_trained_and_kept(run):
    options, out = run
    names = leaves_of(out)
    kinds = {"lora_a", "lora_b"} | ({"lora_magnitude"} if "--dora" in options else set())
    for part in ("params", "reference"):
        assert {name.rsplit("/", 1)[-1] for name in names if name.startswith(part)} == kinds
    assert not [name for name in names if name.startswith("frozen")]


def test_the_exported_model_is_the_base_with_the_exported_adapter(run, tiny):
    options, out = run
    config, base = load_hf(tiny.model)
    loaded = load_adapter(out / "adapter", config)
    assert loaded.rslora == ("--rslora" in options) and loaded.base == str(tiny.model)
    want, got = named_leaves(merge(with_adapters(base, loaded.adapters))), named_leaves(load_hf(out / "export")[1])
    for name, leaf in want.items():
        np.testing.assert_allclose(got[name], leaf, rtol=0, atol=1e-6, err_msg=name)
        moved = np.any(np.asarray(got[name]) != named_leaves(base)[name])
        targets = ("query/kernel", "value/kernel") if "--dora" in options else ("kernel",)
        assert moved == (name.endswith(targets) and name.startswith("layers")), name


def test_export_of_a_checkpoint_writes_the_same(run, tmp_path):
    answer = command("export", "--run", run[1], "--out", tmp_path, "--json")
    assert answer.code == 0, answer.err
    for written, exported in ((tmp_path, run[1] / "export"), (tmp_path / "adapter", run[1] / "adapter")):
        (file,) = written.glob("*.safetensors")
        before = load_file(exported / file.name)
        for name, tensor in load_file(file).items():
            np.testing.assert_allclose(tensor, before[name], rtol=0, atol=1e-7, err_msg=name)
    assert (tmp_path / "adapter" / "adapter_config.json").read_text() == (
        run[1] / "adapter" / "adapter_config.json"
    ).read_text()


def test_interrupted_it_ends_as_if_never_stopped(run, tiny, tmp_path, monkeypatch):
    options, out = run
    real, count = loop.shard_batch, 0

    def shard_batch(batch, mesh):
        nonlocal count
        count += 1
        if count == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(batch, mesh)

    monkeypatch.setattr(loop, "shard_batch", shard_batch)
    assert train(tiny, tmp_path, *LORA, *options, steps=6).result["stopped"]
    answer = train(tiny, tmp_path, *LORA, *options, steps=6)
    assert answer.code == 0 and answer.result["resumed_from"] == 3
    assert leaves_of(tmp_path) == leaves_of(out)
    assert losses(tmp_path) == losses(out)
    assert load_adapter(tmp_path / "adapter", load_hf(tiny.model)[0]).base == str(tiny.model)


def test_a_run_goes_on_from_an_adapters_folder(run, tiny, tmp_path):
    config, _ = load_hf(tiny.model)
    answer = train(tiny, tmp_path, "--adapter", run[1] / "adapter", "--held-out", 4.0, steps=2)
    assert answer.code == 0, answer.err
    # The reference is the policy at the start: the adapter that was given.
    assert abs(losses(tmp_path)[0] - np.log(2)) < 1e-6
    before, after = (load_adapter(folder / "adapter", config) for folder in (run[1], tmp_path))
    assert jax.tree.structure(before.adapters) == jax.tree.structure(after.adapters)
    assert before.rslora == after.rslora
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before.adapters, after.adapters)
    assert 0 < max(jax.tree.leaves(moved)) < 0.1
    decoder_function(config, after.adapters)


def test_a_reward_model_trains_adapters_and_its_head(tiny, tmp_path):
    answer = train(tiny, tmp_path, *LORA, method="bradley-terry", steps=3)
    assert answer.code == 0, answer.err
    params = {name for name in leaves_of(tmp_path, 3) if name.startswith("params")}
    assert "params/score/weight" in params and len(params) == 15
    options = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert options["modules_to_save"] == ["score"] and options["task_type"] == "SEQ_CLS"
    config, _ = load_hf(tmp_path / "export")
    loaded = load_adapter(tmp_path / "adapter", config)
    np.testing.assert_array_equal(loaded.learned["score"]["weight"], load_hf(tmp_path / "export")[1]["score"]["weight"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--lora-rank -1", "--lora-rank is -1"),
        ("--lora-rank 2 --lora-alpha 0", "--lora-alpha is 0"),
        ("--lora-rank 2 --lora-targets (", "no regular expression"),
        ("--lora-rank 2 --lora-targets query", "--lora-targets: no kernel's name matches"),
        ("--lora-alpha 4 --dora", "--lora-alpha, --dora has no effect without --lora-rank"),
        ("--rslora", "--rslora has no effect without --lora-rank"),
        ("--base-quantization int8", "--base-quantization has no effect without --lora-rank"),
        ("--adapter x --lora-rank 2", "--lora-rank has no effect with --adapter"),
        ("--adapter nowhere", "nowhere/adapter_config.json"),
        ("--lora-rank 2 --reference-model x", "--reference-model needs a second frozen base"),
        ("--lora-rank 2 --reference-update-every 2", "would mix the factors"),
        ("--lora-rank 2 --optimizer muon", "--optimizer muon has no effect on adapters"),
    ],
)
def test_what_adapters_cannot_do_is_refused(options, said, tiny, tmp_path):
    answer = train(tiny, tmp_path / "out", *options.split())
    assert answer.code in (1, 2) and answer.out == "" and "Traceback" not in answer.err
    assert said in answer.err
