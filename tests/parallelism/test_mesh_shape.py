"""The sizes of a mesh from text, or a complaint whose remedy works; and a mesh that is chosen, and why."""

import itertools
import re
import types

import jax
import pytest

from parallelism.mesh_shape import along_torus, choose_mesh, parse_mesh, show_mesh
from parallelism.rules import MESH_AXES, RULE_SETS
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
    with pytest.raises(ValueError, match="mesh=auto finds no shape for 8 devices and batch_size=9; ") as caught:
        chosen(tiny, 9, seq_len=9, reduction=reduction)
    chosen(tiny, int(str(caught.value).rpartition(" ")[2]), seq_len=9, reduction=reduction)


@pytest.mark.parametrize(("share", "axis"), [(10, "data"), (1, "fsdp")])
def test_a_state_that_fills_the_memory_is_sharded(tiny, share, axis):
    sizes, why = choose(tiny, [device(tiny, share)] * 8)
    assert {name: size for name, size in sizes.items() if size > 1} == {axis: 8}
    assert ("too much for one device" in why) == (axis == "fsdp")


def device(tiny, share, platform="gpu", **place):
    """One that says how much memory it has, in states of the model: simulated ones do not."""
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(tiny.init_state)))
    limit = {"bytes_limit": int(share * state_bytes)}
    return types.SimpleNamespace(process_index=0, memory_stats=lambda: limit, platform=platform, **place)


def choose(tiny, devices):
    layout = Layout(strategy="mesh", mesh="auto", batch_size=16, seq_len=6)
    return choose_mesh(devices, RULE_SETS["default"], jax.eval_shape(tiny.init_state), tiny.axes, layout)


def torus(tiny, share, *dims, cores=1):
    places = itertools.product(*map(range, dims), range(cores))
    return [device(tiny, share, "tpu", coords=tuple(chip), core_on_chip=core) for *chip, core in places]


@pytest.mark.parametrize(
    ("dims", "cores", "mesh"),
    [
        ((4, 4, 1), 1, "fsdp=4x4"),  # of a v5e-16
        ((8, 2, 1), 1, "fsdp=2x8"),
        ((2, 2, 2), 2, "fsdp=2x2x2x2"),
        ((2, 2, 1), 2, "fsdp=2x2x2"),  # of a v3-8
        ((4, 1, 1), 1, "fsdp=4"),
    ],
)
def test_fsdp_follows_the_network_of_a_tpu(tiny, dims, cores, mesh):
    """Along one ring of 16 BASE sends 285 MiB a step, along two of 4 it sends 215."""
    devices = torus(tiny, 1, *dims, cores=cores)
    sizes, _ = choose(tiny, devices)
    assert show_mesh(sizes) == mesh
    assert parse_mesh(mesh, len(devices)) == sizes


@pytest.mark.parametrize(
    ("sizes", "dims", "mesh"),
    [
        ({"fsdp": 16, "expert": 4}, (4, 4, 4, 1), "fsdp=4x4,expert=4"),
        ({"fsdp": 32, "expert": 8}, (16, 16, 1), "fsdp=16x2,expert=8"),
        ({"data": 4, "fsdp": 4, "expert": 16}, (16, 16, 1), "data=4,fsdp=4,expert=16"),
        ({"fsdp": 8, "expert": 4, "tensor": 2}, (4, 4, 4, 1), "fsdp=8,expert=4,tensor=2"),
    ],
)
def test_experts_are_neighbours_in_the_network(sizes, dims, mesh):
    assert show_mesh(along_torus(sizes, dims)) == mesh


def test_what_is_not_fsdp_stays_whole_on_any_network(tiny):
    assert show_mesh(choose(tiny, torus(tiny, 10, 4, 4, 1))[0]) == "data=16"
    assert show_mesh(choose(tiny, torus(tiny, 1, 4, 4, 1)[:12])[0]) == "fsdp=4,sequence=3"  # no whole torus


@pytest.mark.parametrize(
    ("text", "data", "fsdp"),
    [
        ("", 8, 1),
        ("fsdp=all", 1, 8),
        ("fsdp=4,data=2", 2, 4),
        (" data=2, fsdp=4", 2, 4),
        ("data=2,fsdp=all", 2, 4),
        ("data=all,fsdp=4", 2, 4),
        ("data=8,fsdp=all", 8, 1),
    ],
)
def test_mesh_from_text(text, data, fsdp):
    assert parse_mesh(text, 8) == {"data": data, "fsdp": fsdp, "expert": 1, "sequence": 1, "tensor": 1}
    assert tuple(parse_mesh(text, 8)) == MESH_AXES


def test_one_device_is_a_mesh_too():
    assert parse_mesh("", 1) == parse_mesh("fsdp=all", 1) == dict.fromkeys(MESH_AXES, 1)


@pytest.mark.parametrize(("text", "tensor"), [("tensor=2,sequence=2,data=2", 2), ("tensor=all,sequence=2", 4)])
def test_every_axis_has_a_size_of_its_own(text, tensor):
    wanted = {"data": 4 // tensor, "fsdp": 1, "expert": 1, "sequence": 2, "tensor": tensor}
    assert parse_mesh(text, 8) == wanted


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("8", "unknown axis '8'"),
        ("data=8,", "unknown axis ''"),
        ("data=2,data=4", "gives data twice"),
        ("data=0", "positive number for data, not '0'"),
        ("data=1.5", "positive number for data, not '1.5'"),
        ("data", "positive number for data, not ''"),
        ("data=all,fsdp=all", "positive number for fsdp, not 'all'"),
        ("fsdp=x,data=all", "positive number for fsdp, not 'x'"),
        ("data=3", "needs 3 devices but 8 are visible"),
        ("data=4,fsdp=4", "needs 16 devices but 8 are visible"),
        ("data=all,fsdp=3", "needs 6 devices but 8 are visible"),
        ("data=all,fsdp=16", "needs 16 devices but 8 are visible"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_with_a_remedy(text, complaint):
    with pytest.raises(ValueError, match="mesh=") as caught:
        parse_mesh(text, 8)
    message = str(caught.value)
    assert "\n" not in message
    assert repr(text) in message
    assert complaint in message
    whole, part = re.search(r"--mesh (\S+)$", message), re.search(r"try (\w+)=(\w+)$", message)
    if whole:
        parse_mesh(whole[1], 8)
    elif part:
        sizes = dict(piece.partition("=")[::2] for piece in text.split(","))
        mended = sizes | {part[1]: part[2]}
        parse_mesh(",".join(f"{axis}={size}" for axis, size in mended.items()), 8)
    else:
        assert re.search(r"known are data, fsdp, expert, sequence, tensor$|give each axis once$", message)


@pytest.mark.parametrize(
    ("platform", "devices", "processes", "remedy"),
    [
        ("cpu", 1, 1, "1 is visible; try JAX_NUM_CPU_DEVICES=8, or --mesh data=1"),
        ("cpu", 4, 2, "4 are visible; try JAX_NUM_CPU_DEVICES=4 in each process, or --mesh data=4"),
        ("cpu", 3, 3, "3 are visible; try --mesh data=3"),  # which no number in each makes 8
        ("tpu", 1, 1, "1 is visible; try --mesh data=1"),
    ],
)
def test_devices_that_lack_are_asked_for_where_they_are_simulated(platform, devices, processes, remedy, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    with pytest.raises(ValueError, match=rf"^mesh='data=8' needs 8 devices but {remedy}$"):
        parse_mesh("data=8", devices, platform)
