"""Arrays that are born where the rules say, and shards that are never the whole."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from parallax import axes
from parallelism import reduction
from parallelism.mesh import MeshPlacement
from parallelism.rules import RULE_SETS


@pytest.fixture(scope="module")
def fsdp(tiny):
    return tiny.strategy("mesh", "fsdp=8")


@pytest.fixture
def placement():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    return MeshPlacement(mesh, RULE_SETS["default"])


def size_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_state_is_born_in_eighths(fsdp, tiny):
    """Every parameter and every moment has an embedding dim; only counters are whole everywhere."""
    state = fsdp.init()
    split = (state.params, state.opt_state)
    arrays = [leaf for leaf in jax.tree.leaves(split) if leaf.ndim]
    assert len(arrays) == 3 * len(jax.tree.leaves(state.params)), "a parameter has two moments"
    for leaf in arrays:
        assert {shard.device for shard in leaf.addressable_shards} == set(jax.devices())
        for shard in leaf.addressable_shards:
            assert shard.data.nbytes * 8 == leaf.nbytes
    shardings = jax.tree.map(lambda leaf: leaf.sharding, fsdp.abstract())
    memory = jax.jit(tiny.init_state, out_shardings=shardings).lower().compile().memory_analysis()
    assert memory.output_size_in_bytes < 1.2 * size_of(arrays) / 8  # a table of pointers comes with them
    assert memory.temp_size_in_bytes < size_of(arrays) / 4, "no device holds the whole while the state is made"


def test_state_is_split_over_fsdp_and_repeated_over_data(tiny):
    strategy = tiny.strategy("mesh", "data=2,fsdp=4")
    gate = strategy.init().params["blocks"]["mlp"]["gate"]
    assert gate.sharding.spec == PartitionSpec(None, "fsdp", None)
    for i, shard in enumerate(gate.addressable_shards):
        part = i % 4
        assert shard.data.shape == (1, 4, 24)
        np.testing.assert_array_equal(shard.data, np.asarray(gate)[:, 4 * part : 4 * part + 4])


def test_a_model_that_cannot_be_split_is_refused_with_a_remedy(make_tiny):
    tiny = make_tiny(embed_dim=12)
    with pytest.raises(ValueError, match="embed=12 must be divisible by fsdp=8; try a mesh with") as caught:
        tiny.strategy("mesh", "fsdp=8")
    fewer, wider = re.search(r"fsdp=(\d+) or embed=(\d+)$", str(caught.value)).groups()
    tiny.strategy("mesh", f"data={8 // int(fewer)},fsdp={fewer}")
    make_tiny(embed_dim=int(wider)).strategy("mesh", "fsdp=8")


def test_constraints_place_what_the_model_names(placement):
    def place(x):
        with axes.bound(placement):
            return axes.constrain(x, "batch", "length", "act_embed")

    x = np.arange(16.0).reshape(8, 2, 1)
    placed = jax.jit(place)(x)
    assert placed.sharding.spec[0] == ("data", "fsdp")
    np.testing.assert_array_equal(placed, x)


def test_local_functions_see_their_shards(placement):
    """Under a placement a function gets the rows of one device and may talk to the others; without one, all rows."""
    seen = []

    def centred(x_BT, w_T):
        seen.append((x_BT.shape, w_T.shape))
        return axes.constrain(x_BT * w_T[None], "batch", "length")  # nothing is bound inside, so this is no error

    names = ("batch", "length"), ("length",)
    x, w = np.arange(16.0, dtype=np.float32).reshape(8, 2), np.array([1, -2], np.float32)
    assert axes.local(centred, names, names[0]) is centred

    def under(x, w):
        with axes.bound(placement):
            return axes.local(centred, names, names[0])(x, w)

    out = jax.jit(under)(x, w)
    assert set(seen) == {((1, 2), (2,))}
    assert out.sharding.is_equivalent_to(placement.sharding(names[0], x.shape), 2)
    np.testing.assert_array_equal(out, x * w)


def test_local_refuses_what_the_rules_cannot_split(placement):
    with axes.bound(placement), pytest.raises(ValueError, match="batch=6 must be divisible by data=2×fsdp=4"):
        axes.local(lambda x: x, [("batch", "length")], ("batch", "length"))(np.zeros((6, 2)))


def test_describes_itself_by_its_axes(tiny, fsdp):
    assert fsdp.describe() == "mesh: 8 cpu devices as fsdp=8"
    assert tiny.strategy("mesh", "data=2,fsdp=4").describe() == "mesh: 8 cpu devices as data=2, fsdp=4"


def test_layers_may_be_split_by_an_axis_that_splits_the_batch(make_tiny, tmp_path):
    """Then no device can gather a layer as it comes to it, and the compiler does."""
    tiny = make_tiny("gradient", num_layers=2)
    rules = tmp_path / "rules.json"
    rules.write_text('{"batch": ["data", "fsdp"], "layers": ["fsdp"]}')
    losses = []
    for strategy in (tiny.strategy("single"), tiny.strategy("mesh", "data=4,fsdp=2", rules=str(rules))):
        batch = strategy.put_batch({name: x[strategy.rows(16)] for name, x in tiny.batch(0).items()})
        _, metrics = strategy.compile(tiny.step(strategy))(strategy.init(), batch)
        losses.append(float(metrics["loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)  # float32 sums in another order


def shard_maps(jaxpr):
    """Of each shard_map in a program, whether it is checked."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "shard_map":
            yield equation.params["check_vma"]
        for value in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            if inner := getattr(value, "jaxpr", value if hasattr(value, "eqns") else None):
                yield from shard_maps(inner)


@pytest.mark.parametrize(
    ("mesh", "layout", "sizes", "checked"),
    [
        ("data=2,fsdp=4", {"accumulate": 2}, {"attention": "blocks"}, {True}),
        ("data=8", {"reduction": "exact"}, {}, {True}),
        ("data=2,sequence=2,tensor=2", {}, {"num_kv_heads": 2, "dropout_rate": 0.5}, {True}),
        ("fsdp=8", {"seq_len": 1100}, {}, {True}),
        ("fsdp=8", {"seq_len": 128}, {"attention": "splash"}, {False}),
        ("data=8", {"seq_len": 128, "reduction": "exact"}, {"attention": "splash"}, {False}),
        ("data=4,tensor=2", {"seq_len": 128}, {"attention": "splash", "num_kv_heads": 2}, {False, True}),
    ],
    ids=str,
)
def test_what_differs_between_devices_is_checked_but_through_kernels(make_tiny, mesh, layout, sizes, checked):
    """Under tensor each device adds up the gradient of its rows of the table beside the kernel."""
    tiny = make_tiny(**sizes)
    strategy = tiny.strategy("mesh", mesh, **layout)
    batch = tiny.batch(0, length=layout.get("seq_len", 6))
    traced = strategy.compile(tiny.step(strategy)).trace(strategy.abstract(), batch)
    assert set(shard_maps(traced.jaxpr.jaxpr)) == checked


def test_a_sum_that_is_missing_is_refused(tiny, monkeypatch):
    """Each device would go on with the gradient of its own rows."""
    scatter = reduction.scatter

    def forgetful(names, unreduced, *others):
        return scatter(names, jax.tree.map(lambda _: (), unreduced, is_leaf=lambda x: isinstance(x, tuple)), *others)

    monkeypatch.setattr(reduction, "scatter", forgetful)
    strategy = tiny.strategy("mesh", "data=8")
    with pytest.raises(ValueError, match="out_specs"):
        strategy.lower(tiny.step(strategy), tiny.batch(0))


def test_a_local_result_that_differs_between_replicas_is_refused(placement):
    def function(x):
        with axes.bound(placement):
            return axes.local(lambda x: x + jax.lax.axis_index("fsdp"), [(None,)], (None,))(x)

    with pytest.raises(ValueError, match="out_specs"):
        jax.jit(function)(np.zeros(3, np.int32))
