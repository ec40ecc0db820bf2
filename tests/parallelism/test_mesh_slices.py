"""Several slices, simulated: the mesh says what crosses them, one curve holds, and what crosses is a device's shard."""

import types

import jax
import numpy as np
import pytest

from parallelism import reduction
from parallelism.mesh_shape import choose_mesh, count_slices, lay_out, parse_mesh, show_mesh
from parallelism.planning.hlo_collectives import crossed_axes, read_collectives
from parallelism.rules import RULE_SETS, crosses_slices, in_parts
from parallelism.strategy import Layout
from tests.parallelism.test_mesh_collectives import FLOAT, LAYER, SMALL, TABLE, D, N, compiled_text
from tests.parallelism.test_mesh_shape import torus
from tests.parallelism.test_reduction_exact import train

ACROSS = ["data=2@dcn,data=4", "data=2@dcn,fsdp=2,tensor=2", "fsdp=2@dcn,fsdp=4"]


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("data=2@dcn,fsdp=4", {"data.dcn": 2, "fsdp": 4}),
        ("fsdp=2x2,data=2@dcn", {"data.dcn": 2, "fsdp.0": 2, "fsdp.1": 2}),
        ("data=2@dcn,data=2,fsdp=all", {"data.dcn": 2, "data": 2, "fsdp": 2}),
        ("data=all@dcn,tensor=2", {"data.dcn": 4, "tensor": 2}),
    ],
)
def test_a_mesh_names_what_crosses_slices(text, shape):
    found = parse_mesh(text, 8)
    assert {axis: size for axis, size in found.items() if size > 1} == shape
    assert parse_mesh(show_mesh(found), 8) == found
    assert crosses_slices(next(iter(found)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tensor=2@dcn,data=4", ["tensor=2@dcn", "only data and fsdp can cross slices", "leave @ out"]),
        ("data=2@ici,data=4", ["data=2@ici", "as in data=2@dcn"]),
        ("data=2@dcn,data=2@dcn,fsdp=2", ["data@dcn twice"]),
        ("data=2x2@dcn,fsdp=2", ["positive number for data@dcn, not '2x2'", "try data=all@dcn"]),
        ("data=2@dcn,fsdp=8", ["needs 16 devices but 8 are visible"]),
    ],
)
def test_other_notations_are_refused(text, words, refused):
    with refused(f"mesh={text!r}", *words):
        parse_mesh(text, 8)


def simulated(*processes):
    return [types.SimpleNamespace(platform="cpu", device_kind="cpu", process_index=index) for index in processes]


def test_a_slice_is_a_group_of_processes_or_of_the_devices_of_one():
    for devices in (simulated(0, 0, 1, 1, 2, 2, 3, 3), simulated(*[0] * 8)):
        laid = lay_out(devices, {"data.dcn": 2, "fsdp": 2, "tensor": 2})
        assert laid.shape == (2, 2, 2)
        assert list(laid.flat) == devices


def test_a_slice_of_tpus_and_a_host_of_gpus_is_what_jax_says():
    tpus = [*torus_slice(1), *torus_slice(0)]
    assert count_slices(tpus) == 2
    laid = lay_out(tpus, {"data.dcn": 2, "fsdp": 4})
    assert [[device.slice_index for device in row] for row in laid] == [[0] * 4, [1] * 4]
    gpus = [types.SimpleNamespace(platform="gpu", device_kind="H100", id=i, slice_index=i // 2) for i in range(8)]
    assert [[gpu.id for gpu in row] for row in lay_out(gpus, {"data.dcn": 2, "fsdp": 4})] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
    ]


def torus_slice(number):
    places = [(x, y, 0) for x in range(2) for y in range(2)]
    kind = {"platform": "tpu", "device_kind": "TPU v4", "core_on_chip": 0, "process_index": 0}
    return [types.SimpleNamespace(coords=place, slice_index=number, **kind) for place in places]


@pytest.mark.parametrize(
    ("devices", "sizes", "words"),
    [
        (simulated(0, 1, 2), {"data.dcn": 2, "fsdp": 2}, ["@dcn hold 2 devices, and there are 3 processes", "data=3@"]),
        (torus_slice(0), {"data.dcn": 2, "fsdp": 2}, ["there are 1 slices", "try a mesh without @dcn"]),
        ([*torus_slice(0), *torus_slice(1)], {"fsdp": 8}, ["hold 1 devices, and there are 2 slices", "data=2@dcn"]),
        ([*torus_slice(0), *torus_slice(1)], {"data.dcn": 4, "fsdp": 2}, ["there are 2 slices", "data=2@dcn"]),
    ],
)
def test_slices_that_are_not_there_are_refused(devices, sizes, words, refused):
    with refused(*words):
        lay_out(devices, sizes)


def test_what_is_chosen_crosses_slices_along_data(tiny):
    devices = [*torus(tiny, 1, 2, 2, 1), *torus(tiny, 1, 2, 2, 1)]
    for number, device in enumerate(devices):
        device.slice_index = number // 4
    layout = Layout(strategy="mesh", mesh="auto", batch_size=16, seq_len=6)
    shapes = jax.eval_shape(tiny.init_state)
    sizes, _ = choose_mesh(devices, RULE_SETS["default"], shapes, tiny.axes, layout)
    assert show_mesh(sizes) == "data=2@dcn,fsdp=2x2"
    assert show_mesh(parse_mesh("", 8, "tpu", slices=2)) == "data=2@dcn,data=4"


def test_slices_have_neighbouring_rows_and_shards_of_parameters_within():
    rules = in_parts(RULE_SETS["default"], ["data.dcn", "fsdp.dcn", "data", "fsdp.0", "fsdp.1"])
    assert rules["batch"] == ("data.dcn", "fsdp.dcn", "data", "fsdp.0", "fsdp.1")
    assert rules["embed"] == ("fsdp.0", "fsdp.1", "fsdp.dcn")


@pytest.mark.parametrize("mesh", ACROSS[:2])
def test_every_layout_takes_the_same_steps(make_tiny, mesh):
    """Three steps, from rows with very different numbers of targets. docs/evidence/slices.md has more layouts."""
    tiny = make_tiny(embed_dim=32, num_kv_heads=2)
    losses, params = train(tiny, "mesh", mesh, 1, batch_size=16, reduction="mean")
    wanted, expected = train(tiny, "single", "", 1, batch_size=16, reduction="mean")
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)  # float32 sums in another order
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), params, expected)


@pytest.mark.parametrize("mesh", ACROSS)
def test_what_crosses_slices_is_a_devices_shard(mesh):
    """A slice has four devices, so a quarter of the gradients; of tensor's, and of fsdp's gathers, no more either."""
    sizes = {axis: size for axis, size in parse_mesh(mesh, 8).items() if size > 1}
    every = N * LAYER + TABLE + FLOAT * D
    crossing = {}
    for each in read_collectives(compiled_text(mesh) or ""):
        over = crossed_axes(each, sizes)
        if any(map(crosses_slices, over)) and each.bytes >= SMALL:
            assert len(over) == 1, "what crosses slices crosses nothing else"
            crossing[each.kind] = crossing.get(each.kind, 0) + each.bytes * each.count
    if "fsdp=2@dcn" in mesh:  # both slices' shards, before and after; gathered twice
        assert crossing["reduce-scatter"] == pytest.approx(every / 4, rel=0.05)
        assert crossing["all-gather"] <= 2 * every / 4
    else:
        assert crossing == {"all-reduce": pytest.approx(every / 4, abs=2 * SMALL)}


@pytest.mark.parametrize("over", [("data.dcn",), ("data.dcn", "data")])
def test_what_crosses_slices_is_one_row_of_numbers(over):
    """A TPU pads other arrays to its tiles: heads of 32 fourfold."""
    mesh, whole = jax.make_mesh((2, 4), ("data.dcn", "data")), jax.sharding.PartitionSpec()
    add_up = jax.shard_map(
        lambda x: reduction._add_up([x], over)[0], mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False
    )
    x = np.arange(3 * 4 * 32, dtype=np.float32).reshape(3, 4, 32)
    np.testing.assert_array_equal(jax.jit(add_up)(x), x * (8 if "data" in over else 2))
    (mapped,) = (e for e in jax.make_jaxpr(add_up)(x).eqns if "jaxpr" in e.params)
    sums = [
        e for e in mapped.params["jaxpr"].eqns if e.primitive.name.startswith("psum") and "data.dcn" in e.params["axes"]
    ]
    assert [e.invars[0].aval.shape for e in sums] == [(x.size // (4 if "data" in over else 1),)]


def test_exact_reduction_sends_each_shards_gradient_across_slices_once(tiny):
    """16 shards in all, two on each device; what it then has of both slices it shares within."""
    mesh = "data=2@dcn,fsdp=4"
    sizes = {axis: size for axis, size in parse_mesh(mesh, 8).items() if size > 1}
    said = {}
    for each in read_collectives(compiled_text(mesh, "exact") or ""):
        if each.bytes >= SMALL:
            key = each.kind, crossed_axes(each, sizes)
            said[key] = said.get(key, 0) + each.bytes * each.count
    every = N * LAYER + TABLE + FLOAT * D
    assert said == {
        ("all-gather", ("data.dcn",)): pytest.approx(2 * 2 * every, rel=0.01),
        ("all-gather", ("fsdp",)): pytest.approx(16 * every + every, rel=0.01),
    }
