"""Any form of rows for any method: what is turned into what, what is missing and how to make it, what has no effect."""

import json

import pytest
from every_method import World, make_world
from tiny_runs import command, losses, write_rows

from dpo_jax.cli.catalogue import method
from dpo_jax.cli.console import UsageError
from dpo_jax.language.models.folder import read_config
from dpo_jax.worlds import digits


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def train(world, method, form, out, *words, steps=2):
    fixed = ("--model", world.model, "--data", world.rows[form], "--out", out, "--steps", steps, "--batch-size", 8)
    return command("train", method, *fixed, "--held-out", 0, "--no-export", "--json", *words)


@pytest.mark.parametrize(
    ("method", "form", "said"),
    [
        ("dpo", "lists", "48 rows of lists give 48 of pairs"),
        ("dpo", "triples", "48 rows of triples give 48 of pairs"),
        ("kto", "pairs", "48 rows of pairs give 96 of mismatched"),
        ("bco", "lists", "48 rows of lists give 96 of singles"),
        ("plackett-luce", "pairs", "48 rows of pairs give 48 of lists"),
        ("plackett-luce", "triples", "48 rows of triples give 48 of lists"),
    ],
)
def test_rows_are_turned_into_the_form_of_the_method(method, form, said, world, tmp_path):
    answer = train(world, method, form, tmp_path / "run")
    assert answer.code == 0, answer.err
    assert said in answer.err and len(losses(tmp_path / "run")) == 2


@pytest.mark.parametrize(
    ("method", "form", "words", "expected"),
    [
        ("dpo", "singles", (), "the rows are singles, and pairs are needed"),
        ("triple-po", "pairs", (), "the rows are pairs, and triples are needed: each row with the keys prompt, gold"),
        ("tgdpo", "pairs", (), "`guidance_logps`: give --guidance-model"),
        ("cdpo-critical", "pairs", (), "`contrastive_logps`: give --positive-model and --negative-model"),
        ("sem-dpo", "pairs", (), "`semantic_distance`: give each row `semantic_distance`, or --embedding-model"),
        ("madpo", "triples", (), "`chosen_score`: give each row `chosen_score` and `rejected_score`"),
        ("robust-shift", "triples", (), "`calibration`: give each row `calibration`, or `golden`"),
        ("dpo", "pairs", ("--reward-model", "x"), "--reward-model has no effect"),
        ("dpo", "pairs", ("--guidance-model", "x"), "--guidance-model has no effect: dpo reads nothing"),
        ("dpo", "pairs", ("--step-delimiter", ";"), "--step-delimiter has no effect"),
        ("dpo", "pairs", ("--revision-instruction", "x"), "--revision-instruction has no effect"),
        ("cdpo-critical", "pairs", ("--positive-model", "x"), "are given together or not at all"),
    ],
)
def test_what_is_missing_or_idle_is_one_clear_error(method, form, words, expected, world, tmp_path):
    answer = train(world, method, form, tmp_path / "run", *words)
    assert answer.code == 2 and expected in answer.err, answer.err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_rows_without_the_form_are_listed_and_the_rest_is_trained(world, tmp_path):
    rows = digits.make_rows("lists", 20, seed=0)
    rows[4]["scores"] = [0.5] * len(rows[4]["scores"])
    path = write_rows(tmp_path / "lists.jsonl", rows)
    answer = train(world._replace(rows={"lists": path}), "dpo", "lists", tmp_path / "run")
    assert answer.code == 0, answer.err
    (skipped,) = map(json.loads, (tmp_path / "run" / "skipped_rows.jsonl").read_text().splitlines())
    assert skipped["number"] == 5 and "all scores of the list are equal" in skipped["reason"]


def test_frozen_models_columns_are_kept_and_read_back(world, tmp_path):
    words = ("--guidance-model", world.other)
    first = train(world, "tgdpo", "pairs", tmp_path / "run", *words)
    assert first.code == 0 and "guidance_logps of 48 examples computed" in first.err, first.err
    again = train(world, "tgdpo", "pairs", tmp_path / "run", *words)
    assert again.code == 0 and "guidance_logps of 48 examples read" in again.err


def test_a_guidance_model_that_is_the_reference_changes_nothing(world, tmp_path):
    """Its rewards are then zero, and TGDPO is DPO."""
    guided = train(world, "tgdpo", "pairs", tmp_path / "tgdpo", "--guidance-model", world.model)
    plain = train(world, "dpo", "pairs", tmp_path / "dpo")
    assert guided.code == plain.code == 0
    assert losses(tmp_path / "tgdpo") == pytest.approx(losses(tmp_path / "dpo"), rel=1e-6)


def test_a_reward_model_is_trained_and_exported(world, tmp_path):
    out = tmp_path / "run"
    fixed = ("--model", world.model, "--data", world.rows["pairs"], "--out", out, "--held-out", 8, "--json")
    answer = command("train", "bradley-terry", *fixed, "--steps", 40, "--batch-size", 16, "--learning-rate", 0.01)
    assert answer.code == 0, answer.err
    found = losses(out)
    assert found[-1] < 0.6 * found[0] and answer.result["accuracy_train"] > 0.8
    exported = read_config(out / "export")
    assert exported["architectures"] == ["LlamaForSequenceClassification"]
    scored = command(
        *("train", "madpo", "--model", world.model, "--data", world.rows["triples"], "--out", tmp_path / "scored"),
        *("--steps", 2, "--batch-size", 8, "--reward-model", out / "export"),
    )
    assert scored.code == 0, scored.err
    lists = command(
        *("train", "adpo", "--model", world.model, "--data", world.rows["lists"], "--out", tmp_path / "lists"),
        *("--steps", 2, "--batch-size", 8, "--reward-model", out / "export"),
    )
    assert lists.code == 0, lists.err
    headless = command(
        *("train", "madpo", "--model", world.model, "--data", world.rows["triples"], "--out", tmp_path / "headless"),
        *("--reward-model", world.model),
    )
    assert headless.code == 2 and "has no reward head" in headless.err
    # A reward model goes on as one, and is no policy.
    more = command(
        "train", "bradley-terry", *fixed[:1], out / "export", *fixed[2:4], "--out", tmp_path / "more", "--steps", 1
    )
    assert more.code == 0, more.err
    wrong = command("train", "dpo", *fixed[:1], out / "export", *fixed[2:4], "--out", tmp_path / "wrong", "--steps", 1)
    assert wrong.code != 0 and "is a reward model" in wrong.err
    exported_again = command("export", "--run", out, "--out", tmp_path / "again")
    assert exported_again.code == 0, exported_again.err
    assert read_config(tmp_path / "again")["architectures"] == exported["architectures"]


def test_a_papers_slug_stands_for_its_first_loss():
    assert method("reward-model").slug == "bradley-terry" and method("token-dpo").slug == "tdpo1"
    assert method("dpo").slug == "dpo"
    with pytest.raises(UsageError, match="unknown method 'r-to-q'"):  # a paper without a loss
        method("r-to-q")
