"""The losses that can be trained, found by listing the modules of methods; their options and their rows."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from typing import Annotated, Any, get_type_hints

import tyro
from docstring_parser import parse as parse_docstring

from dpo_jax.cli.console import UsageError
from dpo_jax.language.objectives import column_names, form_of, needs_reference, origin, whole_column
from dpo_jax.signatures import read_needs
from dpo_jax.types import LossOutput

_FORM_NAMES = {
    "pairs": "pairs",
    "triples": "triples (gold, chosen, rejected)",
    "singles": "labelled completions",
    "mismatched": "labelled completions",
    "revisions": "pairs",
    "lists": "scored lists",
}


@dataclass(frozen=True)
class Method:
    """One trainable loss.

    Attributes:
      slug: its name on the command line, the loss's own without `_loss`.
      module: the paper's module, whose slug it shares or belongs to.
      loss: the function.
    """

    slug: str
    module: Any
    loss: Callable[..., LossOutput]

    @property
    def summary(self) -> str:
        """First line of the loss's docstring."""
        return (inspect.getdoc(self.loss) or "").split("\n", 1)[0].rstrip(".")

    @property
    def sources(self) -> str:
        """arXiv numbers named by the loss, or else by its module."""
        found = re.findall(r"\b\d{4}\.\d{5}\b", self.loss.__doc__ or "")
        return ", ".join(dict.fromkeys(found or re.findall(r"\b\d{4}\.\d{5}\b", self.module.__doc__ or "")[:1])) or "-"

    @property
    def data(self) -> str:
        """The kind of rows that the loss reads."""
        columns = tuple(dict.fromkeys(map(whole_column, column_names(self.loss))))
        kind = "any completions" if self.form == "lists" and "scores" not in columns else _FORM_NAMES[self.form]
        named = [name for name in columns if name not in ("labels", "scores")]  # the form has these
        return kind + (f" + {', '.join(named)}" if named else "")

    @property
    def form(self) -> str:
        """What the completions of a row are: a key of `language.types.COMPLETIONS`."""
        return form_of(self.loss)

    @property
    def reward(self) -> bool:
        """Whether the model that is trained is a reward model."""
        return any(origin(name).statistic == "reward" for name in read_needs(self.loss).arrays)

    @property
    def reference(self) -> bool:
        """Whether a reference runs (or is given as columns)."""
        return needs_reference(self.loss)


@dataclass(frozen=True)
class Paper:
    """One module of methods.

    Attributes:
      slug: its name.
      module: with the card as its docstring.
      losses: what can be trained.
      functions: names of all other public functions.
    """

    slug: str
    module: Any
    losses: list[Method]
    functions: tuple[str, ...]


def papers() -> list[Paper]:
    """Every module of `dpo_jax.language.methods`."""
    package = importlib.import_module("dpo_jax.language.methods")
    found = []
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        own = {
            name: function
            for name, function in vars(module).items()
            if inspect.isfunction(function) and function.__module__ == module.__name__ and not name.startswith("_")
        }
        losses = [
            Method(name.removesuffix("_loss").replace("_", "-"), module, function)
            for name, function in own.items()
            if name.endswith("_loss")
        ]
        functions = tuple(name for name in own if not name.endswith("_loss"))
        found.append(Paper(info.name.replace("_", "-"), module, losses, functions))
    return found


def methods() -> dict[str, Method]:
    """Every public `*_loss` of every module in `dpo_jax.language.methods`, by slug."""
    return {loss.slug: loss for paper in papers() for loss in paper.losses}


def method(slug: str) -> Method:
    """The method of a slug; a paper's slug stands for its first loss.

    Raises:
      UsageError: there is none; names those that come close.
    """
    import difflib

    known = methods()
    if slug in known:
        return known[slug]
    for paper in papers():
        if paper.slug == slug and paper.losses:
            return paper.losses[0]
    near = difflib.get_close_matches(slug, known, n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UsageError(f"unknown method {slug!r}; {hint}`dpo-jax methods` lists all {len(known)}")


def initial_loss_state(chosen: Method) -> Any:
    """What the loss remembers before its first step: the module's `<name>_state()`, or None if it remembers nothing."""
    if not read_needs(chosen.loss).state:
        return None
    return getattr(chosen.module, chosen.loss.__name__.removesuffix("_loss") + "_state")()


def options_class(chosen: Method) -> type:
    """Dataclass of the loss's hyper-parameters, with the docstring's help, for the command line and the config file."""
    help_of = {p.arg_name: p.description or "" for p in parse_docstring(inspect.getdoc(chosen.loss) or "").params}
    hints = get_type_hints(chosen.loss)
    fields = [
        (
            name,
            Annotated[hints[name], tyro.conf.arg(help=" ".join(help_of.get(name, "").split()))],
            field(default=value),
        )
        for name, value in read_needs(chosen.loss).hyper.items()
    ]
    return make_dataclass(
        "LossOptions", fields, frozen=True, namespace={"__doc__": f"Options of {chosen.slug}: {chosen.summary}."}
    )
