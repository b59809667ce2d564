"""Attention under the prefix-tree rule against float64 NumPy that follows each token's own path."""

import re
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.attention import (
    PLAIN_LENGTH,
    attention,
    blocked_attention,
    decode_attention,
    plain_attention,
    tree_mask,
)
from dpo_jax.sharding import P, make_mesh

FORMS = {"plain": plain_attention, "blocked": partial(blocked_attention, block_size=8)}
ROWS, LENGTH = 3, 37


def lay_out(trees, length):
    """Paths (indices from the root to the token itself), positions and subtree_end of nested (tokens, children)."""
    paths, ends = [], []

    def place(tree, above):
        tokens, children = tree
        own = range(len(paths), len(paths) + tokens)
        for i in own:
            above = [*above, i]
            paths.append(above)
            ends.append(0)
        for child in children:
            place(child, above)
        for i in own:
            ends[i] = len(paths)

    for tree in trees:
        place(tree, [])
    padding = length - len(paths)
    assert padding >= 0
    positions = [len(path) - 1 for path in paths]
    return paths + [[]] * padding, np.array(positions + [0] * padding), np.array(ends + [0] * padding)


def random_forest(rng, length):
    """Trees up to three nodes deep, as many as fit, padding after them."""

    def grow(depth):
        children = [] if depth == 0 else [grow(depth - 1) for _ in range(rng.integers(0, 4))]
        return int(rng.integers(1, 6)), children

    def size(tree):
        return tree[0] + sum(map(size, tree[1]))

    trees, left = [], length - int(rng.integers(0, 5))
    while size(tree := grow(2)) <= left:
        trees.append(tree)
        left -= size(tree)
    return lay_out(trees or [(left, [])], length)


def rows_of(forests):
    paths, positions, ends = zip(*forests)
    return paths, np.stack(positions).astype(np.int32), np.stack(ends).astype(np.int32)


def case(seed, rows, length, heads=4, key_heads=2, width=8, scale=1.0):
    rng = np.random.default_rng(seed)
    paths, positions, ends = rows_of([random_forest(rng, length) for _ in range(rows)])
    shape = {"q": heads, "k": key_heads, "v": key_heads, "g": heads}
    arrays = [rng.normal(size=(rows, length, h, width)).astype(np.float32) for h in shape.values()]
    arrays[0] *= scale
    return paths, positions, ends, arrays


def reference64(paths, positions, query, key, value, gradient, *, window=None, softcap=None, scale=None):
    """Output and gradients, query by query along its path."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (query, key, value, gradient))
    output, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    groups, scale = q.shape[2] // k.shape[2], q.shape[-1] ** -0.5 if scale is None else scale
    for r, i, h in np.ndindex(q.shape[:3]):
        seen = [j for j in paths[r][i] if window is None or positions[r, i] - positions[r, j] < window]
        if not seen:
            continue
        s = k[r, seen, h // groups] @ q[r, i, h] * scale
        capped = s if softcap is None else softcap * np.tanh(s / softcap)
        p = np.exp(capped - capped.max())
        p /= p.sum()
        output[r, i, h] = p @ v[r, seen, h // groups]
        ds = p * (v[r, seen, h // groups] @ g[r, i, h] - output[r, i, h] @ g[r, i, h]) * scale
        if softcap is not None:
            ds = ds * (1 - (capped / softcap) ** 2)
        dq[r, i, h] = ds @ k[r, seen, h // groups]
        dk[r, seen, h // groups] += ds[:, None] * q[r, i, h]
        dv[r, seen, h // groups] += p[:, None] * g[r, i, h]
    return output, (dq, dk, dv)


@partial(jax.jit, static_argnames=("form", "softcap", "scale"))
def run(form, query, key, value, gradient, *, subtree_end, positions=None, window=None, softcap=None, scale=None):
    """Output and gradients; tests of equal shape and options share one compiled program, the window is traced."""
    tree = {"subtree_end": subtree_end, "positions": positions, "window": window}
    output, pull_back = jax.vjp(lambda *x: form(*x, **tree, softcap=softcap, scale=scale), query, key, value)
    return output, pull_back(gradient.astype(output.dtype))


def assert_close(actual, expected, tolerance=1e-5):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(e, np.float64), rtol=tolerance, atol=tolerance)


def assert_equal(actual, expected):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, e)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("length", "heads", "options"),
    [
        (37, (4, 2), {}),
        (37, (4, 2), {"window": 3}),
        (24, (3, 3), {"softcap": 2.0}),
        (5, (3, 1), {"softcap": 1.5, "window": 4, "scale": 1.3}),
    ],
)
def test_values_and_gradients_equal_the_walk_along_paths(form, length, heads, options):
    paths, positions, ends, arrays = case(length, ROWS, length, *heads)
    actual = run(FORMS[form], *arrays, subtree_end=ends, positions=positions, **options)
    assert_close(actual, reference64(paths, positions, *arrays, **options))


@pytest.mark.parametrize("seed", range(3))
def test_tree_mask_holds_the_paths(seed):
    paths, _, ends, _ = case(seed, 4, 33)
    mask = np.asarray(tree_mask(jnp.asarray(ends)))
    for r, q in np.ndindex(ends.shape):
        assert list(np.flatnonzero(mask[r, q])) == paths[r][q]


def test_tree_mask_of_a_pair_counts_what_the_layout_saves():
    prompt, chosen, rejected = 11, 5, 7
    triangle = lambda n: n * (n + 1) // 2  # noqa: E731
    _, _, ends = lay_out([(prompt, [(chosen, []), (rejected, [])])], 30)
    mask = np.asarray(tree_mask(jnp.asarray(ends)[None]))[0]
    pairs = triangle(prompt + chosen) + triangle(prompt + rejected) - triangle(prompt)
    assert mask.sum() == pairs
    np.testing.assert_array_equal(mask.sum(1)[:prompt], np.arange(prompt) + 1)
    np.testing.assert_array_equal(mask.sum(1)[prompt : prompt + chosen], prompt + 1 + np.arange(chosen))
    assert not mask[23:].any() and not mask[:, 23:].any()


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_padding_give_zeros_and_no_gradient(form):
    _, positions, ends, arrays = case(1, ROWS, LENGTH, scale=1e3)
    ends[1] = 0
    output, gradients = run(FORMS[form], *arrays, subtree_end=ends, positions=positions, window=1)
    assert not np.any(output[1]) and np.any(output[0])
    assert all(not np.any(x[1]) and np.all(np.isfinite(x)) for x in gradients)


@pytest.mark.parametrize("form", FORMS)
def test_extreme_scores(form):
    paths, positions, ends, arrays = case(2, ROWS, LENGTH, scale=1e4)
    output, gradients = run(FORMS[form], *arrays, subtree_end=ends, positions=positions)
    expected, _ = reference64(paths, positions, *arrays)
    assert_close(output, expected, 1e-3)  # scores near 1e4 are rounded by 1e-3 in float32
    assert all(np.all(np.isfinite(x)) for x in gradients)


@pytest.mark.parametrize("form", FORMS)
def test_bf16_rounds_once(form):
    paths, positions, ends, arrays = case(3, 2, 37, width=16)
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    output, gradients = run(FORMS[form], *arrays, subtree_end=ends)
    assert output.dtype == jnp.bfloat16 and all(x.dtype == jnp.bfloat16 for x in gradients)
    for a, e in zip(jax.tree.leaves((output, gradients)), jax.tree.leaves(reference64(paths, positions, *arrays))):
        error = np.linalg.norm(np.asarray(a, np.float64) - e) / np.linalg.norm(e)
        assert error < 6e-3  # bf16 keeps 8 bits: 2^-8 = 4e-3


@pytest.mark.parametrize("form", FORMS)
def test_shared_prompt_equals_separate_sequences(form):
    prompt, branches, length = 9, (4, 6, 5), 30
    _, positions, ends = lay_out([(prompt, [(n, []) for n in branches])], length)
    rng = np.random.default_rng(4)
    arrays = [rng.normal(size=(1, length, h, 8)).astype(np.float32) for h in (4, 2, 2, 4)]
    options = {"window": 6, "softcap": 3.0}
    output, gradients = run(FORMS[form], *arrays, subtree_end=ends[None], positions=positions[None], **options)
    starts = prompt + np.cumsum((0, *branches))
    indices = [np.r_[:prompt, a:b] for a, b in pairwise(starts)]
    # One padded row per completion.
    alone = [np.zeros((len(branches), prompt + max(branches), *x.shape[2:]), np.float32) for x in arrays]
    for row, index in enumerate(indices):
        for target, x in zip(alone, arrays):
            target[row, : index.size] = x[0, index]
    alone[3][1:, :prompt] = 0  # the prompt's own outputs count once
    own = np.arange(alone[0].shape[1])[None] * np.ones((len(branches), 1), int)
    ends_alone = np.where(own < [[i.size] for i in indices], [[i.size] for i in indices], 0)
    once, pulled = run(plain_attention, *alone, subtree_end=ends_alone, positions=own, **options)
    summed = [np.zeros_like(x) for x in arrays[:3]]
    for row, index in enumerate(indices):
        assert_close(output[0, index], once[row, : index.size])
        for total, part in zip(summed, pulled):
            total[0, index] += part[row, : index.size]
    assert_close(gradients, summed)


@pytest.mark.parametrize("form", FORMS)
def test_a_branch_never_feels_its_sibling(form):
    # Two pairs in a row; everything of the first pair's chosen completion changes.
    _, _, ends = lay_out([(5, [(7, []), (6, [])]), (4, [(5, []), (5, [])])], LENGTH)
    _, positions, _, arrays = case(5, ROWS, LENGTH)
    rng, ends = np.random.default_rng(5), np.tile(ends, (ROWS, 1)).astype(np.int32)
    changed = [x.copy() for x in arrays]
    for x in changed:
        x[:, 5:12] = rng.normal(size=x[:, 5:12].shape) * 100
    same = np.r_[:5, 12:LENGTH]
    before, after = (run(FORMS[form], *x, subtree_end=ends, positions=positions) for x in (arrays, changed))
    np.testing.assert_array_equal(before[0][:, same], after[0][:, same])
    np.testing.assert_array_equal(before[1][0][:, same], after[1][0][:, same])
    assert not np.array_equal(before[0][:, 5:12], after[0][:, 5:12])
    # Keys of the sibling and of the other tree get the same gradient; the shared prompt's may change.
    for a, b in zip(before[1][1:], after[1][1:]):
        np.testing.assert_array_equal(a[:, 12:], b[:, 12:])


def test_skipping_a_block_changes_no_bit():
    _, positions, ends, arrays = case(6, ROWS, LENGTH)
    options = {"subtree_end": ends, "positions": positions, "window": 5}
    skipped = run(FORMS["blocked"], *arrays, **options)

    # Under vmap the branch becomes a selection, so that every block on and below the diagonal is computed.
    def all_blocks(query, key, value, *, subtree_end, positions, window, **_):
        one = lambda q, k, v, e, p: FORMS["blocked"](q, k, v, subtree_end=e, positions=p, window=window)  # noqa: E731
        return jax.vmap(one)(*(x[None] for x in (query, key, value, subtree_end, positions)))[0]

    assert_equal(run(all_blocks, *arrays, **options), skipped)


def test_unseen_blocks_are_not_computed():
    # What nobody sees is nan: computing it would show, since 0 * nan is nan.
    _, _, _, arrays = case(7, ROWS, LENGTH)
    positions, size = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)), 8
    ends = np.minimum((positions // size + 1) * size, LENGTH)  # sequences of one block each
    options = {"subtree_end": ends, "positions": positions}
    clean = run(FORMS["blocked"], *arrays, **options, window=1000)
    arrays[1][:, :size] = arrays[2][:, :size] = np.nan
    dirty = run(FORMS["blocked"], *arrays, **options, window=1000)
    assert np.isnan(dirty[0][:, :size]).all()
    assert_equal(jax.tree.map(lambda x: x[:, size:], dirty), jax.tree.map(lambda x: x[:, size:], clean))
    # The same beyond a window in one long sequence, as far as the last block without padding.
    options["subtree_end"] = np.full_like(ends, LENGTH)
    output, _ = run(FORMS["blocked"], *arrays, **options, window=4)
    assert np.isfinite(output[:, 2 * size : LENGTH // size * size]).all()


def test_window_may_differ_from_layer_to_layer():
    paths, positions, ends, arrays = case(8, ROWS, LENGTH)
    for form in FORMS.values():
        layer = lambda w: form(*arrays[:3], subtree_end=ends, positions=positions, window=w)  # noqa: B023, E731
        near, far = jax.lax.map(layer, jnp.array([2, 1000]))
        assert_close(near, reference64(paths, positions, *arrays, window=2)[0])
        assert_close(far, reference64(paths, positions, *arrays)[0])


@pytest.mark.parametrize("form", FORMS)
def test_vmap_jit_and_remat(form):
    _, positions, ends, (query, key, value, gradient) = case(9, ROWS, LENGTH)
    expected = run(FORMS[form], query, key, value, gradient, subtree_end=ends, positions=positions, window=6)

    def by_row(query, key, value, *, subtree_end, positions, window, **_):
        rows = jax.tree.map(lambda x: jnp.asarray(x)[:, None], (query, key, value, subtree_end, positions))
        one = lambda q, k, v, e, p: FORMS[form](q, k, v, subtree_end=e, positions=p, window=window)  # noqa: E731
        return jax.vmap(jax.checkpoint(one))(*rows)[:, 0]

    actual = run(by_row, query, key, value, gradient, subtree_end=ends, positions=positions, window=6)
    assert_close(actual, expected, 1e-6)


def test_attention_chooses_by_length_and_takes_another_form():
    def count(length, **options):
        x = jax.ShapeDtypeStruct((1, length, 2, 4), jnp.float32)
        ends = jax.ShapeDtypeStruct((1, length), jnp.int32)
        text = str(jax.make_jaxpr(lambda x, e: attention(x, x, x, subtree_end=e, **options))(x, ends))
        return f"[1,2,1,{length},{length}]" in text

    assert count(PLAIN_LENGTH) and not count(PLAIN_LENGTH + 1)
    assert count(PLAIN_LENGTH + 1, implementation=plain_attention)
    assert not count(PLAIN_LENGTH, implementation=blocked_attention)


def test_decoding_from_a_cache_equals_the_whole_row():
    _, _, ends, (query, key, value, _) = case(10, 2, 17)
    ends[:] = 17
    whole = plain_attention(query, key, value, subtree_end=ends)
    cache = [jnp.pad(x, ((0, 0), (0, 7), (0, 0), (0, 0)), constant_values=9.0) for x in (key, value)]
    mask = np.arange(24) <= np.arange(14, 17)[:, None]
    last = decode_attention(query[:, 14:], *cache, jnp.broadcast_to(mask, (2, 3, 24)))
    assert_close(last, whole[:, 14:], 1e-6)


def test_errors_name_what_does_not_fit():
    _, _, ends, (query, key, value, _) = case(11, 2, 9)
    for form in FORMS.values():
        with pytest.raises(ValueError, match="multiple"):
            form(query[:, :, :3], key, value, subtree_end=ends)
        with pytest.raises(ValueError, match="window"):
            form(query, key, value, subtree_end=ends, window=3)
        with pytest.raises(ValueError, match="subtree_end"):
            form(query, key, value, subtree_end=ends[:, :-1])
    with pytest.raises(ValueError, match="mask"):
        decode_attention(query, key, value, jnp.ones((2, 9, 8), bool))


def compile_gradient(form, length, rows=1, heads=2, width=16):
    x = jax.ShapeDtypeStruct((rows, length, heads, width), jnp.float32)
    ends = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    gradient = jax.grad(lambda q, k, v, e: jnp.sum(jnp.square(form(q, k, v, subtree_end=e))), (0, 1, 2))
    return jax.jit(gradient).lower(x, x, x, ends).compile()


def test_memory_grows_with_the_length_not_its_square():
    short, long = (compile_gradient(partial(blocked_attention, block_size=128), n) for n in (1024, 4096))
    sizes = [x.memory_analysis().temp_size_in_bytes for x in (short, long)]
    queries = 2 * 16 * 4  # bytes per token
    assert sizes[1] - sizes[0] < (4096 - 1024) * queries * 16
    assert sizes[1] < 4096**2 * 4 / 4
    largest = max(np.prod([int(n) for n in s.split(",")]) for s in re.findall(r"\[(\d+(?:,\d+)*)\]", long.as_text()))
    assert largest <= 4096 * 2 * 16
    plain = compile_gradient(plain_attention, 1024).memory_analysis().temp_size_in_bytes
    assert plain > 1024**2 * 2 * 4 > sizes[0]  # the measure can fail


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_mesh_equals_one_device(sizes):
    _, positions, ends, arrays = case(12, 8, 21)
    options = {"subtree_end": ends, "positions": positions, "window": 7}
    expected = run(FORMS["blocked"], *arrays, **options)
    with jax.set_mesh(make_mesh(data=sizes[0], fsdp=sizes[1], model=sizes[2])):
        spec = P(("data", "fsdp"), None, "model" if sizes[2] == 2 else None)
        placed = [jax.device_put(x, spec) for x in arrays]
        for form in FORMS.values() if sizes == (2, 2, 2) else [FORMS["blocked"]]:
            assert_close(run(form, *placed, **options), expected, 1e-5)


def test_mesh_that_divides_neither_rows_nor_heads():
    _, _, ends, arrays = case(13, ROWS, 21, heads=3, key_heads=1)
    expected = run(FORMS["blocked"], *arrays, subtree_end=ends)
    with jax.set_mesh(make_mesh(data=2, fsdp=2, model=2)):
        assert_close(run(FORMS["blocked"], *arrays, subtree_end=ends), expected)


def test_blocked_form_needs_no_communication():
    mesh = make_mesh(data=2, fsdp=2, model=2)
    x = jax.ShapeDtypeStruct(
        (8, 32, 4, 8), jnp.float32, sharding=jax.NamedSharding(mesh, P(("data", "fsdp"), None, "model"))
    )
    ends = jax.ShapeDtypeStruct((8, 32), jnp.int32, sharding=jax.NamedSharding(mesh, P(("data", "fsdp"))))
    with jax.set_mesh(mesh):
        loss = lambda q, k, v, e: 0.5 * jnp.square(FORMS["blocked"](q, k, v, subtree_end=e))  # noqa: E731
        pulled = lambda *a: jax.vjp(partial(loss, e=a[3]), *a[:3])[1](a[0])  # noqa: E731
        text = jax.jit(pulled).lower(x, x, x, ends).compile().as_text()
    assert " while(" in text and "f32[2,32,2,8]" in text  # 8 rows over 4, 4 heads over 2
    assert not re.search(r"(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)", text)
