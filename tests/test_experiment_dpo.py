"""The DPO experiment at reduced size: the orderings that its header claims hold on every seed."""

import importlib.util
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.language.methods import cdpo_loss, dpo_loss, ipo_loss, rdpo_loss, robust_loss, rpo_loss

SEEDS = 3


@pytest.fixture(scope="module")
def experiment():
    path = Path(__file__).parents[1] / "experiments" / "dpo.py"
    spec = importlib.util.spec_from_file_location("experiment_dpo", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bandit_tasks(experiment, flip):
    keys = jax.random.split(jax.random.key(0), SEEDS)
    return experiment.over_seeds(partial(experiment.bandit_task, flip=flip, pairs=800), keys)


def train(experiment, tasks, loss):
    return experiment.over_seeds(partial(experiment.run_bandit, loss=loss, steps=200), tasks)


def test_flipped_labels_hurt_robust_dpo_least(experiment):
    tasks = bandit_tasks(experiment, 0.3)
    dpo = train(experiment, tasks, partial(dpo_loss, beta=0.5))
    cdpo = train(experiment, tasks, partial(cdpo_loss, beta=0.5, label_smoothing=0.3))
    robust = train(experiment, tasks, partial(robust_loss, beta=0.5, label_smoothing=0.3))
    assert robust["reward"].mean() > dpo["reward"].mean() > cdpo["reward"].mean()
    assert np.all(cdpo["KL"] < 0.5 * dpo["KL"])


def test_ipo_stays_closer_and_the_nll_term_holds_the_chosen_answers(experiment):
    tasks = bandit_tasks(experiment, None)
    dpo = train(experiment, tasks, partial(dpo_loss, beta=0.5))
    ipo = train(experiment, tasks, partial(ipo_loss, beta=0.2))
    held = train(experiment, tasks, partial(rpo_loss, beta=0.5, nll_coef=1.0))
    assert np.all(ipo["KL"] < 0.5 * dpo["KL"])
    assert np.all(dpo["u"] < -0.5) and np.all(held["u"] > 0)


def test_length_regulariser_takes_back_the_annotators_bonus(experiment):
    keys = jax.random.split(jax.random.key(0), SEEDS)
    tasks = experiment.over_seeds(partial(experiment.length_task, pairs=400, width=48), keys)

    def run(loss):
        return experiment.over_seeds(partial(experiment.run_length, loss=loss, steps=150), tasks)

    reference = experiment.over_seeds(experiment.measure_length, tasks)
    dpo = run(partial(dpo_loss, beta=1.0))
    regularised = run(partial(rdpo_loss, beta=1.0, alpha=0.05))
    np.testing.assert_allclose(reference["length"], experiment.optimal_length(alpha=experiment.BONUS), rtol=1e-4)
    assert np.all(regularised["length"] < 0.8 * dpo["length"])
    np.testing.assert_allclose(regularised["quality"], dpo["quality"], atol=0.05)
    assert np.all(dpo["quality"] > 3 * reference["quality"])


@pytest.mark.parametrize("flip", [0.0, 0.3])
def test_labels_are_flipped_at_the_stated_rate(experiment, flip):
    task = experiment.bandit_task(jax.random.key(1), flip, 4000)
    assert np.all(task["actions"][:, 0] != task["actions"][:, 1])
    rewards = jnp.take_along_axis(task["reward"][task["context"]], task["actions"], 1)
    # Standard error 0.007; none at all without flips.
    assert np.mean(rewards[:, 0] < rewards[:, 1]) == pytest.approx(flip, abs=0.1 * flip)


def test_table_is_printed(experiment, capsys):
    experiment.print_table({"row": {"reward": jnp.array([1.0, 2.0])}})
    assert "1.50 (0.50)" in capsys.readouterr().out
