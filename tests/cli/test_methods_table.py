"""The README's METHODS table is what the command prints."""

import re
from pathlib import Path

from dpo_jax.cli.methods import markdown


def test_readme_table_is_the_commands_output():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    table = re.search(r"<!-- methods -->\n(.*?)\n<!-- /methods -->", readme, re.DOTALL)
    assert table is not None and table[1] == markdown(), "run `dpo-jax methods --markdown` and put its rows there"


def test_experiments_that_are_named_exist():
    root = Path(__file__).parents[2]
    named = re.findall(r"\| ((?:experiments|dpo_jax)/\S+\.py) \|", markdown())
    assert named and all((root / name).exists() for name in named)
