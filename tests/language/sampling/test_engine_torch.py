"""Greedy completions are those of torch transformers, for every checkpoint among the fixtures."""

from functools import partial

import jax
import numpy as np
import pytest
from make_decoder_fixtures import FOLDER

from dpo_jax.language.models.decoder import decoder_function, empty_cache
from dpo_jax.language.models.weights import load_hf
from dpo_jax.language.sampling.engine import generate, make_engine, prompt_keys
from dpo_jax.language.sampling.filters import GREEDY
from dpo_jax.language.sampling.steps import CachedModel

NEW, EOS = 12, 5
# Every whole checkpoint of every group of fixtures; an adapter's folder is none.
FIXTURES = [weights.parent for weights in sorted(FOLDER.parent.glob("*/*/model.safetensors"))]

QUICK = {"plain", "gemma2", "qwen3_moe"}  # the rest is as quick, but there are many


@pytest.mark.parametrize(
    "folder",
    [
        pytest.param(f, marks=() if f.name in QUICK else pytest.mark.slow, id=f"{f.parent.name}-{f.name}")
        for f in FIXTURES
    ],
)
def test_greedy_completions_are_those_of_torch(folder):
    torch = pytest.importorskip("torch", reason="compares greedy completions with those of transformers")
    from transformers import AutoModelForCausalLM

    config, variables = load_hf(folder)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(6, config.vocabulary_size, n).astype(np.int32) for n in (1, 7, 3, 12)]
    model = CachedModel(decoder_function(config), partial(empty_cache, config))
    used = make_engine([model], new_tokens=NEW, stop_tokens=(EOS,), rows=4, prefill_rows=4, chunk=NEW, sampling=GREEDY)
    got = generate(used, (variables,), prompts, prompt_keys(jax.random.key(0), 4))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    options = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": EOS, "pad_token_id": 0}
    for prompt, (completion,) in zip(prompts, got):
        ids = torch.tensor(prompt[None], dtype=torch.long)
        want = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].numpy()
        np.testing.assert_array_equal(completion.tokens, want)
    assert len({tuple(completion.tokens) for (completion,) in got}) > 1
