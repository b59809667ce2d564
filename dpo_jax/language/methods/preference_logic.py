"""Preference losses as propositional statements: formulas, structures, codes, decompilation and entailment.

Richardson, Srikumar, Sabharwal 2024, arXiv 2412.17696. Evidence: the paper's definitions, reconstructed; CE, CEUnl,
CPO, ORPO and DPO come out exactly, which code belongs to the names unCPO, cCPO, cUNL, fUNL, cfUNL, qfUNL is our guess.
The propositions w and l say that the model accepts the chosen and the rejected answer, independently, with the
probabilities p_w and p_l. A structure (P, P_C, P_A) sorts the worlds into those that a loss wants and does not want:

    top = (P or P_A) and P_C,   bottom = (not P or P_A) and P_C
    WMC(F) = sum over the worlds in which F holds of the product of p_v or 1 - p_v
    ratio = WMC(top) / WMC(bottom),   the loss falls with it (`dpa_logic.compile_code`)

A code has one mark per world, (w, l) = TT, TF, FT, FF, the first variable slowest and true first: T, the world is in
the top only, B in the bottom only, X in both, - in neither. Two structures with one code are one loss, however their
formulas look: n propositions give 4^(2^n) losses, 256 for a pair, in 225 of them both top and bottom can be satisfied.

    CE TTBB     p_w / (1 - p_w)                    CEUnl BTBB  p_w (1 - p_l) / (1 - p_w (1 - p_l))
    CPO XTB-    p_w / p_l                          ORPO -TB-   p_w (1 - p_l) / (p_l (1 - p_w))
    unCPO TTBT  (1 - p_l + p_w p_l) / (p_l (1 - p_w))         cCPO TTB-   p_w / (p_l (1 - p_w))
    cUNL BTB-   p_w (1 - p_l) / p_l                fUNL BTBT   (1 - p_l) / p_l
    cfUNL -TBT  (1 - p_l) / (p_l (1 - p_w))        qfUNL -TBX  (1 - p_l) / (1 - p_w)

One loss entails another if its top implies the other's and its bottom is implied by the other's; then it is the larger
one for every model, if it falls with the ratio (the squared form does not). All of this is plain Python on the host.

>>> structure = decompile({"w": 1.0}, {"l": 1.0})
>>> structure.code, formula_text(structure.core), formula_text(structure.condition), formula_text(structure.shared)
('XTB-', 'l -> w', 'w or l', 'w and l')
>>> relation("XTB-", "TTB-"), relation("XTB-", "-TB-")
('entails', 'incomparable')
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

PAIR = ("w", "l")
_MARKS = {"T": (True, False), "B": (False, True), "X": (True, True), "-": (False, False)}

Table = tuple[bool, ...]
Polynomial = Mapping[str, float]


@dataclass(frozen=True)
class Var:
    """A proposition."""

    name: str


@dataclass(frozen=True)
class Constant:
    """True or false everywhere."""

    value: bool


@dataclass(frozen=True)
class Not:
    """The operand does not hold."""

    operand: "Formula"


@dataclass(frozen=True)
class And:
    """Both hold."""

    left: "Formula"
    right: "Formula"


@dataclass(frozen=True)
class Or:
    """At least one holds."""

    left: "Formula"
    right: "Formula"


@dataclass(frozen=True)
class Implies:
    """The right one holds wherever the left one does."""

    left: "Formula"
    right: "Formula"


@dataclass(frozen=True)
class Xor:
    """Exactly one holds."""

    left: "Formula"
    right: "Formula"


Formula = Var | Constant | Not | And | Or | Implies | Xor
TRUE, FALSE = Constant(True), Constant(False)


class NotDecompilable(ValueError):
    """A ratio whose parts are not weighted counts of worlds."""


@dataclass(frozen=True)
class PreferenceStructure:
    """A loss as logic: a core formula P, a condition P_C that worlds must meet, worlds P_A that both sides count.

    Attributes:
      core: what a good model makes true, e.g. `Implies(Var("l"), Var("w"))`.
      condition: worlds outside are left out of both counts.
      shared: worlds (within the condition) that are in both counts.
      variables: the propositions in the order of the code.
    """

    core: Formula
    condition: Formula = TRUE
    shared: Formula = FALSE
    variables: tuple[str, ...] = PAIR

    @property
    def top(self) -> Table:
        """Truth table of (P or P_A) and P_C."""
        return truth_table(And(Or(self.core, self.shared), self.condition), self.variables)

    @property
    def bottom(self) -> Table:
        """Truth table of (not P or P_A) and P_C."""
        return truth_table(And(Or(Not(self.core), self.shared), self.condition), self.variables)

    @property
    def code(self) -> str:
        """One mark per world; equal for equal losses."""
        marks = {sides: mark for mark, sides in _MARKS.items()}
        return "".join(marks[sides] for sides in zip(self.top, self.bottom))

    @classmethod
    def from_code(cls, code: str, variables: tuple[str, ...] = PAIR) -> "PreferenceStructure":
        """The structure of a code, with P = "bottom implies top"; ValueError for a wrong length or mark."""
        top, bottom = _tables(code)
        if len(code) != 2 ** len(variables):
            raise ValueError(
                f"code {code!r} has {len(code)} marks; {len(variables)} variables need {2 ** len(variables)}"
            )
        implied, either, both = ([f(b, t) for t, b in zip(top, bottom)] for f in (lambda b, t: t or not b, max, min))
        core, condition, shared = (_formula(tuple(map(bool, table)), variables) for table in (implied, either, both))
        return cls(core, condition, shared, variables)


def truth_table(formula: Formula, variables: Sequence[str] = PAIR) -> Table:
    """Values of a formula in all 2^n worlds, the first variable slowest, true before false; host.

    Raises ValueError for a variable that is not listed.
    """
    worlds = itertools.product((True, False), repeat=len(variables))
    return tuple(_holds(formula, dict(zip(variables, world))) for world in worlds)


def formula_text(formula: Formula) -> str:
    """A formula as words: `not`, `and`, `or`, `->`, `xor`, with brackets around inner operations; host."""
    words = {And: "and", Or: "or", Implies: "->", Xor: "xor"}

    def inner(part: Formula) -> str:
        return formula_text(part) if isinstance(part, Var | Constant | Not) else f"({formula_text(part)})"

    match formula:
        case Var(name):
            return name
        case Constant(value):
            return str(value).lower()
        case Not(operand):
            return f"not {inner(operand)}"
        case _:
            return f"{inner(formula.left)} {words[type(formula)]} {inner(formula.right)}"


def decompile(
    top: Polynomial | Callable[..., float],
    bottom: Polynomial | Callable[..., float],
    variables: tuple[str, ...] = PAIR,
) -> PreferenceStructure:
    """The structure whose ratio of counts is top / bottom; host.

    Raises NotDecompilable if a part is not multilinear in the probabilities, or not 0 or 1 where all of them are.

    Args:
      top, bottom: polynomials in the variables' probabilities: products of names -> coefficients, `{"w": 1, "w*l": -1}`
        with "1" for the constant, or functions of the probabilities by keyword.
      variables: the propositions in the order of the code.
    """
    sides = zip(_corners(top, variables), _corners(bottom, variables))
    marks = {sides: mark for mark, sides in _MARKS.items()}
    return PreferenceStructure.from_code("".join(marks[pair] for pair in sides), variables)


def relation(first: str, second: str) -> Literal["equivalent", "entails", "entailed_by", "incomparable"]:
    """How two codes of equal length are ordered; the one that entails is the larger loss for every model; host."""
    forward, backward = _entails(first, second), _entails(second, first)
    if forward and backward:
        return "equivalent"
    return "entails" if forward else "entailed_by" if backward else "incomparable"


def lattice(codes: Sequence[str]) -> list[tuple[str, str]]:
    """Edges (stronger, weaker) of the Hasse diagram of the entailments among different codes; host."""
    codes = list(dict.fromkeys(codes))
    above = {a: [b for b in codes if b != a and _entails(a, b)] for a in codes}
    return [(a, c) for a in codes for c in above[a] if not any(c in above[b] for b in above[a])]


def enumerate_losses(n: int = 2, between: tuple[str, str] | None = None) -> Iterator[str]:
    """All 4^(2^n) codes of n propositions, or those from a stronger code to a weaker one, both included; host.

    Raises ValueError if the first of `between` does not entail the second.
    """
    low, high = between or ("B" * 2**n, "T" * 2**n)
    if len(low) != 2**n or not _entails(low, high):
        raise ValueError(f"{low!r} does not entail {high!r} as codes of {n} propositions")
    choices = ([m for m in _MARKS if _entails(a, m) and _entails(m, b)] for a, b in zip(low, high))
    return map("".join, itertools.product(*choices))


_w, _l = Var("w"), Var("l")
_order, _either, _one_missing = Implies(_l, _w), Or(_w, _l), Or(Not(_w), Not(_l))
NAMED: Mapping[str, PreferenceStructure] = {
    "CE": PreferenceStructure(_w),
    "CEUnl": PreferenceStructure(And(_w, Not(_l))),
    "CPO": PreferenceStructure(_order, _either, And(_w, _l)),
    "ORPO": PreferenceStructure(_order, Xor(_w, _l)),
    "unCPO": PreferenceStructure(_order),
    "cCPO": PreferenceStructure(_order, _either),
    "cUNL": PreferenceStructure(And(_w, Not(_l)), _either),
    "fUNL": PreferenceStructure(Not(_l)),
    "cfUNL": PreferenceStructure(Not(_l), Not(And(_w, _l))),
    "qfUNL": PreferenceStructure(_order, _one_missing, And(Not(_w), Not(_l))),
}


def _holds(formula: Formula, world: Mapping[str, bool]) -> bool:
    match formula:
        case Constant(value):
            return value
        case Var(name):
            if name not in world:
                raise ValueError(f"variable {name!r} is not among {tuple(world)}")
            return world[name]
        case Not(operand):
            return not _holds(operand, world)
    left, right = _holds(formula.left, world), _holds(formula.right, world)
    match formula:
        case And():
            return left and right
        case Or():
            return left or right
        case Implies():
            return right or not left
        case Xor():
            return left != right


def _formula(table: Table, variables: Sequence[str]) -> Formula:
    """A formula with this truth table, by cases of the first variable: short, and for two variables without repeats."""
    if len(set(table)) == 1:
        return Constant(table[0])
    half, var, others = len(table) // 2, Var(variables[0]), variables[1:]
    if_true, if_false = table[:half], table[half:]
    true, false = _formula(if_true, others), _formula(if_false, others)
    if if_true == if_false:
        return true
    match true, false:
        case Constant(True), Constant(False):
            return var
        case Constant(False), Constant(True):
            return Not(var)
        case Constant(True), Not(operand):
            return Implies(operand, var)
        case Constant(True), _:
            return Or(var, false)
        case Constant(False), _:
            return And(Not(var), false)
        case _, Constant(True):
            return Implies(var, true)
        case _, Constant(False):
            return And(var, true)
    if all(a != b for a, b in zip(if_true, if_false)):
        return Xor(var, false)
    return Or(And(var, true), And(Not(var), false))


def _tables(code: str) -> tuple[Table, Table]:
    if not code or set(code) - set(_MARKS):
        raise ValueError(f"code {code!r} has marks other than T, B, X and -")
    top, bottom = zip(*(_MARKS[mark] for mark in code))
    return top, bottom


def _entails(first: str, second: str) -> bool:
    if len(first) != len(second):
        raise ValueError(f"codes {first!r} and {second!r} are of different lengths")
    (top, bottom), (weaker_top, weaker_bottom) = _tables(first), _tables(second)
    implied = all(b or not a for a, b in zip(top, weaker_top))
    return implied and all(b or not a for a, b in zip(weaker_bottom, bottom))


def _corners(part: Polynomial | Callable[..., float], variables: tuple[str, ...]) -> Table:
    """Truth table of a count given as a function of the probabilities."""
    if callable(part):
        function = part
    else:

        def function(**probs: float) -> float:
            try:
                return sum(c * math.prod(probs[v] for v in term.split("*") if v != "1") for term, c in part.items())
            except KeyError as error:
                raise NotDecompilable(f"variable {error} is not among {variables}") from None

    worlds = list(itertools.product((1.0, 0.0), repeat=len(variables)))
    values = [float(function(**dict(zip(variables, world)))) for world in worlds]
    if any(min(abs(value), abs(value - 1)) > 1e-9 for value in values):
        raise NotDecompilable(f"{part} takes the values {values} at the corners; a count of worlds takes 0 and 1 only")
    for trial in range(1, 4):
        # Inside the cube a weighted count is the multilinear interpolation of its corners.
        probs = [math.modf(0.618034 * (trial * len(variables) + i))[0] for i in range(len(variables))]
        weights = [math.prod(p if on else 1 - p for p, on in zip(probs, world)) for world in worlds]
        count = sum(weight * value for weight, value in zip(weights, values))
        if abs(float(function(**dict(zip(variables, probs)))) - count) > 1e-6:
            raise NotDecompilable(f"{part} is not multilinear in the probabilities of {variables}")
    return tuple(value > 0.5 for value in values)
