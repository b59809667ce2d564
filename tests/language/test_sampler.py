"""The sampler against whole-row scoring: tokens, ends, log-probs, frequencies."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.language.models.decoder import DecoderConfig, RopeConfig, decoder_function, empty_cache, init_variables
from dpo_jax.language.sampler import pad_prompts, sample, sample_completions
from dpo_jax.language.types import Prediction

CONFIG = DecoderConfig(
    24, 16, 24, layers=2, heads=4, key_value_heads=2, head_dim=8, rope=RopeConfig(500.0), initializer_range=0.4
)
EOS, PAD, NEW = 3, 1, 12
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(4, 24, n).astype(np.int32) for n in (1, 9, 4, 6, 6, 2)]


@pytest.fixture(scope="module")
def model():
    variables = jax.jit(init_variables, static_argnums=0)(CONFIG, jax.random.key(1))
    return jax.jit(decoder_function(CONFIG), static_argnames="method"), variables


@partial(jax.jit, static_argnames=("temperature", "columns"))
def drawn(variables, tokens, lengths, key, *, temperature, columns):
    decode = partial(decoder_function(CONFIG), variables, method="decode")
    cache = empty_cache(CONFIG, len(tokens), columns)
    return sample(decode, cache, tokens, lengths, key, new_tokens=NEW, eos=EOS, pad=PAD, temperature=temperature)


def run(model, key, temperature, prompts=PROMPTS, columns=9 + NEW):
    return jax.device_get(
        drawn(model[1], *pad_prompts(prompts, pad=PAD), key, temperature=temperature, columns=columns)
    )


def logps_alone(model, prompt, completion):
    """Log-probs of all words before each completion token, one unpadded row, no cache, float64 softmax."""
    apply_fn, variables = model
    width = max(map(len, PROMPTS)) + NEW
    row = np.concatenate([prompt, completion])
    ends = np.where(np.arange(width) < len(row), len(row), 0)[None]
    tokens = np.pad(row, (0, width - len(row)))[None]
    answer = apply_fn(variables, tokens, np.arange(width)[None], ends)
    logits = np.asarray(answer.hidden[0] @ answer.head.T, np.float64)[len(prompt) - 1 : len(row) - 1]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logps_are_those_of_a_scoring_pass_and_rows_end_at_eos(model, temperature):
    samples = run(model, jax.random.key(2), temperature)
    assert samples.tokens.shape == samples.mask.shape == samples.logps.shape == (len(PROMPTS), NEW)
    assert samples.logps.dtype == np.float32
    ended = 0
    for prompt, tokens, mask, logps in zip(PROMPTS, *samples):
        size = int(mask.sum())
        np.testing.assert_array_equal(mask, np.arange(NEW) < size)
        np.testing.assert_array_equal(tokens[size:], PAD)
        np.testing.assert_array_equal(logps[size:], 0)
        assert EOS not in tokens[: size - 1] and (size == NEW or tokens[size - 1] == EOS)
        ended += size < NEW
        scored = logps_alone(model, prompt, tokens[:size])
        np.testing.assert_allclose(logps[:size], scored[np.arange(size), tokens[:size]], atol=1e-4)
        if temperature == 0:
            np.testing.assert_array_equal(tokens[:size], scored.argmax(-1))
    assert temperature == 0 or 0 < ended < len(PROMPTS)


def test_padding_other_prompts_and_spare_columns_change_nothing(model):
    together = run(model, jax.random.key(0), 0.0)
    for i, prompt in enumerate(PROMPTS[:2]):
        alone = run(model, jax.random.key(5), 0.0, [prompt], columns=30)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[i])
        np.testing.assert_allclose(alone.logps[0], together.logps[i], atol=1e-5)


def test_keys_decide(model):
    first, again, other = (run(model, jax.random.key(k), 1.0).tokens for k in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    same = run(model, jax.random.key(3), 1.0, [PROMPTS[1]] * len(PROMPTS)).tokens
    assert len(np.unique(same, axis=0)) > 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_those_of_the_tempered_softmax(temperature):
    logits = np.array([1.0, 0.0, -1.0, 0.5, -3.0])
    head = jnp.asarray(logits, jnp.float32)[:, None]

    def decode(tokens, positions, cache, start, mask):
        return Prediction(jnp.ones((*tokens.shape, 1)), head), cache

    count, steps = 2000, 4
    cache = jnp.zeros((1, count, steps + 1, 1, 1))
    draw = jax.jit(partial(sample, decode, new_tokens=steps, eos=-1, temperature=temperature))
    samples = draw(cache, np.zeros((count, 1), np.int32), np.ones(count, np.int32), jax.random.key(0))
    want = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    for step in range(steps):
        got = np.bincount(samples.tokens[:, step], minlength=5) / count
        # Five standard deviations of a count of 2000.
        np.testing.assert_array_less(np.abs(got - want), 5 * np.sqrt(want * (1 - want) / count))
    # Steps are independent draws: two in a row agree as often as chance has it.
    chance, repeats = np.sum(want**2), np.mean(samples.tokens[:, 1:] == samples.tokens[:, :-1])
    assert abs(repeats - chance) < 5 * np.sqrt(chance * (1 - chance) / count)
    # Log-probs stay those of the model, whatever the temperature.
    plain = logits - np.log(np.exp(logits).sum())
    np.testing.assert_allclose(samples.logps, plain[samples.tokens], atol=1e-5)
    assert float(samples.mask.min()) == 1


def test_positions_count_from_the_first_token_of_each_prompt():
    """A rotary model sees differences only; this one says its position."""

    def decode(tokens, positions, cache, start, mask):
        return Prediction(jax.nn.one_hot(positions, 24) * 9, jnp.eye(24)), cache

    tokens, lengths = pad_prompts(PROMPTS)
    options = {"new_tokens": NEW, "eos": -1, "temperature": 0.0}
    samples = sample(decode, jnp.zeros((1, 6, 9 + NEW, 1, 1)), tokens, lengths, jax.random.key(0), **options)
    np.testing.assert_array_equal(samples.tokens, lengths[:, None] - 1 + np.arange(NEW))


def test_bias_and_softcap_of_the_head_count():
    logits, bias = np.array([5.0, -5.0, 0.0]), np.array([-1.0, 0.0, 2.0])

    def decode(tokens, positions, cache, start, mask):
        head = jnp.asarray(logits, jnp.float32)[:, None]
        return Prediction(jnp.ones((*tokens.shape, 1)), head, jnp.asarray(bias, jnp.float32), 2.0), cache

    one = np.ones((1, 1), np.int32)
    samples = sample(
        decode, jnp.zeros((1, 1, 2, 1, 1)), one, one[0], jax.random.key(0), new_tokens=1, eos=9, temperature=0
    )
    capped = 2 * np.tanh((logits + bias) / 2)
    assert samples.tokens[0, 0] == capped.argmax()
    assert float(samples.logps[0, 0]) == pytest.approx(capped.max() - np.log(np.exp(capped).sum()), abs=1e-5)


def test_any_number_of_prompts_in_batches_of_one_shape(model):
    _, variables = model
    options = {"new_tokens": NEW, "eos": EOS, "temperature": 0.0}
    apply_fn, caches = decoder_function(CONFIG), partial(empty_cache, CONFIG)
    got = sample_completions(apply_fn, variables, caches, PROMPTS, jax.random.key(0), batch_size=4, **options)
    want = run(model, jax.random.key(0), 0.0)
    assert len(got) == len(PROMPTS)
    for (tokens, logps), row in zip(got, zip(*want)):
        kept = row[1] > 0
        np.testing.assert_array_equal(tokens, row[0][kept])
        np.testing.assert_allclose(logps, row[2][kept], atol=1e-5)


def test_a_bfloat16_model_scores_in_float32(model):
    config = replace(CONFIG, dtype="bfloat16")
    decode = partial(decoder_function(config), model[1], method="decode")
    tokens, lengths = pad_prompts(PROMPTS)
    cache = empty_cache(config, len(PROMPTS), tokens.shape[1] + 2)
    shapes = jax.eval_shape(partial(sample, decode, new_tokens=2, eos=EOS), cache, tokens, lengths, jax.random.key(0))
    assert shapes.logps.dtype == jnp.float32 and shapes.tokens.dtype == jnp.int32


def test_a_negative_temperature_is_refused():
    with pytest.raises(ValueError, match="temperature is -1"):
        sample(None, None, None, None, None, new_tokens=1, eos=0, temperature=-1)
