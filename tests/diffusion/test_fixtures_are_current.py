"""The committed numbers are what the installed diffusers computes."""

import numpy as np
import pytest
from make_scheduler_fixtures import CASES, FILE, rollout, tables

pytest.importorskip("diffusers", reason="compares the committed numbers with diffusers' schedulers")
pytest.importorskip("torch", reason="compares the committed numbers with diffusers' schedulers")
EXPECTED = np.load(FILE)


def test_tables_and_grids():
    for name, value in tables().items():
        np.testing.assert_allclose(value, EXPECTED[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_rollouts(name):
    for key, value in rollout(name).items():
        np.testing.assert_allclose(value, EXPECTED[f"{name}/{key}"], rtol=1e-5, atol=1e-5)
