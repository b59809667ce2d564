"""Every wrong use has its exit code, one clear line and no traceback; nothing is silently ignored."""

import json

import pytest
from tiny_runs import command, make_tiny, train, write_rows

from dpo_jax import __version__
from dpo_jax.cli.catalogue import methods

DONE, FAILURE, WRONG_USE = 0, 1, 2


def assert_refused(answer, code, *words):
    assert answer.code == code, answer.err
    assert answer.out == ""
    assert "Traceback" not in answer.err
    for word in words:
        assert word in answer.err, answer.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "unknown command 'trian'"),
        (["train", "dop"], "did you mean dpo"),
        (["train", "zzzz"], "dpo-jax methods"),
        (["train", "dpo"], "--model, --data, --out"),
        (["train", "dpo", "--config"], "--config needs a file"),
        (["train", "dpo", "--config", "/nowhere/run.json"], "/nowhere/run.json"),
        (["train", "dpo", "--batchsize", "3"], "batchsize"),
        (["train", "dpo", "--steps", "many"], "steps"),
        (["train", "dpo", "--optimizer", "adam2"], "adam2"),
        (["evaluate"], "model"),
        (["evaluate", "--model", "x", "--data", "y", "--dtype", "float8"], "float8"),
        (["export", "--run", "/nowhere", "--out", "x"], "/nowhere is not the folder of a run"),
        (["export", "--run", "/nowhere", "--out", "x", "--weights", "best"], "best"),
        (["methods", "--xml"], "xml"),
    ],
)
def test_wrong_words_exit_with_two(words, said):
    assert_refused(command(*words), WRONG_USE, said)


def test_train_without_a_method_and_no_command_at_all():
    answer = command("train")
    assert answer.code == WRONG_USE and "needs a method" in answer.err
    assert command().code == WRONG_USE


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("dpo", "--beta -1", "beta is -1"),
        ("cdpo", "--label-smoothing 0.9", "label_smoothing is 0.9"),
        ("dpo", "--batch-size 0", "--batch-size is 0"),
        ("dpo", "--steps 0", "--steps is 0"),
        ("dpo", "--microbatches 0", "--microbatches is 0"),
        ("dpo", "--epochs -1", "--epochs is -1"),
        ("dpo", "--epochs 2 --steps 3", "--epochs has no effect with --steps"),
        ("dpo", "--seed -1", "--seed is -1"),
        ("dpo", "--keep 0", "--keep is 0"),
        ("dpo", "--log-every 0", "--log-every is 0"),
        ("dpo", "--eval-every -1", "--eval-every is -1"),
        ("dpo", "--held-out -0.5", "--held-out is -0.5"),
        ("dpo", "--held-out nan", "--held-out is nan"),
        ("dpo", "--held-out 0.2 --eval-data x.jsonl", "--held-out has no effect with --eval-data"),
        ("dpo", "--held-out 0 --eval-every 3", "--eval-every has no effect with --held-out 0"),
        ("dpo", "--max-length 1", "--max-length is 1"),
        ("dpo", "--max-prompt-length 9 --max-length 9", "--max-prompt-length is 9"),
        ("dpo", "--max-prompt-length 9 --truncation drop", "--max-prompt-length has no effect with --truncation drop"),
        ("dpo", "--learning-rate 0", "--learning-rate is 0"),
        ("dpo", "--clip -1", "--clip is -1"),
        ("dpo", "--warmup -1", "--warmup is -1"),
        ("dpo", "--b1 1", "--b1 is 1"),
        ("dpo", "--b2 1.5", "--b2 is 1.5"),
        ("dpo", "--optimizer sgd --b2 0.9", "--b2 has no effect with --optimizer sgd"),
        ("dpo", "--optimizer adafactor --b1 0.8", "--b1 has no effect with --optimizer adafactor"),
        ("dpo", "--optimizer lion --epsilon 1e-6", "--epsilon has no effect with --optimizer lion"),
        ("dpo", "--schedule constant --final-learning-rate 0.1", "--final-learning-rate has no effect"),
        ("dpo", "--ema-decay 1", "--ema-decay is 1"),
        ("dpo", "--reference-update-rate 0.5", "--reference-update-rate has no effect without"),
        ("dpo", "--reference-update-every 2 --reference-update-rate 1.5", "--reference-update-rate is 1.5"),
        ("dpo", "--reference-update-every 2 --reference columns", "columns do not move"),
        ("sft", "--reference-model x", "--reference-model has no effect: sft reads no reference"),
        ("sft", "--reference columns", "--reference columns has no effect"),
        ("sft", "--reference-update-every 2", "--reference-update-every has no effect"),
        ("dpo", "--mesh-fsdp 3", "does not fit 8 devices"),
        ("dpo", "--mesh-expert 3", "does not fit 8 devices"),
        ("dpo", "--router-loss -1", "--router-loss is -1"),
        ("dpo", "--mesh-slices 0", "--mesh-slices is 0"),
        ("dpo", "--mesh-slices 3", "cannot span 3 slices"),
    ],
)
def test_options_out_of_range_or_without_effect_exit_with_two(tmp_path, method, options, said):
    fixed = ("--model", tmp_path / "m", "--data", tmp_path / "d.jsonl", "--out", tmp_path / "out")
    assert_refused(command("train", method, *fixed, *options.split()), WRONG_USE, said)
    assert not (tmp_path / "out").exists()


def test_no_such_data_file(tiny, tmp_path):
    answer = train(tiny, tmp_path, "--data", tmp_path / "none.jsonl", tmp_path / "nor.jsonl")
    assert_refused(answer, WRONG_USE, "none.jsonl", "nor.jsonl")


def test_bad_row_is_named_or_skipped_and_listed(tiny, tmp_path):
    good = [json.loads(line) for line in tiny.rows.read_text().splitlines()]
    rows = write_rows(tmp_path / "rows.jsonl", [good[0], {"prompt": "x", "chosen": 3, "rejected": "y"}, *good[1:]])
    answer = train(tiny, tmp_path / "a", "--data", rows, "--on-bad-row", "error")
    assert_refused(answer, FAILURE, f"{rows}, row 2")
    answer = train(tiny, tmp_path / "b", "--data", rows, "--no-export", steps=1)
    assert answer.code == DONE, answer.err
    assert "1 bad rows skipped" in answer.err
    listed = [json.loads(line) for line in (tmp_path / "b" / "skipped_rows.jsonl").read_text().splitlines()]
    assert [(row["file"], row["number"]) for row in listed] == [(str(rows), 2)]


def test_no_row_is_left(tiny, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "x"}] * 3)
    assert_refused(train(tiny, tmp_path / "a", "--data", rows), FAILURE, "no good row is left")
    (tmp_path / "empty.jsonl").write_text("")
    assert_refused(train(tiny, tmp_path / "a", "--data", tmp_path / "empty.jsonl"), FAILURE, "no good row is left")
    rows = write_rows(tmp_path / "same.jsonl", [{"prompt": "x", "chosen": "y", "rejected": "y"}] * 3)
    assert_refused(train(tiny, tmp_path / "a", "--data", rows), FAILURE, "no")


def test_rows_that_are_no_pairs(tiny, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "x", "completion": f" {word}"} for word in "abcdef"])
    needed = "the rows are singles, and pairs are needed"
    assert_refused(train(tiny, tmp_path / "a", "--data", rows), WRONG_USE, needed)
    answer = command("evaluate", "--model", tiny.model, "--data", rows)
    assert_refused(answer, WRONG_USE, needed)


def test_all_rows_held_out(tiny, tmp_path):
    assert_refused(train(tiny, tmp_path / "a", "--held-out", 40.0), FAILURE, "held_out is 40")


def test_no_checkpoint_where_one_should_be(tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_refused(train(tiny, tmp_path / "a", "--model", tmp_path / "empty"), FAILURE, str(tmp_path / "empty"))
    assert_refused(train(tiny, tmp_path / "a", "--model", tmp_path / "nothing"), FAILURE, str(tmp_path / "nothing"))


def test_reference_of_another_shape(tiny, tmp_path):
    wide = make_tiny(tmp_path / "wide", tiny.rows, intermediate_size=48)
    assert_refused(train(tiny, tmp_path / "a", "--reference-model", wide), WRONG_USE, str(wide), "another shape")
    options = ("--model", tiny.model, "--data", tiny.rows, "--reference-model", wide)
    assert_refused(command("evaluate", *options), WRONG_USE, str(wide), "another shape")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batch-size", 0], "--batch-size is 0"),
        (["--max-length", 1], "--max-length is 1"),
        (["--beta", 0.5], "--beta has no effect without --reference-model"),
        (["--reference-model", "x", "--beta", -1], "--beta is -1"),
        (["--mesh-fsdp", 3], "does not fit 8 devices"),
    ],
)
def test_options_of_evaluate(tiny, words, said):
    assert_refused(command("evaluate", "--model", tiny.model, "--data", tiny.rows, *words), WRONG_USE, said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "--config"),
        ("[1]", "key 'config'"),
        ('{"command": "train", "method": "ipo", "config": {}}', "`train ipo`"),
        ('{"command": "train", "method": "dpo", "config": {"loop": {"stepz": 3}}}', "stepz"),
        ('{"command": "train", "method": "dpo", "config": {"loop": {"steps": "many"}}}', "steps"),
        ('{"command": "train", "method": "dpo", "config": {"loop": {"steps": 3.7}}}', "steps"),
        ('{"command": "train", "method": "dpo", "config": {"loop": {"export": "no"}}}', "export"),
        ('{"command": "train", "method": "dpo", "config": {"loop": {"batch_size": null}}}', "batch_size"),
        ('{"command": "train", "method": "dpo", "config": {"model": {"dtype": "float8"}}}', "dtype"),
        ('{"command": "train", "method": "dpo", "config": {"data": {"data": "rows.jsonl"}}}', "data"),
    ],
)
def test_config_that_no_run_wrote(tmp_path, text, said):
    path = tmp_path / "run.json"
    path.write_text(text)
    assert_refused(command("train", "dpo", "--config", path), WRONG_USE, str(path), said)


def test_debug_shows_the_traceback(tiny, tmp_path):
    answer = train(tiny, tmp_path / "a", "--model", tmp_path / "nothing", "--debug")
    assert answer.code == FAILURE
    assert "Traceback" in answer.err


def test_version_help_and_methods():
    assert command("--version")[:2] == (DONE, __version__ + "\n")
    assert "evaluate" in command("--help").out
    assert "dpo" in command("train", "--help").out
    help_text = command("train", "dpo", "--help")
    assert help_text.code == DONE and "--beta" in help_text.out and "KL constraint" in help_text.out
    listed = command("methods", "--json").result["methods"]
    assert [row["method"] for row in listed] == list(methods())
    assert {row["method"]: row["reference"] for row in listed}["sft"] == "no"
    assert command("methods", "--markdown").out.splitlines()[1].startswith("| --- |")
    assert all(slug in command("methods").out for slug in methods())
