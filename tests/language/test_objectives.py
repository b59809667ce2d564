"""A loss's argument names decide what is computed, what runs and what the data must give."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_score import both_layouts, score
from toy_model import ragged_examples, toy_model, toy_variables

from dpo_jax.language.methods import dpo_loss, reference_free_loss, sft_loss, wpo_loss
from dpo_jax.language.objectives import column_names, form_of, needs_reference, origin
from dpo_jax.language.objectives import from_loss as from_loss_eagerly
from dpo_jax.language.score import completion_mask
from dpo_jax.language.types import COMPLETIONS
from dpo_jax.signatures import read_needs
from dpo_jax.types import LossOutput

POLICY, REFERENCE = partial(toy_model, toy_variables(0)), partial(toy_model, toy_variables(1))
KEY = jax.random.key(0)


def from_loss(loss, **hyper):
    """Compiled: op by op the same takes seconds."""
    objective = from_loss_eagerly(loss, **hyper)

    def run(policy, reference, batch, key, loss_state=None):
        return jax.jit(lambda batch, key, state: objective(policy, reference, batch, key, state))(
            batch, key, loss_state
        )

    return run


def refuse(*_):
    raise AssertionError("this model must not run")


def pair_batch(seed=0, columns=None, completions=2):
    return both_layouts(ragged_examples(5, seed=seed, columns=columns, completions=completions))[1]


def test_dpo_from_its_names_equals_dpo_by_hand():
    batch = pair_batch()
    output = from_loss(dpo_loss, beta=0.3)(POLICY, REFERENCE, batch, KEY)
    policy, reference, mask = score(POLICY, batch)["logps"], score(REFERENCE, batch)["logps"], completion_mask(batch)
    ratios = ((policy - reference) * mask).sum(-1)
    expected = jnp.logaddexp(0.0, -0.3 * (ratios[:, 0] - ratios[:, 1]))
    np.testing.assert_allclose(output.loss, expected, atol=1e-6)
    assert float(jnp.std(output.loss[batch.weight.reshape(-1) > 0])) > 0.01


def test_reference_runs_only_when_it_is_named():
    assert needs_reference(dpo_loss) and not needs_reference(reference_free_loss) and not needs_reference(sft_loss)
    from_loss(reference_free_loss)(POLICY, refuse, pair_batch(), KEY)
    from_loss(sft_loss)(POLICY, refuse, pair_batch(completions=1), KEY)
    with pytest.raises(TypeError, match="reference"):
        from_loss(dpo_loss)(POLICY, None, pair_batch(), KEY)


def test_a_column_wins_over_the_reference():
    batch = pair_batch()
    logps = score(REFERENCE, batch)["logps"]
    columns = {"reference_logps": np.asarray(logps).reshape(*batch.weight.shape, *logps.shape[1:])}
    with_columns = type(batch)(**{**vars(batch), "columns": columns})
    computed = from_loss(dpo_loss)(POLICY, REFERENCE, batch, KEY)
    given = from_loss(dpo_loss)(POLICY, refuse, with_columns, KEY)
    np.testing.assert_allclose(computed.loss, given.loss, atol=1e-6)
    assert not needs_reference(dpo_loss, ("reference_logps",))


def test_statistics_are_computed_when_a_signature_asks():
    batch = pair_batch()
    output = from_loss(wpo_loss)(POLICY, REFERENCE, batch, KEY)
    collision = score(POLICY, batch, statistics=("collision",))["collision"]

    def by_hand(policy_chosen_collision, policy_rejected_collision):
        mask, policy, reference = (
            completion_mask(batch),
            score(POLICY, batch)["logps"],
            score(REFERENCE, batch)["logps"],
        )
        return wpo_loss(
            policy_chosen_logps=policy[:, 0],
            policy_rejected_logps=policy[:, 1],
            reference_chosen_logps=reference[:, 0],
            reference_rejected_logps=reference[:, 1],
            policy_chosen_collision=policy_chosen_collision,
            policy_rejected_collision=policy_rejected_collision,
            chosen_mask=mask[:, 0],
            rejected_mask=mask[:, 1],
        )

    np.testing.assert_allclose(output.loss, by_hand(collision[:, 0], collision[:, 1]).loss, rtol=1e-5)


def test_divergences_run_both_models_once():
    calls = []

    def counted(name, variables):
        def model(*inputs):
            calls.append(name)
            return toy_model(variables, *inputs)

        return model

    def loss(*, policy_chosen_logps, reference_chosen_logps, chosen_kl, rejected_reverse_kl, chosen_mask) -> LossOutput:
        return LossOutput(chosen_kl.sum(-1) + rejected_reverse_kl.sum(-1), {"ratio": reference_chosen_logps.sum(-1)})

    policy, reference = counted("policy", toy_variables(0)), counted("reference", toy_variables(1))
    output = from_loss(loss)(policy, reference, pair_batch(), KEY)
    assert sorted(calls) == ["policy", "reference"]
    assert np.all(np.asarray(output.loss) >= -1e-5) and float(output.loss.max()) > 0.1


def test_columns_state_and_key_reach_the_loss():
    def loss(*, margin, loss_state, key, policy_chosen_logps, scale=2.0) -> LossOutput:
        assert jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
        return LossOutput(scale * margin, {}, loss_state + 1)

    batch = pair_batch(columns=lambda rng: {"margin": np.float32(rng.normal())})
    output = from_loss(loss, scale=3.0)(POLICY, None, batch, KEY, jnp.ones(()))
    np.testing.assert_allclose(output.loss, 3 * batch.columns["margin"].reshape(-1))
    assert float(output.state) == 2
    assert column_names(loss) == ("margin",) and read_needs(loss).hyper == {"scale": 2.0}


def test_what_is_missing_is_named():
    def loss(*, reward_margin, policy_chosen_logps) -> LossOutput:
        raise AssertionError

    with pytest.raises(TypeError, match=r"reward_margin.*no columns"):
        from_loss(loss)(POLICY, None, pair_batch(), KEY)
    with pytest.raises(TypeError, match=r"no option \['gamma'\]; its options are \['beta'\]"):
        from_loss(dpo_loss, gamma=1.0)
    with pytest.raises(TypeError, match="needs pairs, and the rows have 3 completions"):
        from_loss(dpo_loss)(POLICY, REFERENCE, pair_batch(completions=3), KEY)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("policy_chosen_logps", ("policy", "logps", "chosen")),
        ("reference_logps", ("reference", "logps", None)),
        ("policy_rejected_entropy", ("policy", "entropy", "rejected")),
        ("rejected_kl", ("both", "kl", "rejected")),
        ("reverse_kl", ("both", "reverse_kl", None)),
        ("chosen_mask", ("batch", "mask", "chosen")),
        ("chosen_step_ids", ("column", "chosen_step_ids", None)),
        ("policy_chosen_logps_ratio", ("column", "policy_chosen_logps_ratio", None)),
    ],
)
def test_origins(name, expected):
    assert origin(name) == expected


def named(names, **hyper):
    """A loss that asks for the arrays of the given names and shows their sums."""
    words = ", ".join(names)
    shown = ", ".join(f"{name!r}: jnp.sum({name}.reshape({name}.shape[0], -1), -1)" for name in names)
    space = {"jnp": jnp, "LossOutput": LossOutput}
    exec(
        f"def loss(*, {words}):\n    shown = {{{shown}}}\n    return LossOutput(0 * shown[{names[0]!r}], shown)", space
    )
    return space["loss"]


@pytest.mark.parametrize(
    ("names", "form"),
    [
        (("policy_chosen_logps", "rejected_mask"), "pairs"),
        (("policy_chosen_logps", "gold_mask"), "triples"),
        (("policy_completion_logps", "completion_mask", "labels"), "singles"),
        (("labels",), "singles"),
        (("policy_completion_logps", "reference_mismatched_logps"), "mismatched"),
        (("policy_chosen_logps", "policy_rejected_given_chosen_logps"), "revisions"),
        (("policy_logps", "mask", "scores"), "lists"),
        (("policy_chosen_reward", "policy_rejected_reward"), "pairs"),
        (("policy_reward", "mask"), "lists"),
        (("chosen_score",), "pairs"),
        (("guidance_rejected_logps",), "pairs"),
    ],
)
def test_names_of_completions_tell_the_form_of_the_rows(names, form):
    assert form_of(named(names)) == form


@pytest.mark.parametrize("form", [form for form, names in COMPLETIONS.items() if names])
def test_every_named_completion_is_the_one_at_its_place(form):
    names = COMPLETIONS[form]
    batch = pair_batch(completions=len(names))
    asked = [f"policy_{name}_logps" for name in names] + [f"{name}_mask" for name in names]
    shown = from_loss(named(asked))(POLICY, None, batch, KEY).metrics
    logps, mask = score(POLICY, batch)["logps"], completion_mask(batch)
    for k, name in enumerate(names):
        np.testing.assert_allclose(shown[f"policy_{name}_logps"], logps[:, k].sum(-1), rtol=1e-5)
        np.testing.assert_allclose(shown[f"{name}_mask"], mask[:, k].sum(-1))


def test_columns_of_all_completions_serve_each_of_them():
    batch = pair_batch()
    shape = batch.slots.shape[:4]
    rng = np.random.default_rng(0)
    columns = {
        "guidance_logps": rng.normal(size=shape).astype(np.float32),
        "step_ids": rng.integers(0, 3, shape).astype(np.int32),
    }
    batch = type(batch)(**{**vars(batch), "columns": columns})
    loss = named(("guidance_chosen_logps", "guidance_rejected_logps", "rejected_step_ids", "policy_chosen_logps"))
    assert column_names(loss) == ("guidance_chosen_logps", "guidance_rejected_logps", "rejected_step_ids")
    shown = from_loss(loss)(POLICY, None, batch, KEY).metrics
    whole = columns["guidance_logps"].reshape(-1, *shape[2:])
    np.testing.assert_allclose(shown["guidance_chosen_logps"], whole[:, 0].sum(-1), rtol=1e-5)
    np.testing.assert_allclose(shown["guidance_rejected_logps"], whole[:, 1].sum(-1), rtol=1e-5)
    np.testing.assert_array_equal(shown["rejected_step_ids"], columns["step_ids"].reshape(-1, *shape[2:])[:, 1].sum(-1))


def test_a_reward_model_speaks_at_the_last_token():
    variables = {**toy_variables(0), "head": toy_variables(0)["head"][:1]}
    examples = ragged_examples(5, completions=2)
    for batch in both_layouts(examples)[1:]:
        shown = from_loss(named(("policy_chosen_reward", "policy_rejected_reward", "policy_reward")))(
            partial(toy_model, variables), None, batch, KEY
        ).metrics
        there = np.asarray(batch.weight).reshape(-1) > 0
        assert not np.any(np.asarray(shown["policy_reward"])[~there])
        found = np.stack([shown["policy_chosen_reward"], shown["policy_rejected_reward"]], 1)
        expected = []
        for example in examples:
            for ids in example.completions:
                path = jnp.asarray(np.concatenate([example.prompt, ids]))[None]
                length = path.shape[1]
                answer = toy_model(variables, path, jnp.arange(length)[None], jnp.full((1, length), length))
                expected.append(float(answer.hidden[0, -1] @ variables["head"][0]))
        np.testing.assert_allclose(sorted(found[there].reshape(-1)), sorted(expected), rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="reward head"):
            from_loss(named(("policy_reward",)))(POLICY, None, batch, KEY)
