"""A loss's argument names decide what is computed, what runs and what the data must give."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_score import both_layouts, score
from toy_model import ragged_examples, toy_model, toy_variables

from dpo_jax.language.methods import dpo_loss, reference_free_loss, sft_loss, wpo_loss
from dpo_jax.language.objectives import column_names, loss_needs, needs_reference, origin
from dpo_jax.language.objectives import from_loss as from_loss_eagerly
from dpo_jax.language.score import completion_mask
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
    assert column_names(loss) == ("margin",) and loss_needs(loss).hyper == {"scale": 2.0}


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
