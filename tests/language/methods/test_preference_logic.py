"""Preference structures over all 256 codes: codes, formulas, decompilation, entailment."""

import itertools
import math

import numpy as np
import pytest

from dpo_jax.language.methods.preference_logic import (
    FALSE,
    NAMED,
    TRUE,
    And,
    Implies,
    Not,
    NotDecompilable,
    Or,
    PreferenceStructure,
    Var,
    Xor,
    decompile,
    enumerate_losses,
    formula_text,
    lattice,
    relation,
    truth_table,
)

CODES = ["".join(marks) for marks in itertools.product("TBX-", repeat=4)]
W, L = Var("w"), Var("l")


def weighted_count(table, probs):
    """Float64 sum over the worlds, from the definition; probs [n] of the variables, first one slowest."""
    worlds = itertools.product((True, False), repeat=len(probs))
    return sum(on * math.prod(p if v else 1 - p for p, v in zip(probs, world)) for on, world in zip(table, worlds))


def sides(code):
    return [m in "TX" for m in code], [m in "BX" for m in code]


@pytest.mark.parametrize(
    ("formula", "table", "text"),
    [
        (W, (1, 1, 0, 0), "w"),
        (L, (1, 0, 1, 0), "l"),
        (Not(L), (0, 1, 0, 1), "not l"),
        (And(W, Not(L)), (0, 1, 0, 0), "w and not l"),
        (Or(W, L), (1, 1, 1, 0), "w or l"),
        (Implies(L, W), (1, 1, 0, 1), "l -> w"),
        (Xor(W, L), (0, 1, 1, 0), "w xor l"),
        (Not(And(W, L)), (0, 1, 1, 1), "not (w and l)"),
        (Or(And(W, L), FALSE), (1, 0, 0, 0), "(w and l) or false"),
        (TRUE, (1, 1, 1, 1), "true"),
    ],
)
def test_truth_tables_list_the_worlds_from_both_to_neither(formula, table, text):
    assert truth_table(formula) == tuple(map(bool, table))
    assert formula_text(formula) == text


def test_a_variable_that_is_not_listed_is_named():
    with pytest.raises(ValueError, match="ref_w"):
        truth_table(And(W, Var("ref_w")))


@pytest.mark.parametrize(
    ("name", "code"),
    dict(
        CE="TTBB", CEUnl="BTBB", CPO="XTB-", ORPO="-TB-", unCPO="TTBT", cCPO="TTB-", cUNL="BTB-", fUNL="BTBT",
        cfUNL="-TBT", qfUNL="-TBX",
    ).items(),
)  # fmt: skip
def test_named_structures_have_the_codes_of_the_table(name, code):
    assert NAMED[name].code == code


@pytest.mark.parametrize(
    ("name", "ratio"),
    [
        ("CE", lambda w, l: w / (1 - w)),
        ("CEUnl", lambda w, l: w * (1 - l) / (1 - w * (1 - l))),
        ("CPO", lambda w, l: w / l),
        ("ORPO", lambda w, l: w * (1 - l) / (l * (1 - w))),
        ("unCPO", lambda w, l: (1 - l + w * l) / (l * (1 - w))),
        ("cCPO", lambda w, l: w / (l * (1 - w))),
        ("cUNL", lambda w, l: w * (1 - l) / l),
        ("fUNL", lambda w, l: (1 - l) / l),
        ("cfUNL", lambda w, l: (1 - l) / (l * (1 - w))),
        ("qfUNL", lambda w, l: (1 - l) / (1 - w)),
    ],
)
def test_ratios_of_counts_are_the_formulas_of_the_table(name, ratio):
    for w, l in np.random.default_rng(0).uniform(0.01, 0.99, (20, 2)):
        structure = NAMED[name]
        counted = weighted_count(structure.top, (w, l)) / weighted_count(structure.bottom, (w, l))
        assert counted == pytest.approx(ratio(w, l), rel=1e-12)


def test_every_code_survives_the_way_through_formulas():
    for code in CODES:
        structure = PreferenceStructure.from_code(code)
        assert structure.code == code
        assert (list(structure.top), list(structure.bottom)) == sides(code)


def test_codes_of_one_and_three_variables_survive_too():
    for code in map("".join, itertools.product("TBX-", repeat=2)):
        assert PreferenceStructure.from_code(code, ("l",)).code == code
    for code in np.random.default_rng(0).choice(list("TBX-"), (300, 8)):
        assert PreferenceStructure.from_code("".join(code), ("w", "l", "r")).code == "".join(code)


def test_every_code_decompiles_from_its_counts():
    def count(table):
        return lambda w, l: weighted_count(table, (w, l))

    for code in CODES:
        top, bottom = sides(code)
        assert decompile(count(top), count(bottom)).code == code


@pytest.mark.parametrize(
    ("top", "bottom", "name"),
    [
        ({"w": 1}, {"1": 1, "w": -1}, "CE"),
        ({"w": 1, "w*l": -1}, {"1": 1, "w": -1, "w*l": 1}, "CEUnl"),
        ({"w": 1}, {"l": 1}, "CPO"),
        ({"w": 1, "w*l": -1}, {"l": 1, "w*l": -1}, "ORPO"),
        ({"1": 1, "l": -1, "l*w": 1}, {"l": 1, "w*l": -1}, "unCPO"),
        ({"w": 1}, {"l": 1, "w*l": -1}, "cCPO"),
        ({"1": 1, "l": -1}, {"1": 1, "w": -1}, "qfUNL"),
    ],
)
def test_published_ratios_decompile_to_their_names(top, bottom, name):
    assert decompile(top, bottom).code == NAMED[name].code


def test_decompiled_formulas_read_well():
    cpo, funl = decompile({"w": 1}, {"l": 1}), PreferenceStructure.from_code("BTBT")
    assert (cpo.core, cpo.condition, cpo.shared) == (Implies(L, W), Or(W, L), And(W, L))
    assert (funl.core, funl.condition, funl.shared) == (Not(L), TRUE, FALSE)


def test_dpo_decompiles_to_a_structure_of_four_variables():
    variables = ("w", "l", "ref_w", "ref_l")
    dpo = decompile({"w*ref_l": 1}, {"ref_w*l": 1}, variables)
    assert dpo.top == truth_table(And(W, Var("ref_l")), variables)
    assert dpo.bottom == truth_table(And(Var("ref_w"), L), variables)


@pytest.mark.parametrize(
    ("top", "message"),
    [
        ({"w": 2.0}, "corners"),
        ({"w": 1.0, "l": 1.0}, "corners"),
        ({"w*w": 1.0}, "not multilinear"),
        ({"v": 1.0}, "'v' is not among"),
        (lambda w, l: w if w > l else w**2, "not multilinear"),  # a gate, as DPO-positive has
        (lambda w, l: w * max(0.0, 1 - l - w / 4) / 0.75, "corners|multilinear"),
    ],
)
def test_what_is_no_count_of_worlds_is_refused(top, message):
    with pytest.raises(NotDecompilable, match=message):
        decompile(top, {"l": 1})


@pytest.mark.parametrize("code", ["TTB", "TTB-T", "ttb-", "TTBY", ""])
def test_bad_codes_are_named(code):
    with pytest.raises(ValueError, match=f"code '{code}'"):
        PreferenceStructure.from_code(code)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("CEUnl", "CE", "entails"),
        ("CE", "cCPO", "entails"),
        ("cCPO", "unCPO", "entails"),
        ("CPO", "cCPO", "entails"),
        ("ORPO", "cCPO", "entails"),
        ("qfUNL", "cfUNL", "entails"),
        ("unCPO", "CEUnl", "entailed_by"),
        ("CPO", "ORPO", "incomparable"),
        ("CE", "CPO", "incomparable"),
        ("CPO", "qfUNL", "incomparable"),
        ("cUNL", "cUNL", "equivalent"),
    ],
)
def test_relations_of_the_named_losses(first, second, expected):
    assert relation(NAMED[first].code, NAMED[second].code) == expected


def test_entailment_orders_the_ratios_of_every_model():
    """For all pairs of the 225 codes, on 250 models, some of them certain; and different codes are never equivalent."""
    probs = np.random.default_rng(1).uniform(0, 1, (200, 2))
    probs = np.concatenate([probs, np.random.default_rng(2).choice([1e-6, 1 - 1e-6], (50, 2))])
    codes = [code for code in CODES if any(sides(code)[0]) and any(sides(code)[1])]
    assert len(codes) == 225 and sum(not set(code) <= set("X-") for code in codes) == 210
    worlds = [(1, 1), (1, 0), (0, 1), (0, 0)]
    weights = np.stack([np.prod(np.where(world, probs, 1 - probs), -1) for world in worlds])  # [4, models]
    rho = np.stack(
        [np.log(np.asarray(sides(c)[0]) @ weights) - np.log(np.asarray(sides(c)[1]) @ weights) for c in codes]
    )
    for i, first in enumerate(codes):
        for j, second in enumerate(codes):
            entails = relation(first, second) in ("entails", "equivalent")
            if entails:
                assert (rho[i] <= rho[j] + 1e-9).all(), (first, second)
            assert (relation(first, second) == "equivalent") == (first == second)


def test_sixteen_losses_lie_between_ceunl_and_uncpo():
    between = list(enumerate_losses(2, between=("BTBB", "TTBT")))
    assert len(set(between)) == 16 and all(code[1:3] == "TB" for code in between)
    assert {s.code for s in NAMED.values()} <= set(between)  # all ten names live there


def test_enumeration_is_complete():
    assert sorted(enumerate_losses(2)) == sorted(CODES)
    assert sum(1 for _ in enumerate_losses(3)) == 4**8
    assert sorted(enumerate_losses(1)) == sorted(map("".join, itertools.product("TBX-", repeat=2)))
    for low, high in [("TTB-", "BTB-"), ("TTB", "TTB")]:
        with pytest.raises(ValueError, match="does not entail"):
            list(enumerate_losses(2, between=(low, high)))


def test_lattice_of_the_interval_is_the_product_of_two_diamonds():
    edges = lattice(list(enumerate_losses(2, between=("BTBB", "TTBT"))))
    assert len(edges) == 32  # each free mark climbs B < X, - < T: 4 edges, times 4 values of the other, twice
    assert all(sum(a != b for a, b in zip(*edge)) == 1 for edge in edges)
    assert lattice(["BTBB", "TTBT", "TTBB", "TTBT"]) == [("BTBB", "TTBB"), ("TTBB", "TTBT")]


def test_codes_of_different_lengths_cannot_be_related():
    with pytest.raises(ValueError, match="different lengths"):
        relation("TB", "TTB-")
