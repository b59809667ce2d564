"""Tokens per second of the decode engine and of torch transformers, on the same tiny model, one after the other.

Claim     on two CPU cores the engine writes 5.4 times as many tokens per second as transformers' generate at 1 row,
          2.75 times at 8, 1.65 times at 32, as many at 128: 4867, 13398, 18608 and 16826 tokens, so that the machine is
          full at 32 rows. Sampling with refilled rows runs at about half of greedy decoding: noise over all words, and
          a prefill for every refill, are dear beside so small a model.
Command   python experiments/benchmarks/decode.py --batch-sizes 1 8 32 128     (needs torch; half a minute)

Both decode greedily from the same prompts in float32 (torch on one thread), a fixed number of tokens each; compilation
and a first call are not counted, each figure is the best of the rounds, and the two take turns. The last column is
sampling with stop tokens, so that completions are ragged; only tokens of the completions count.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from dpo_jax.language.models.decoder import DecoderConfig, RopeConfig, decoder_function, empty_cache, init_variables
from dpo_jax.language.models.weights import save_hf
from dpo_jax.language.sampling.engine import Completion, generate, make_engine, prompt_keys
from dpo_jax.language.sampling.filters import GREEDY, UNFILTERED
from dpo_jax.language.sampling.steps import CachedModel
from dpo_jax.report import table

MODEL = DecoderConfig(
    vocabulary_size=2048,
    hidden_size=128,
    intermediate_size=352,
    layers=2,
    heads=8,
    key_value_heads=4,
    head_dim=16,
    rope=RopeConfig(theta=500000.0),
    initializer_range=0.05,
)
PROMPT_LENGTH = 32
STOP_TOKENS = tuple(range(64))  # of 2048 words: a completion of a model that knows nothing ends after 32 on average


@dataclass(frozen=True)
class Benchmark:
    """Time greedy decoding in both libraries, and sampling with refilled rows."""

    batch_sizes: tuple[int, ...] = (1, 8, 32)
    """Rows at a time."""
    new_tokens: int = 32
    """Tokens of a completion."""
    rounds: int = 2
    """Timed calls of each."""
    json: bool = False
    """Print one JSON object."""


def torch_generate(folder: Path, prompts: np.ndarray, new_tokens: int) -> Callable[[], int]:
    """A call that decodes greedily with transformers, and returns the number of new tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    # For so small a model threads cost more than they give, much more on a busy machine.
    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor(prompts, dtype=torch.long)
    # No word ends a completion: both write all tokens.
    options = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "pad_token_id": 0}

    def run() -> int:
        with torch.no_grad():
            answer = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return answer[:, prompts.shape[1] :].numel()

    return run


def engine_generate(variables: dict, prompts: np.ndarray, new_tokens: int, *, rows: int, ragged: bool):
    """The same by the engine; ragged: sampled with stop tokens, twice as many prompts as rows."""
    model = CachedModel(decoder_function(MODEL), partial(empty_cache, MODEL))
    engine = make_engine(
        [model],
        new_tokens=new_tokens,
        rows=rows,
        prefill_rows=max(1, rows // 4) if ragged else rows,
        sampling=UNFILTERED if ragged else GREEDY,
        stop_tokens=STOP_TOKENS if ragged else (),
    )
    some = list(prompts) * (2 if ragged else 1)
    keys = prompt_keys(jax.random.key(0), len(some))

    def run() -> int:
        answers: list[list[Completion]] = generate(engine, (variables,), some, keys)
        return sum(len(one.tokens) for several in answers for one in several)

    return run


def tokens_per_second(calls: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """The best of the rounds of each call, which take turns."""
    best = dict.fromkeys(calls, 0.0)
    for number in range(rounds + 1):
        for name, call in calls.items():
            begun = time.perf_counter()
            tokens = call()
            if number:  # the first round compiles
                best[name] = max(best[name], tokens / (time.perf_counter() - begun))
    return best


def main(benchmark: Benchmark) -> None:
    variables = jax.jit(init_variables, static_argnums=0)(MODEL, jax.random.key(0))
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        save_hf(folder, MODEL, variables)
        for size in benchmark.batch_sizes:
            rng = np.random.default_rng(size)
            prompts = rng.integers(64, MODEL.vocabulary_size, (size, PROMPT_LENGTH)).astype(np.int32)
            calls = {
                "transformers": torch_generate(Path(folder), prompts, benchmark.new_tokens),
                "engine": engine_generate(variables, prompts, benchmark.new_tokens, rows=size, ragged=False),
                "engine, ragged": engine_generate(variables, prompts, benchmark.new_tokens, rows=size, ragged=True),
            }
            results[size] = tokens_per_second(calls, benchmark.rounds)
            print(f"batch size {size}: {results[size]}", file=sys.stderr, flush=True)
    if benchmark.json:
        print(json.dumps(results))
        return
    rows = [
        (str(size), *(f"{value:.0f}" for value in values.values()), f"{values['engine'] / values['transformers']:.2f}")
        for size, values in results.items()
    ]
    print("tokens per second")
    print(table(rows, ("batch size", "transformers", "engine", "engine, ragged", "engine / transformers")))


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
