"""Every method of pairs trains through the command line."""

import pytest
from every_method import World, check_training, make_world

from dpo_jax.cli.catalogue import methods

METHODS = {slug: method for slug, method in methods().items() if method.wing == "language" and method.form == "pairs"}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.slow
@pytest.mark.parametrize("slug", METHODS)
def test_twenty_steps_on_the_digit_world(slug, world, tmp_path):
    check_training(METHODS[slug], world, tmp_path / "run")
