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
from dpo_jax.language.objectives import column_names, loss_needs, needs_reference
from dpo_jax.types import LossOutput


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
    def paper(self) -> str:
        """Slug of the paper's module."""
        return self.module.__name__.rsplit(".", 1)[-1].replace("_", "-")

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
        names = loss_needs(self.loss).arrays
        kind = "pairs" if any(re.search(r"chosen|rejected", name) for name in names) else "lists or single completions"
        columns = column_names(self.loss)
        return kind + (f" + {', '.join(columns)}" if columns else "")

    @property
    def reference(self) -> bool:
        """Whether a reference runs (or is given as columns)."""
        return needs_reference(self.loss)


def methods() -> dict[str, Method]:
    """Every public `*_loss` of every module in `dpo_jax.language.methods`, by slug."""
    package = importlib.import_module("dpo_jax.language.methods")
    found: dict[str, Method] = {}
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for name, function in vars(module).items():
            own = inspect.isfunction(function) and function.__module__ == module.__name__
            if own and name.endswith("_loss") and not name.startswith("_"):
                slug = name.removesuffix("_loss").replace("_", "-")
                found[slug] = Method(slug, module, function)
    return found


def method(slug: str) -> Method:
    """The method of a slug.

    Raises:
      UsageError: there is none; names those that come close.
    """
    import difflib

    known = methods()
    if slug in known:
        return known[slug]
    near = difflib.get_close_matches(slug, known, n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UsageError(f"unknown method {slug!r}; {hint}`dpo-jax methods` lists all {len(known)}")


def initial_loss_state(chosen: Method) -> Any:
    """What the loss remembers before its first step: the module's `<name>_state()`, or None if it remembers nothing."""
    if not loss_needs(chosen.loss).state:
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
        for name, value in loss_needs(chosen.loss).hyper.items()
    ]
    return make_dataclass(
        "LossOptions", fields, frozen=True, namespace={"__doc__": f"Options of {chosen.slug}: {chosen.summary}."}
    )
