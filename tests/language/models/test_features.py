"""Features of families: each matters; windows and caps on long rows, layouts on meshes, programs flat in depth."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from make_family_fixtures import FOLDER, WORDS
from test_decoder import jit, jitted_logits, loss_of, padded_rows, program

from dpo_jax import attention
from dpo_jax.language.models.decoder import RULES, DecoderConfig, decoder_function, init_variables
from dpo_jax.language.models.rope import RopeConfig
from dpo_jax.language.models.weights import load_hf
from dpo_jax.sharding import P, make_mesh, shard_batch, tree_shardings
from dpo_jax.tree import named_leaves


def test_every_feature_matters():
    changes = {
        "mistral": [{"window": 6}],
        "gemma2": [{"attention_softcap": None}, {"query_scalar": None}],
        "gemma3": [{"local_rope": None}, {"local_layers": (False, True, True)}],
        "phi": [{"rotary_dim": None}, {"activation": "gelu"}],
    }
    tokens = np.random.default_rng(1).integers(0, WORDS, (1, 12)).astype(np.int32)
    rows = padded_rows(tokens, np.array([12]))
    for variant, others in changes.items():
        config, variables = load_hf(FOLDER / variant)
        want = jitted_logits(config, variables, *rows)
        for other in others:
            got = jitted_logits(replace(config, **other), variables, *rows)
            # The two gelus differ by less than 5e-4 anywhere.
            assert np.abs(got - want).max() > (1e-5 if "activation" in other else 1e-2), (variant, other)


def test_positions_behind_the_learned_ones_are_noticed():
    config, variables = load_hf(FOLDER / "gpt2")
    last = config.learned_positions - 1
    tokens, ends = np.ones((1, 2), np.int32), np.full((1, 2), 2, np.int32)
    got = [
        jitted_logits(config, variables, tokens, np.array([[0, place]], np.int32), ends)[0]
        for place in (last, last + 1)
    ]
    assert np.all(np.isfinite(got[0])) and np.all(np.isfinite(got[1][0])) and np.all(np.isnan(got[1][1]))


def test_local_layers_must_be_as_many_as_layers():
    config, _ = load_hf(FOLDER / "gemma3")
    with pytest.raises(ValueError, match="local_layers has 3 entries for 5 layers"):
        decoder_function(replace(config, layers=5))


def test_the_program_does_not_grow_with_local_and_global_layers():
    config, _ = load_hf(FOLDER / "gemma3")
    small, large = (program(replace(config, layers=n, local_layers=(True, False) * (n // 2))) for n in (2, 16))
    assert large == pytest.approx(small, rel=0.02)


@pytest.mark.slow
def test_long_rows_have_the_gradients_of_short_ones(monkeypatch):
    """The blocked form of attention, with windows and caps that are scanned, against the plain one."""
    config, variables = load_hf(FOLDER / "gemma2")
    config = replace(config, window=70)
    tokens = np.random.default_rng(2).integers(0, WORDS, (1, 300)).astype(np.int32)
    rows = padded_rows(tokens, np.array([290]))
    assert tokens.shape[1] > attention.PLAIN_LENGTH
    blocked = jit(jax.grad(loss_of(config, rows)))(variables)
    monkeypatch.setattr(attention, "PLAIN_LENGTH", 1000)
    plain = jit(jax.grad(loss_of(config, rows)))(variables)
    for a, b in zip(jax.tree.leaves(blocked), jax.tree.leaves(plain)):
        np.testing.assert_allclose(a, b, atol=1e-6)


SIZES = {"layers": 2, "heads": 4, "key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}
MESHED = {
    "learned": DecoderConfig(
        40,
        16,
        24,
        **SIZES,
        norm="layer",
        gated=False,
        residual="parallel",
        activation="gelu",
        attention_bias=True,
        mlp_bias=True,
        head_bias=True,
        learned_positions=16,
    ),
    "local": DecoderConfig(
        40,
        16,
        24,
        **SIZES,
        norm="rms_offset",
        post_norms=True,
        query_key_norm=True,
        qkv_bias=True,
        embedding_scale=True,
        tie_embeddings=True,
        window=4,
        local_layers=(True, False),
        local_rope=RopeConfig(30.0),
        rotary_dim=4,
        attention_softcap=2.0,
        logit_softcap=3.0,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHED)
def test_meshes_give_the_numbers_of_one_device(name, capfd):
    config, rng = MESHED[name], np.random.default_rng(4)
    variables = jit(init_variables, static_argnums=0)(config, jax.random.key(0))
    tokens = rng.integers(0, 40, (8, 12)).astype(np.int32)
    rows = padded_rows(tokens, rng.integers(4, 13, 8))
    want = jit(jax.value_and_grad(loss_of(config, rows)))(variables)
    mesh = make_mesh(data=2, fsdp=2, model=2)
    shardings = tree_shardings(variables, mesh, RULES)
    specs = {path: sharding.spec for path, sharding in named_leaves(shardings).items()}
    if name == "learned":
        assert specs["positions/embedding"] == P(None, "fsdp") and specs["head_bias/bias"] == P("model")
        assert specs["layers/feed_forward/up/bias"] == P(None, "model")
    else:
        assert specs["layers/attention/query_norm/scale"] == P()
    capfd.readouterr()
    with jax.set_mesh(mesh):
        run = jit(
            lambda variables, rows: jax.value_and_grad(loss_of(config, rows))(variables),
            out_shardings=(None, shardings),
        )
        got = run(jax.device_put(variables, shardings), shard_batch(rows, mesh))
    assert "rematerialization" not in capfd.readouterr().err
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, atol=1e-6)
