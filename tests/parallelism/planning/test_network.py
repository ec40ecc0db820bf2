"""Times of collectives against hand-computed ones, and where the axes of a mesh run."""

import itertools
import types

import pytest
from jax.experimental.mesh_utils import create_device_mesh

from parallelism.planning.compiler import Traffic
from parallelism.planning.hardware import accelerator
from parallelism.planning.network import Dim, collective_seconds, place, waits

GB = 10**9


@pytest.mark.parametrize(
    ("slice_", "mesh", "axis", "kind", "wire", "seconds"),
    [
        # A pod of v5e is a torus: two rings of 16, each two links of 45 GB/s, so 180 GB/s; 16 hops.
        ("v5e-256", {"fsdp": 256}, "fsdp", "all-gather", 180 * GB, 1 + 16e-6),
        ("v5e-256", {"data": 256}, "data", "all-reduce", 180 * GB, 1 + 32e-6),
        # One ring of it; four of its 16 in a line, whose links do not lead round.
        ("v5e-256", {"data": 16, "fsdp": 16}, "fsdp", "reduce-scatter", 90 * GB, 1 + 8e-6),
        ("v5e-256", {"data": 64, "tensor": 4}, "tensor", "all-gather", 45 * GB, 1 + 3e-6),
        # A slice of 8 × 8 has no link round: two lines of 45 GB/s, 7 hops each; 8 × 16 has them along 16.
        ("v5e-64", {"fsdp": 64}, "fsdp", "all-gather", 90 * GB, 1 + 14e-6),
        ("v6e-128", {"fsdp": 128}, "fsdp", "all-gather", 270 * GB, 1 + 15e-6),
        # A cube of v5p closes in all three dims: 3 × 2 × 90; a slice smaller than a cube in none: 90 along 2, 4 and 4.
        ("v5p-128", {"fsdp": 64}, "fsdp", "all-gather", 540 * GB, 1 + 6e-6),
        ("v5p-64", {"fsdp": 32}, "fsdp", "all-gather", 270 * GB, 1 + 7e-6),
        # Two of a ring of four send half of their 90 GB each across its middle, where two links of 45 GB/s lead.
        ("v4-128", {"data": 16, "expert": 4}, "expert", "all-to-all", 67.5 * GB, 1 + 2e-6),
        # To a neighbour in a ring one link leads.
        ("v4-128", {"data": 16, "sequence": 4}, "sequence", "collective-permute", 45 * GB, 1 + 1e-6),
        # The cores of a v3 chip have no link: each writes at a quarter of the 900 GB/s of its memory.
        ("v3-8", {"data": 4, "tensor": 2}, "tensor", "all-gather", 225 * GB, 1.0),
        # Eight cores: 2 × 2 chips gather halves over two lines of 50 GB/s a core, 2 hops, and each pair completes them:
        # of 8 GB, 3 GB at 100 GB/s and 4 GB at 225 GB/s.
        ("v3-8", {"fsdp": 8}, "fsdp", "all-gather", 7 * GB, 3 / 100 + 4 / 225 + 2e-6),
    ],
)
def test_a_collective_takes_what_one_computes_by_hand(slice_, mesh, axis, kind, wire, seconds):
    path = place(mesh, accelerator(slice_).dims)[axis]
    assert collective_seconds(kind, wire, path) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "slice_", "mesh"),
    [
        ("TPU v4", "v4-128", {"fsdp": 16, "tensor": 4}),
        ("TPU v4", "v4-256", {"data": 2, "fsdp": 8, "tensor": 8}),
        ("TPU v4", "v4-1024", {"data": 4, "fsdp": 32, "sequence": 2, "tensor": 2}),
        ("TPU v5p", "v5p-1024", {"fsdp": 64, "tensor": 8}),
        ("TPU v6 lite", "v6e-256", {"data": 16, "fsdp": 16}),
        ("TPU v6 lite", "v6e-256", {"fsdp": 64, "tensor": 4}),
    ],
)
def test_axes_run_along_the_dims_that_jax_gives_them(kind, slice_, mesh):
    dims = accelerator(slice_).dims
    chips = accelerator(slice_).shape
    devices = [
        types.SimpleNamespace(platform="tpu", device_kind=kind, coords=(*coords, 0)[:3], core_on_chip=0)
        for coords in itertools.product(*map(range, chips))
    ]
    laid = create_device_mesh(tuple(mesh.values()), devices, allow_split_physical_axes=True)
    for along, path in enumerate(place(mesh, dims).values()):
        group = laid[tuple(slice(None) if at == along else 0 for at in range(laid.ndim))]
        found = [sorted({device.coords[dim] for device in group}) for dim in range(len(chips))]
        sizes = sorted((len(at), at[1] - at[0]) for at in found if len(at) > 1)
        assert sizes == sorted((reach.size, reach.stride) for reach in path)


def test_what_is_gathered_by_parts_takes_the_links_of_one_after_the_other():
    """Of 256 GB 15/16 come along one ring of 90 GB/s, and 15/256 before along the other: not by both at once."""
    dims = accelerator("v5e-256").dims
    sent = [Traffic("all-gather", ("fsdp",), 0, 255 * GB)]
    (split,) = waits(sent, place({"fsdp.0": 16, "fsdp.1": 16}, dims))
    (flat,) = waits(sent, place({"fsdp": 256}, dims))
    assert split.seconds == pytest.approx(256 / 90 * (15 / 16 + 15 / 256))
    assert flat.seconds == pytest.approx(255 / 180)
    (named,) = waits([Traffic("all-gather", ("fsdp.1",), 0, 90 * GB)], place({"fsdp.0": 16, "fsdp.1": 16}, dims))
    assert (named.axes, named.seconds) == (("fsdp",), pytest.approx(1.0))


def test_levels_carry_what_the_inner_ones_complete():
    """Two hosts of four at switches, as of GPUs: 8 GB gathered by 8; of 2 GB half comes from the other host."""
    hosts, cards = Dim("network", 2, 50e9, "switch", 1e-5), Dim("nvlink", 4, 450e9, "switch", 1e-6)
    path = place({"fsdp": 8}, (hosts, cards))["fsdp"]
    assert collective_seconds("all-gather", 7 * GB, path) == pytest.approx(6 / 450 + 1 / 50 + 2e-6 + 1e-5)
    assert collective_seconds("all-to-all", 7 * GB, path) == pytest.approx(6 / 450 + 4 / 50 + 2e-6 + 1e-5)
    data, fsdp = place({"data": 2, "fsdp": 4}, (hosts, cards)).values()
    assert (data[0].dim, fsdp[0].dim) == (hosts, cards)
    assert collective_seconds("all-reduce", 50 * GB, data) == pytest.approx(1 + 2e-5)


def test_groups_that_are_woven_into_each_other_share_links():
    """Of a ring of 16 each fourth device: a ring of its own, with a quarter of what the links carry."""
    path = place({"data": 64, "tensor": 4}, accelerator("v5e-256").dims)["data"]
    assert [(reach.size, reach.stride, reach.bandwidth) for reach in path] == [(16, 1, 90e9), (4, 4, 90e9 / 4)]


def test_a_mesh_that_does_not_fill_its_network_is_refused():
    with pytest.raises(ValueError, match=r"a mesh of .* must have the devices of \[2, 2, 2\]"):
        place({"data": 4}, accelerator("v3-8").dims)
