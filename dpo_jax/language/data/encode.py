"""From checked rows to token ids: chat template, one BOS, one EOS, truncation that empties nothing.

Prompt and completion are tokenised apart, so that no token crosses their border and all completions of a row follow
exactly the same prompt ids. Masks are never read off the ids, so an EOS that is also the padding token is harmless.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dpo_jax.language.data.rows import ASSISTANT_TURN, HUMAN_TURN, Message, PreferenceRow, Prompt, RowError
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

    Returns:
      Examples with int32 ids (columns: bool, int32 or float32, one dtype per name), and a report of what was cut.

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
    dtypes = _column_dtypes(rows)
    examples: list[Example] = []
    count = dict.fromkeys(("prompts_cut", "completions_cut", "too_long", "identical"), 0)
    for row, prompt, completions in _tokenise(rows, tokenizer, chat_template):
        lengths = [len(c) for c in completions]
        columns = {name: _column_array(row, name, lengths, dtypes[name]) for name in row.columns}
        if len(prompt) + max(lengths) > max_length:
            if truncation == "drop":
                count["too_long"] += 1
                continue
            room = max(max_prompt_length, max_length - max(lengths))
            count["prompts_cut"] += len(prompt) > room
            prompt = _keep_end(prompt, room, tokenizer.bos_token_id)
            room = max_length - len(prompt)
            count["completions_cut"] += sum(length > room for length in lengths)
            completions = [c[:room] for c in completions]
            columns = {k: v[..., :room] if is_per_token(k, v, len(lengths)) else v for k, v in columns.items()}
        if len({tuple(c) for c in completions}) < len(completions):
            count["identical"] += 1
            continue
        ids = tuple(np.array(c, np.int32) for c in completions)
        examples.append(Example(np.array(prompt, np.int32), ids, columns))
    return examples, EncodeReport(rows=len(rows), examples=len(examples), **count)


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


def _render(row: PreferenceRow, tokenizer: Any, messages: Prompt) -> tuple[str, list[str]]:
    """Text of the prompt and of each completion under the chat template."""
    strip = isinstance(row.prompt, str)  # an HH completion begins with the blank that follows "Assistant:"
    turns = [{"role": "assistant", "content": c.strip() if strip else c} for c in row.completions]
    full = [[*messages, turn] for turn in turns]
    try:
        prompt = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        wholes = tokenizer.apply_chat_template(full, tokenize=False, add_generation_prompt=False)
    except Exception as error:  # templates are programs: what they raise is up to them
        raise RowError(row.file, row.number, f"the chat template refuses this row ({error})") from error
    for whole in wholes:
        if not whole.startswith(prompt):
            reason = "the chat template's conversation does not begin with its own generation prompt, "
            reason += f"which ends in {prompt[-40:]!r}; use a template whose assistant turns open the same way"
            raise RowError(row.file, row.number, reason)
    return prompt, [whole[len(prompt) :] for whole in wholes]


def _texts(row: PreferenceRow, tokenizer: Any, chat_template: ChatTemplate) -> list[str]:
    """The prompt's text, then those of the completions."""
    messages = _messages_of(row, tokenizer, chat_template)
    if messages is None:
        return [str(row.prompt), *row.completions]
    prompt, completions = _render(row, tokenizer, messages)
    return [prompt, *completions]


def _tokenise(
    rows: Sequence[PreferenceRow], tokenizer: Any, chat_template: ChatTemplate
) -> Iterator[tuple[PreferenceRow, list[int], list[list[int]]]]:
    """Ids of each row before truncation: the prompt with its BOS, every completion with its EOS."""
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    for begin in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[begin : begin + ROWS_AT_ONCE]
        texts = [text for row in some for text in _texts(row, tokenizer, chat_template)]
        ids = iter(tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"])
        for row in some:
            prompt = _begin(list(next(ids)), tokenizer, adds_bos)
            yield row, prompt, [_end(list(next(ids)), tokenizer) for _ in row.completions]


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
        array = np.full((len(lengths), max(lengths)), outside(np.dtype(dtype)), dtype)
        for k, (tokens, length) in enumerate(zip(value, lengths)):
            array[k, : len(tokens)] = _require_token_values(row, name, tokens, length)
        return array
    side = _side(name)
    if isinstance(value, (list, tuple)) and not nested and side is not None and side < len(lengths):
        array = np.full(lengths[side], outside(np.dtype(dtype)), dtype)
        array[: len(value)] = _require_token_values(row, name, value, lengths[side])
        return array
    try:
        return np.asarray(value, dtype)
    except ValueError:
        raise RowError(row.file, row.number, f"the lists of column {name!r} are not equally long") from None


def _require_token_values(row: PreferenceRow, name: str, values: Sequence[Any], length: int) -> Sequence[Any]:
    if len(values) not in (length - 1, length):
        reason = f"column {name!r} has {len(values)} values for a completion of {length} tokens (its EOS included)"
        raise RowError(row.file, row.number, f"{reason}; expected one per token")
    return values


def outside(dtype: np.dtype) -> int:
    """What a column per token holds where there is no token: -1 if it is an integer (an index), else zero."""
    return -1 if np.issubdtype(dtype, np.integer) else 0
