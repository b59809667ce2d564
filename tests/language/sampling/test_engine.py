"""The engine on a decoder: against scoring passes, one batch at a time, meshes, other chunks."""

from functools import cache

import jax
import numpy as np
import pytest
from tiny_decoder import EOS, MODEL, NEW, PROMPTS, score_alone, weights

from dpo_jax.language.sampling.engine import bucket_width, generate, make_engine, prompt_keys
from dpo_jax.language.sampling.filters import GREEDY, Sampling
from dpo_jax.language.sampling.steps import guided
from dpo_jax.sharding import make_mesh

KEYS = prompt_keys(jax.random.key(2), len(PROMPTS))


@cache
def engine(**options):
    return make_engine([MODEL], **{"new_tokens": NEW, "stop_tokens": (EOS,), "rows": 4, "chunk": 5, **options})


def assert_same(got, want, *, atol=1e-5):
    for ours, theirs in zip(got, want, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a.tokens, b.tokens)
            np.testing.assert_allclose(a.logps, b.logps, atol=atol)
            np.testing.assert_allclose(a.drawn_logps, b.drawn_logps, atol=atol)
            assert a.ended == b.ended


@pytest.fixture(scope="module")
def sampled():
    """Refilled: 18 completions in four rows."""
    return generate(engine(), (weights(1),), PROMPTS, KEYS, samples=2)


@pytest.fixture(scope="module")
def greedy():
    return generate(engine(sampling=GREEDY), (weights(1),), PROMPTS, KEYS)


def test_logps_are_those_of_a_scoring_pass_and_completions_end_at_eos(sampled, greedy):
    endings = []
    for prompt, several in zip(PROMPTS * 2, [*sampled, *greedy]):
        for completion in several:
            tokens = completion.tokens
            assert tokens.dtype == np.int32 and completion.logps.dtype == np.float32
            assert EOS not in tokens[:-1] and completion.ended == (tokens[-1] == EOS)
            assert completion.ended or len(tokens) == NEW
            np.testing.assert_allclose(completion.logps[0], score_alone(1, prompt, tokens), atol=1e-4)
            endings.append(completion.ended)
    assert 0 < sum(endings) < len(endings)


def test_refill_gives_what_one_prompt_at_a_time_gives(sampled, greedy):
    for place in (0, 3, 8):
        prompts, keys = PROMPTS[place : place + 1], KEYS[place : place + 1]
        assert_same(generate(engine(), (weights(1),), prompts, keys, samples=2), sampled[place : place + 1])
        assert_same(generate(engine(sampling=GREEDY), (weights(1),), prompts, keys), greedy[place : place + 1])


def test_order_changes_nothing(sampled):
    order = [5, 2, 8, 0, 1, 7, 4, 6, 3]
    prompts = [PROMPTS[place] for place in order]
    got = generate(engine(), (weights(1),), prompts, KEYS[np.array(order)], samples=2)
    assert_same(got, [sampled[place] for place in order])


def test_keys_and_samples_decide(sampled):
    other = generate(engine(), (weights(1),), PROMPTS, prompt_keys(jax.random.key(3), len(PROMPTS)))
    assert sum(np.array_equal(a[0].tokens, b[0].tokens) for a, b in zip(sampled, other)) < 3
    assert sum(np.array_equal(*(c.tokens for c in several)) for several in sampled) < 3


def test_eight_devices_give_the_tokens_of_one(sampled, capfd):
    mesh = make_mesh(data=2, fsdp=2, model=2)
    capfd.readouterr()
    spread = engine(mesh=mesh, rows=8)
    assert_same(generate(spread, (weights(1),), PROMPTS[:6], KEYS[:6], samples=2), sampled[:6], atol=1e-4)
    assert "rematerialization" not in capfd.readouterr().err
    with jax.set_mesh(mesh):
        cache = spread.start(16).state.caches[0][0]
    assert cache.addressable_shards[0].data.size * 8 == cache.size  # rows over four, heads over two


def test_the_parameters_are_used_in_place():
    variables = weights(1)
    used = engine()
    compiled = used.advance.lower((variables,), used.start(16)).compile()
    memory = compiled.memory_analysis()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    caches = sum(leaf.nbytes for leaf in jax.tree.leaves(used.start(16).state.caches))
    # The rows are donated; what comes out anew is small, and no copy of the parameters.
    assert memory.alias_size_in_bytes >= caches
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < held / 4
    assert all(not leaf.is_deleted() for leaf in jax.tree.leaves(variables))


def test_a_reference_in_lock_step_scores_the_same_tokens(sampled):
    pair = make_engine([MODEL, MODEL], new_tokens=NEW, stop_tokens=(EOS,), rows=4)
    got = generate(pair, (weights(1), weights(2)), PROMPTS[:3], KEYS[:3])
    for prompt, (completion,), several in zip(PROMPTS, got, sampled):
        np.testing.assert_array_equal(completion.tokens, several[0].tokens)
        for seed, logps in zip((1, 2), completion.logps, strict=True):
            np.testing.assert_allclose(logps, score_alone(seed, prompt, completion.tokens), atol=1e-4)


@pytest.mark.parametrize(("strength", "seeds", "like"), [(0.0, (1, 2, 4), 1), (1.0, (1, 2, 1), 2)])
def test_guidance_at_its_ends_is_the_base_or_the_tuned_model(strength, seeds, like):
    three = make_engine([MODEL] * 3, new_tokens=NEW, stop_tokens=(EOS,), rows=4, combine=guided(strength))
    got = generate(three, tuple(map(weights, seeds)), PROMPTS[:3], KEYS[:3])
    assert_same(got, generate(engine(), (weights(like),), PROMPTS[:3], KEYS[:3]), atol=1e-4)


def test_a_repetition_penalty_knows_the_prompt():
    """So large a penalty lets no word come twice while others are left."""
    sampling = Sampling(temperature=0.0, repetition_penalty=1e6)
    got = generate(engine(sampling=sampling, vocabulary_size=24), (weights(1),), PROMPTS[:6], KEYS[:6])
    for prompt, (completion,) in zip(PROMPTS, got):
        tokens = completion.tokens
        if len({*prompt, *tokens}) < 24:
            assert len({*tokens}) == len(tokens) and not {*tokens} & {*prompt}


def test_an_end_test_cuts_where_it_says(greedy):
    got = generate(
        engine(sampling=GREEDY), (weights(1),), PROMPTS, KEYS, end_test=lambda ids: 3 if len(ids) > 2 else None
    )
    for (cut,), (whole,) in zip(got, greedy):
        np.testing.assert_array_equal(cut.tokens, whole.tokens[:3])
        np.testing.assert_allclose(cut.logps, whole.logps[:, :3], atol=1e-5)
        assert cut.ended


def test_the_listener_hears_every_chunk_and_chunks_change_nothing(greedy):
    heard = []
    used = engine(chunk=1, rows=2, prefill_rows=2, sampling=GREEDY)
    (got,) = generate(used, (weights(1),), PROMPTS[1:2], KEYS[:1], samples=1, listener=lambda *news: heard.append(news))
    assert_same([got], greedy[1:2])
    for number, (prompt, sample, tokens, over) in enumerate(heard, 1):
        assert (prompt, sample, over) == (0, 0, number == len(got[0].tokens))
        np.testing.assert_array_equal(tokens, got[0].tokens[:number])


def test_buckets_are_powers_of_two():
    assert [bucket_width(n) for n in (1, 16, 17, 32, 33, 1000)] == [16, 16, 32, 32, 64, 1024]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"new_tokens": 0}, "new_tokens is 0"),
        ({"rows": 0}, "rows is 0"),
        ({"chunk": 0}, "chunk is 0"),
        ({"prefill_rows": 0}, "prefill_rows is 0"),
        ({"sampling": Sampling(repetition_penalty=2.0)}, "vocabulary_size"),
    ],
)
def test_an_engine_without_sense_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        engine(**options)


def test_rows_that_a_mesh_does_not_divide_are_refused():
    with pytest.raises(ValueError, match="multiples of the mesh's 8 parts"):
        engine(mesh=make_mesh())


def test_prompts_that_cannot_be_answered_are_refused():
    used, variables = engine(), (weights(1),)
    with pytest.raises(ValueError, match=r"\[1\] are empty"):
        generate(used, variables, [PROMPTS[0], PROMPTS[0][:0]], KEYS[:2])
    with pytest.raises(ValueError, match="2 keys for 1 prompts"):
        generate(used, variables, PROMPTS[:1], KEYS[:2])
    with pytest.raises(ValueError, match="samples is 0"):
        generate(used, variables, PROMPTS[:1], KEYS[:1], samples=0)
