"""`dpo-jax methods`: the losses that can be trained, as a table for the terminal, Markdown or JSON."""

import re
from dataclasses import dataclass, field

from dpo_jax.cli.catalogue import Method, Paper, methods, papers
from dpo_jax.cli.console import OutputConfig, result
from dpo_jax.report import table

HEADERS = ("method", "what it is", "arXiv", "data it needs", "reference", "options")
PAPER_HEADERS = ("slug", "paper", "losses or functions", "data it needs", "reference", "experiment", "measured claim")


@dataclass(frozen=True)
class MethodsConfig:
    """The losses that can be trained."""

    markdown: bool = False
    """Print the README's METHODS table: a row for each paper."""
    output: OutputConfig = field(default_factory=OutputConfig)


def row(method: Method) -> tuple[str, ...]:
    """One loss."""
    summary = re.sub(r"\s*\([^()]*(arXiv|note)[^()]*\)", "", method.summary)
    options = ", ".join(f"{name} {value}" for name, value in method.hyper.items())
    return method.slug, summary, method.sources, method.data, "yes" if method.reference else "no", options or "-"


def paper_row(paper: Paper) -> tuple[str, ...]:
    """One paper: the losses (or else the functions) of a module, and what its card says was measured."""
    losses, card = paper.losses, paper.module.__doc__ or ""
    title, numbers = card.split("\n", 1)[0].rstrip("."), re.findall(r"arXiv (\d{4}\.\d{5})", card)

    def card_line(name: str) -> str:
        # An entry of the card goes on until the next one begins or a line is blank.
        match = re.search(rf"^{name}: (.+?)(?=\n[A-Z][\w -]*:|\n\s*\n|\Z)", card, re.MULTILINE | re.DOTALL)
        return " ".join(match[1].split()) if match else "-"

    with_reference = [loss.slug for loss in losses if loss.reference]
    reference = "no" if not with_reference else "yes" if len(with_reference) == len(losses) else "all but "
    if reference == "all but ":
        reference += ", ".join(loss.slug for loss in losses if not loss.reference)
    name = title + (f", arXiv {numbers[0]}" if numbers else "")
    names = ", ".join(f"`{loss.slug}`" for loss in losses)
    names = names or "functions: " + ", ".join(f"`{function}`" for function in paper.functions)
    data = "; ".join(dict.fromkeys(loss.data for loss in losses)) or "-"
    reference = reference if losses else "-"
    return paper.slug, name, names, data, reference, card_line("Experiment"), card_line("Measured")


def markdown() -> str:
    """The README's METHODS table."""
    rows = [PAPER_HEADERS, tuple("---" for _ in PAPER_HEADERS), *map(paper_row, papers())]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def methods_command(config: MethodsConfig) -> None:
    """Print the table."""
    rows = [row(method) for method in methods().values()]
    values = {"methods": [dict(zip(HEADERS, cells)) for cells in rows]}
    result(values, markdown() if config.markdown else table(rows, HEADERS), as_json=config.output.json)
