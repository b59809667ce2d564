"""Preference rows: read JSONL, JSONL.gz or Parquet, check every row, say exactly where a bad one stands.

Forms of a row, each a plain mapping:

- `{"prompt", "chosen", "rejected"}`: a pair. Text, or lists of `{"role", "content"}` messages.
- `{"chosen", "rejected"}`: two message lists, or two texts of "\\n\\nHuman: ...\\n\\nAssistant: ..." turns (the form of
  Anthropic's HH data), that differ in the last assistant turn only; what goes before it is the prompt.
- `{"prompt", "gold", "chosen", "rejected"}`: a triple (`reference` is read as `gold`).
- `{"prompt", "completion"}`: one completion; its `label`, true or false, says whether it is desirable.
- `{"prompt", "completions": [...]}` or `{"prompt", "responses": [...]}`: a list, best first; its items are text,
  messages or `{"text", "score"}`. Lists may differ in length; `scores` has a number per item.

In all of them `prefix` (or `initial_reason_steps`) is a beginning of the answer that is given: the completions go on
from it, as single steps that do not end the answer. Further keys that hold numbers or lists of numbers are kept as
columns; other keys are left aside.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dpo_jax.rows import (
    OnBadRow,
    Reason,
    Record,
    RowError,
    SkippedRow,
    is_numeric,
    json_records,
    kind_of,
    numeric_column,
    require_text,
)

HUMAN_TURN = "\n\nHuman:"
ASSISTANT_TURN = "\n\nAssistant:"

Message = Mapping[str, str]
Prompt = str | tuple[Message, ...]
Form = Literal["pairs", "triples", "singles", "mismatched", "revisions", "lists"]

# Keys under which known data sets have a column.
COLUMN_ALIASES = {"label": "labels", "score_chosen": "chosen_score", "score_rejected": "rejected_score"}
PREFIX_KEYS = ("prefix", "initial_reason_steps")


@dataclass(frozen=True)
class PreferenceRow:
    """One prompt and its K completions as text.

    Attributes:
      prompt: text, or messages with the keys `role` and `content` only.
      completions: K texts, in the order of `language.types.COMPLETIONS`; the best of a list first.
      columns: name -> number or (nested) list of numbers.
      file, number: where the row was read; the number counts lines from 1.
      form: what the completions are.
      prefix: beginning of the answer that all completions go on from; they are then steps, without an end of text.
      contexts: for each completion the messages that stand between prompt and completion, an earlier answer and what
        is said to it; () if no completion has any.
    """

    prompt: Prompt
    completions: tuple[str, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)
    file: str = ""
    number: int = 0
    form: Form = "pairs"
    prefix: str = ""
    contexts: tuple[tuple[Message, ...], ...] = ()


class RowsRead(NamedTuple):
    """Good rows in the order of the files, and the bad ones that were skipped."""

    rows: list[PreferenceRow]
    skipped: list[SkippedRow]


def read_rows(paths: str | Path | Sequence[str | Path], *, on_bad_row: OnBadRow = "error") -> RowsRead:
    """Read and check the rows of one or several files; `.gz` and `.parquet` are known by their suffix.

    Args:
      paths: files in order.
      on_bad_row: "error" raises at the first bad row; "skip" lists it in `skipped` and loses nothing else. A file that
        breaks off (a truncated gzip stream) is one bad row after the last that could be read.

    Raises:
      RowError: a bad row, an empty or broken file (only with "error").
      OSError: a file that is missing or may not be read.
    """
    if isinstance(paths, (str, Path)):
        paths = [paths]
    records = (record for path in paths for record in _records(Path(path)))
    return _check(records, on_bad_row)


def check_rows(rows: Iterable[Mapping[str, Any]], *, name: str = "rows", on_bad_row: OnBadRow = "error") -> RowsRead:
    """The same checks for rows in memory: an iterable of mappings, a Hugging Face dataset; `name` stands for the file.

    Raises:
      RowError: a bad row (only with "error").
    """
    return _check(((name, number, row) for number, row in enumerate(rows, 1)), on_bad_row)


def _check(records: Iterable[Record], on_bad_row: OnBadRow) -> RowsRead:
    rows: list[PreferenceRow] = []
    skipped: list[SkippedRow] = []
    for file, number, record in records:
        try:
            if isinstance(record, RowError):
                raise record
            row = parse_row(record, file=file, number=number)
            if rows:
                _require_same_form(row, rows[0])
            rows.append(row)
        except RowError as error:
            if on_bad_row == "error":
                raise
            skipped.append(SkippedRow(error.file, error.number, error.reason))
    return RowsRead(rows, skipped)


def _require_same_form(row: PreferenceRow, first: PreferenceRow) -> None:
    """Batches have one shape: every row needs the form and the columns of the first one."""
    if row.form != first.form:
        reason = f"one of {row.form}, but row {first.number} of {first.file} is one of {first.form}"
        raise RowError(row.file, row.number, f"{reason}; give rows of one form")
    if row.columns.keys() != first.columns.keys():
        reason = f"number columns {sorted(row.columns)}, but row {first.number} of {first.file} has "
        raise RowError(row.file, row.number, f"{reason}{sorted(first.columns)}; give all rows the same columns")


def _records(path: Path) -> Iterator[Record]:
    read = _parquet_records if path.suffix == ".parquet" else json_records
    number = 0
    for file, number, record in read(path):
        yield file, number, record
    if not number:
        yield str(path), 1, RowError(str(path), 1, "the file has no rows; expected one JSON object per line")


def _parquet_records(path: Path) -> Iterator[Record]:
    from pyarrow import ArrowException, parquet

    file, number = str(path), 0
    path.stat()  # a missing file is an OSError, as for the other formats
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield file, number, row
    except (ArrowException, UnicodeDecodeError) as error:
        yield file, number + 1, RowError(file, number + 1, f"expected a Parquet file with rows ({error})")


def parse_row(row: Any, *, file: str = "row", number: int = 1) -> PreferenceRow:
    """Canonical form of one row; `file` and `number` go into the error.

    Raises:
      RowError: a missing key, a wrong type, an empty or repeated completion, unequal prompts.
    """
    try:
        if not isinstance(row, Mapping):
            raise Reason(f"expected an object with a prompt and completions, got {kind_of(row)}")
        row = {key: value for key, value in row.items() if value is not None}  # Parquet fills absent keys with None
        form, used, prompt, completions, scores = _prompt_and_completions(row)
        for name, text in zip(_completion_names(used, len(completions)), completions):
            require_text(name, text)
            if not text.strip():
                raise Reason(f"{name} is empty; expected text")
        if (repeated := len(completions) - len(set(completions))) > 0:
            what = "chosen and rejected are equal" if "chosen" in used else f"{repeated} completions are repeated"
            raise Reason(f"{what}; expected different texts")
        prefix, used = _prefix(row, used)
        columns = {str(k): numeric_column(k, v) for k, v in row.items() if k not in used and is_numeric(v)}
        columns = {COLUMN_ALIASES.get(k, k): v for k, v in columns.items()}
        if scores is not None:
            columns["scores"] = numeric_column("score", scores)
        _require_sound_columns(form, columns, len(completions))
    except Reason as reason:
        raise RowError(file, number, str(reason)) from None
    except RecursionError:
        raise RowError(file, number, "its lists are nested too deeply") from None
    return PreferenceRow(prompt, completions, columns, file, number, form, prefix)


class _Parts(NamedTuple):
    """Form of a row, the keys that were used, its prompt and completions, and scores that stood in a list's items."""

    form: Form
    used: tuple[str, ...]
    prompt: Prompt
    completions: tuple[str, ...]
    scores: list[Any] | None = None


def _prompt_and_completions(row: Mapping[str, Any]) -> _Parts:
    if "chosen" in row or "rejected" in row:
        return _sides(row)
    for key in ("completions", "responses"):
        if key in row:
            return _list(row, key)
    _require_keys(row, ("prompt", "completion"))
    prompt = _prompt(row["prompt"])
    answer = _answer("completion", row["completion"], prompt)[1]
    return _Parts("singles", ("prompt", "completion"), prompt, (answer,))


def _sides(row: Mapping[str, Any]) -> _Parts:
    """A pair or a triple."""
    _require_keys(row, ("chosen", "rejected"))
    gold = next((name for name in ("gold", "reference") if isinstance(row.get(name), (str, list, tuple))), None)
    gold = None if gold == "reference" and is_numeric(row[gold]) else gold
    sides = {name: row[name] for name in ("chosen", "rejected", *((gold,) if gold else ()))}
    form: Form = "triples" if gold else "pairs"
    if "prompt" not in row:
        return _Parts(form, tuple(sides), *_split_dialogues(sides))
    prompt, given = _prompt(row["prompt"]), row["prompt"]
    answers = [_answer(name, value, prompt) for name, value in sides.items()]
    # Some data sets repeat the turns of a text prompt in front of all answers; then these turns are the prompt.
    if isinstance(given, str) and answers[0][0] is not None:
        if any(before != answers[0][0] for before, _ in answers):
            raise Reason("the messages before the last one differ between chosen and rejected")
        prompt = answers[0][0]
    return _Parts(form, ("prompt", *sides), prompt, tuple(text for _, text in answers))


def _list(row: Mapping[str, Any], key: str) -> _Parts:
    _require_keys(row, ("prompt", key))
    values = row[key]
    if not isinstance(values, (list, tuple)) or not values:
        raise Reason(f"{key} should be a list of at least one text, got {kind_of(values)}")
    prompt, texts, scores = _prompt(row["prompt"]), [], []
    for i, value in enumerate(values):
        if isinstance(value, Mapping):
            if "text" not in value:
                raise Reason(
                    f'{key}[{i}] should be text or {{"text", "score"}}, got the keys {sorted(map(str, value))}'
                )
            if "score" in value:
                if not is_numeric(value["score"]) or isinstance(value["score"], (list, tuple)):
                    raise Reason(f"{key}[{i}].score should be a number, got {kind_of(value['score'])}")
                scores.append(value["score"])
            value = value["text"]
        texts.append(_answer(f"{key}[{i}]", value, prompt)[1])
    if scores and len(scores) < len(texts):
        raise Reason(f"{len(scores)} of {len(texts)} items of {key} have a score; expected all or none")
    return _Parts("lists", ("prompt", key), prompt, tuple(texts), scores or None)


def _prefix(row: Mapping[str, Any], used: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """The beginning of the answer that a row gives, and the keys used up to here."""
    for key in PREFIX_KEYS:
        if isinstance(row.get(key), str):
            require_text(key, row[key])
            return row[key], (*used, key)
    return "", used


def _require_sound_columns(form: Form, columns: Mapping[str, Any], count: int) -> None:
    """What the names of known columns promise: labels are 0 or 1, a list has a score for each item."""
    if "labels" in columns and columns["labels"] not in (0, 1):
        raise Reason(f"label is {columns['labels']!r}; expected true or false (1 or 0)")
    scores = columns.get("scores")
    if form == "lists" and scores is not None and (not isinstance(scores, (list, tuple)) or len(scores) != count):
        given = len(scores) if isinstance(scores, (list, tuple)) else "no list of"
        raise Reason(f"{given} scores for {count} completions; expected one number for each")


def _completion_names(used: tuple[str, ...], count: int) -> Sequence[str]:
    key = next((key for key in ("completions", "responses") if key in used), None)
    return [f"{key}[{i}]" for i in range(count)] if key else used[-count:]


def _require_keys(row: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    for key in keys:
        if key not in row:
            forms = (
                "prompt + chosen + rejected, chosen + rejected, prompt + gold + chosen + rejected, "
                "prompt + completion, prompt + completions, or prompt + responses"
            )
            raise Reason(f"no {key!r} among the keys {sorted(map(str, row))}; expected {forms}")


def _prompt(value: Any) -> Prompt:
    if isinstance(value, str):
        require_text("prompt", value)
        return value
    return _messages("prompt", value)


def _answer(name: str, value: Any, prompt: Prompt) -> tuple[tuple[Message, ...] | None, str]:
    """The turns that a completion repeats from its prompt (None if it repeats none), and its text."""
    if isinstance(value, str):
        return None, value
    *before, last = _messages(name, value)
    if last["role"] != "assistant":
        raise Reason(f"{name} should end with an assistant message, got the role {last['role']!r}")
    if not before:
        return None, last["content"]
    repeats = tuple(before) == prompt if not isinstance(prompt, str) else before[-1]["content"] == prompt
    if not repeats:
        raise Reason(f"{name} has messages before its last one that are not those of the prompt")
    return tuple(before), last["content"]


def _split_dialogues(sides: Mapping[str, Any]) -> tuple[Prompt, tuple[str, ...]]:
    """Shared prompt and last assistant turns of two dialogues, message lists or text."""
    parts = [_split_dialogue(name, value) for name, value in sides.items()]
    if any(prompt != parts[0][0] for prompt, _ in parts):
        raise Reason("chosen and rejected differ before the last assistant turn; expected one shared prompt")
    return parts[0][0], tuple(completion for _, completion in parts)


def _split_dialogue(name: str, value: Any) -> tuple[Prompt, str]:
    if not isinstance(value, str):
        *before, last = _messages(name, value)
        if last["role"] != "assistant" or not before:
            raise Reason(f"there is no prompt, so {name} should be messages that end with an answer by the assistant")
        return tuple(before), last["content"]
    head, turn, completion = value.rpartition(ASSISTANT_TURN)
    if not turn:
        raise Reason(f"there is no prompt, and {name} has no turn {ASSISTANT_TURN!r} to split at")
    if HUMAN_TURN in completion:
        raise Reason(f"{name} should end with a turn {ASSISTANT_TURN!r}, but ends with {HUMAN_TURN!r}")
    require_text(name, value)
    return head + turn, completion


def _messages(name: str, value: Any) -> tuple[Message, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise Reason(f"{name} should be text or a list of messages, got {kind_of(value)}")
    for i, message in enumerate(value):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise Reason(f'{name}[{i}] should be a message {{"role", "content"}}, got {kind_of(message)}')
        for key in ("role", "content"):
            require_text(f"{name}[{i}].{key}", message[key])
    return tuple({"role": message["role"], "content": message["content"]} for message in value)
