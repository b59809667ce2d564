"""Meshes, rules and global batches on eight forced host devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dpo_jax.sharding import (
    active_mesh,
    constrain,
    data_shards,
    fit_spec,
    like_parameters,
    make_mesh,
    shard_batch,
    spec_for,
    tree_shardings,
)

RULES = ((r"kernel$", P("fsdp", "model")), (r"embedding", P("model", "fsdp")))


def test_one_size_may_be_left_open():
    assert dict(make_mesh(fsdp=4).shape) == {"data": 2, "fsdp": 4, "expert": 1, "model": 1}
    assert dict(make_mesh(data=2, fsdp=-1, model=2).shape) == {"data": 2, "fsdp": 2, "expert": 1, "model": 2}
    assert dict(make_mesh(fsdp=1, expert=-1, data=2).shape) == {"data": 2, "fsdp": 1, "expert": 4, "model": 1}
    assert data_shards(make_mesh(fsdp=2, model=2)) == 4 and data_shards(make_mesh(expert=2, model=2)) == 4


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 3}, {"data": 2, "fsdp": 2, "model": 1}, {"data": -1, "fsdp": -1}, {"model": 0}]
)
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ValueError, match="devices"):
        make_mesh(**sizes)


def test_slices_must_divide_the_data_axis():
    with pytest.raises(ValueError, match="3 slices"):
        make_mesh(data=4, fsdp=2, slices=3)
    assert dict(make_mesh(data=4, fsdp=2, slices=2).shape) == {"data": 4, "fsdp": 2, "expert": 1, "model": 1}


def test_first_rule_wins_and_axes_that_do_not_divide_are_dropped():
    mesh = make_mesh(data=2, fsdp=2, model=2)
    assert spec_for("up/kernel", (4, 6), RULES, mesh) == P("fsdp", "model")
    assert spec_for("up/kernel", (3, 6), RULES, mesh) == P(None, "model")
    assert spec_for("up/bias", (4,), RULES, mesh) == P()
    assert fit_spec(P(("data", "fsdp"), "expert"), (8, 8), mesh) == P(("data", "fsdp"), None)
    assert fit_spec(P(("data", "fsdp")), (6, 8), mesh) == P(None)


def test_copies_of_parameters_are_laid_out_like_them():
    mesh = make_mesh(data=2, fsdp=2, model=2)
    params = {"up": {"kernel": jnp.ones((4, 6))}, "embed": {"embedding": jnp.ones((8, 4))}}
    copies = {
        "mu": params,
        "count": jnp.zeros(()),
        "row": {"up": {"kernel": jnp.ones(4)}},
        "column": {"up": {"kernel": jnp.ones(6)}},
    }
    specs = jax.tree.map(lambda s: s.spec, like_parameters(copies, params, mesh, RULES))
    assert specs["mu"] == {"up": {"kernel": P("fsdp", "model")}, "embed": {"embedding": P("model", "fsdp")}}
    assert (
        specs["count"] == P()
        and specs["row"]["up"]["kernel"] == P("fsdp")
        and specs["column"]["up"]["kernel"] == P("model")
    )
    assert tree_shardings(params, mesh, RULES)["embed"]["embedding"].spec == P("model", "fsdp")


def test_batches_become_global_arrays():
    mesh = make_mesh(data=4, fsdp=2)
    batch = {"tokens": np.arange(48).reshape(16, 3), "weight": np.ones(16, np.float32)}
    placed = shard_batch(batch, mesh)
    assert placed["tokens"].sharding.shard_shape((16, 3)) == (2, 3)
    np.testing.assert_array_equal(placed["tokens"], batch["tokens"])


def test_batches_fall_on_experts_too_and_on_meshes_without_that_axis():
    spread = shard_batch(np.zeros((8, 3)), make_mesh(data=2, expert=2, model=2))
    assert spread.sharding.shard_shape((8, 3)) == (2, 3)
    other = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    assert shard_batch(np.zeros((8, 3)), other).sharding.shard_shape((8, 3)) == (2, 3)


def test_constrain_is_silent_without_a_mesh_and_inside_shard_map():
    x = jnp.ones((8, 4))
    assert active_mesh() is None and constrain(x, "data") is x
    mesh = make_mesh(data=8)
    with jax.set_mesh(mesh):
        assert jax.jit(lambda x: constrain(x, "data", "model"))(x).sharding.shard_shape(x.shape) == (1, 4)

        def local(x):
            assert active_mesh() is None
            return constrain(x, "data") * 2

        doubled = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data")))(x)
    np.testing.assert_array_equal(doubled, 2 * x)
