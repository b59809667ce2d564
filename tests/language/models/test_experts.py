"""Mixtures of experts: against experts that all compute all tokens, on trees, as metrics and penalty, in FLOPs."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from make_family_fixtures import FOLDER, inputs
from test_decoder import jit, loss_of, padded_rows, tree_row

from dpo_jax.language.data.pack import Layout, pack_rows
from dpo_jax.language.methods.sft import sft_loss
from dpo_jax.language.models.adapters import load_adapter, save_adapter
from dpo_jax.language.models.decoder import DecoderConfig, decoder_function, init_variables
from dpo_jax.language.models.experts import mixture
from dpo_jax.language.models.rope import RopeConfig
from dpo_jax.language.models.weights import load_hf
from dpo_jax.language.objectives import from_loss
from dpo_jax.language.types import Example
from dpo_jax.lora import LoraConfig, adapter_sites, init_adapters, merge, with_adapters
from dpo_jax.optimizers import OptimizerConfig, make_optimizer
from dpo_jax.train import init_state, make_train_step

CONFIG = DecoderConfig(
    40,
    16,
    24,
    layers=2,
    heads=4,
    key_value_heads=2,
    head_dim=8,
    rope=RopeConfig(500.0),
    initializer_range=0.3,
    experts=4,
    experts_per_token=2,
    expert_intermediate_size=8,
)


@pytest.fixture(scope="module")
def variables():
    return jit(init_variables, static_argnums=0)(CONFIG, jax.random.key(0))


def all_experts(x, weights, chosen, gate, up, down):
    """Every expert computes every token, and the chosen are picked."""
    hidden = jax.nn.silu(jnp.einsum("rld,edf->rlef", x, gate)) * jnp.einsum("rld,edf->rlef", x, up)
    each = jnp.einsum("rlef,efd->rled", hidden, down)
    return jnp.sum(jnp.take_along_axis(each, chosen[..., None], axis=2) * weights[..., None], axis=2)


@pytest.mark.parametrize("chosen_by", ["chance", "one expert takes all"])
def test_values_and_gradients_are_those_of_experts_that_compute_everything(chosen_by):
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = ((3, 5, 6), (4, 6, 7), (4, 6, 7), (4, 7, 6))
    x, *kernels = (0.5 * jax.random.normal(key, shape) for key, shape in zip(keys, shapes))
    logits = jax.random.normal(keys[4], (3, 5, 4))
    # Experts 0 and 2 get nothing, or the second choice only.
    logits += jnp.array([0.0, 0, 0, 50] if chosen_by != "chance" else [0.0, 0, -50, 0])
    weights, chosen = jax.lax.top_k(jax.nn.softmax(logits), 2)

    def total(function):
        return jit(jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(function(a[0], a[1], chosen, *a[2:]))), range(5)))

    got = total(partial(mixture, activation=jax.nn.silu))(x, weights, *kernels)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(total(all_experts)(x, weights, *kernels))):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_layers_that_are_computed_again_have_the_same_gradients(variables):
    rows = padded_rows(np.arange(10, dtype=np.int32)[None], np.array([8]))
    got, want = (jit(jax.grad(loss_of(replace(CONFIG, remat=remat), rows)))(variables) for remat in ("full", "none"))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert all(np.abs(leaf).max() > 1e-5 for leaf in jax.tree.leaves(want["layers"]["experts"]))


def test_a_tree_counts_its_prompt_once_and_no_padding(variables):
    row, paths = tree_row()
    run, count = jit(decoder_function(CONFIG)), int(np.sum(row[2] > 0))
    assert count < row[0].size

    def sums(rows):
        routing, size = run(variables, *rows).routing, np.sum(rows[2] > 0)
        return size * np.concatenate([routing.shares, routing.entropy[:, None]], axis=1)

    def alone(tokens):
        padded = np.zeros_like(row[0])
        padded[:, : len(tokens)] = tokens
        return sums(padded_rows(padded, np.array([len(tokens)])))

    # The second path begins with the prompt of the first, of 5 tokens.
    want = sum(alone(tokens) for _, tokens in paths) - alone(paths[0][1][:5])
    assert list(paths[0][1][:5]) == list(paths[1][1][:5])
    np.testing.assert_allclose(sums(row), want, atol=1e-4)
    np.testing.assert_allclose(np.sum(sums(row)[:, :4], axis=1), count, rtol=1e-6)


def test_a_router_without_preference_is_balanced_and_its_penalty_has_a_gradient(variables):
    config = replace(CONFIG, layers=1, router_loss=0.5)
    flat = jax.tree.map(lambda leaf: leaf[:1], variables["layers"])
    flat["experts"]["router"]["weight"] *= 0
    rows = padded_rows(np.arange(12, dtype=np.int32)[None], np.array([9]))

    def penalty(variables):
        routing = decoder_function(config)(variables, *rows).routing
        return routing.penalty, routing

    (value, routing), gradients = jit(jax.value_and_grad(penalty, has_aux=True))(variables | {"layers": flat})
    np.testing.assert_allclose(routing.entropy, np.log(4), rtol=1e-6)
    assert float(routing.load_balance) == pytest.approx(2) and float(value) == pytest.approx(1)
    # Equal experts are taken in order, so the first two are busy, and the router learns to leave them.
    slopes = gradients["layers"]["experts"]["router"]["weight"][0]  # [D, E]
    assert np.abs(slopes).max() > 1e-3
    np.testing.assert_allclose(slopes[:, 0], -slopes[:, 3], atol=1e-6)


@pytest.mark.parametrize("variant", ["qwen3_moe", "mixtral"])
def test_the_load_balancing_loss_is_that_of_transformers(variant):
    torch = pytest.importorskip("torch", reason="compares the load balancing loss with that of transformers")
    from transformers import AutoModelForCausalLM

    config, variables = load_hf(FOLDER / variant)
    given = inputs()
    rows = padded_rows(given["tokens"], given["lengths"])
    model = AutoModelForCausalLM.from_pretrained(FOLDER / variant, dtype=torch.float32)
    with torch.no_grad():
        tokens, kept = torch.tensor(given["tokens"], dtype=torch.long), torch.tensor(rows[2] > 0).long()
        want = float(model(tokens, attention_mask=kept, output_router_logits=True).aux_loss)
    got = jit(decoder_function(config))(variables, *rows).routing.load_balance
    assert float(got) == pytest.approx(want, rel=1e-5)


def batch_of_pairs(rows=2):
    rng = np.random.default_rng(8)

    def ids():
        return rng.integers(0, 40, rng.integers(1, 6)).astype(np.int32)

    layout = Layout(rows=rows, length=32, source_length=24, examples=2, completions=2, completion_length=6)
    return pack_rows([[Example(ids(), (ids(), ids())) for _ in range(rng.integers(1, 3))] for _ in range(rows)], layout)


def test_the_train_step_has_metrics_of_the_router_and_its_penalty(variables):
    optimizer, batch = optax.sgd(1.0), batch_of_pairs()
    objective, key = from_loss(sft_loss), jax.random.key(2)
    plain = jit(lambda v: objective(partial(decoder_function(CONFIG), v), None, batch, key))(variables)
    step = make_train_step(objective, decoder_function(replace(CONFIG, router_loss=0.1)), optimizer)
    _, metrics = jit(step)(init_state(variables, optimizer, key, reference=False), batch)
    shares = [float(metrics[f"expert_share_{number}"]) for number in range(4)]
    assert sum(shares) == pytest.approx(1) and 0 < metrics["router_entropy"] < np.log(4)
    before = np.sum(plain.loss * batch.weight.reshape(-1)) / batch.weight.sum()
    assert float(metrics["loss"]) == pytest.approx(float(before + 0.1 * metrics["router_load_balance"]))
    dense = replace(CONFIG, experts=0)
    shapes = jax.eval_shape(partial(init_variables, dense), key)
    output = jax.eval_shape(lambda v: objective(partial(decoder_function(dense), v), None, batch, key), shapes)
    assert plain.metrics.keys() - output.metrics.keys() >= {"router_load_balance", "router_entropy", "expert_share_3"}


def ragged_flops(config):
    """FLOPs of the ragged products of a step with gradients, as the traced program has them."""
    rows = padded_rows(np.zeros((2, 16), np.int32), np.array([16, 16]))
    shapes = jax.eval_shape(partial(init_variables, config), jax.random.key(0))
    program = jax.make_jaxpr(jax.grad(loss_of(config, rows)))(shapes)

    def is_program(x):
        return isinstance(x, ClosedJaxpr | Jaxpr)

    def flops(jaxpr):
        total = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "ragged_dot_general":
                # Rows times the two sides of a kernel, whichever of the three is the result.
                shapes = [variable.aval.shape for variable in (*equation.invars[:2], *equation.outvars)]
                rows, kernel = (next(shape for shape in shapes if len(shape) == axes) for axes in (2, 3))
                total += 2 * rows[0] * kernel[1] * kernel[2]
            for inner in filter(is_program, jax.tree.leaves(list(equation.params.values()), is_leaf=is_program)):
                total += flops(getattr(inner, "jaxpr", inner))
        return total

    return flops(program.jaxpr)


def test_flops_grow_with_the_experts_of_a_token_and_not_with_all_experts():
    """XLA's own count will not do here: its CPU backend turns a ragged product into one masked product per expert."""
    few = ragged_flops(CONFIG)
    # Three kernels, forward and two gradients each; 32 tokens with 2 experts each, in the body of the scan.
    assert few == 9 * 2 * (32 * 2) * 16 * 8
    assert ragged_flops(replace(CONFIG, experts=16)) == few
    assert ragged_flops(replace(CONFIG, experts_per_token=4)) == 2 * few


def test_adapters_are_for_attention_and_not_for_experts(variables, tmp_path):
    adapters = init_adapters(jax.random.key(0), variables, LoraConfig(rank=2))
    assert {path.split("/")[1] for path in adapter_sites(adapters)} == {"attention"}
    with pytest.raises(ValueError, match="no kernel's name matches the targets 'layers/experts/"):
        init_adapters(jax.random.key(0), variables, LoraConfig(targets="layers/experts/.*"))
    with pytest.raises(ValueError, match="layers/experts/gate/lora_a: the model has no linear layer there"):
        decoder_function(CONFIG, {"layers": {"experts": {"gate": {"lora_a": jnp.zeros((2, 4, 16, 2))}}}})


def test_adapters_change_the_model_as_their_merge_does_and_go_through_a_peft_folder(tmp_path):
    config, base = load_hf(FOLDER / "qwen3_moe")
    adapters = init_adapters(jax.random.key(0), base, LoraConfig(rank=2))
    moved = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    rows = padded_rows(inputs()["tokens"], inputs()["lengths"])
    merged = jit(lambda v: decoder_function(config)(merge(v), *rows).hidden)(with_adapters(base, moved))
    save_adapter(tmp_path, config, moved)
    loaded = load_adapter(tmp_path, config).adapters
    got = jit(decoder_function(config, loaded))(with_adapters(base, loaded), *rows).hidden
    kept = (rows[2] > 0)[..., None]
    np.testing.assert_allclose(got * kept, merged * kept, atol=1e-4)
    options = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(options["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_muon_orthogonalises_each_expert_by_itself(variables):
    made = make_optimizer(OptimizerConfig(optimizer="muon", learning_rate=0.1), 10)
    kernels = variables["layers"]["experts"]["gate"]["kernels"]
    # One expert's gradient is a hundred times another's.
    scale = jnp.array([1.0, 100, 1, 1])[:, None, None]
    tree, gradients = ({"layers": {"experts": {"gate": {"kernels": leaf}}}} for leaf in (kernels, kernels * scale))
    updates, _ = made.update(gradients, made.init(tree), tree)
    norms = jnp.linalg.norm(jax.tree.leaves(updates)[0], axis=(-2, -1))
    assert float(norms.max() / norms.min()) < 1.5


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"experts_per_token": 0}, "experts_per_token is 0 of 4 experts"),
        ({"experts_per_token": 5}, "experts_per_token is 5 of 4 experts"),
        ({"mlp_bias": True}, "experts are gated and without biases"),
        ({"gated": False}, "experts are gated and without biases"),
    ],
)
def test_shapes_that_experts_cannot_have_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        decoder_function(replace(CONFIG, **changes))
