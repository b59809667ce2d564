"""From checked rows to token ids: chat template, one BOS, one EOS, truncation that empties nothing.

Prompt and completion are tokenised apart, so that no token crosses their border and all completions of a row follow
exactly the same prompt ids. Masks are never read off the ids, so an EOS that is also the padding token is harmless.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from dpo_jax.language.data.rows import ASSISTANT_TURN, HUMAN_TURN, Message, PreferenceRow, RowError
from dpo_jax.language.types import Example

ROWS_AT_ONCE = 2048  # the tokenizer runs on this many rows in one call

ChatTemplate = Literal["auto", "never", "always"]
Truncation = Literal["keep_end", "drop"]


@dataclass(frozen=True)
class EncodeReport:
    """What encoding did to the rows.

    Attributes:
      rows: rows that came in.
      examples: examples that came out.
      prompts_cut, completions_cut: prompts and completions that lost tokens.
      too_long: rows dropped because a prompt with a completion was longer than max_length (truncation "drop").
      identical: rows dropped because two completions have the same tokens, cut or not.
    """

    rows: int = 0
    examples: int = 0
    prompts_cut: int = 0
    completions_cut: int = 0
    too_long: int = 0
    identical: int = 0

    @property
    def dropped(self) -> int:
        """Rows that gave no example."""
        return self.too_long + self.identical


def encode_rows(
    rows: Sequence[PreferenceRow],
    tokenizer: Any,
    *,
    max_length: int = 1024,
    max_prompt_length: int | None = None,
    truncation: Truncation = "keep_end",
    chat_template: ChatTemplate = "auto",
    step_delimiter: str | None = None,
) -> tuple[list[Example], EncodeReport]:
    """Token ids of all rows, in their order.

    Args:
      rows: as `read_rows` gives them.
      tokenizer: a transformers tokenizer.
      max_length: most tokens of a prompt together with one completion.
      max_prompt_length: a prompt is not cut below this many tokens; half of max_length by default.
      truncation: if a row is too long, "keep_end" cuts the beginning of the prompt (its BOS stays) as far as needed,
        then the end of the completions, which lose their EOS; "drop" drops the row.
      chat_template: "auto" renders message lists, and dialogues of Human and Assistant turns if the tokenizer has a
        template; plain text stays as it is. "never" renders nothing. "always" renders plain text as a user message.
      step_delimiter: text that ends a step. Every step is tokenised apart, and a column `step_ids` [K, C] numbers the
        steps of each completion from 0 (EOS belongs to the last).

    Returns:
      Examples with int32 ids (columns: bool, int32 or float32, one dtype per name), and a report of what was cut. All
      have as many completions as the longest list; the absent ones have no token, zeros in columns per item.

    Raises:
      RowError: messages without a template, a template that does not extend its own prompt, token columns of a wrong
        length; names the row.
      ValueError: a tokenizer without EOS, lengths that leave no room for a completion.
    """
    if max_prompt_length is None:
        max_prompt_length = max(1, max_length // 2)
    if not 1 <= max_prompt_length < max_length:
        raise ValueError(
            f"max_prompt_length is {max_prompt_length} and max_length is {max_length}; "
            "a prompt needs a token, and a completion one more"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, so a completion could not end; set tokenizer.eos_token")
    if chat_template == "always" and not _has_template(tokenizer):
        raise ValueError('chat_template="always", but the tokenizer has no chat template; set tokenizer.chat_template')
    if step_delimiter == "":
        raise ValueError("step_delimiter is empty; give the text that ends a step")
    dtypes = _column_dtypes(rows)
    most = max((len(row.completions) for row in rows), default=0)
    examples: list[Example] = []
    count = dict.fromkeys(("prompts_cut", "completions_cut", "too_long", "identical"), 0)
    for row, prompt, completions, contexts, step_ids in _tokenise(rows, tokenizer, chat_template, step_delimiter):
        lengths = [len(c) for c in completions]
        before = [len(c) for c in contexts] or [0] * len(completions)
        columns = {name: _column_array(row, name, lengths, dtypes[name]) for name in row.columns}
        if step_delimiter is not None:
            columns["step_ids"] = _rectangle(step_ids, -1, np.dtype(np.int32))
        longest = max(map(sum, zip(before, lengths)))
        if len(prompt) + longest > max_length:
            room = max(max_prompt_length, max_length - longest)
            # A context is never cut: an answer that is to be revised would be another one.
            if truncation == "drop" or min(room, len(prompt)) + max(before) >= max_length:
                count["too_long"] += 1
                continue
            count["prompts_cut"] += len(prompt) > room
            prompt = _keep_end(prompt, room, tokenizer.bos_token_id)
            rooms = [max_length - len(prompt) - length for length in before]
            count["completions_cut"] += sum(length > room for length, room in zip(lengths, rooms))
            completions = [c[:room] for c, room in zip(completions, rooms)]
            most_left = max(map(len, completions))
            columns = {k: v[..., :most_left] if is_per_token(k, v, len(lengths)) else v for k, v in columns.items()}
        if len({(tuple(a), tuple(b)) for a, b in zip(contexts or completions, completions)}) < len(completions):
            count["identical"] += 1
            continue
        absent = most - len(completions)
        ids = tuple(np.array(c, np.int32) for c in [*completions, *([] for _ in range(absent))])
        others = tuple(np.array(c, np.int32) for c in contexts)
        columns = {k: _with_absent(k, v, len(lengths), absent) for k, v in columns.items()}
        examples.append(Example(np.array(prompt, np.int32), ids, columns, others))
    return examples, EncodeReport(rows=len(rows), examples=len(examples), **count)


def encode_prompts(
    rows: Sequence[PreferenceRow], tokenizer: Any, *, chat_template: ChatTemplate = "auto"
) -> list[np.ndarray]:
    """Token ids int32 [P] of the prompts alone, uncut: what a completion in `encode_rows` goes on from.

    Args:
      rows: completions are not looked at, a prefix belongs to the prompt.
      tokenizer, chat_template: as for `encode_rows`.

    Raises:
      RowError: messages without a template, or messages that the template refuses; names the row.
      ValueError: chat_template "always" without a template.
    """
    if chat_template == "always" and not _has_template(tokenizer):
        raise ValueError('chat_template="always", but the tokenizer has no chat template; set tokenizer.chat_template')
    texts = []
    for row in rows:
        messages = _messages_of(row, tokenizer, chat_template)
        if messages is None:
            texts.append(str(row.prompt) + row.prefix)
            continue
        try:
            prompt = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates are programs: what they raise is up to them
            raise RowError(row.file, row.number, f"the chat template refuses this row ({error})") from error
        texts.append(prompt + row.prefix)
    adds_bos = _adds_bos(tokenizer)
    ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return [np.array(_begin(list(prompt), tokenizer, adds_bos), np.int32) for prompt in ids]


def _with_absent(name: str, value: np.ndarray, completions: int, absent: int) -> np.ndarray:
    """A column with room for the absent items of a list, if it has a place per item."""
    per_token = is_per_token(name, value, completions)
    if not absent or not (per_token or value.shape == (completions,)):
        return value
    return np.pad(value, [(0, absent), *[(0, 0)] * (value.ndim - 1)], constant_values=outside(value.dtype) * per_token)


def is_per_token(name: str, value: np.ndarray, completions: int) -> bool:
    """Whether a column's last axis runs over tokens, so that it is cut and padded with them.

    That is so for [K, C], and for [C] under a name with `chosen` or `rejected` in it; all else has a fixed shape.
    """
    if value.ndim == 2:
        return value.shape[0] == completions
    return value.ndim == 1 and _side(name) is not None


def _side(name: str) -> int | None:
    """Index of the completion that a column's name speaks of."""
    return 0 if "chosen" in name else 1 if "rejected" in name else None


def dialogue_messages(text: str) -> tuple[Message, ...] | None:
    """Messages of a text of Human and Assistant turns that asks for an answer, or None if it is no such text.

    Turns of the same speaker in a row, which some templates refuse, become one message.
    """
    if not (text.startswith(HUMAN_TURN) and text.endswith(ASSISTANT_TURN)):
        return None
    pieces = re.split(f"({HUMAN_TURN}|{ASSISTANT_TURN})", text.removesuffix(ASSISTANT_TURN))[1:]
    messages: list[dict[str, str]] = []
    for turn, content in zip(pieces[::2], pieces[1::2]):
        role, content = "user" if turn == HUMAN_TURN else "assistant", content.strip()
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + content
        else:
            messages.append({"role": role, "content": content})
    return tuple(messages)


def _has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def _messages_of(row: PreferenceRow, tokenizer: Any, chat_template: ChatTemplate) -> tuple[Message, ...] | None:
    """What the chat template should render for this row, or None if its text is used as it is."""
    if not isinstance(row.prompt, str):
        if chat_template == "never" or not _has_template(tokenizer):
            remedy = "set tokenizer.chat_template and allow it, or write the prompts as text"
            raise RowError(row.file, row.number, f"the prompt is a list of messages, but no chat template; {remedy}")
        return row.prompt
    if chat_template == "never" or not _has_template(tokenizer):
        return None
    messages = dialogue_messages(row.prompt)
    if messages is None and chat_template == "always":
        return ({"role": "user", "content": row.prompt},)
    return messages


def _render(row: PreferenceRow, tokenizer: Any, messages: tuple[Message, ...]) -> tuple[str, list[str], list[str]]:
    """Text of the prompt, of each completion, and of each context, under the chat template."""

    def trimmed(text: str) -> str:
        return text.strip() if isinstance(row.prompt, str) else text  # HH text begins with the blank after "Assistant:"

    turns = [{"role": "assistant", "content": trimmed(c)} for c in row.completions]
    between = [[{**m, "content": trimmed(m["content"])} for m in context] for context in row.contexts]
    asked = [[*messages, *context] for context in between] or [list(messages)] * len(turns)
    full = [[*before, turn] for before, turn in zip(asked, turns)]
    try:
        prompt = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        starts = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        wholes = tokenizer.apply_chat_template(full, tokenize=False, add_generation_prompt=False)
    except Exception as error:  # templates are programs: what they raise is up to them
        raise RowError(row.file, row.number, f"the chat template refuses this row ({error})") from error
    for start, whole in zip(starts, wholes):
        if not start.startswith(prompt) or not whole.startswith(start):
            reason = "the chat template's conversation does not begin with its own generation prompt, "
            reason += f"which ends in {prompt[-40:]!r}; use a template whose assistant turns open the same way"
            raise RowError(row.file, row.number, reason)
    contexts = [start[len(prompt) :] for start in starts] if row.contexts else []
    return prompt, [whole[len(start) :] for start, whole in zip(starts, wholes)], contexts


def _texts(row: PreferenceRow, tokenizer: Any, chat_template: ChatTemplate) -> tuple[str, list[str], list[str]]:
    """Text of the prompt (with the beginning of the answer that is given), of the completions, of the contexts."""
    messages = _messages_of(row, tokenizer, chat_template)
    if messages is None:
        return str(row.prompt) + row.prefix, list(row.completions), [_plain(c, row.prompt) for c in row.contexts]
    prompt, completions, contexts = _render(row, tokenizer, messages)
    if row.prefix:
        # Steps go on inside the answer: what the template writes around a whole answer has no place there.
        return prompt + row.prefix, list(row.completions), contexts
    return prompt, completions, contexts


def _plain(context: tuple[Message, ...], prompt: Any) -> str:
    """Turns after a text prompt as text: dialogues go on as they are written, other texts in paragraphs."""
    human, assistant = ("\n\n", "\n\n")
    if dialogue_messages(prompt) is not None:
        human, assistant = HUMAN_TURN + " ", ASSISTANT_TURN
    return "".join(m["content"] if m["role"] == "assistant" else human + m["content"] + assistant for m in context)


class _Tokens(NamedTuple):
    """Ids of a row before truncation: the prompt with its BOS, every completion with its EOS (but for steps)."""

    row: PreferenceRow
    prompt: list[int]
    completions: list[list[int]]
    contexts: list[list[int]]
    step_ids: list[list[int]]


def _tokenise(
    rows: Sequence[PreferenceRow], tokenizer: Any, chat_template: ChatTemplate, step_delimiter: str | None
) -> Iterator[_Tokens]:
    adds_bos = _adds_bos(tokenizer)
    for begin in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[begin : begin + ROWS_AT_ONCE]
        parts = [_texts(row, tokenizer, chat_template) for row in some]
        steps = [[_split_steps(text, step_delimiter) for text in completions] for _, completions, _ in parts]
        texts = [
            text
            for (prompt, _, contexts), pieces in zip(parts, steps)
            for text in (prompt, *contexts, *(piece for completion in pieces for piece in completion))
        ]
        ids = iter(tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"])
        for row, (_, _, contexts), pieces in zip(some, parts, steps):
            prompt = _begin(list(next(ids)), tokenizer, adds_bos)
            before = [list(next(ids)) for _ in contexts]
            split = [[list(next(ids)) for _ in completion] for completion in pieces]
            completions = [[token for piece in completion for token in piece] for completion in split]
            completions = [c if row.prefix else _end(c, tokenizer) for c in completions]
            numbered = [[n for n, piece in enumerate(completion) for _ in piece] for completion in split]
            step_ids = [(n + n[-1:])[: len(c)] for n, c in zip(numbered, completions)]
            yield _Tokens(row, prompt, completions, before, step_ids)


def _split_steps(text: str, delimiter: str | None) -> list[str]:
    """The steps of a completion, each with the delimiter that ends it."""
    if delimiter is None:
        return [text]
    pieces = text.split(delimiter)
    steps = [piece + delimiter for piece in pieces[:-1]] + [pieces[-1]]
    return [step for step in steps if step]


def _adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a BOS in front by itself."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _begin(prompt: list[int], tokenizer: Any, adds_bos: bool) -> list[int]:
    """The prompt with exactly one BOS in front if the tokenizer adds one by itself, and never empty."""
    bos = tokenizer.bos_token_id
    if adds_bos and prompt[:1] != [bos]:
        prompt = [bos, *prompt]
    return prompt or [tokenizer.eos_token_id if bos is None else bos]


def _end(completion: list[int], tokenizer: Any) -> list[int]:
    """The completion up to its first EOS, which is added if there is none; whatever a template writes after it goes."""
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    if bos is not None and bos != eos and completion[:1] == [bos]:
        completion = completion[1:]
    return [*(completion[: completion.index(eos)] if eos in completion else completion), eos]


def _keep_end(prompt: list[int], room: int, bos: int | None) -> list[int]:
    """The last `room` tokens; a BOS in front stays there."""
    if len(prompt) <= room:
        return prompt
    if bos is not None and prompt[0] == bos:
        return [bos, *prompt[len(prompt) - room + 1 :]]
    return prompt[len(prompt) - room :]


def _column_dtypes(rows: Sequence[PreferenceRow]) -> dict[str, type]:
    """One dtype per column for all rows: bool, int32, or float32 as soon as one value is no small integer."""
    dtypes: dict[str, type] = {}
    for row in rows:
        for name, value in row.columns.items():
            dtypes[name] = _wider(dtypes.get(name), _dtype_of(value))
    return dtypes


def _dtype_of(value: Any) -> type:
    if isinstance(value, (list, tuple)):
        found: type | None = None
        for item in value:
            found = _wider(found, _dtype_of(item))
        return found or np.float32
    if isinstance(value, bool):
        return np.bool_
    return np.int32 if isinstance(value, int) and abs(value) < 2**31 else np.float32


def _wider(a: type | None, b: type) -> type:
    return b if a is None or a is b else np.float32


def _column_array(row: PreferenceRow, name: str, lengths: list[int], dtype: type) -> np.ndarray:
    """A row's column: token lists are padded to the longest completion, other values keep their shape.

    A value for EOS may be left out; it is then what stands outside of completions (`outside`).
    """
    value = row.columns[name]
    nested = isinstance(value, (list, tuple)) and isinstance(value[0], (list, tuple))
    if nested and len(value) == len(lengths) and not isinstance(value[0][0], (list, tuple)):
        checked = [_require_token_values(row, name, tokens, length) for tokens, length in zip(value, lengths)]
        return _rectangle(checked, outside(np.dtype(dtype)), np.dtype(dtype), max(lengths))
    side = _side(name)
    if isinstance(value, (list, tuple)) and not nested and side is not None and side < len(lengths):
        array = np.full(lengths[side], outside(np.dtype(dtype)), dtype)
        array[: len(value)] = _require_token_values(row, name, value, lengths[side])
        return array
    try:
        return np.asarray(value, dtype)
    except ValueError:
        raise RowError(row.file, row.number, f"the lists of column {name!r} are not equally long") from None


def _rectangle(values: Sequence[Sequence[Any]], fill: int, dtype: np.dtype, width: int = 0) -> np.ndarray:
    """Ragged lists as one array, short ones filled up."""
    array = np.full((len(values), max(width, *map(len, values))), fill, dtype)
    for place, items in zip(array, values):
        place[: len(items)] = items
    return array


def _require_token_values(row: PreferenceRow, name: str, values: Sequence[Any], length: int) -> Sequence[Any]:
    if len(values) not in (length - 1, length):
        reason = f"column {name!r} has {len(values)} values for a completion of {length} tokens (its EOS included)"
        raise RowError(row.file, row.number, f"{reason}; expected one per token")
    return values


def outside(dtype: np.dtype) -> int:
    """What a column per token holds where there is no token: -1 if it is an integer (an index), else zero."""
    return -1 if np.issubdtype(dtype, np.integer) else 0
