"""Choices for CPUs give the results of other devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from parallax import cpu


def draw(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_layers_are_listed_on_a_lone_cpu_and_if_they_are_few():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    sharded = jax.device_put(draw(4), NamedSharding(mesh, PartitionSpec("data")))
    assert cpu.lists_layers(12, {"own": jnp.ones(4)})
    assert cpu.lists_layers(12, {"own": draw(4)}), "what is on no device yet goes to the first"
    assert not cpu.lists_layers(13, {"own": jnp.ones(4)})
    assert not cpu.lists_layers(12, {"own": jnp.ones(4), "shared": sharded})


@pytest.mark.parametrize(("rows", "room"), [(21, 160), (22, 112)])
def test_long_answers_begin_in_half_of_the_room(rows, room):
    assert cpu.first_room(rows, 64, 160) == room


def test_joined_projections_are_those_apart():
    x, weights = draw(2, 3, 8), [draw(8, heads, 4) for heads in (4, 2, 2)]
    for joined, weight in zip(cpu.project_joined(x, weights), weights, strict=True):
        np.testing.assert_allclose(joined, np.einsum("BTD,DHK->BTHK", x, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 1, 8), (3, 4, 8)], ids=str)
def test_logits_are_products_with_the_table(shape):
    x, table = draw(*shape), draw(5, 8)
    logits = jax.jit(cpu.unembed, static_argnums=2)(table, x, jnp.float32)
    np.testing.assert_allclose(logits, x @ table.T, rtol=1e-5, atol=1e-5)


def test_argmax_is_the_first_of_the_greatest_and_always_an_id():
    rows = np.array([[1, 3, 3, 2], [-np.inf] * 4, [np.nan, 1, 2, 0], [0, -1, -2, -3]], np.float32)
    found = np.asarray(jax.jit(cpu.argmax)(rows))
    assert found.dtype == np.int32
    assert found[[0, 1, 3]].tolist() == [1, 0, 0]
    assert 0 <= found[2] < 4
    drawn = draw(50, 7)
    np.testing.assert_array_equal(cpu.argmax(drawn), drawn.argmax(axis=1))


@pytest.mark.parametrize("replace", [cpu.replace_if, cpu.replace_in_branch, cpu.replace_by_select])
@pytest.mark.parametrize("wanted", [True, False])
def test_a_tree_is_replaced_whole_or_not_at_all(replace, wanted):
    """What is not finite in the new one does not reach the old one; a None stays."""
    old = {"a": draw(3), "frozen": None, "count": np.int32(7)}
    new = {"a": np.array([np.nan, np.inf, 1], np.float32), "frozen": None, "count": np.int32(8)}
    found = jax.jit(lambda wanted, new, old: replace(wanted, lambda: new, old))(wanted, new, old)
    assert jax.tree.structure(found) == jax.tree.structure(old)
    for name in ("a", "count"):
        np.testing.assert_array_equal(found[name], (new if wanted else old)[name])
        assert found[name].dtype == old[name].dtype
