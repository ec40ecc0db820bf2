"""A program shows the collectives that its author asked for: kinds, counts, bytes, groups and axes, exactly.

Invariant: every expected number is derived by hand or by numpy from the program's source, never read from its text.
"""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P, lax
from jax.sharding import AxisType, Mesh, NamedSharding

from parallelism.planning.hlo_collectives import crossed_axes, read_collectives, wire_bytes

MESHES = {"2x4": {"data": 2, "fsdp": 4}, "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2}}
ROWS, COLUMNS, ALL = ((0, 1, 2, 3), (4, 5, 6, 7)), ((0, 4), (1, 5), (2, 6), (3, 7)), (tuple(range(8)),)
RING = tuple((i, 4 * (i // 4) + (i + 1) % 4) for i in range(8))


def make_mesh(name="2x4", order=slice(None)):
    shape = MESHES[name]
    devices = np.array(jax.devices())[order].reshape(tuple(shape.values()))
    return Mesh(devices, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def on_shards(function, specs=P("data", "fsdp"), out_specs=P("data", "fsdp"), mesh=None, shape=(8, 16)):
    """The text of a shard_map over one array; by default each of 2×4 devices holds 4×4 float32, 64 bytes."""
    mesh = mesh or make_mesh()
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)
    return jax.jit(mapped).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile().as_text()


def numbers(text):
    return [(each.kind, each.count, each.bytes, each.groups) for each in read_collectives(text)]


def sums(text):
    """Kind to how many run, and the bytes of all of them."""
    found = {}
    for each in read_collectives(text):
        count, size = found.get(each.kind, (0, 0))
        found[each.kind] = count + each.count, size + each.count * each.bytes
    return found


def without_trip_counts(text):
    """As a TPU prints it."""
    cut, count = re.subn(r'"known_trip_count":\{"n":"\d+"\}', '"other":{}', text)
    assert count > 0
    return cut


KINDS = {
    "psum": (lambda x: lax.psum(x, "fsdp"), "all-reduce", 64, ROWS, 2 * 64 * 3 / 4),
    "all_gather": (lambda x: lax.all_gather(x, "fsdp"), "all-gather", 256, ROWS, 256 * 3 / 4),
    "reduce_scatter": (lambda x: lax.psum_scatter(x, "fsdp"), "reduce-scatter", 64, ROWS, 64 * 3 / 4),
    "ppermute": (lambda x: lax.ppermute(x, "fsdp", RING[:4]), "collective-permute", 64, RING, 64),
    "all_to_all": (lambda x: lax.all_to_all(x, "fsdp", 0, 1), "all-to-all", 64, ROWS, 64 * 3 / 4),
}


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_alone(name):
    function, kind, size, groups, sent = KINDS[name]
    (found,) = read_collectives(on_shards(function, out_specs=P()))
    assert (found.kind, found.count, found.bytes, found.groups) == (kind, 1, size, groups)
    assert found.name.endswith(f"shard_map/{name}")
    assert wire_bytes(found) == sent
    assert crossed_axes(found, MESHES["2x4"]) == ("fsdp",)


@pytest.mark.parametrize(
    ("name", "axes"),
    [(name, axes) for name in MESHES for n in (1, 2, 3) for axes in itertools.combinations(MESHES[name], n)],
)
def test_groups_are_positions_in_the_mesh_whatever_its_devices(name, axes):
    shape, mesh = MESHES[name], make_mesh(name, order=[3, 6, 1, 0, 7, 2, 5, 4])
    text = on_shards(lambda x: lax.psum(x, axes), P(tuple(shape)), P(), mesh)
    places = np.arange(8).reshape(tuple(shape.values()))
    inside = [list(shape).index(axis) for axis in axes]
    groups = np.moveaxis(places, inside, range(-len(axes), 0))
    groups = groups.reshape(-1, np.prod([shape[axis] for axis in axes]))
    (found,) = read_collectives(text)
    assert sorted(found.groups) == sorted(map(tuple, groups.tolist()))
    assert crossed_axes(found, shape) == axes


def repeat(function, length, **options):
    return lambda x: lax.scan(lambda carry, _: (function(carry), None), x, None, length, **options)[0]


@pytest.mark.parametrize("length", [1, 12])
@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"unroll": 3}], ids=str)
def test_a_scan_counts_by_its_length(length, options):
    text = on_shards(repeat(lambda x: jnp.sin(lax.psum(x, "fsdp")), length, **options))
    assert sums(text) == {"all-reduce": (length, 64 * length)}


def test_nested_scans_multiply():
    inner = repeat(lambda x: jnp.sin(lax.psum(x, "fsdp")), 3)
    text = on_shards(repeat(lambda x: jnp.cos(lax.psum(inner(x), "data")), 5))
    assert numbers(text) == [("all-reduce", 15, 64, ROWS), ("all-reduce", 5, 64, COLUMNS)]
    assert numbers(without_trip_counts(text)) == numbers(text)


def test_a_backward_scan_counts_too():
    """Fully sharded: each layer gathers its weights, again in the backward pass, and scatters their gradient."""

    def loss(weights):
        @jax.checkpoint
        def layer(x, shard):
            return jnp.tanh(x @ lax.all_gather(shard, "fsdp", tiled=True)), None

        return lax.scan(layer, jnp.ones((2, 16)), weights)[0].sum()

    text = on_shards(jax.grad(loss), P(None, "fsdp"), P(None, "fsdp"), shape=(6, 16, 16))
    expected = {"all-gather": (12, 12 * 1024), "reduce-scatter": (6, 6 * 1024)}
    assert sums(text) == sums(without_trip_counts(text)) == expected


def test_what_the_partitioner_inserts():
    mesh = make_mesh()
    rows, whole = (NamedSharding(mesh, spec) for spec in (P("data", "fsdp"), P("data")))

    def multiply(x, weights):
        def layer(x, w):
            return lax.with_sharding_constraint(jnp.tanh(x @ w), rows), None

        return lax.scan(layer, x, weights)[0]

    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=rows)
    weights = jax.ShapeDtypeStruct((3, 16, 16), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp")))
    compiled = jax.jit(multiply, out_shardings=whole).lower(x, weights).compile()
    assert numbers(compiled.as_text()) == [("all-reduce", 3, 256, ROWS), ("all-gather", 1, 256, ROWS)]


def test_pmap_reduces_a_tuple_over_all_at_once():
    summed = jax.pmap(lambda x: lax.psum((x, x.sum()), "batch"), axis_name="batch")
    compiled = summed.lower(jax.ShapeDtypeStruct((8, 4), jnp.float32)).compile()
    assert numbers(compiled.as_text()) == [("all-reduce", 1, 16 + 4, ALL)]


@pytest.mark.parametrize("lengths", [(2, 5), (5, 2)])
def test_of_a_conditional_the_branch_that_sends_the_most(lengths):
    branches = [repeat(lambda x: jnp.sin(lax.psum(x, "data")), length) for length in lengths]
    text = on_shards(lambda x: lax.cond(x[0, 0] > 0, *branches, x))
    assert numbers(text) == [("all-reduce", 5, 64, COLUMNS)]


def loop(step, bound, function):
    def body(state):
        return function(state[0]), state[1] + step

    return lambda x: lax.while_loop(lambda state: state[1] < bound(x), body, (x, 1))[0]


def test_a_loop_by_its_bounds_and_step():
    text = on_shards(loop(2, lambda x: 9, lambda x: jnp.sin(lax.psum(x, "fsdp"))))
    assert numbers(text) == numbers(without_trip_counts(text)) == [("all-reduce", 4, 64, ROWS)]


def test_a_loop_of_unknown_length_is_refused_if_it_holds_collectives():
    assert read_collectives(on_shards(loop(1, lambda x: x[0, 0].astype(int), jnp.sin))) == []
    with pytest.raises(ValueError, match=r"^loop .*while needs a fixed length .*; use jax.lax.scan$"):
        read_collectives(on_shards(loop(1, lambda x: x[0, 0].astype(int), lambda x: lax.psum(x, "fsdp"))))


def program(*lines, others=""):
    """A text written by hand, here and below, in the notation of libtpu; what it leaves out is not read."""
    head = ["HloModule m, num_partitions=8", others, "ENTRY %e (p: f32[4]) -> f32[4] {"]
    return "\n".join([*head, *(f"  {line}" for line in ("%p = f32[4] parameter(0)", *lines)), "}"])


INSTRUCTIONS = """
512 ROWS (f32[4,8], f32[16,8]{1,0:T(8,128)S(1)}) all-gather-start(%p), channel_id=1, replica_groups=[2,4]<=[8]
36 ROWS ((f32[4], s8[2]), (f32[8], s8[4])) all-gather-start(%p, %q), replica_groups=[2,4]<=[8]
24 ALL (f32[4], bf16[4]) all-reduce-start(%p, %q), channel_id=1, replica_groups={}, to_apply=%add
64 COLUMNS bf16[2,8]{1,0:T(8,128)(2,1)} reduce-scatter(%p), channel_id=1, replica_groups=[4,2]<=[2,4]T(1,0)
32 ROWS ((f32[8]), f32[2], u32[]{:S(2)}) reduce-scatter-start(%p), replica_groups=[2,4]<=[8]
8 COLUMNS (f32[2], f32[2], u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,4},{1,5},{2,6},{3,7}}
33 ROWS (pred[3], s4[3], f8e4m3fn[8], c64[2], f32[]) all-reduce(%p), replica_groups={{0,1,2,3},{4,5,6,7}}
4 COLUMNS s8[4] all-to-all(%p), replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, dimensions={0}
4 COLUMNS s8[4] all-to-all(%p), replica_groups=mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'b'}
4 ROWS s8[4] all-reduce(%p), replica_groups=mesh['a'=8] {'a':(2)4}, to_apply=%add
4 ROWS s8[4] all-reduce(%p), replica_groups=mesh[a=4,b=2] {a:(2)2,b}, to_apply=%add
"""


@pytest.mark.parametrize("line", INSTRUCTIONS.strip().splitlines())
def test_one_instruction(line):
    size, groups, instruction = line.split(maxsplit=2)
    kind = re.search(r" ([a-z-]+?)(-start)?\(", instruction)[1]
    text = program(f"%s = {instruction}", f"ROOT %d = f32[4] {kind}-done(%s)")
    assert numbers(text) == [(kind, 1, int(size), {"ROWS": ROWS, "COLUMNS": COLUMNS, "ALL": ALL}[groups])]


COMPUTATIONS = """
%all-reduce-scatter.1 (a: f32[8]) -> f32[2] {
  %all-reduce.1 = f32[8] all-reduce(%a), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %slice = f32[2] dynamic-slice(%all-reduce.1, %shard), dynamic_slice_sizes={2}
}
%first (a: f32[2]) -> (f32[8], s32[2]) {
  %gather.1 = f32[8] all-gather(%a), replica_groups=[2,4]<=[8], frontend_attributes={chain_id="0"}
  ROOT %b = (f32[8], s32[2]) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}
%last (a: f32[8], b: s32[2]) -> f32[8] {
  %gather.2 = f32[8] all-gather(%a), replica_groups=[2,4]<=[8], frontend_attributes={chain_id="0"}
  ROOT %b = f32[8] custom-call(%gather.2), custom_call_target="AsyncCollectiveDone"
}
%exchange (a: f32[4]) -> f32[4] {
  ROOT %all-to-all.1 = f32[4] all-to-all(%a), replica_groups=[4,2]<=[2,4]T(1,0)
}
%layer (state: (s32[], f32[4], s32[])) -> (s32[], f32[4], s32[]) {
  %state = (s32[]{:T(128)}, f32[4], s32[]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %bound = s32[] get-tuple-element(%state), index=2
  %next = s32[] add(%i, %two)
  %two = s32[] constant(2)
  %scattered = f32[2] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="scatter"}
  %started = (f32[8], s32[2]) fusion(%scattered), kind=kCustom, calls=%first
  %gathered = f32[8] fusion(%started), kind=kCustom, calls=%last
  %moving = ((f32[4]), f32[4]) async-start(%x), calls=%exchange
  %moved = f32[4] async-done(%moving), calls=%exchange
  ROOT %after = (s32[], f32[4], s32[]) tuple(%next, %moved, %bound)
}
%goes_on (state: (s32[], f32[4], s32[])) -> pred[] {
  %state = (s32[]{:T(128)}, f32[4], s32[]) parameter(0)
  %test = f32[4] collective-permute(%x), source_target_pairs={{0,1}}
  %i = s32[] get-tuple-element(%state), index=0
  %bound = s32[] get-tuple-element(%state), index=2
  ROOT %less = pred[]{:T(512)} compare(%i, %bound), direction=LT
}
"""


def loop_of_layers(computations=COMPUTATIONS):
    return program(
        "%zero = s32[] constant(0)",
        "%six = s32[] constant(6)",
        "%state = (s32[], f32[4], s32[]) tuple(%zero, %p, %six)",
        "ROOT %w = (s32[], f32[4], s32[]) while(%state), condition=%goes_on, body=%layer",
        others=computations,
    )


def test_a_loop_of_fused_and_asynchronous_collectives_without_a_trip_count():
    text = loop_of_layers()
    thrice = [("reduce-scatter", 3, 32, ROWS), ("all-gather", 3, 32, ROWS), ("all-to-all", 3, 16, COLUMNS)]
    assert numbers(text) == [*thrice, ("collective-permute", 4, 16, ((0, 1),))]
    assert read_collectives(text)[0].name == "scatter"
    assert numbers(text.replace("%", "")) == numbers(text)


def test_a_fused_slice_makes_a_reduce_scatter_whatever_it_is_called():
    renamed = COMPUTATIONS.replace("all-reduce-scatter.1", "fused_computation.7")
    assert numbers(loop_of_layers(renamed)) == numbers(loop_of_layers())
    several = renamed.replace(
        "%all-reduce.1 = f32[8] all-reduce(%a)", "%both = (f32[8], f32[4]) all-reduce(%a, %b)"
    ).replace(
        "ROOT %slice",
        "%all-reduce.1 = f32[8] get-tuple-element(%both), index=0\n"
        "  %other = f32[4] get-tuple-element(%both), index=1\n"
        "  %part = f32[1] dynamic-slice(%other, %shard), dynamic_slice_sizes={1}\n"
        "  ROOT %slice",
    )
    assert numbers(loop_of_layers(several))[0] == ("reduce-scatter", 3, 48, ROWS)
    whole = renamed.replace("ROOT %slice", "%slice").replace("f32[8] all-reduce", "f32[2] all-reduce")
    whole = whole.replace("{2}\n}", "{2}\n  ROOT %sum = f32[2] add(%all-reduce.1, %slice)\n}")
    assert numbers(loop_of_layers(whole))[0] == ("all-reduce", 3, 8, ROWS)  # all of it is used


def test_a_chain_of_collectives_that_nothing_known_starts_is_refused():
    text = loop_of_layers(COMPUTATIONS.replace("AsyncCollectiveStart", "AsyncBegin"))
    with pytest.raises(ValueError, match="chain_id 0 are started in no way that is known"):
        read_collectives(text)


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("%r = s8[4] collective-broadcast(%p), replica_groups={}", "collective-broadcast"),
        ('%r = (s8[4]) send(%p), x={_xla_megascale_transfer_type="ALL_REDUCE"}', "send"),
        ('%r = s8[4] custom-call(%p), custom_call_target="their_gather", replica_groups={{0,1}}', "their_gather"),
    ],
)
def test_what_is_not_counted_is_named(line, kind):
    (found,) = read_collectives(program(line))
    assert (found.kind, found.count, found.groups, wire_bytes(found)) == (kind, 1, (), 0)


@pytest.mark.parametrize(("kind", "size"), [("ALL_REDUCE", 64), ("ALL_GATHER", 128)])
def test_what_hosts_do_between_slices_is_a_collective_of_devices_in_the_same_place(kind, size):
    """As libtpu prints it: the program is that of one slice, here of eight devices."""
    target = f'_xla_megascale_target="{{1,2}}x{{0:1,6}}",_xla_megascale_transfer_type="{kind}"'
    send = f"%r = (bf16[4,8]{{1,0}}, u32[], token[]) send(%p, %t), channel_id=1, frontend_attributes={{{target}}}"
    (found,) = read_collectives(program(send))
    name = kind.lower().replace("_", "-")
    assert (found.kind, found.count, found.bytes) == (name, 1, size)
    assert found.groups == ((0, 8), (1, 9), (6, 14))
    assert crossed_axes(found, {"data.dcn": 2, "fsdp": 8}) == ("data.dcn",)
    assert wire_bytes(found) == 64


def test_a_send_counts_what_it_sends_once():
    """Its result is a tuple of what is sent, a context and a token; the receiver's is the same again."""
    pairs = 'frontend_attributes={_xla_send_recv_source_target_pairs="{{0,1},{1,0}}"}'
    send = f"%r = (bf16[4,8]{{1,0}}, u32[], token[]) send(%p, %t), channel_id=1, {pairs}"
    (found,) = read_collectives(program(send))
    assert (found.kind, found.bytes, found.groups, wire_bytes(found)) == ("send", 64, ((0, 1), (1, 0)), 64)
    assert read_collectives(program(send.replace(" send(", " recv("))) == []


@pytest.mark.parametrize(
    ("line", "match"), [("%r = s8[4] all-reduce(%p), replica_groups=new", "in no known notation: replica_groups=new")]
)
def test_groups_in_a_notation_that_is_not_known_are_refused(line, match):
    with pytest.raises(ValueError, match=match):
        read_collectives(program(line))
    with pytest.raises(ValueError, match=r"ENTRY computation; pass compiled\.as_text"):
        read_collectives(line)
