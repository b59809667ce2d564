"""SRPO against float64 NumPy written from the formulas; the optimum in a small table; prompts for revision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numeric import float32, pairs, value_and_gradients

from dpo_jax.language.methods.dpo import ipo_sum_loss
from dpo_jax.language.methods.srpo import (
    REVISION_TEMPLATE,
    revision_prompt,
    revision_rows,
    self_revise,
    srpo_loss,
    srpo_tabular_optimum,
)

B, T = 5, 4
PAIR = ("chosen", "rejected")
SIDES = [*PAIR, *(f"{a}_given_{b}" for a in PAIR for b in PAIR)]
# Preferences that no reward explains: 0 beats 1, 1 beats 2, 2 beats 0.
CYCLE = np.array([[0.5, 0.9, 0.4], [0.1, 0.5, 0.8], [0.6, 0.2, 0.5]])


def arrays_of(seed=0, spread=0.7):
    return pairs(seed, spread, tokens=T, sides=tuple(SIDES))


def from_ratios(ratios):
    """One-token inputs whose log ratios are the given [B] arrays, by side."""
    inputs = {}
    for side in SIDES:
        ratio = jnp.asarray(ratios[side], jnp.float32)[:, None]
        inputs |= {f"policy_{side}_logps": ratio, f"reference_{side}_logps": 0 * ratio, f"{side}_mask": 0 * ratio + 1}
    return inputs


def log_ratios(a):
    return {s: ((a[f"policy_{s}_logps"] - a[f"reference_{s}_logps"]) * a[f"{s}_mask"]).sum(-1) for s in SIDES}


def numpy_terms(r, beta):
    w, l = "chosen", "rejected"
    improve = (
        (0.5 - beta * (r[f"{w}_given_{l}"] - r[f"{l}_given_{l}"])) ** 2
        + (0.5 - beta * (r[f"{w}_given_{w}"] - r[f"{l}_given_{w}"])) ** 2
    ) / 2
    robust = (0.5 - beta / 2 * (r[f"{w}_given_{l}"] - r[f"{l}_given_{w}"] + r[w] - r[l])) ** 2
    return improve, robust


@pytest.mark.parametrize(("beta", "alpha"), [(0.1, 0.5), (0.6, 0.2), (0.3, 1.0), (0.3, 0.0)])
def test_value_and_gradient_against_the_formula(beta, alpha):
    arrays = arrays_of(1)
    ratios = log_ratios(arrays)

    def formula(r):
        improve, robust = numpy_terms(r, beta)
        return (1 - alpha) * robust + alpha * improve

    output, gradient = value_and_gradients(srpo_loss, arrays, beta=beta, alpha=alpha)
    np.testing.assert_allclose(output.loss, formula(ratios), rtol=2e-5, atol=1e-6)
    improve, robust = numpy_terms(ratios, beta)
    np.testing.assert_allclose(output.metrics["improve_loss"], improve, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(output.metrics["robust_loss"], robust, rtol=2e-5, atol=1e-6)
    for side in SIDES:  # all tokens of a completion share the slope in its log ratio; central differences in float64
        up, down = ({**ratios, side: ratios[side] + d} for d in (1e-5, -1e-5))
        slope = (formula(up) - formula(down)) / 2e-5
        expected = slope[:, None] * arrays[f"{side}_mask"]
        np.testing.assert_allclose(gradient[f"policy_{side}_logps"], expected, rtol=1e-4, atol=2e-6, err_msg=side)
        writer_is_idle = alpha == 1 and side in PAIR
        assert bool(np.any(gradient[f"policy_{side}_logps"] != 0)) != (
            writer_is_idle or (alpha == 0 and side in ("chosen_given_chosen", "rejected_given_rejected"))
        )


@pytest.mark.parametrize(("beta", "alpha"), [(0.1, 0.5), (2.0, 0.9)])
def test_loss_is_a_quarter_when_policy_is_reference(beta, alpha):
    output = srpo_loss(**float32(arrays_of(spread=0.0)), beta=beta, alpha=alpha)
    np.testing.assert_allclose(output.loss, 0.25, rtol=1e-6)
    np.testing.assert_allclose(output.metrics["preference_estimate"], 0.5, rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_reviser_that_does_not_look_makes_it_ipo(alpha):
    arrays, beta = arrays_of(2), 0.3
    for a in PAIR:
        for b in PAIR:
            for kind in ("policy_{}_logps", "reference_{}_logps", "{}_mask"):
                arrays[kind.format(f"{a}_given_{b}")] = arrays[kind.format(a)]
    pair = {name: value for name, value in arrays.items() if "given" not in name}
    ipo = ipo_sum_loss(**float32(pair), beta=beta).loss
    np.testing.assert_allclose(srpo_loss(**float32(arrays), beta=beta, alpha=alpha).loss, beta**2 * ipo, rtol=1e-4)


# The optimum in a table


def numpy_optimum(p, reference, reviser, beta):
    table = reviser * np.exp(p.T / beta)  # row b, column a
    z = table.sum(-1)
    writer = reference / z
    return table / z[:, None], np.log(z), writer / writer.sum()


@functools.partial(jax.jit, static_argnames="beta")
def optimum(p, reference, reviser, beta):
    return srpo_tabular_optimum(*(x.astype(jnp.float32) for x in (p, reference, reviser)), beta=beta)


def table(seed=0, k=4):
    rng = np.random.default_rng(seed)
    wins = rng.random((k, k))
    p = np.triu(wins, 1) + np.tril(1 - wins.T, -1) + 0.5 * np.eye(k)
    return p, rng.dirichlet(np.ones(k)), rng.dirichlet(np.ones(k), k)


@pytest.mark.parametrize("beta", [0.1, 0.3, 2.0])
def test_optimum_against_the_formula(beta):
    p, reference, reviser = table()
    actual = optimum(p, reference, reviser, beta)
    for value, expected in zip(actual, numpy_optimum(p, reference, reviser, beta)):
        np.testing.assert_allclose(value, expected, rtol=2e-5)
    np.testing.assert_allclose(actual.reviser.sum(-1), 1.0, rtol=1e-6)


def test_optimum_stays_finite_for_a_tiny_beta():
    actual = optimum(*table(), 1e-4)
    for value in actual:
        assert np.all(np.isfinite(value))


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_optimum_satisfies_both_identities_for_intransitive_preferences(beta):
    reference, reviser = table(3, 3)[1:]
    best = optimum(CYCLE, reference, reviser, beta)
    given = np.log(np.asarray(best.reviser, float)).T - np.log(reviser).T  # R(a|b) at [a, b]
    free = np.log(np.asarray(best.writer, float)) - np.log(reference)
    improve = 0.5 + beta * (given - np.diag(given)[None, :])
    robust = 0.5 + beta / 2 * (given - given.T + free[:, None] - free[None, :])
    np.testing.assert_allclose(improve, CYCLE, atol=1e-4)
    np.testing.assert_allclose(robust, CYCLE, atol=1e-4)


def test_writer_solves_the_game():
    # The value of a writer against the best reviser, E[beta log Z] + beta KL, is lowest at the closed form.
    p, reference, reviser = table(5)
    _, log_z, writer = numpy_optimum(p, reference, reviser, 0.4)
    value = lambda pi: (pi * (log_z + np.log(pi / reference))).sum()  # noqa: E731
    ours = optimum(p, reference, reviser, 0.4).writer
    others = np.random.default_rng(1).dirichlet(np.ones(4), 50)
    assert value(np.asarray(ours, float)) < min(map(value, others))
    assert value(np.asarray(ours, float)) == pytest.approx(value(writer), rel=1e-5)


@pytest.mark.parametrize("mu", [(0.6, 0.3, 0.1), (0.1, 0.3, 0.6)])
def test_learning_from_pairs_finds_the_optimum_whatever_their_distribution(mu):
    # Expected loss over both orders of every pair of three answers, minimised over free logits.
    beta, mu = 0.3, np.array(mu)
    w, l = np.array([(a, b) for a in range(3) for b in range(3) if a != b]).T
    weight = jnp.asarray(mu[w] * mu[l] * CYCLE[w, l], jnp.float32)

    def loss(logits):
        writer, reviser = jax.nn.log_softmax(logits["writer"]), jax.nn.log_softmax(logits["reviser"])
        free, given = writer + jnp.log(3.0), reviser + jnp.log(3.0)  # references are uniform; row b, column a
        ratios = dict(
            chosen=free[w],
            rejected=free[l],
            chosen_given_chosen=given[w, w],
            chosen_given_rejected=given[l, w],
            rejected_given_chosen=given[w, l],
            rejected_given_rejected=given[l, l],
        )
        return jnp.sum(weight * srpo_loss(**from_ratios(ratios), beta=beta).loss) / weight.sum()

    @jax.jit
    def train(logits):
        def step(_, carry):
            logits, speed = carry
            speed = jax.tree.map(lambda v, g: 0.9 * v - g, speed, jax.grad(loss)(logits))
            return jax.tree.map(jnp.add, logits, speed), speed

        return jax.lax.fori_loop(0, 3000, step, (logits, jax.tree.map(jnp.zeros_like, logits)))[0]

    learned = train({"writer": jnp.zeros(3), "reviser": jnp.zeros((3, 3))})
    writer = np.asarray(jax.nn.softmax(learned["writer"]))
    _, _, expected = numpy_optimum(CYCLE, np.ones(3) / 3, np.ones((3, 3)) / 3, beta)
    np.testing.assert_allclose(expected, [0.473, 0.244, 0.284], atol=1e-3)
    np.testing.assert_allclose(writer, expected, atol=2e-3)


# Prompts for revision


ROW = {"prompt": "Sort {3, 1}.", "chosen": "1 3", "rejected": "{answer}"}


def test_six_completions_of_a_row():
    rows = revision_rows(ROW, "Q: {prompt}\nA: {answer}\nBetter:")
    assert set(rows) == set(SIDES)
    assert rows["chosen"] == ("Sort {3, 1}.", "1 3")
    assert rows["rejected_given_chosen"] == ("Q: Sort {3, 1}.\nA: 1 3\nBetter:", "{answer}")
    assert rows["chosen_given_rejected"] == ("Q: Sort {3, 1}.\nA: {answer}\nBetter:", "1 3")
    for a in PAIR:
        for b in PAIR:
            assert rows[f"{a}_given_{b}"] == (
                revision_prompt(ROW["prompt"], ROW[b], "Q: {prompt}\nA: {answer}\nBetter:"),
                ROW[a],
            )


def test_messages_keep_their_turns_and_the_last_one_asks_for_a_revision():
    prompt = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"})
    context, answer = revision_rows({**ROW, "prompt": prompt})["chosen_given_chosen"]
    assert answer == "1 3"
    assert context[0] == prompt[0] and context[1]["role"] == "user"
    assert context[1]["content"] == REVISION_TEMPLATE.format(prompt="Why?", answer="1 3")
    assert prompt[1]["content"] == "Why?"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, r"no \['rejected'\]"),
        ({**ROW, "chosen": 3}, "chosen is 3"),
        ({**ROW, "rejected": " "}, "rejected is ' '"),
        ({**ROW, "prompt": []}, "no messages"),
    ],
)
def test_bad_rows_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        revision_rows(row)


@pytest.mark.parametrize("template", ["{prompt} only", "{prompt} {answer} {other}", "{prompt} {answer} {", "{} {}"])
def test_bad_templates_are_refused(template):
    with pytest.raises(ValueError, match="template"):
        revision_rows(ROW, template)


def test_answers_are_revised_one_after_the_other():
    seen = []

    def generate(prompt):
        seen.append(prompt)
        return f"answer {len(seen)}"

    assert self_revise(generate, "Why?", revisions=2) == ["answer 1", "answer 2", "answer 3"]
    assert seen[0] == "Why?" and "answer 1" in seen[1] and "answer 2" in seen[2] and "answer 1" not in seen[2]
    assert self_revise(generate, "Why?", revisions=0) == ["answer 4"]
    with pytest.raises(ValueError, match="revisions"):
        self_revise(generate, "Why?", revisions=-1)


@pytest.mark.parametrize("options", [dict(beta=0.0), dict(alpha=1.5)])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        srpo_loss(**float32(arrays_of()), **options)
