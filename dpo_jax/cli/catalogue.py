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
from dpo_jax.diffusion import objectives as image_objectives
from dpo_jax.diffusion.errors import Inputs, noised_inputs
from dpo_jax.language import objectives as text_objectives
from dpo_jax.language.objectives import whole_column
from dpo_jax.signatures import read_needs
from dpo_jax.types import LossOutput

WINGS = ("language", "diffusion")
_IMAGE_FORMS = {
    "pairs": "image pairs",
    "singles": "labelled images",
    "mismatched": "labelled images",
    "experts": "images + samples of the policy",
    "patches": "reference and generated images",
    "lists": "scored image lists",
}
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
      wing: "language" or "diffusion".
    """

    slug: str
    module: Any
    loss: Callable[..., LossOutput]
    wing: str = "language"

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
        columns = self.columns
        names = _FORM_NAMES if self.wing == "language" else _IMAGE_FORMS
        if self.wing == "language":
            columns = tuple(dict.fromkeys(map(whole_column, columns)))
        if self.online:
            return "samples of the policy, judged"
        kind = names[self.form]
        if self.wing == "language" and self.form == "lists" and "scores" not in columns:
            kind = "any completions"
        named = [name for name in columns if name not in ("labels", "scores")]  # the form has these
        return kind + (f" + {', '.join(named)}" if named else "")

    @property
    def inputs(self) -> Callable[..., Inputs]:
        """What the models of the diffusion wing are asked: the module's `<name>_inputs`, or noise on clean latents."""
        return getattr(self.module, self.loss.__name__.removesuffix("_loss") + "_inputs", noised_inputs)

    @property
    def columns(self) -> tuple[str, ...]:
        """Arguments that only the data can give."""
        if self.wing == "language":
            return text_objectives.column_names(self.loss)
        return image_objectives.column_names(self.loss, self.inputs)

    @property
    def form(self) -> str:
        """What the completions or images of a row are: a key of `COMPLETIONS` or `IMAGES` of the wing's types."""
        return (text_objectives if self.wing == "language" else image_objectives).form_of(self.loss)

    @property
    def reward(self) -> bool:
        """Whether the model that is trained is a reward model."""
        if self.wing != "language":
            return False
        return any(text_objectives.origin(name).statistic == "reward" for name in read_needs(self.loss).arrays)

    @property
    def online(self) -> bool:
        """Whether the loss reads recorded samples of the policy, so that sampling and training take turns."""
        if self.wing == "language":
            return False
        return image_objectives.reads_trajectories(self.loss) or self.form == "experts"

    @property
    def reference(self) -> bool:
        """Whether a reference runs (or is given as columns)."""
        if self.wing == "language":
            return text_objectives.needs_reference(self.loss)
        return image_objectives.needs_reference(self.loss, self.inputs)

    @property
    def start_noise(self) -> float:
        """Share of noise that the policy starts with: the module's `START_NOISE` where the reference is no start."""
        return getattr(self.module, "START_NOISE", 0.0)

    @property
    def hyper(self) -> dict[str, Any]:
        """Names and defaults of the options: of the loss, then of what makes its inputs."""
        own = read_needs(self.loss).hyper
        return own if self.wing == "language" else own | read_needs(self.inputs).hyper


@dataclass(frozen=True)
class Paper:
    """One module of methods.

    Attributes:
      slug: its name.
      module: with the card as its docstring.
      losses: what can be trained.
      functions: names of all other public functions.
      wing: "language" or "diffusion".
    """

    slug: str
    module: Any
    losses: list[Method]
    functions: tuple[str, ...]
    wing: str = "language"


def papers() -> list[Paper]:
    """Every module of `dpo_jax.language.methods`, then of `dpo_jax.diffusion.methods`."""
    return [paper for wing in WINGS for paper in _papers_of(wing)]


def _papers_of(wing: str) -> list[Paper]:
    package = importlib.import_module(f"dpo_jax.{wing}.methods")
    found = []
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        own = {
            name: function
            for name, function in vars(module).items()
            if inspect.isfunction(function) and function.__module__ == module.__name__ and not name.startswith("_")
        }
        losses = [
            Method(name.removesuffix("_loss").replace("_", "-"), module, function, wing)
            for name, function in own.items()
            if name.endswith("_loss")
        ]
        functions = tuple(name for name in own if not name.endswith("_loss"))
        found.append(Paper(info.name.replace("_", "-"), module, losses, functions, wing))
    return found


def methods() -> dict[str, Method]:
    """Every public `*_loss` of every module of methods, by slug."""
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
    sources = [chosen.loss] if chosen.wing == "language" else [chosen.inputs, chosen.loss]
    help_of: dict[str, str] = {}
    hints: dict[str, Any] = {}
    for source in sources:
        help_of |= {p.arg_name: p.description or "" for p in parse_docstring(inspect.getdoc(source) or "").params}
        hints |= get_type_hints(source)
    fields = [
        (
            name,
            Annotated[hints[name], tyro.conf.arg(help=" ".join(help_of.get(name, "").split()))],
            field(default=value),
        )
        for name, value in chosen.hyper.items()
    ]
    return make_dataclass(
        "LossOptions", fields, frozen=True, namespace={"__doc__": f"Options of {chosen.slug}: {chosen.summary}."}
    )
