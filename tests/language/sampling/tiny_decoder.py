"""One tiny decoder, ragged prompts in two buckets, and scoring passes without a cache."""

from functools import cache, partial

import jax
import numpy as np

from dpo_jax.language.data.pack import Layout, pack_rows
from dpo_jax.language.models.decoder import DecoderConfig, RopeConfig, decoder_function, empty_cache, init_variables
from dpo_jax.language.sampling.steps import CachedModel
from dpo_jax.language.score import score
from dpo_jax.language.types import Example

CONFIG = DecoderConfig(
    24, 16, 24, layers=2, heads=4, key_value_heads=2, head_dim=8, rope=RopeConfig(500.0), initializer_range=0.4
)
EOS, NEW = 3, 12
MODEL = CachedModel(decoder_function(CONFIG), partial(empty_cache, CONFIG))
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(4, 24, n).astype(np.int32) for n in (1, 9, 4, 16, 6, 2, 20, 5, 17)]


@cache
def weights(seed: int):
    return jax.jit(init_variables, static_argnums=0)(CONFIG, jax.random.key(seed))


@jax.jit
def _scored(variables, batch):
    return score(partial(decoder_function(CONFIG), variables), batch)["logps"]


def score_alone(seed, prompt, completion):
    """Log-probs [C] of a completion by `language.score`, on one row without a cache."""
    layout = Layout(rows=1, length=48, source_length=24, examples=1, completions=1, completion_length=24)
    batch = pack_rows([[Example(prompt, (np.asarray(completion, np.int32),))]], layout)
    return np.asarray(_scored(weights(seed), batch))[0, 0, : len(completion)]
