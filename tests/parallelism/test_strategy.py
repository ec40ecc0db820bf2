"""The promise of the whole: one curve, one gradient and one state, whatever the strategy and the model."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from parallax.config import OptimizerConfig
from parallax.layers import attention
from parallax.model.transformer import parameters
from parallax.training.loss import make_evaluation
from parallax.training.optimizer import make_optimizer
from parallax.training.state import make_init, params_sha256, state_axes
from parallelism.strategies import STRATEGIES, get_strategy
from parallelism.strategy import Layout

LAYOUTS = [("single", ""), ("pmap", ""), ("mesh", "data=8"), ("mesh", "fsdp=8"), ("mesh", "data=2,fsdp=4")]


CURVES = [("single", "", 1), ("pmap", "", 2), ("mesh", "data=2,fsdp=4", 1)]


@pytest.fixture(scope="module")
def compiled(make_tiny):
    """A model, a strategy for it, and its step compiled from shapes."""

    @functools.cache
    def of(*layout):
        tiny = make_tiny(embed_dim=32)
        strategy = tiny.strategy(*layout)
        shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tiny.batch(0).items()}
        return tiny, strategy, strategy.lower(tiny.step(strategy), shapes).compile()

    return of


@pytest.fixture(scope="module")
def losses(compiled):
    """Of 30 steps from the same weights, over four batches."""

    @functools.cache
    def run(*layout):
        tiny, strategy, take = compiled(*layout)
        state, losses = strategy.init(), []
        for number in range(30):
            state, metrics = take(state, strategy.put_batch(tiny.batch(number % 4)))
            losses.append(metrics["loss"].item())  # simulated devices may lock up when steps are queued
        return losses

    return run


@pytest.mark.parametrize("layout", CURVES[1:], ids=str)
def test_every_layout_has_the_same_curve(losses, layout):
    """1e-5 is what docs/evidence/equivalence.md holds over 100 steps, on all layouts."""
    one = losses(*CURVES[0])
    assert np.mean(one[-4:]) < np.mean(one[:4]) - 0.15, "there must be something to agree on"
    np.testing.assert_allclose(losses(*layout), one, rtol=1e-5)


def test_random_weights_are_the_same_wherever_they_are_born(tiny):
    """To the bit: each device makes its shard of the same random numbers."""
    init = make_init(tiny.config, make_optimizer(OptimizerConfig(), parameters(tiny.config)), seed=0)
    layouts = [Layout(strategy=name, mesh=mesh, batch_size=16, seq_len=6) for name, mesh in (LAYOUTS[0], LAYOUTS[-1])]
    born = [get_strategy(layout, init, state_axes(tiny.config, init)).init() for layout in layouts]
    assert params_sha256(born[0].params) == params_sha256(born[1].params)


@pytest.mark.parametrize(("optimizer", "layouts"), [("adamw", LAYOUTS), ("muon", LAYOUTS[1::3])])
def test_a_state_moves_between_layouts_to_the_bit(make_tiny, optimizer, layouts):
    """Out through numpy, as a checkpoint would go, and into every other layout, where `abstract` says."""
    tiny = make_tiny(optimizer)
    strategies = [tiny.strategy(name, mesh) for name, mesh in layouts]
    expected = params_sha256(tiny.init_state())
    for source in strategies:
        state = source.canonical(source.init())
        assert params_sha256(state) == expected
        jax.tree.map(assert_placed, state, source.abstract())
        on_disk = jax.tree.map(np.asarray, state)
        for target in strategies:
            restored = jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), on_disk, target.abstract())
            adopted = target.adopt(restored)
            assert jax.tree.structure(adopted) == jax.tree.structure(target.init())
            assert params_sha256(target.canonical(adopted)) == expected


@pytest.mark.parametrize("layout", LAYOUTS[1::3], ids=str)
def test_a_part_of_a_first_state_is_what_the_whole_has_there(tiny, layout):
    """All but parameters, as a run takes it that begins with those of another."""
    strategy = tiny.strategy(*layout)

    def part(state):
        return dataclasses.replace(state, params={})

    own = strategy.canonical(strategy.init(part))
    jax.tree.map(np.testing.assert_array_equal, own, part(strategy.canonical(strategy.init())))
    jax.tree.map(assert_placed, own, part(strategy.abstract()))


def assert_placed(leaf, shape):
    assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)
    assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)


def bytes_of_a_device(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("layout", CURVES, ids=str)
def test_a_step_lowered_from_shapes_takes_the_state_in_its_place_and_donates_it(compiled, layout):
    tiny, strategy, take = compiled(*layout)
    batch = tiny.batch(0)
    state, placed = strategy.init(), strategy.put_batch(batch)
    held, memory = bytes_of_a_device((state, placed)), take.memory_analysis()
    assert held <= memory.argument_size_in_bytes <= 1.2 * held  # words are rounded up
    assert memory.temp_size_in_bytes > 0
    new, metrics = take(state, placed)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    jax.tree.map(assert_placed, strategy.canonical(new), strategy.abstract())
    assert all(value.shape == () and np.isfinite(value) for value in metrics.values())
    assert metrics["tokens"] == np.sum(batch["targets"] != -1)


def test_evaluation_is_the_same_everywhere(tiny):
    batch, results = tiny.batch(4), []
    for name, mesh in (LAYOUTS[0], LAYOUTS[1], LAYOUTS[-1]):
        strategy = tiny.strategy(name, mesh)
        params = strategy.canonical(strategy.init()).params
        total, tokens = strategy.compile_evaluation(make_evaluation(tiny.config))(params, batch)
        assert tokens == np.sum(batch["targets"] != -1)
        results.append(total.item())
    np.testing.assert_allclose(results, results[0], rtol=1e-5)  # order of float32 sums


@pytest.mark.parametrize(("name", "mesh"), LAYOUTS)
def test_every_strategy_says_what_it_is_and_waits_to_be_stopped(tiny, name, mesh):
    strategy = tiny.strategy(name, mesh)
    assert strategy.describe().startswith(f"{name}: ")
    assert "\n" not in strategy.describe()
    assert len(strategy.devices) == (1 if name == "single" else 8)
    assert strategy.devices == jax.devices()[: len(strategy.devices)]
    assert strategy.is_writer
    assert not strategy.stop_requested()
    np.testing.assert_array_equal(strategy.rows(16), np.arange(16))


def test_unknown_strategy_is_refused_with_those_that_are_known(tiny):
    with pytest.raises(ValueError, match="strategy='ddp' is not one of single, pmap, mesh; try mesh") as caught:
        tiny.strategy("ddp")
    remedy = re.search(r"try (\w+)$", str(caught.value))[1]
    tiny.strategy(remedy)


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "mesh"])
def test_a_mesh_for_a_strategy_without_one_is_refused(tiny, name):
    with pytest.raises(ValueError, match=f"mesh='data=8' needs strategy mesh, not {name}; add --strategy mesh"):
        tiny.strategy(name, "data=8")


@pytest.mark.parametrize(("name", "mesh", "accumulate"), [("pmap", "", 3), ("mesh", "fsdp=8", 2)])
@pytest.mark.parametrize("batch_size", [1, 12, 100])
def test_a_batch_that_cannot_be_dealt_is_refused_with_a_remedy(tiny, name, mesh, accumulate, batch_size):
    with pytest.raises(ValueError, match=f"batch_size={batch_size} must be divisible by .*=8") as caught:
        tiny.strategy(name, mesh, accumulate, batch_size=batch_size)
    remedy = int(re.search(r"try --batch-size (\d+)$", str(caught.value))[1])
    assert len(tiny.strategy(name, mesh, accumulate, batch_size=remedy).rows(remedy)) == remedy


MESHES = ["fsdp=2,sequence=2,tensor=2", "data=2,fsdp=2x2"]
EVERYTHING = {
    "qk_norm": True,
    "attention_bias": True,
    "tie_embeddings": False,
    "sliding_window": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "logit_softcap": 5.0,
}
TOKENS = 8


@functools.cache
def stepped(tiny, name, mesh="", accumulate=1, segments=False):
    """Parameters less their gradient, and the metrics, after one batch with uneven targets; 11 words in 16 rows.

    All devices apply the same summed gradient, so copies of a parameter stay equal to the bit.
    """
    strategy = tiny.strategy(name, mesh, accumulate, seq_len=TOKENS)
    batch = tiny.batch(3, length=TOKENS)
    if segments:
        batch["segments"] = (np.arange(TOKENS)[None] // 3 + np.zeros((16, 1))).astype(np.int32)
    state, metrics = strategy.compile(tiny.step(strategy))(strategy.init(), strategy.put_batch(batch))
    jax.tree.map(assert_copies_are_equal, state.params)
    return jax.device_get((strategy.canonical(state).params, metrics))


def assert_copies_are_equal(leaf):
    copies = {}
    for shard in leaf.addressable_shards:
        copies.setdefault(str(shard.index), []).append(np.asarray(shard.data))
    for same in copies.values():
        assert all(np.array_equal(copy, same[0]) for copy in same)


def assert_same_gradient(tiny, *layout, segments=False):
    """Within the order of float32 sums."""
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, stepped(tiny, *layout, segments=segments), stepped(tiny, "single", segments=segments))


@pytest.mark.parametrize("layout", [("pmap", "", 2), ("mesh", "data=2,fsdp=4", 2)], ids=str)
def test_uneven_rows_give_the_same_gradient_everywhere_and_drop_the_same(make_tiny, layout):
    assert_same_gradient(make_tiny("gradient", num_kv_heads=2, dropout_rate=0.5), *layout)


@pytest.mark.parametrize("mesh", MESHES)
def test_the_gradient_is_that_of_one_device(make_tiny, mesh):
    assert_same_gradient(make_tiny("gradient", **EVERYTHING), "mesh", mesh, segments=True)


def test_the_gradient_is_that_of_one_device_in_chunks(make_tiny, monkeypatch):
    """Where rows are split, too, each drops the same."""
    monkeypatch.setattr(attention, "CHUNK", 1)  # so that 8 tokens, or 4 of a shard, are long
    tiny = make_tiny("gradient", num_kv_heads=2, dropout_rate=0.1)
    assert_same_gradient(tiny, "mesh", "fsdp=2,sequence=2,tensor=2")
