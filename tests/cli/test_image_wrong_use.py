"""Wrong use of the commands for diffusion models: exit code 2 and one line that names the option or the key."""

import json

import pytest
from PIL import Image
from tiny_images import change_rows, make_image_folder
from tiny_pipelines import make_tiny_pipeline
from tiny_runs import command

DONE, FAILURE, WRONG_USE = 0, 1, 2


def assert_refused(answer, *words, code=WRONG_USE):
    assert answer.code == code, answer.err
    assert answer.out == ""
    assert "Traceback" not in answer.err
    last = answer.err.strip().splitlines()[-1]
    for word in words:
        assert word in last, answer.err


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("model"), "sd")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return make_image_folder(tmp_path_factory.mktemp("rows") / "pairs", count=4)


def train(model, rows, out, *words, method="diffusion-dpo"):
    return command("train", method, "--model", model, "--data", rows, "--out", out, "--batch-size", 8, *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "diffusion-dop"], "did you mean diffusion-dpo"),
        (["train", "diffusion-dpo"], "--model, --data, --out"),
        (["train", "diffusion-dpo", "--model", "x", "--data", "y"], "needs --out"),
        (["train", "diffusion-dpo", "--max-length", "3"], "max-length"),
        (["train", "dpo", "--caption-dropout", "0.1"], "caption-dropout"),
        (["train", "diffusion-dpo", "--buckets", "round"], "round"),
    ],
)
def test_wrong_words(words, said):
    answer = command(*words)
    assert answer.code == WRONG_USE and said in answer.err and "Traceback" not in answer.err


@pytest.mark.parametrize("method", ["d3po", "ddpo", "grpo", "spo", "dro", "tailorpo"])
def test_methods_that_learn_from_their_own_samples(tmp_path, method):
    assert_refused(train("m", "d", tmp_path / "out", method=method), method, "samples of its own policy")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("dmpo", "--beta nan", "--beta is nan"),
        ("smpo", "--score-min nan", "--score-min is nan"),
        ("smpo", "--calls 0", "--calls is 0"),
        ("smpo", "--inversion-steps 0", "--inversion-steps is 0"),
        ("self-npo", "--rollout-steps 0", "--rollout-steps is 0"),
        ("self-npo", "--grid 0", "--grid is 0"),
        ("inversion-dpo", "--trajectory-steps 0", "--trajectory-steps is 0"),
        ("inversion-dpo", "--guidance nan", "--guidance is nan"),
        ("inpo", "--eta 2", "--eta is 2"),
        ("diffusion-dpo", "--batch-size 0", "--batch-size is 0"),
        ("diffusion-dpo", "--steps 0", "--steps is 0"),
        ("diffusion-dpo", "--microbatches 0", "--microbatches is 0"),
        ("diffusion-dpo", "--epochs 2 --steps 3", "--epochs has no effect with --steps"),
        ("diffusion-dpo", "--seed -1", "--seed is -1"),
        ("diffusion-dpo", "--held-out -1", "--held-out is -1"),
        ("diffusion-dpo", "--held-out 0.2 --eval-data x", "--held-out has no effect with --eval-data"),
        ("diffusion-dpo", "--held-out 0 --eval-every 3", "--eval-every has no effect with --held-out 0"),
        ("diffusion-dpo", "--caption-dropout 1.5", "--caption-dropout is 1.5"),
        ("diffusion-dpo", "--caption-dropout nan", "--caption-dropout is nan"),
        ("diffusion-dpo", "--offset-noise -1", "--offset-noise is -1"),
        ("diffusion-dpo", "--encode-batch 0", "--encode-batch is 0"),
        ("diffusion-dpo", "--resolution 0", "--resolution is 0"),
        ("diffusion-dpo", "--max-pixels 0", "--max-pixels is 0"),
        ("diffusion-dpo", "--learning-rate 0", "--learning-rate is 0"),
        ("diffusion-dpo", "--ema-decay 1", "--ema-decay is 1"),
        ("diffusion-dpo", "--optimizer lion --epsilon 1e-6", "--epsilon has no effect with --optimizer lion"),
        ("diffusion-dpo", "--schedule constant --final-learning-rate 0.1", "--final-learning-rate has no effect"),
        ("diffusion-dpo", "--reference-update-rate 0.5", "--reference-update-rate has no effect without"),
        ("mapo", "--reference-model x", "--reference-model has no effect: mapo reads no reference"),
        ("mapo", "--reference-update-every 2", "--reference-update-every has no effect"),
        ("diffusion-dpo", "--lora-alpha 3", "--lora-alpha has no effect without --lora-rank"),
        ("diffusion-dpo", "--rslora --dora", "--rslora, --dora has no effect without --lora-rank"),
        ("diffusion-dpo", "--lora-targets x", "--lora-targets has no effect without --lora-rank"),
        ("diffusion-dpo", "--lora-rank -1", "--lora-rank is -1"),
        ("diffusion-dpo", "--lora-rank 2 --lora-alpha 0", "--lora-alpha is 0"),
        ("diffusion-dpo", "--lora-rank 2 --reference-model x", "--reference-model needs a second frozen base"),
        ("diffusion-dpo", "--lora-rank 2 --reference-update-every 2", "--reference-update-rate 0.6 would mix"),
        ("diffusion-dpo", "--lora-rank 2 --optimizer muon", "--optimizer muon has no effect on adapters"),
        ("diffusion-dpo", "--mesh-fsdp 3", "does not fit 8 devices"),
        ("diffusion-dpo", "--mesh-data 8 --batch-size 12", "--batch-size 12 does not fall evenly on 8 batch shards"),
        ("diffusion-dpo", "--mesh-data 8 --microbatches 3", "give a multiple of 24"),
    ],
)
def test_options_out_of_range_or_without_effect(tmp_path, method, options, said):
    assert_refused(train(tmp_path / "m", tmp_path / "d", tmp_path / "out", *options.split(), method=method), said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--resolution 15", "--resolution is 15; give a multiple of 4"),
        ("--resolution 2", "--resolution is 2; give a multiple of 4"),
        ("--lora-rank 2 --lora-targets nothing", "--lora-targets"),
        ("--lora-rank 2 --lora-targets [", "--lora-targets"),
    ],
)
def test_options_that_do_not_fit_the_model(model, pairs, tmp_path, options, said):
    assert_refused(train(model, pairs, tmp_path / "out", *options.split()), said)


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("diffusion-dpo", "--beta -1", "diffusion-dpo --beta -1.0: beta is -1.0; give"),
        ("inversion-dpo", "--trajectory-steps 1001", "inversion-dpo --trajectory-steps 1001: 1001 sampling steps of"),
        ("inversion-dpo", "--sign 3", "inversion-dpo --sign 3.0: sign is 3.0"),
        ("smpo", "--gamma 0", "smpo --gamma 0.0: gamma is 0.0"),
        ("smpo", "--score-min 1", "smpo --score-min 1.0 --score-max 0.28201571106910706: score_max - score_min is"),
        ("smpo", "--inversion-steps 2000", "smpo --inversion-steps 2000: 2000 sampling steps of"),
        ("rankdpo", "--beta -1", "rankdpo --beta -1.0: beta is -1.0"),
    ],
)
def test_what_a_loss_or_its_inputs_refuse_is_said_before_anything_is_encoded(
    model, pairs, tmp_path, method, options, said
):
    out = tmp_path / "out"
    assert_refused(train(model, pairs, out, "--held-out", 0, *options.split(), method=method), said)
    assert not list(out.glob("cache/*.safetensors"))
    assert (method in ("smpo", "rankdpo")) == out.exists()  # the others read no columns, and so were not read for


def test_options_that_do_not_fit_what_the_model_was_trained_to_undo(pairs, tmp_path):
    flow = make_tiny_pipeline(tmp_path / "flow", "sd3")
    answer = train(flow, tmp_path / "no data", tmp_path / "out", method="inpo")
    assert_refused(answer, "inpo --eta 0.1: eta is 0.1, and straight paths have no posterior")
    assert not (tmp_path / "out").exists()
    answer = train(flow, tmp_path / "no data", tmp_path / "out", "--eta", 0, method="inpo")
    assert_refused(answer, "no such file")


def test_scores_by_their_published_names_are_those_that_smpo_reads(model, pairs, tmp_path):
    def published(number, row):
        images = {"caption": row["caption"], "image_0": row["rejected"], "image_1": row["chosen"], "label_0": 0}
        return images | {"ps_score_0": 0.1, "ps_score_1": 0.2}

    rows = change_rows(pairs, published)
    words = ("--held-out", 0, "--inversion-steps", 2000)  # which is refused once the columns are there
    answer = train(model, rows, tmp_path / "a", *words, method="smpo")
    assert_refused(answer, "smpo --inversion-steps 2000")
    rows = change_rows(pairs, lambda number, row: published(number, row) | {"ps_score_1": "0.2"})
    answer = train(model, rows, tmp_path / "b", *words, "--on-bad-row", "error", method="smpo")
    assert_refused(answer, "row 1: ps_score_1 should be a number or a list of numbers, got text '0.2'", code=FAILURE)


def test_columns_that_do_not_fit_the_loss(model, pairs, tmp_path):
    rows = change_rows(pairs, lambda number, row: {**row, "chosen_score": [1.0, 2.0]})
    answer = train(model, rows, tmp_path / "out", "--held-out", 0, method="smpo")
    assert_refused(answer, "smpo: columns of the shapes chosen_score [2], rejected_score [] give a row 2 losses")
    assert not list((tmp_path / "out").glob("cache/*.safetensors"))


def test_a_model_that_is_no_pipeline(pairs, tmp_path):
    (tmp_path / "empty").mkdir()
    for place, said in (("empty", "it has no model_index.json"), ("nowhere", "no such folder")):
        assert_refused(train(tmp_path / place, pairs, tmp_path / "out"), str(tmp_path / place), said)
        assert_refused(
            command("evaluate", "--model", tmp_path / place, "--prompt", "x", "--samples", 2), code=WRONG_USE
        )
    (tmp_path / "empty" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    answer = train(tmp_path / "empty", pairs, tmp_path / "out")
    assert_refused(answer, "model_index.json", "FluxPipeline", code=FAILURE)


def test_no_such_data(model, tmp_path):
    assert_refused(train(model, tmp_path / "none", tmp_path / "out"), f"no such file: {tmp_path / 'none'}")


def test_missing_columns(model, pairs, tmp_path):
    answer = train(model, pairs, tmp_path / "out", method="capo")
    assert_refused(answer, "capo needs the columns reward_gap", "the rows have chosen_score, rejected_score")
    assert not list((tmp_path / "out").glob("cache/*.safetensors"))
    rows = change_rows(pairs, lambda number, row: {**row, "reward_gap": [1.0] * (1 + number % 2)})
    answer = train(model, rows, tmp_path / "out", "--held-out", 0, method="capo")
    assert_refused(answer, "row 2", "'reward_gap' has the shape [2], but row 1", code=FAILURE)


def test_rows_from_which_there_is_no_way(model, tmp_path):
    singles = make_image_folder(tmp_path / "singles", "singles", count=4)
    assert_refused(train(model, singles, tmp_path / "out"), "the rows are singles, and pairs are made of lists")
    lists = make_image_folder(tmp_path / "lists", "lists", count=4)
    rows = change_rows(lists, lambda number, row: {k: v for k, v in row.items() if k != "scores"})
    assert_refused(train(model, rows, tmp_path / "out"), "row 1", "list without `scores`")
    same = change_rows(singles, lambda number, row: {**row, "caption": "a red circle"})
    assert_refused(train(model, same, tmp_path / "out", method="tdpo"), "at least two captions")
    assert_refused(train(model, lists, tmp_path / "out", method="patchdpo"), "patches are made of nothing else")


def test_bad_rows_are_listed_or_stop_the_run(model, pairs, tmp_path):
    (pairs / "broken.png").write_bytes(b"no image")
    rows = change_rows(pairs, lambda number, row: {**row, "chosen": "broken.png"} if number == 2 else row)
    answer = train(model, rows, tmp_path / "a", "--on-bad-row", "error")
    assert_refused(answer, f"{rows}, row 3: chosen image: 8 bytes that are no image", code=FAILURE)
    answer = train(model, rows, tmp_path / "b", "--held-out", 3.0)
    assert "1 bad rows skipped" in answer.err and "leaves none of the 3 rows" in answer.err
    (listed,) = (tmp_path / "b" / "skipped_rows.jsonl").read_text().splitlines()
    assert json.loads(listed)["number"] == 3
    rows = change_rows(pairs, lambda number, row: {**row, "chosen": "broken.png"})
    assert_refused(train(model, rows, tmp_path / "c"), "no good row is left", code=FAILURE)


def test_images_of_a_wrong_mode_are_converted_or_refused(model, pairs, tmp_path):
    Image.new("RGBA", (16, 16), (9, 9, 9, 100)).save(pairs / "clear.png")
    rows = change_rows(pairs, lambda number, row: {**row, "rejected": "clear.png"} if number == 1 else row)
    words = ("--held-out", 9.0)  # leaves no row, which is said after all images have been looked at
    assert_refused(train(model, rows, tmp_path / "a", *words), "leaves none of the 4 rows", code=FAILURE)
    answer = train(model, rows, tmp_path / "b", *words, "--on-mode", "error")
    assert_refused(answer, "leaves none of the 3 rows", code=FAILURE)
    answer = train(model, rows, tmp_path / "c", "--on-mode", "error", "--on-bad-row", "error")
    assert_refused(answer, "row 2: rejected image: the image has mode RGBA with transparency", code=FAILURE)


def test_the_limit_of_pixels_is_an_option(model, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # of Pillow, which the option goes above
    answer = train(model, pairs, tmp_path / "a", "--max-pixels", 255, "--on-bad-row", "error")
    assert_refused(answer, "row 1: chosen image: ", "16 x 16, more than 255 pixels (max_pixels)", code=FAILURE)
    answer = train(model, pairs, tmp_path / "b", "--max-pixels", 256, "--held-out", 9.0)
    assert_refused(answer, "leaves none of the 4 rows", code=FAILURE)
    large = tmp_path / "large"
    large.mkdir()
    Image.new("L", (8400, 8000)).save(large / "a.png")  # above the limit that holds by default
    Image.new("L", (16, 16), 7).save(large / "b.png")
    (large / "metadata.jsonl").write_text('{"caption": "c", "chosen": "a.png", "rejected": "b.png"}\n')
    answer = train(model, large, tmp_path / "c", "--on-bad-row", "error")
    assert_refused(answer, "8400 x 8000, more than 67108864 pixels", code=FAILURE)
    answer = train(model, large, tmp_path / "d", "--max-pixels", 8400 * 8000, "--held-out", 9.0)
    assert_refused(answer, "leaves none of the 1 rows", code=FAILURE)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "generate needs --out"),
        ("--out o", "generate needs prompts: give --prompt or --data"),
        ("--out o --prompt x --samples 0", "--samples is 0"),
        ("--out o --prompt x --batch-size 0", "--batch-size is 0"),
        ("--out o --prompt x --sampling-steps 0", "--sampling-steps is 0"),
        ("--out o --prompt x --sampling-steps 2000", "--sampling-steps 2000"),
        ("--out o --prompt x --guidance nan", "--guidance is nan"),
        ("--out o --prompt x --guidance-rescale 2", "--guidance-rescale is 2"),
        ("--out o --prompt x --eta 1.5", "--eta is 1.5"),
        ("--out o --prompt x --sampler flow-euler", "--sampler flow-euler: the model was trained on a noise schedule"),
        ("--out o --prompt x --sampler euler --eta 0.5", "--eta has no effect with --sampler euler"),
        ("--out o --prompt x --height 18", "give multiples of 4"),
        ("--out o --prompt x --width 0", "--width is 0"),
        ("--out o --data none.jsonl", "no such file: none.jsonl"),
        ("--out o --prompt x --guidance 1 --negative-prompt y", "--negative-prompt has no effect with --guidance 1"),
        ("--out o --prompt x --guidance 1 --guidance-rescale 0.5", "--guidance-rescale has no effect"),
        ("--out o --prompt x --guidance 1 --negative-model y", "--negative-model has no effect"),
        ("--out o --prompt x --negative-model none", "no such folder: none"),
        ("--out o --prompt x --adapter none", "none"),
    ],
)
def test_options_of_generate(model, tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    assert_refused(command("generate", "--model", model, *options.split()), said)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--samples 2", "evaluate needs prompts: give --prompt or --data"),
        ("--prompt x", "nothing to measure: give --reward"),
        ("--prompt x --reward clip", "1 rewards and 0 folders"),
        ("--prompt x --reward-model r", "0 rewards and 1 folders"),
        ("--prompt x --reward best --reward-model r", "best"),
        ("--prompt x --reward clip --reward-model none", "none"),
        ("--prompt x --samples 2 --sampler flow-euler", "--sampler flow-euler"),
    ],
)
def test_options_of_evaluate(model, tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    answer = command("evaluate", "--model", model, *options.split())
    assert answer.code == WRONG_USE and said in answer.err and "Traceback" not in answer.err, answer.err


def test_models_of_another_shape(model, pairs, tmp_path):
    other = make_tiny_pipeline(tmp_path / "xl", "sdxl")
    said = (str(other), "they differ in kind")
    given = ("generate", "--model", model, "--prompt", "x", "--out", tmp_path / "o", "--negative-model", other)
    assert_refused(command(*given), *said)
    assert_refused(train(model, pairs, tmp_path / "out", "--reference-model", other), *said)


def test_rows_without_a_caption(model, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"caption": "x"}\n{"other": "y"}\n')
    answer = command("generate", "--model", model, "--out", tmp_path / "o", "--data", path)
    assert_refused(answer, f"{path}, row 2: no caption", code=FAILURE)


@pytest.mark.parametrize("options", [["--step", 3], ["--weights", "ema"], []])
def test_export_of_no_run(tmp_path, options):
    answer = command("export", "--run", tmp_path, "--out", tmp_path / "o", *options)
    assert_refused(answer, f"{tmp_path} is not the folder of a run")
