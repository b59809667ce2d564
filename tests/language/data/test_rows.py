"""Rows: every accepted form, every way a row can be bad, and files that are broken."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax.language.data.rows import PreferenceRow, RowError, check_rows, parse_row, read_rows

GOOD = {"prompt": "p", "chosen": "good", "rejected": "bad"}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.mark.parametrize(
    "row, prompt, completions",
    [
        (GOOD, "p", ("good", "bad")),
        ({"prompt": "", "completion": "x"}, "", ("x",)),
        ({"prompt": "p", "completions": ["a", "b", "c"]}, "p", ("a", "b", "c")),
        (
            {"prompt": [user("u")], "chosen": [assistant("a")], "rejected": "b"},
            (user("u"),),
            ("a", "b"),
        ),
        (
            {"chosen": [user("u"), assistant("a")], "rejected": [user("u"), assistant("b")]},
            (user("u"),),
            ("a", "b"),
        ),
        (
            {"prompt": "u", "chosen": [user("u"), assistant("a")], "rejected": [user("u"), assistant("b")]},
            (user("u"),),
            ("a", "b"),
        ),
        (
            {
                "chosen": "\n\nHuman: u\n\nAssistant: v\n\nHuman: w\n\nAssistant: a",
                "rejected": "\n\nHuman: u\n\nAssistant: v\n\nHuman: w\n\nAssistant: b\n",
            },
            "\n\nHuman: u\n\nAssistant: v\n\nHuman: w\n\nAssistant:",
            (" a", " b\n"),
        ),
        ({"prompt": [{**user("u"), "name": "n"}], "completion": "a", "system": None}, (user("u"),), ("a",)),
    ],
)
def test_forms(row, prompt, completions):
    form = "pairs" if "chosen" in row else "lists" if "completions" in row else "singles"
    assert parse_row(row, file="f", number=3) == PreferenceRow(prompt, completions, {}, "f", 3, form)


def test_numbers_become_columns_and_other_keys_are_left_aside():
    extra = {"margin": 1.5, "label": True, "weights": [[1, 2], [0.5]], "source": "web", "tags": ["a"], "none": None}
    assert parse_row({**GOOD, **extra}).columns == {"margin": 1.5, "labels": True, "weights": [[1, 2], [0.5]]}


@pytest.mark.parametrize(
    "row, expected",
    [
        ([1], "expected an object"),
        ({"prompt": "p", "chosen": "a"}, "no 'rejected'"),
        ({"prompt": "p"}, "no 'completion'"),
        ({"text": "p"}, "no 'prompt'"),
        ({**GOOD, "prompt": 3}, "prompt should be text or a list of messages, got a number"),
        ({**GOOD, "chosen": 3}, "chosen should be text or a list"),
        ({**GOOD, "chosen": " \n"}, "chosen is empty"),
        ({**GOOD, "rejected": ""}, "rejected is empty"),
        ({**GOOD, "rejected": "good"}, "chosen and rejected are equal"),
        ({**GOOD, "prompt": []}, "got an empty list"),
        ({**GOOD, "prompt": [{"role": "user"}]}, "should be a message"),
        ({**GOOD, "prompt": [{"role": "user", "content": None}]}, "prompt[0].content should be text"),
        ({**GOOD, "chosen": [user("u")]}, "should end with an assistant message"),
        ({**GOOD, "chosen": [user("other"), assistant("a")]}, "not those of the prompt"),
        ({"prompt": "p", "completions": []}, "list of at least one text"),
        ({"prompt": "p", "completions": ["a", ""]}, "completions[1] is empty"),
        ({"prompt": "p", "completions": ["a", "b", "a"]}, "1 completions are repeated"),
        ({"chosen": "a", "rejected": "b"}, "has no turn"),
        ({"chosen": "\n\nHuman: u\n\nAssistant: a", "rejected": "\n\nHuman: w\n\nAssistant: b"}, "one shared prompt"),
        (
            {"chosen": "\n\nHuman: u\n\nAssistant: a\n\nHuman: x", "rejected": "\n\nHuman: u\n\nAssistant: b"},
            "end with",
        ),
        ({"chosen": "\n\nHuman: u\n\nAssistant:", "rejected": "\n\nHuman: u\n\nAssistant: b"}, "chosen is empty"),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "there is no prompt"),
        ({"chosen": [user("u"), assistant("a")], "rejected": [user("v"), assistant("b")]}, "one shared prompt"),
        ({**GOOD, "margin": float("nan")}, "column 'margin' holds nan"),
        ({**GOOD, "margin": [1, 10**400]}, "column 'margin' holds a huge integer"),
        ({**GOOD, "prompt": "\ud800"}, "half of a surrogate pair"),
    ],
)
def test_bad_row_says_where_and_why(row, expected):
    with pytest.raises(RowError) as error:
        parse_row(row, file="f.jsonl", number=7)
    assert str(error.value).startswith("f.jsonl, row 7: ")
    assert expected in str(error.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_files_in_order_with_line_numbers(tmp_path, suffix):
    rows = [{**GOOD, "prompt": f"{i} ü"} for i in range(5)]
    first, second = write(tmp_path / f"a{suffix}", rows[:3]), write(tmp_path / f"b{suffix}", rows[3:])
    read = read_rows([first, str(second)])
    assert [row.prompt for row in read.rows] == [row["prompt"] for row in rows]
    assert [(row.file, row.number) for row in read.rows] == [(str(first), i) for i in (1, 2, 3)] + [
        (str(second), i) for i in (1, 2)
    ]
    assert read.skipped == []
    assert read_rows(first).rows == read.rows[:3]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="compares rows read from Parquet with those that pyarrow wrote")
    from pyarrow import parquet

    rows = [{**GOOD, "margin": 0.5, "hint": None}, {**GOOD, "margin": 1.0, "hint": "x"}, {**GOOD, "chosen": ""}]
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    read = read_rows(path, on_bad_row="skip")
    assert [row.columns for row in read.rows] == [{"margin": 0.5}, {"margin": 1.0}]
    assert [(bad.number, bad.reason) for bad in read.skipped] == [(3, "chosen is empty; expected text")]
    path.write_bytes(b"no parquet")
    with pytest.raises(RowError, match="expected a Parquet file"):
        read_rows(path)


def test_skip_loses_only_the_bad_rows(tmp_path):
    lines = [
        b"\xef\xbb\xbf" + json.dumps(GOOD).encode(),  # a byte order mark before the first row
        b"{broken",
        b"",
        b'{"prompt": "\xff"}',
        json.dumps({"prompt": "p", "completions": ["a", "b", "c"]}).encode(),  # K differs
        json.dumps({**GOOD, "margin": 1}).encode(),  # a column that the first row has not
        json.dumps({**GOOD, "prompt": "last"}).encode(),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\r\n".join(lines))
    read = read_rows(path, on_bad_row="skip")
    assert [(row.prompt, row.number) for row in read.rows] == [("p", 1), ("last", 7)]
    assert [bad.number for bad in read.skipped] == [2, 4, 5, 6]
    reasons = ["one JSON object", "byte 12 of the line is 0xff", "one of lists, but row 1", "columns ['margin'], but"]
    for bad, reason in zip(read.skipped, reasons, strict=True):
        assert reason in bad.reason
    with pytest.raises(RowError, match="row 2: expected one JSON object"):
        read_rows(path)


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + '\n{"prompt": "p", "chosen": "a", "rejected": "b", "chosen": "c"}\n')
    with pytest.raises(RowError, match=r"row 2: .*the key 'chosen' stands there twice"):
        read_rows(path)


def test_broken_files(tmp_path):
    for name in ("empty.jsonl", "blank.jsonl"):
        path = tmp_path / name
        path.write_text("" if name == "empty.jsonl" else "\n \n")
        with pytest.raises(RowError, match="has no rows"):
            read_rows(path)
        good = write(tmp_path / "good.jsonl", [GOOD])
        read = read_rows([path, good], on_bad_row="skip")
        assert len(read.rows) == 1 and len(read.skipped) == 1
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path / "missing.jsonl", on_bad_row="skip")
    plain = tmp_path / "plain.jsonl.gz"
    plain.write_text(json.dumps(GOOD))
    with pytest.raises(RowError, match="row 1: the gzip stream is broken"):
        read_rows(plain)


def test_truncated_gzip_keeps_what_can_be_read(tmp_path):
    whole = write(tmp_path / "whole.jsonl.gz", [{**GOOD, "prompt": f"prompt {i * 7919 % 1000}"} for i in range(2000)])
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(RowError, match="cut off here"):
        read_rows(cut)
    read = read_rows(cut, on_bad_row="skip")
    assert 1000 < len(read.rows) < 2000
    assert read.rows[-1].number == len(read.rows)
    assert [bad.number for bad in read.skipped] == [len(read.rows) + 1]


def test_rows_in_memory():
    read = check_rows(iter([GOOD, {}]), name="mine", on_bad_row="skip")
    assert (read.rows[0].file, read.rows[0].number) == ("mine", 1)
    assert read.skipped[0].file == "mine"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner),
    max_leaves=6,
)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", ""]), "content": st.text(max_size=3)}),
    max_size=3,
)
likely = st.text(max_size=4) | messages | st.sampled_from(["\n\nHuman: a\n\nAssistant: b", "\n\nAssistant:"])
keys = st.sampled_from(["prompt", "chosen", "rejected", "completion", "completions", "margin"])


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(keys, likely | json_values) | json_values)
def test_any_value_is_a_row_or_a_row_error(value):
    try:
        row = parse_row(value)
    except RowError:
        return
    assert row.completions and all(text.strip() for text in row.completions)
    assert len(set(row.completions)) == len(row.completions)
    assert isinstance(row.prompt, str) or all(set(m) == {"role", "content"} for m in row.prompt)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_bytes_are_rows_or_skipped(tmp_path_factory, data):
    good = json.dumps(GOOD).encode()
    lines = data.draw(st.lists(st.just(good) | st.binary(max_size=20).map(lambda b: b.replace(b"\n", b"")), min_size=1))
    path = tmp_path_factory.mktemp("fuzz") / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    read = read_rows(path, on_bad_row="skip")
    assert len(read.rows) == lines.count(good)
    assert len(read.rows) + len(read.skipped) == max(1, sum(bool(line.strip()) for line in lines))
