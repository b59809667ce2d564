"""Running-sum digit chains: a synthetic task with an exact judge of every step.

The prompt is six digits. The solution walks over the last five: each step writes the digit, the running sum modulo 10
(which starts from the first digit), and ";". So for `314159` the right chain is `14;48;19;54;93;` and the last running
sum, 3, is the answer. A warm start on chains whose steps are wrong with probability 0.12 samples a right answer about
half of the time (0.88^5 = 0.53), and every wrong chain has an exactly known first wrong step.
"""

from typing import NamedTuple

import numpy as np

DIGITS = 6
STEPS = DIGITS - 1
STEP_NOISE = 0.12

PAD, BOS, EOS = 0, 1, 2
SYMBOLS = ("<pad>", "<s>", "</s>", *"0123456789", ";")
_IDS = {symbol: i for i, symbol in enumerate(SYMBOLS)}
VOCABULARY_SIZE = 16  # a multiple of 8, so that the vocabulary can be sharded
COMPLETION_LENGTH = 3 * STEPS + 1  # with EOS


class Verdict(NamedTuple):
    """What the exact judge says of a chain.

    Attributes:
      final_correct: the chain has the right form and ends in the right sum.
      first_error_step: index of the first wrong step, or None if every step is right.
      step_scores: one for each of the STEPS steps: 1.0 where it is right given what was written before, else 0.0.
    """

    final_correct: bool
    first_error_step: int | None
    step_scores: tuple[float, ...]


def make_prompts(count: int, seed: int) -> list[str]:
    """Prompts of six random digits."""
    digits = np.random.default_rng(seed).integers(0, 10, size=(count, DIGITS))
    return ["".join(map(str, row)) for row in digits]


def solve(prompt: str) -> str:
    """The right chain."""
    return noisy_solution(prompt, 0.0, np.random.default_rng(0))


def noisy_solution(prompt: str, noise: float, random: np.random.Generator) -> str:
    """A chain each of whose sums is, with probability `noise`, a random wrong digit; the next step goes on from it."""
    total, steps = int(prompt[0]), []
    for digit in map(int, prompt[1:]):
        total = (total + digit) % 10
        if random.random() < noise:
            total = (total + int(random.integers(1, 10))) % 10
        steps.append(f"{digit}{total};")
    return "".join(steps)


def judge(prompt: str, chain: str) -> Verdict:
    """Exact verdict on any text as a chain for the prompt."""
    pieces = chain.split(";")
    well_formed = len(pieces) == STEPS + 1 and pieces[-1] == ""
    previous, scores = int(prompt[0]), []
    for index, digit in enumerate(map(int, prompt[1:])):
        piece = pieces[index] if index < len(pieces) else ""
        readable = len(piece) == 2 and piece.isascii() and piece.isdigit()
        right = readable and int(piece[0]) == digit and int(piece[1]) == (previous + digit) % 10
        scores.append(float(right))
        previous = int(piece[1]) if readable else (previous + digit) % 10
    first = next((i for i, score in enumerate(scores) if not score), None)
    if first is None and not well_formed:
        first = STEPS  # something after the last step, or its ";" is missing
    answer = sum(map(int, prompt)) % 10
    final = well_formed and len(pieces[STEPS - 1]) == 2 and pieces[STEPS - 1][1] == str(answer)
    return Verdict(final, first, tuple(scores))


def encode(text: str) -> np.ndarray:
    """Token ids int32 of a prompt or a chain, one per character, without special tokens.

    Raises:
      ValueError: a character that the world does not have.
    """
    strange = sorted(set(text) - set(_IDS))
    if strange:
        raise ValueError(f"the digit world has no characters {strange}; it has digits and ';'")
    return np.array([_IDS[c] for c in text], np.int32)


def decode(ids: np.ndarray) -> str:
    """Text of token ids up to the first EOS; special and unused ids are shown as '?'."""
    ids = np.asarray(ids)
    ends = np.flatnonzero(ids == EOS)
    ids = ids[: ends[0]] if ends.size else ids
    return "".join(SYMBOLS[i] if EOS < i < len(SYMBOLS) else "?" for i in ids)


def prompt_ids(prompt: str) -> np.ndarray:
    """BOS and the prompt's digits, int32 [1 + DIGITS]."""
    return np.concatenate([np.array([BOS], np.int32), encode(prompt)])


def completion_ids(chain: str) -> np.ndarray:
    """The chain and EOS, int32."""
    return np.concatenate([encode(chain), np.array([EOS], np.int32)])


def make_tokenizer():
    """The world's characters as a transformers tokenizer, so that its models are ordinary HF folders."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = [*SYMBOLS, *(f"<unused{i}>" for i in range(VOCABULARY_SIZE - len(SYMBOLS)))]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=SYMBOLS[PAD]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{SYMBOLS[BOS]} $A", special_tokens=[(SYMBOLS[BOS], BOS)]
    )
    backend.add_special_tokens([AddedToken(SYMBOLS[i], special=True) for i in (PAD, BOS, EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=SYMBOLS[PAD], bos_token=SYMBOLS[BOS], eos_token=SYMBOLS[EOS]
    )


def make_rows(form: str, count: int, seed: int) -> list[dict]:
    """Preference rows of the world: chains scored by the share of their steps before the first wrong one.

    Args:
      form: "pairs" (with both scores, and `golden`: 1 for every other row), "triples", "singles" (with labels) or
        "lists" (of two to four chains with scores; `is_adversarial` for every third).
      count: of the rows.
      seed: of prompts and chains.

    Raises:
      ValueError: another form.
    """
    random = np.random.default_rng(seed)
    return [_row(form, number, prompt, random) for number, prompt in enumerate(make_prompts(count, seed))]


def _row(form: str, number: int, prompt: str, random: np.random.Generator) -> dict:
    def score(chain: str) -> float:
        first = judge(prompt, chain).first_error_step
        return 1.0 if first is None else first / STEPS

    chains = {solve(prompt)}
    while len(chains) < 4:
        chains.add(noisy_solution(prompt, 0.4, random))
    ranked = sorted(chains, key=lambda chain: (-score(chain), chain))
    best, second, worst = ranked[0], ranked[1], ranked[-1]
    if form == "pairs":
        scores = {"chosen_score": score(best), "rejected_score": score(worst)}
        return {"prompt": prompt, "chosen": best, "rejected": worst, **scores, "golden": number % 2}
    if form == "triples":
        return {"prompt": prompt, "gold": best, "chosen": second, "rejected": worst}
    if form == "singles":
        return {"prompt": prompt, "completion": worst if number % 2 else best, "label": number % 2 == 0}
    if form == "lists":
        some = ranked[: 2 + number % 3]
        scores = [score(chain) for chain in some]
        return {"prompt": prompt, "completions": some, "scores": scores, "is_adversarial": int(number % 3 == 0)}
    raise ValueError(f"the digit world has no rows of {form!r}; there are pairs, triples, singles and lists")
