"""A mesh that is chosen: legal, of all devices, and said why."""

import types

import jax
import pytest

from parallelism.mesh_shape import choose_mesh
from parallelism.rules import RULE_SETS
from parallelism.strategy import Layout


def chosen(tiny, batch_size, **layout):
    return tiny.strategy("mesh", "auto", batch_size=batch_size, **layout)


@pytest.mark.parametrize(
    ("batch_size", "shape"),
    [
        (16, "data=8"),
        (8, "data=8"),
        (4, "data=4, sequence=2"),  # one key/value head cannot be shared
        (12, "data=4, sequence=2"),
    ],
)
def test_rows_come_first(tiny, batch_size, shape):
    strategy = chosen(tiny, batch_size)
    assert f"8 cpu devices as {shape} (state of " in strategy.describe()
    assert ("no more devices can share" in strategy.describe()) == ("sequence" in shape)
    assert len(strategy.devices) == 8


def test_heads_come_before_tokens(make_tiny):
    assert "data=4, tensor=2 (" in chosen(make_tiny(num_kv_heads=2), 4).describe()


def test_exact_reduction_keeps_to_rows(tiny):
    assert "data=8 (" in chosen(tiny, 16, reduction="exact").describe()


@pytest.mark.parametrize("reduction", ["mean", "exact"])
def test_no_shape_is_refused_with_a_remedy(tiny, reduction):
    with pytest.raises(
        ValueError, match="mesh=auto finds no shape for 8 devices and batch_size=9; "
    ) as caught:
        chosen(tiny, 9, seq_len=9, reduction=reduction)
    chosen(tiny, int(str(caught.value).rpartition(" ")[2]), seq_len=9, reduction=reduction)


@pytest.mark.parametrize(("share", "axis"), [(10, "data"), (1, "fsdp")])
def test_a_state_that_fills_the_memory_is_sharded(tiny, share, axis):
    """Devices that say how much memory they have: simulated ones do not."""
    shapes = jax.eval_shape(tiny.init_state)
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    device = types.SimpleNamespace(process_index=0, memory_stats=lambda: {"bytes_limit": share * state_bytes})
    layout = Layout(strategy="mesh", mesh="auto", batch_size=16, seq_len=6)
    sizes, why = choose_mesh([device] * 8, RULE_SETS["default"], shapes, tiny.axes, layout)
    assert {name: size for name, size in sizes.items() if size > 1} == {axis: 8}
    assert ("too much for one device" in why) == (axis == "fsdp")
