"""Encoding: one BOS, one EOS, templates that extend their prompt, truncation that empties nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dpo_jax.language.data.encode import EncodeReport, dialogue_messages, encode_rows, is_per_token
from dpo_jax.language.data.forms import to_form
from dpo_jax.language.data.rows import PreferenceRow, RowError, check_rows

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_BOS = (
    "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
NO_PREFIX = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}?{% endif %}"
STRICT = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"


def make_tokenizer(*, bos, eos, pad, adds_bos=False, template=None):
    """One token per byte, and the special tokens; no two texts have the same ids."""
    specials = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in specials])
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad)
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS = {
    "adds_bos": make_tokenizer(bos="<s>", eos="</s>", pad="<pad>", adds_bos=True),
    "eos_is_pad": make_tokenizer(bos=None, eos="</s>", pad="</s>"),
    "one_for_all": make_tokenizer(bos="</s>", eos="</s>", pad="</s>"),
    "tail_after_eos": make_tokenizer(bos=None, eos="<|im_end|>", pad="<|im_end|>", template=CHATML),
    "template_with_bos": make_tokenizer(bos="<s>", eos="</s>", pad="<pad>", adds_bos=True, template=WITH_BOS),
}
with_every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())


def rows_of(*rows):
    return check_rows(rows).rows


def encode_one(row, tokenizer, **options):
    examples, _ = encode_rows(rows_of(row), tokenizer, **options)
    return examples[0]


def text_of(ids, tokenizer):
    return tokenizer.decode(ids, skip_special_tokens=False)


@with_every_tokenizer
def test_plain_text_has_its_bos_and_eos(tokenizer):
    example = encode_one({"prompt": "Hello", "chosen": " wörld", "rejected": " x</s>"}, tokenizer)
    bos = [tokenizer.bos_token_id] if tokenizer("")["input_ids"] else []
    assert example.prompt.dtype == np.int32 and example.completions[0].dtype == np.int32
    assert example.prompt.tolist() == bos + tokenizer("Hello", add_special_tokens=False)["input_ids"]
    for completion, text in zip(example.completions, [" wörld", " x</s>"], strict=True):
        body = tokenizer(text, add_special_tokens=False)["input_ids"]
        body = body[:-1] if body[-1] == tokenizer.eos_token_id else body
        assert completion.tolist() == [*body, tokenizer.eos_token_id]


@with_every_tokenizer
def test_bos_in_the_text_is_not_doubled(tokenizer):
    example = encode_one({"prompt": "<s>Hello", "completion": "<s>x"}, tokenizer)
    assert example.prompt.tolist().count(0) == 1
    assert example.completions[0][0] != 0 or tokenizer.bos_token != "<s>"


@with_every_tokenizer
def test_empty_prompt_has_one_token(tokenizer):
    example = encode_one({"prompt": "", "completion": "x"}, tokenizer)
    expected = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    assert example.prompt.tolist() == [expected]


@pytest.mark.parametrize("name", ["tail_after_eos", "template_with_bos"])
def test_messages_follow_the_template(name):
    tokenizer = TOKENIZERS[name]
    turns = [{"role": "user", "content": "u"}]
    row = {"prompt": turns, "chosen": "yes", "rejected": [{"role": "assistant", "content": "no"}]}
    example = encode_one(row, tokenizer)
    for completion, answer in zip(example.completions, ["yes", "no"], strict=True):
        whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}], tokenize=False)
        ours = text_of([*example.prompt, *completion], tokenizer)
        assert whole.removesuffix("\n") == ours
        assert ours.endswith(answer + tokenizer.eos_token)
    assert example.prompt.tolist().count(0) == (name == "template_with_bos")


def test_tail_after_eos_is_dropped_and_eos_is_trained_once():
    tokenizer = TOKENIZERS["tail_after_eos"]
    example = encode_one({"prompt": [{"role": "user", "content": "u"}], "completion": "a"}, tokenizer)
    assert text_of(example.prompt, tokenizer) == "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(example.completions[0], tokenizer) == "a<|im_end|>"


def test_dialogues_become_messages_only_if_there_is_a_template():
    dialogue = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant:"
    row = {"prompt": dialogue, "completion": " four"}
    with_template, without = TOKENIZERS["tail_after_eos"], TOKENIZERS["eos_is_pad"]
    rendered = encode_one(row, with_template)
    assert text_of(rendered.prompt, with_template) == (
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
        "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text_of(rendered.completions[0], with_template) == "four<|im_end|>"
    for tokenizer, options in [(without, {}), (with_template, {"chat_template": "never"})]:
        plain = encode_one(row, tokenizer, **options)
        assert text_of(plain.prompt, tokenizer) == dialogue
        assert text_of(plain.completions[0], tokenizer) == " four" + tokenizer.eos_token


def test_chat_template_options():
    tokenizer, row = TOKENIZERS["tail_after_eos"], {"prompt": "u", "completion": "a"}
    assert text_of(encode_one(row, tokenizer).prompt, tokenizer) == "u"
    always = encode_one(row, tokenizer, chat_template="always")
    assert text_of(always.prompt, tokenizer) == "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(ValueError, match="no chat template; set"):
        encode_one(row, TOKENIZERS["eos_is_pad"], chat_template="always")
    message_row = {"prompt": [{"role": "user", "content": "u"}], "completion": "a"}
    for name, options in [("eos_is_pad", {}), ("tail_after_eos", {"chat_template": "never"})]:
        with pytest.raises(RowError, match=r"rows, row 1: the prompt is a list of messages, .* set tokenizer"):
            encode_one(message_row, TOKENIZERS[name], **options)


@pytest.mark.parametrize(
    "template, message", [(NO_PREFIX, "does not begin with its own generation prompt"), (STRICT, "no system")]
)
def test_template_that_does_not_fit(template, message):
    tokenizer = make_tokenizer(bos=None, eos="</s>", pad="</s>", template=template)
    with pytest.raises(RowError, match=message):
        encode_one({"prompt": [{"role": "user", "content": "u"}], "completion": "a"}, tokenizer)


def test_tokenizer_without_eos():
    with pytest.raises(ValueError, match="no EOS"):
        encode_one({"prompt": "u", "completion": "a"}, make_tokenizer(bos="<s>", eos=None, pad="<pad>"))


def test_dialogue_messages():
    assert dialogue_messages("plain") is None
    assert dialogue_messages("\n\nHuman: a") is None
    assert dialogue_messages("\n\nHuman: a\n\nHuman: b\n\nAssistant:") == ({"role": "user", "content": "a\n\nb"},)


def test_truncation_cuts_no_more_than_needed():
    tokenizer = TOKENIZERS["adds_bos"]  # one token per character
    row = {"prompt": "0123456789", "chosen": "abcdef", "rejected": "x"}  # 11 prompt tokens, 7 and 2 with EOS

    def cut(**options):
        examples, report = encode_rows(rows_of(row), tokenizer, **options)
        parts = (examples[0].prompt, *examples[0].completions)
        return [text_of(part, tokenizer) for part in parts], (report.prompts_cut, report.completions_cut)

    assert cut(max_length=18) == (["<s>0123456789", "abcdef</s>", "x</s>"], (0, 0))
    assert cut(max_length=17) == (["<s>123456789", "abcdef</s>", "x</s>"], (1, 0))
    assert cut(max_length=12) == (["<s>56789", "abcdef", "x</s>"], (1, 1))
    assert cut(max_length=12, max_prompt_length=11) == (["<s>0123456789", "a", "x"], (0, 2))
    assert cut(max_length=3, max_prompt_length=1) == (["<s>", "ab", "x</s>"], (1, 1))
    examples, report = encode_rows(rows_of(row), tokenizer, max_length=17, truncation="drop")
    assert examples == [] and report == EncodeReport(rows=1, too_long=1) and report.dropped == 1
    with pytest.raises(ValueError, match="a prompt needs a token"):
        cut(max_length=8, max_prompt_length=8)


def test_completions_equal_after_truncation_are_dropped_and_counted():
    rows = rows_of(
        {"prompt": "p", "chosen": "same x", "rejected": "same y"}, {"prompt": "p", "chosen": "a", "rejected": "b"}
    )
    examples, report = encode_rows(rows, TOKENIZERS["eos_is_pad"], max_length=5)
    assert len(examples) == 1
    assert report == EncodeReport(rows=2, examples=1, completions_cut=2, identical=1)


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.text(st.characters(codec="utf-8"), max_size=12), texts, texts), min_size=1, max_size=4),
    name=st.sampled_from(sorted(TOKENIZERS)),
    max_length=st.integers(2, 40),
    data=st.data(),
)
def test_rules_hold_for_any_text(rows, name, max_length, data):
    tokenizer = TOKENIZERS[name]
    limit = data.draw(st.integers(1, max_length - 1))
    given_rows = [PreferenceRow(p, (a, b)) for p, a, b in rows if a != b]
    wholes, _ = encode_rows(given_rows, tokenizer, max_length=10**6)
    examples, report = encode_rows(given_rows, tokenizer, max_length=max_length, max_prompt_length=limit)
    assert len(examples) + report.identical == report.rows == len(given_rows)
    assert report.too_long == 0
    for whole in wholes:
        for completion in whole.completions:
            assert completion[-1] == tokenizer.eos_token_id
            assert completion.tolist().count(tokenizer.eos_token_id) == 1
    for whole, example in zip(wholes, examples) if report.identical == 0 else []:
        cut = len(whole.prompt) - len(example.prompt)
        longest = max(map(len, whole.completions))
        assert len(example.prompt) >= 1 and (not cut or len(example.prompt) >= limit)
        assert np.array_equal(example.prompt[1:], whole.prompt[cut + 1 :])
        if tokenizer.bos_token_id is not None and whole.prompt[0] == tokenizer.bos_token_id:
            assert example.prompt[0] == tokenizer.bos_token_id
        for completion, full in zip(example.completions, whole.completions, strict=True):
            assert 1 <= len(completion) <= len(full)
            assert np.array_equal(completion, full[: len(completion)])
            assert len(example.prompt) + len(completion) <= max_length
            # A completion is cut only where the prompt has already given all it may.
            if len(completion) < len(full):
                assert len(example.prompt) == min(len(whole.prompt), limit) and limit > max_length - longest


def test_batches_of_the_tokenizer_do_not_matter(monkeypatch):
    rows = rows_of(*({"prompt": f"p{i}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(7)))
    whole, report = encode_rows(rows, TOKENIZERS["adds_bos"])
    monkeypatch.setattr("dpo_jax.language.data.encode.ROWS_AT_ONCE", 3)
    parts, again = encode_rows(rows, TOKENIZERS["adds_bos"])
    assert report == again
    for a, b in zip(whole, parts, strict=True):
        assert a.prompt.tolist() == b.prompt.tolist()
        assert [c.tolist() for c in a.completions] == [c.tolist() for c in b.completions]


def test_columns_have_one_dtype_and_follow_the_tokens():
    base = {"prompt": "ppppp", "chosen": "abcd", "rejected": "xy"}
    rows = rows_of(
        {
            **base,
            "margin": 1,
            "label": True,
            "step_ids": [[0, 0, 1, 1], [0, 1, 2]],
            "rejected_gain": [1, 0.5],
            "v": [1],
        },
        {
            **base,
            "margin": 0.5,
            "label": False,
            "step_ids": [[0, 1, 2, 3], [4, 5]],
            "rejected_gain": [3, 4, 5],
            "v": [2],
        },
    )
    examples, _ = encode_rows(rows, TOKENIZERS["eos_is_pad"])
    first, second = (example.columns for example in examples)
    assert {name: value.dtype.name for name, value in first.items()} == {
        "margin": "float32",
        "labels": "bool",
        "step_ids": "int32",
        "rejected_gain": "float32",
        "v": "int32",
    }
    assert first["step_ids"].tolist() == [[0, 0, 1, 1, -1], [0, 1, 2, -1, -1]]
    assert first["rejected_gain"].tolist() == [1, 0.5, 0]
    assert second["rejected_gain"].tolist() == [3, 4, 5]
    examples, _ = encode_rows(rows, TOKENIZERS["eos_is_pad"], max_length=5, max_prompt_length=3)
    assert examples[0].columns["step_ids"].tolist() == [[0, 0], [0, 1]]
    assert examples[0].columns["rejected_gain"].tolist() == [1, 0.5]
    for bad in ({"step_ids": [[0] * 6, [0]]}, {"chosen_gain": [1.0]}, {"v": [[1], [2], [3, 4]]}):
        with pytest.raises(RowError, match=f"column '{next(iter(bad))}'"):
            encode_rows(rows_of({**base, **bad}), TOKENIZERS["eos_is_pad"])


def test_which_columns_run_over_tokens():
    assert is_per_token("any", np.zeros((2, 5)), 2) and not is_per_token("any", np.zeros((3, 5)), 2)
    assert is_per_token("chosen_step_ids", np.zeros(5), 2) and not is_per_token("scores", np.zeros(5), 2)
    assert not is_per_token("chosen_score", np.zeros(()), 2)


def plain_text(ids, tokenizer=TOKENIZERS["eos_is_pad"]):
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_short_lists_are_filled_with_absent_items():
    rows = rows_of(
        {
            "prompt": "p",
            "completions": ["a", "bb", "ccc"],
            "scores": [3, 2, 1],
            "gains": [[1, 1.5], [2, 2, 2], [3, 3, 3]],
        },
        {"prompt": "q", "completions": ["dd"], "scores": [0.5], "gains": [[4, 4]]},
    )
    examples, _ = encode_rows(rows, TOKENIZERS["eos_is_pad"])
    assert [[len(c) for c in e.completions] for e in examples] == [[2, 3, 4], [3, 0, 0]]
    assert examples[1].columns["scores"].tolist() == [0.5, 0, 0]
    assert examples[1].columns["gains"].tolist() == [[4, 4, 0], [0, 0, 0], [0, 0, 0]]


def test_steps_are_numbered_and_their_texts_kept():
    row = {"prompt": "p", "chosen": "ab;c;", "rejected": "xyz"}
    example = encode_rows(rows_of(row), TOKENIZERS["eos_is_pad"], step_delimiter=";")[0][0]
    assert example.columns["step_ids"].tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, -1, -1]]
    assert plain_text(example.completions[0]) == "ab;c;"
    cut = encode_rows(rows_of(row), TOKENIZERS["eos_is_pad"], step_delimiter=";", max_length=4, max_prompt_length=2)
    assert cut[0][0].columns["step_ids"].tolist() == [[0, 0, 0], [0, 0, 0]]
    with pytest.raises(ValueError, match="step_delimiter is empty"):
        encode_rows(rows_of(row), TOKENIZERS["eos_is_pad"], step_delimiter="")


@with_every_tokenizer
def test_steps_after_a_prefix_do_not_end_the_answer(tokenizer):
    whole = encode_one({"prompt": "p", "chosen": "ab", "rejected": "xyz"}, tokenizer)
    step = encode_one({"prompt": "p", "prefix": "Step 1:", "chosen": "ab", "rejected": "xyz"}, tokenizer)
    assert plain_text(step.prompt, tokenizer).endswith("Step 1:")
    for given_whole, ids in zip(whole.completions, step.completions):
        assert tokenizer.eos_token_id not in ids.tolist()
        assert ids.tolist() == given_whole[: len(ids)].tolist() and plain_text(ids, tokenizer) in ("ab", "xyz")


def revised(row, tokenizer, **options):
    rows = to_form(rows_of(row), "revisions", revision_instruction="Better?").rows
    return encode_rows(rows, tokenizer, **options)


def test_contexts_stand_between_prompt_and_completion():
    plain = revised({"prompt": "p", "chosen": "ab", "rejected": "xyz"}, TOKENIZERS["eos_is_pad"])[0][0]
    assert [plain_text(c) for c in plain.contexts] == ["", "", *["ab\n\nBetter?\n\n"] * 2, *["xyz\n\nBetter?\n\n"] * 2]
    assert [plain_text(c) for c in plain.completions] == ["ab", "xyz"] * 3
    chat = {"prompt": [{"role": "user", "content": "u"}], "chosen": "ab", "rejected": "xyz"}
    example = revised(chat, TOKENIZERS["template_with_bos"])[0][0]
    tokenizer = TOKENIZERS["template_with_bos"]
    assert tokenizer.decode(example.contexts[2]) == "ab</s>[user]Better?[assistant]"
    assert tokenizer.decode(np.concatenate([example.prompt, example.branches()[5]])) == (
        "<s>[user]u[assistant]xyz</s>[user]Better?[assistant]xyz</s>"
    )
    dialogue = revised(
        {"chosen": "\n\nHuman: u\n\nAssistant: a", "rejected": "\n\nHuman: u\n\nAssistant: b"},
        TOKENIZERS["eos_is_pad"],
    )[0][0]
    assert plain_text(dialogue.contexts[2]) == " a\n\nHuman: Better?\n\nAssistant:"


def test_a_context_is_never_cut():
    row = {"prompt": "p" * 10, "chosen": "ab", "rejected": "xyz"}
    whole = revised(row, TOKENIZERS["eos_is_pad"])[0][0]
    longest = max(map(len, whole.branches()))
    fits, _ = revised(row, TOKENIZERS["eos_is_pad"], max_length=longest + 2, max_prompt_length=2)
    assert len(fits[0].prompt) == 2 and [c.tolist() for c in fits[0].contexts] == [c.tolist() for c in whole.contexts]
    none, report = revised(row, TOKENIZERS["eos_is_pad"], max_length=len(whole.contexts[4]) + 2, max_prompt_length=2)
    assert not none and report.too_long == 1
