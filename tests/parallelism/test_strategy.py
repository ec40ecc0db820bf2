"""The promise of the whole: one curve, one gradient and one state, whatever the strategy and the model."""

import functools
import re

import jax
import numpy as np
import pytest

from parallax import axes
from parallax.config import NANO_CONFIG, OptimizerConfig, TrainConfig
from parallax.layers import attention
from parallax.model.transformer import parameters
from parallax.training.loss import make_evaluation, make_loss
from parallax.training.optimizer import make_learning_rate, make_optimizer
from parallax.training.state import make_init, params_sha256, state_axes
from parallax.training.step import train_step
from parallelism.mesh import MeshPlacement
from parallelism.rules import RULE_SETS
from parallelism.strategies import STRATEGIES, get_strategy
from parallelism.strategy import Layout

LAYOUTS = [("single", ""), ("pmap", ""), ("mesh", "data=8"), ("mesh", "fsdp=8"), ("mesh", "data=2,fsdp=4")]
STEPS, ROWS, LENGTH = 30, 32, 16


def markov_batches():
    """STEPS batches of a chain over 65 symbols, each followed by one of a few, so that there is much to learn."""
    rng = np.random.default_rng(0)
    chain = rng.dirichlet(np.full(65, 0.05), size=65).cumsum(axis=1)
    ids = np.zeros((STEPS, ROWS, LENGTH + 1), np.int32)
    ids[..., 0] = rng.integers(0, 65, (STEPS, ROWS))
    draws = rng.random(ids.shape)
    for t in range(LENGTH):
        ids[..., t + 1] = (draws[..., t, None] > chain[ids[..., t]]).sum(axis=-1).clip(max=64)
    return [{"inputs": rows[:, :-1], "targets": rows[:, 1:]} for rows in ids]


CONFIG = NANO_CONFIG.replace(num_layers=2, embed_dim=64, mlp_dim=128)


class Nano:
    """Half of the NANO preset in float32 without dropout, at rate 1e-2 after 5 steps of warm-up."""

    def __init__(self):
        self._learning = OptimizerConfig(learning_rate=1e-2, warmup_steps=5)
        self._optimizer = make_optimizer(self._learning, parameters(CONFIG))
        self._init_state = make_init(CONFIG, self._optimizer, seed=0)
        self._axes = state_axes(CONFIG, self._init_state)
        self._batches = markov_batches()

    def strategy(self, name, mesh="", accumulate=1):
        sizes = {"batch_size": ROWS, "seq_len": LENGTH}
        layout = Layout(strategy=name, mesh=mesh, accumulate=accumulate, **sizes)
        return get_strategy(layout, self._init_state, self._axes)

    def losses(self, strategy, first_state):
        """Of STEPS steps from a state on the host."""
        step = functools.partial(
            train_step,
            loss_fn=make_loss(CONFIG, TrainConfig()),
            optimizer=self._optimizer,
            learning_rate=make_learning_rate(self._learning, STEPS),
            gradients=strategy.gradients,
            seed=0,
        )
        take, losses = strategy.compile(step), []
        state = strategy.adopt(
            jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), first_state, strategy.abstract())
        )
        for batch in self._batches:
            state, metrics = take(state, strategy.put_batch(batch))
            losses.append(metrics["loss"].item())  # simulated devices may lock up when steps are queued
        return np.array(losses)


@pytest.fixture(scope="module")
def nano():
    return Nano()


@pytest.fixture(scope="module")
def first_state(nano):
    """As a single device makes it, on the host; made once."""
    return jax.tree.map(np.asarray, nano.strategy("single").init())


@pytest.fixture(scope="module")
def reference(nano, first_state):
    losses = nano.losses(nano.strategy("single"), first_state)
    assert abs(losses[0] - np.log(65)) < 0.1
    assert losses[-5:].mean() < losses[0] - 1, "there must be something to agree on"
    return losses


@pytest.mark.parametrize(
    ("name", "mesh", "accumulate"), [("mesh", "data=8", 1), ("mesh", "data=2,fsdp=4", 1), ("pmap", "", 4)]
)
def test_every_layout_has_the_same_curve(nano, first_state, reference, name, mesh, accumulate):
    """1e-5 is what docs/evidence/equivalence.md holds over 100 steps, on all layouts."""
    losses = nano.losses(nano.strategy(name, mesh, accumulate), first_state)
    np.testing.assert_allclose(losses, reference, rtol=1e-5)


def test_random_weights_are_the_same_wherever_they_are_born(nano, first_state):
    """To the bit: each device makes its shard of the same random numbers."""
    born = nano.strategy("mesh", "data=2,fsdp=4").init()
    assert params_sha256(born.params) == params_sha256(first_state.params)


@pytest.fixture(scope="module")
def bare(make_tiny):
    """Steps that leave the params less their gradient, in float32, of a batch with very uneven rows."""
    tiny = make_tiny("gradient")

    def run(name, mesh="", accumulate=1):
        strategy = tiny.strategy(name, mesh, accumulate)
        step = strategy.compile(tiny.step(strategy))
        state, metrics = step(strategy.init(), strategy.put_batch(tiny.batch(3)))
        return jax.device_get((strategy.canonical(state).params, metrics))

    return run


@pytest.fixture(scope="module")
def single_step(bare):
    return bare("single")


@pytest.mark.parametrize(("name", "mesh", "accumulate"), [("pmap", "", 2), ("mesh", "data=2,fsdp=4", 2)])
def test_uneven_rows_give_the_same_gradient_everywhere(bare, single_step, name, mesh, accumulate):
    params, metrics = bare(name, mesh, accumulate)
    assert metrics["tokens"] == single_step[1]["tokens"]
    for key, value in single_step[1].items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-5, err_msg=key)  # order of float32 sums
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), params, single_step[0])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_state_moves_between_layouts_to_the_bit(make_tiny, optimizer):
    """Out through numpy, as a checkpoint would go, and into every other layout, where `abstract` says."""
    tiny = make_tiny(optimizer)
    strategies = [tiny.strategy(name, mesh) for name, mesh in LAYOUTS]
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


def assert_placed(leaf, shape):
    assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)
    assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)


def bytes_of_a_device(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("name", "mesh"), [LAYOUTS[0], LAYOUTS[1], LAYOUTS[3]])
def test_a_step_lowered_from_shapes_takes_the_state_in_its_place_and_donates_it(tiny, name, mesh):
    strategy, batch = tiny.strategy(name, mesh), tiny.batch(0)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
    compiled = strategy.lower(tiny.step(strategy), shapes).compile()
    state, placed = strategy.init(), strategy.put_batch(batch)
    held, memory = bytes_of_a_device((state, placed)), compiled.memory_analysis()
    assert held <= memory.argument_size_in_bytes <= 1.2 * held  # words are rounded up
    assert memory.temp_size_in_bytes > 0
    new, metrics = compiled(state, placed)
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
    assert not strategy.stop_requested(1)
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


MESHES = ["tensor=2,data=4", "sequence=2,data=4", "fsdp=2,sequence=2,tensor=2", "fsdp=2x4", "data=2,fsdp=2x2"]
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
def stepped(tiny, name, mesh="", segments=False):
    """Parameters less their gradient, and the metrics, after one batch with uneven targets; 11 words in 16 rows."""
    strategy = tiny.strategy(name, mesh, seq_len=TOKENS)
    batch = tiny.batch(3, length=TOKENS)
    if segments:
        batch["segments"] = (np.arange(TOKENS)[None] // 3 + np.zeros((16, 1))).astype(np.int32)
    state, metrics = strategy.compile(tiny.step(strategy))(strategy.init(), strategy.put_batch(batch))
    return jax.device_get((strategy.canonical(state).params, metrics))


def assert_same_gradient(tiny, mesh, segments):
    """Within the order of float32 sums."""
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, stepped(tiny, "mesh", mesh, segments), stepped(tiny, "single", "", segments))


@pytest.mark.parametrize("mesh", MESHES)
def test_the_gradient_is_that_of_one_device(make_tiny, mesh):
    assert_same_gradient(make_tiny("gradient", **EVERYTHING), mesh, segments=True)


def test_the_gradient_is_that_of_one_device_in_chunks(make_tiny, monkeypatch):
    monkeypatch.setattr(attention, "CHUNK", 1)  # so that 8 tokens, or 4 of a shard, are long
    tiny = make_tiny("gradient", num_kv_heads=2)
    assert_same_gradient(tiny, "fsdp=2,sequence=2,tensor=2", segments=False)


@pytest.fixture
def placement():
    mesh = jax.make_mesh((2, 2, 2), ("data", "sequence", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    return MeshPlacement(mesh, RULE_SETS["default"])


def test_every_device_draws_its_own_numbers(placement):
    def draw(x, nothing, key):
        assert nothing is None
        return x + jax.random.uniform(key, x.shape)

    names = ("batch", "length", "act_heads")

    def function(x, key):
        with axes.bound(placement):
            return axes.local(draw, (names, (), ()), names)(x, None, key)

    drawn = np.asarray(jax.jit(function)(np.zeros((2, 2, 2), np.float32), jax.random.key(0)))
    assert len(np.unique(drawn)) == 8


@pytest.mark.parametrize("mesh", ["tensor=2,data=4", "data=2,fsdp=4"])
def test_dropout_leaves_replicas_equal(make_tiny, mesh):
    """A device drops its own values, and all of them apply the same summed gradient."""
    tiny = make_tiny(num_kv_heads=2, dropout_rate=0.5)
    strategy = tiny.strategy("mesh", mesh)
    batch = strategy.put_batch(tiny.batch(1))
    state, _ = strategy.compile(tiny.step(strategy))(strategy.init(), batch)
    for leaf in jax.tree.leaves(state.params):
        copies = {}
        for shard in leaf.addressable_shards:
            copies.setdefault(str(shard.index), []).append(np.asarray(shard.data))
        for same in copies.values():
            assert all(np.array_equal(copy, same[0]) for copy in same)
