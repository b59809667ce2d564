"""`dpo-jax generate`: what it writes, what it streams, and what it refuses."""

import io
import json

import numpy as np
import pytest
from make_tiny_checkpoint import CHAT_TEMPLATE
from tiny_runs import command, make_tiny, write_rows

from dpo_jax.cli.configs import ModelConfig
from dpo_jax.cli.models import open_model
from dpo_jax.language.data.encode import encode_prompts, encode_rows
from dpo_jax.language.data.rows import PreferenceRow, RowError, check_rows
from dpo_jax.language.models.folder import load_tokenizer
from dpo_jax.language.models.weights import save_hf
from dpo_jax.language.sampling.text import cut_at, held_back, stop_strings, text_of
from dpo_jax.sharding import make_mesh

PROMPTS = ["red blue 1", "a cold near", "green"]
SHORT = ("--max-new-tokens", 8, "--batch-size", 8)


def lines_of(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def greedy(tiny):
    answer = command("generate", "--model", tiny.model, "--prompt", *PROMPTS, "--temperature", 0, *SHORT, "--json")
    assert answer.code == 0, answer.err
    return lines_of(answer.out)


def logps_of(folder, prompt, tokens):
    """Log-probs of tokens after a prompt, by a forward pass over the whole row."""
    model = open_model(str(folder), ModelConfig())
    row = np.concatenate([prompt, tokens]).astype(np.int32)[None]
    answer = model.apply_fn(
        model.load(make_mesh()), row, np.arange(row.size)[None], np.full(row.shape, row.size, np.int32)
    )
    logits = np.asarray(answer.hidden[0] @ answer.head.T, np.float64)[len(prompt) - 1 : -1]
    return (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(len(tokens)), tokens]


def test_lines_hold_prompts_texts_logps_and_tokens(tiny, greedy):
    tokenizer = load_tokenizer(tiny.model)
    assert [line["prompt"] for line in greedy] == PROMPTS
    prompts = encode_prompts([PreferenceRow(text, ()) for text in PROMPTS], tokenizer)
    for line, prompt in zip(greedy, prompts):
        (one,) = line["completions"]
        assert one["text"] == tokenizer.decode(one["tokens"], skip_special_tokens=True)
        assert one["logp"] == pytest.approx(logps_of(tiny.model, prompt, one["tokens"]).sum(), abs=1e-4)


def test_a_file_of_rows_gives_a_file_of_lines(tiny, greedy, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": text, "more": [None]} for text in PROMPTS])
    out = tmp_path / "new" / "out.jsonl"
    words = ("--data", rows, "--out", out, "--temperature", 0, *SHORT, "--json")
    answer = command("generate", "--model", tiny.model, *words)
    assert answer.code == 0, answer.err
    assert answer.result["prompts"] == 3 and answer.result["tokens"] > 0
    got = lines_of(out.read_text())
    assert [line["completions"][0]["tokens"] for line in got] == [line["completions"][0]["tokens"] for line in greedy]


def test_samples_follow_the_seed_and_the_best_is_kept(tiny):
    fixed = ("generate", "--model", tiny.model, "--prompt", *PROMPTS, *SHORT, "--json", "--samples", 3, "--top-p", 0.9)
    first, again, other, best = (
        lines_of(command(*fixed, "--seed", seed, *more).out)
        for seed, more in ((1, ()), (1, ()), (2, ()), (1, ("--best-by", "mean-logp")))
    )
    assert first == again != other
    for line, kept in zip(first, best):
        assert len(line["completions"]) == 3
        assert kept["completions"] == [max(line["completions"], key=lambda c: c["logp"] / len(c["tokens"]))]


def test_the_best_by_value_and_by_reward(tiny, tmp_path):
    fixed = ("generate", "--model", tiny.model, "--prompt", *PROMPTS, *SHORT, "--json", "--samples", 3)
    everything = lines_of(command(*fixed).out)
    value = command(*fixed, "--best-by", "value", "--reference-model", tiny.other)
    assert value.code == 0, value.err
    prompts = encode_prompts([PreferenceRow(text, ()) for text in PROMPTS], load_tokenizer(tiny.model))
    for line, kept, prompt in zip(everything, lines_of(value.out), prompts):
        values = [c["logp"] - logps_of(tiny.other, prompt, c["tokens"]).sum() for c in line["completions"]]
        assert kept["completions"] == [line["completions"][int(np.argmax(values))]]
    headless = command(*fixed, "--best-by", "reward", "--reward-model", tiny.other)
    assert headless.code == 2 and "has no reward head" in headless.err
    judge, mesh = open_model(tiny.other, ModelConfig(), reward=True), make_mesh()
    save_hf(tmp_path / "judge", judge.config, judge.load(mesh), source=tiny.other)
    reward = command(*fixed, "--best-by", "reward", "--reward-model", tmp_path / "judge")
    assert reward.code == 0, reward.err
    for line, kept in zip(everything, lines_of(reward.out)):
        assert len(kept["completions"]) == 1 and kept["completions"][0] in line["completions"]


def test_beams_and_guidance(tiny, greedy):
    fixed = ("generate", "--model", tiny.model, "--prompt", *PROMPTS, *SHORT, "--json")
    one = lines_of(command(*fixed, "--beam-width", 1).out)
    for line, want in zip(one, greedy):
        assert line["completions"][0]["tokens"] == want["completions"][0]["tokens"]
        assert line["completions"][0]["score"] == pytest.approx(want["completions"][0]["logp"], abs=1e-4)
    value = command(*fixed, "--beam-width", 3, "--samples", 2, "--reference-model", tiny.other)
    assert value.code == 0, value.err
    assert all(1 <= len(line["completions"]) <= 2 for line in lines_of(value.out))
    guided = ("--tuned-model", tiny.other, "--untuned-model", tiny.model, "--temperature", 0)
    tuned = lines_of(command(*fixed, *guided).out)
    alone = lines_of(command("generate", "--model", tiny.other, *fixed[3:], "--temperature", 0).out)
    assert [c["completions"][0]["tokens"] for c in tuned] == [c["completions"][0]["tokens"] for c in alone]


def test_stop_strings_end_texts_across_the_borders_of_tokens(tiny, greedy):
    tokenizer = load_tokenizer(tiny.model)
    tokens = greedy[0]["completions"][0]["tokens"]
    pieces = [tokenizer.decode([token]) for token in tokens]
    place = next(
        i
        for i in range(1, 6)
        if len(pieces[i]) and len(pieces[i + 1]) and "\N{REPLACEMENT CHARACTER}" not in pieces[i] + pieces[i + 1]
    )
    stop = pieces[place][-1] + pieces[place + 1][0]
    whole = text_of(tokenizer, np.array(tokens))
    fixed = ("generate", "--model", tiny.model, "--prompt", PROMPTS[0], *SHORT, "--temperature", 0, "--json")
    ((one,),) = (line["completions"] for line in lines_of(command(*fixed, "--stop", stop).out))
    assert one["text"] == whole[: whole.index(stop)]
    size = len(one["tokens"])
    assert one["tokens"] == tokens[:size]
    assert stop in text_of(tokenizer, np.array(tokens[:size]))
    assert stop not in text_of(tokenizer, np.array(tokens[: size - 1]))


def test_texts_are_cut_and_held_back():
    assert cut_at("one\n\ntwo###", ["###", "\n\n"]) == "one" and cut_at("one", ["x"]) == "one"
    assert held_back("answer: #", ["###"]) == "answer: " and held_back("answer#a", ["###"]) == "answer#a"
    assert held_back("half \N{REPLACEMENT CHARACTER}", []) == "half "
    with pytest.raises(ValueError, match="empty"):
        stop_strings(None, ["a", ""])


def test_lines_of_standard_input_are_answered_token_by_token(tiny, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PROMPTS[0]}\n\n{PROMPTS[2]}\n"))
    answer = command("generate", "--model", tiny.model, "--temperature", 0, "--max-new-tokens", 4)
    assert answer.code == 0, answer.err
    want = command(
        "generate", "--model", tiny.model, "--prompt", PROMPTS[0], PROMPTS[2], "--temperature", 0, "--max-new-tokens", 4
    )
    assert answer.out == want.out


@pytest.mark.parametrize("template", ["auto", "always", "never"])
def test_prompts_are_encoded_as_for_training(tiny, template):
    tokenizer = load_tokenizer(tiny.model)
    tokenizer.chat_template = CHAT_TEMPLATE
    rows = check_rows(
        {"prompt": prompt, "chosen": " good", "rejected": " bad"}
        for prompt in (
            "red",
            "\n\nHuman: cold?\n\nAssistant:",
            *([] if template == "never" else [[{"role": "user", "content": "near"}]]),
        )
    ).rows
    examples, _ = encode_rows(rows, tokenizer, chat_template=template)
    for ids, example in zip(encode_prompts(rows, tokenizer, chat_template=template), examples, strict=True):
        np.testing.assert_array_equal(ids, example.prompt)


def test_messages_need_a_template(tiny):
    tokenizer = load_tokenizer(tiny.model)
    tokenizer.chat_template = None
    row = PreferenceRow(({"role": "user", "content": "x"},), (), file="rows.jsonl", number=3)
    with pytest.raises(RowError, match=r"rows\.jsonl, row 3"):
        encode_prompts([row], tokenizer)
    with pytest.raises(ValueError, match="no chat template"):
        encode_prompts([PreferenceRow("x", ())], tokenizer, chat_template="always")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--samples 0", "--samples is 0"),
        ("--max-new-tokens 0", "--max-new-tokens is 0"),
        ("--beam-width -1", "--beam-width is -1"),
        ("--batch-size 0", "--batch-size is 0"),
        ("--seed -1", "--seed is -1"),
        ("--temperature -0.5", "temperature is -0.5"),
        ("--top-p 0", "top_p is 0"),
        ("--min-p 1.5", "min_p is 1.5"),
        ("--top-k -1", "top_k is -1"),
        ("--repetition-penalty 0", "repetition_penalty is 0"),
        ("--length-penalty -1 --beam-width 2", "alpha is -1"),
        ("--beam-width 2 --top-k 3 --stop x", "--top-k, --stop has no effect with --beam-width"),
        ("--beam-width 2 --samples 3", "more than --beam-width 2 can find"),
        ("--length-penalty 1", "--length-penalty has no effect without"),
        ("--tuned-model x", "together or not at all"),
        ("--guidance-strength 2", "--guidance-strength has no effect"),
        ("--guidance-strength nan --tuned-model x --untuned-model y", "--guidance-strength is nan"),
        ("--reference-model x", "--reference-model has no effect"),
        ("--reference-model x --beam-width 2 --tuned-model y --untuned-model z", "do not go together"),
        ("--best-by value --samples 2", "--best-by value needs --reference-model"),
        ("--best-by reward --samples 2", "--best-by reward needs --reward-model"),
        ("--reward-model x", "--reward-model has no effect"),
        ("--best-by logp", "--best-by needs --samples"),
        ("--data /nowhere/rows.jsonl", "no such file: /nowhere/rows.jsonl"),
        ("--mesh-fsdp 3", "does not fit 8 devices"),
        ("--best-by worst", "worst"),
    ],
)
def test_options_out_of_range_or_without_effect_exit_with_two(options, said):
    answer = command("generate", "--model", "/nowhere", "--prompt", "x", *options.split())
    assert answer.code == 2 and answer.out == "" and said in answer.err, answer.err
    assert "Traceback" not in answer.err


@pytest.mark.parametrize(("options", "said"), [("--out x", "--out has no effect"), ("--samples 2", "leave --samples")])
def test_a_session_takes_no_options_of_files(options, said):
    answer = command("generate", "--model", "/nowhere", *options.split())
    assert answer.code == 2 and said in answer.err


def test_models_and_rows_that_do_not_fit(tiny, tmp_path):
    larger = make_tiny(tmp_path / "larger", tiny.rows, vocab_size=320)
    fixed = ("generate", "--model", tiny.model, *SHORT)
    answer = command(*fixed, "--prompt", "x", "--beam-width", 2, "--reference-model", larger)
    assert answer.code == 2 and "one vocabulary" in answer.err
    answer = command(*fixed, "--prompt", "x", "--stop-tokens", 300)
    assert answer.code == 2 and "[300] are no words" in answer.err
    answer = command(*fixed, "--data", write_rows(tmp_path / "rows.jsonl", [{"prompt": "x"}, {"promt": "y"}]))
    assert answer.code == 1 and "rows.jsonl, row 2" in answer.err
    (tmp_path / "empty.jsonl").write_text("\n")
    answer = command(*fixed, "--data", tmp_path / "empty.jsonl")
    assert answer.code == 1 and "no prompt is there" in answer.err
