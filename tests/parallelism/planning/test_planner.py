"""Layouts for a slice: which are legal, how they follow its network, which are worth compiling."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from parallax.training.state import TrainState
from parallelism.mesh_shape import along_torus, parse_mesh
from parallelism.planning.compiler import Report, Traffic
from parallelism.planning.hardware import GIB, accelerator
from parallelism.planning.planner import (
    Build,
    Choice,
    choose_to_compile,
    estimate,
    held_bytes,
    legal_meshes,
    mesh_text,
    name_of,
    rank,
    tiled_size,
)
from parallelism.rules import RULE_SETS
from parallelism.strategy import Layout

V3, V5E = accelerator("v3-8"), accelerator("v5e-256")


@dataclasses.dataclass
class Fixed:
    """A cost of given numbers; what it sends goes over data."""

    flops: float = 8e12
    temporary: float = 1e9
    wire: float = 1e8
    evaluation: float = 0.0
    embed_dim: int = 8192
    num_experts: int = 0
    experts: float = 0.0

    def model_flops(self):
        return self.flops / 2

    def expert_flops(self):
        return self.experts

    def elementwise_bytes(self, sizes):
        return 0.0

    def product_flops(self, sizes):
        return self.flops

    def kernel_flops(self):
        return 0.0

    def temporary_bytes(self, sizes, parameter_bytes, on_chip):
        return self.temporary + parameter_bytes - on_chip

    def evaluation_bytes(self, sizes, parameter_bytes):
        return self.evaluation

    def even_share(self, sizes):
        return 0.5

    def sent(self, sizes):
        return [Traffic("all-reduce", ("data",), 1, self.wire)] if sizes.get("data", 1) > 1 else []


def build(cost):
    def init_state():
        zero = jnp.zeros((), jnp.int32)
        params = {"w": jnp.zeros((64, 32))}
        return TrainState(step=zero, params=params, opt_state=(params, params), bad_steps=zero)

    spec = {"w": PartitionSpec("embed", "mlp")}
    axes = TrainState(step=PartitionSpec(), params=spec, opt_state=(spec, spec), bad_steps=PartitionSpec())
    return Build(init_state, axes, lambda gradients: gradients, {}, cost, "xla")


def row(cost, sizes, report=None, strategy="mesh", sliced=V3):
    mesh = mesh_text(sizes, sliced) if strategy == "mesh" else ""
    layout = Layout(strategy=strategy, mesh=mesh, batch_size=8, seq_len=8)
    return estimate(Choice(layout, sizes, "none", "float32"), build(cost), sliced, report)


def test_every_split_of_the_devices_is_tried_once():
    found = [tuple(sizes.values()) for sizes in legal_meshes(8, lambda sizes: True)]
    assert len(found) == len(set(found)) == math.comb(3 + 4, 3)  # three factors of two among five axes
    assert all(math.prod(sizes) == 8 for sizes in found)
    assert list(legal_meshes(8, lambda sizes: sizes["tensor"] == 8)) == [
        {"data": 1, "fsdp": 1, "expert": 1, "sequence": 1, "tensor": 8}
    ]


def test_every_device_of_a_slice_is_planned_for_whatever_their_number():
    shapes = list(legal_meshes(192, lambda sizes: True))
    assert {math.prod(sizes.values()) for sizes in shapes} == {192}
    assert len({tuple(sizes.values()) for sizes in shapes}) == len(shapes)
    assert {"data": 1, "fsdp": 12, "expert": 1, "sequence": 1, "tensor": 16} in shapes


def test_slices_are_crossed_along_data_or_fsdp():
    shapes = list(legal_meshes(8, lambda sizes: sizes["tensor"] == 4, slices=2))
    assert [mesh_text(sizes, accelerator("2xv4-8")) for sizes in shapes] == [
        "data=2@dcn,tensor=4",
        "fsdp=2@dcn,tensor=4",
    ]


@pytest.mark.parametrize(
    ("slice_", "sizes", "text"),
    [
        (V5E, {"fsdp": 256}, "fsdp=16x16"),
        (V5E, {"data": 16, "fsdp": 16}, "data=16,fsdp=16"),
        (V5E, {"fsdp": 64, "tensor": 4}, "fsdp=64,tensor=4"),
        (V5E, {"data": 2, "fsdp": 128}, "data=2,fsdp=8x16"),
        (V3, {"fsdp": 8}, "fsdp=2x2x2"),
        (V3, {"data": 4, "tensor": 2}, "data=4,tensor=2"),
        (V3, {"data": 2, "fsdp": 4}, "data=2,fsdp=2x2"),
        (accelerator("v5p-128"), {"fsdp": 64}, "fsdp=4x4x4"),
        (accelerator("2xv5p-128"), {"data.dcn": 2, "fsdp": 64}, "data=2@dcn,fsdp=4x4x4"),
        (accelerator("v5e-1"), {"data": 1}, "data=1"),
    ],
)
def test_an_axis_that_spans_the_network_is_cut_at_its_dims(slice_, sizes, text):
    assert mesh_text(sizes, slice_) == text
    shape = along_torus(sizes, slice_.network)
    assert math.prod(shape.values()) == slice_.devices
    assert parse_mesh(text, slice_.devices) == shape


def test_bytes_held_are_those_of_the_shards():
    arrays = {"w": jax.ShapeDtypeStruct((64, 32), jnp.float32), "n": jax.ShapeDtypeStruct((64,), jnp.float32)}
    axes = {"w": PartitionSpec("embed", "mlp"), "n": PartitionSpec(None)}
    rules = RULE_SETS["default"]
    assert held_bytes(arrays, axes, rules, {"data": 8}) == 4 * (64 * 32 + 64)
    assert held_bytes(arrays, axes, rules, {"fsdp": 2, "tensor": 4}) == 4 * (64 * 32 // 8 + 64)


def test_an_estimate_counts_whole_tiles_and_a_row_the_bytes_that_there_are():
    """A quarter of w is 16 × 32 numbers, in tiles 16 × 128; two scalars take a tile's row each."""
    found = row(Fixed(temporary=0.0), {"fsdp": 4, "data": 2})
    assert (found.parameter_bytes, found.optimizer_bytes) == (4 * 16 * 32, 2 * 4 * 16 * 32 + 2 * 4)
    assert found.estimated_bytes == (3 + 1) * 4 * 16 * 128 + 2 * 4 * 128  # and gradients as parameters


def test_an_estimate_names_what_binds():
    compute = row(Fixed(flops=8e15), {"data": 8})
    assert compute.bound == "compute"
    assert compute.seconds == pytest.approx(1e15 / (123e12 / 2))
    assert row(Fixed(temporary=1e12), {"data": 8}).bound == "memory"
    assert row(Fixed(wire=1e12), {"data": 8}).bound == "links"
    assert row(Fixed(wire=1e12), {"fsdp": 8}).link_seconds == 0


def test_what_is_expected_is_no_less_than_what_binds_and_gives_the_utilisation():
    """An efficiency below 1 lengthens matmuls; memory that moves for longer than that is the time itself."""
    compute, memory = row(Fixed(flops=8e15), {"data": 8}), row(Fixed(temporary=1e14), {"data": 8})
    assert compute.expected.seconds > 1.1 * compute.seconds
    assert memory.expected.seconds == memory.seconds
    assert compute.expected.low < compute.expected.seconds < compute.expected.high
    # The model asks for half of the operations that the program has.
    assert compute.utilisation == pytest.approx(compute.seconds / 2 / compute.expected.seconds)


def test_an_axis_whose_collectives_a_layer_waits_for_is_known():
    """Along tensor, by the memory of a chip at 225 GB/s, and along fsdp, by a link of which each core has 50 GB/s."""
    traffic = (Traffic("all-reduce", ("tensor",), 1, 225e9), Traffic("all-gather", ("fsdp",), 0, 50e9))
    found = row(Fixed(), {"fsdp": 2, "data": 2, "tensor": 2}, Report(flops=1, traffic=traffic))
    assert [(each.axes, each.in_layer, each.seconds) for each in found.waits] == [
        (("tensor",), True, pytest.approx(1.0)),
        (("fsdp",), False, pytest.approx(1.0)),
    ]
    assert found.link_seconds == pytest.approx(1.0)


def test_a_report_replaces_the_estimate():
    report = Report(
        state_bytes=100, temporary_bytes=200, flops=10, traffic=(Traffic("all-gather", ("fsdp.0",), 3, 7.0),)
    )
    found = row(Fixed(), {"fsdp": 8}, report)
    assert (found.peak_bytes, found.flops, found.wire_bytes) == (300, 10, {"fsdp": 7.0})
    assert (found.sent_bytes, found.source) == (7.0, "compiled")
    assert found.estimated_bytes > 1e9


def test_buffers_of_tokens_are_counted_full_and_as_they_are_at_even_load():
    traffic = (Traffic("ragged-all-to-all", ("expert",), 3, 8.0), Traffic("all-gather", ("fsdp",), 3, 7.0))
    found = row(Fixed(), {"fsdp": 2, "expert": 4}, Report(flops=1, traffic=traffic))
    assert (found.sent_bytes, found.held_bytes) == (15.0, 11.0)
    assert found.wire_bytes == {"expert": 4.0, "fsdp": 7.0}


@pytest.mark.parametrize("counted", [0.5e12, 1e12])
def test_the_experts_matmuls_are_added_where_the_compiler_has_them_in_kernels(counted):
    """Half of all here: where it counts all of them none are."""
    cost = Fixed(flops=8e12, experts=4e12, num_experts=8)
    found = row(cost, {"expert": 8}, Report(flops=int(counted)))
    assert found.flops == 1e12
    assert found.expected == row(cost, {"expert": 8}).expected


def test_an_estimate_leaves_out_what_a_chip_keeps_on_itself():
    without, v5e = row(Fixed(), {"data": 8}), row(Fixed(), {"data": 8}, sliced=accelerator("v5e-8"))
    assert without.estimated_bytes - v5e.estimated_bytes == V5E.generation.on_chip > 0


def test_what_crosses_two_axes_is_sent_once():
    found = row(Fixed(), {"data": 8}, Report(flops=1, traffic=(Traffic("all-reduce", ("data", "fsdp.0"), 1, 5.0),)))
    assert found.wire_bytes == {"data": 5.0, "fsdp": 5.0}
    assert found.sent_bytes == 5.0


def test_what_fits_comes_first_and_fast_before_slow():
    fast, slow = row(Fixed(flops=1e12), {"data": 8}), row(Fixed(flops=1e15), {"fsdp": 8})
    large, larger = (row(Fixed(temporary=size * GIB), {"tensor": 8}) for size in (17, 18))
    refused = row(Fixed(flops=1.0), {"data": 4, "fsdp": 2}, Report(error="too large"))
    ranked = rank([larger, slow, large, refused, fast], 16 * GIB)
    assert ranked[:2] == [fast, slow]
    assert ranked.index(large) < ranked.index(larger)
    assert refused in ranked[2:]


@pytest.mark.parametrize("strategy", ["mesh", "pmap"])
@pytest.mark.parametrize(("sizes", "parts", "replicas"), [({"data": 8}, 1, 8), ({"data": 2, "fsdp": 4}, 4, 2)])
def test_a_save_takes_a_slice_of_what_several_devices_hold(strategy, sizes, parts, replicas):
    """Of w and its two moments, each 64 × 32; the two scalars have no dim to be cut along."""
    found = row(Fixed(), sizes, strategy=strategy)
    shard = 3 * 4 * 64 * 32 // parts
    state = 3 * 4 * tiled_size((64 // parts, 32)) + 2 * 4 * tiled_size(())
    assert found.save_bytes == state + shard // replicas
    assert row(Fixed(), {"fsdp": 8}).save_bytes == 3 * 4 * tiled_size((8, 32)) + 2 * 4 * tiled_size(())


def test_what_an_evaluation_needs_beside_the_state_decides_too():
    """A step that the compiler takes is not enough: a run that cannot be evaluated ends at its first interval."""
    report = Report(state_bytes=10, temporary_bytes=10, flops=1)
    small, large = (row(Fixed(evaluation=size * GIB), {"data": 8}, report) for size in (1, 17))
    assert (small.fits(16 * GIB), large.fits(16 * GIB)) == (True, False)
    assert large.needed_bytes == large.evaluation_bytes == 17 * GIB + small.evaluation_bytes - GIB
    assert rank([large, small], 16 * GIB) == [small, large]
    assert not row(Fixed(evaluation=17 * GIB), {"data": 8}).fits(16 * GIB)


def test_each_layout_is_compiled_once_pmap_among_them_and_nothing_hopeless():
    quick, slow = row(Fixed(flops=1e12), {"data": 8}), row(Fixed(flops=1e13), {"data": 8})
    hopeless = row(Fixed(temporary=100 * GIB), {"tensor": 8})
    pmap = row(Fixed(flops=1e15), {"data": 8}, strategy="pmap")
    others = [row(Fixed(flops=1e14), {"data": 8 // fsdp, "fsdp": fsdp}) for fsdp in (2, 4, 8)]
    chosen = choose_to_compile([slow, hopeless, *others, quick, pmap], 16 * GIB, 3)
    assert [name_of(rows[0].choice) for rows in chosen] == ["pmap", "data=8", "fsdp=2x2x2"]
    assert chosen[1] == [quick, slow]


SHAPES = [shape for rank in range(4) for shape in itertools.product((1, 2, 3, 8, 12, 16, 100, 128, 344), repeat=rank)]


@pytest.mark.parametrize(
    ("shape", "laid"),
    [
        ((4, 16, 4, 32), (4, 16, 4, 128)),  # f32[4,16,4,32]{3,2,1,0:T(4,128)}
        ((4, 128, 4, 32), (4, 128, 4, 32)),  # f32[4,128,4,32]{1,3,2,0:T(8,128)}
        ((4, 64, 96), (4, 64, 128)),
        ((4, 96, 16), (4, 128, 16)),  # bf16[4,96,16]{1,2,0:T(8,128)(2,1)}
        ((6, 64, 8, 64), (6, 64, 8, 128)),
        ((4, 128), (4, 128)),  # f32[4,128]{1,0:T(4,128)}
        ((72, 128), (72, 128)),
        ((9, 3), (128, 4)),
        ((100,), (128,)),
        ((), (128,)),
    ],
)
def test_an_array_lies_as_wastes_least(shape, laid):
    assert tiled_size(shape) == math.prod(laid)


def test_whole_tiles_hold_what_they_hold():
    for shape in SHAPES:
        size = tiled_size(shape)
        assert size % 128 == 0
        assert math.prod(shape) <= size <= 2 * 128 * math.prod(shape)
        if 128 in shape and any(dim % 8 == 0 for dim in shape[: shape.index(128)]):
            assert size == math.prod(shape)


def test_the_order_of_dims_does_not_matter():
    for shape in SHAPES:
        assert len({tiled_size(each) for each in itertools.permutations(shape)}) == 1


def test_more_of_a_dim_takes_no_less():
    for shape in SHAPES:
        for dim in range(len(shape)):
            assert tiled_size((*shape[:dim], shape[dim] + 1, *shape[dim + 1 :])) >= tiled_size(shape)
