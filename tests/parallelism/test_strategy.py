"""The promise of the whole: one curve and one state, whatever the strategy."""

import functools
import re

import jax
import numpy as np
import pytest

from parallax.config import NANO_CONFIG, OptimizerConfig, TrainConfig
from parallax.model.transformer import parameters
from parallax.training.fingerprint import params_sha256
from parallax.training.loss import make_evaluation, make_loss
from parallax.training.optimizer import make_learning_rate, make_optimizer
from parallax.training.state import make_init, state_axes
from parallax.training.step import train_step
from parallelism.strategies import STRATEGIES, get_strategy
from parallelism.strategy import Layout

LAYOUTS = [("single", ""), ("pmap", ""), ("mesh", "data=8"), ("mesh", "fsdp=8"), ("mesh", "data=2,fsdp=4")]
STEPS, ROWS, LENGTH = 100, 32, 16


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


class Nano:
    """The NANO preset in float32 without dropout, at rate 3e-4 after 20 steps of warm-up."""

    def __init__(self):
        self._learning = OptimizerConfig(learning_rate=3e-4, warmup_steps=20)
        self._optimizer = make_optimizer(self._learning, parameters(NANO_CONFIG))
        self._init_state = make_init(NANO_CONFIG, self._optimizer, seed=0)
        self._axes = state_axes(NANO_CONFIG, self._init_state)
        self._batches = markov_batches()

    def strategy(self, name, mesh="", accumulate=1):
        sizes = {"batch_size": ROWS, "seq_len": LENGTH}
        layout = Layout(strategy=name, mesh=mesh, accumulate=accumulate, **sizes)
        return get_strategy(layout, self._init_state, self._axes)

    def losses(self, strategy, first_state):
        """Of STEPS steps from a state on the host."""
        step = functools.partial(
            train_step,
            loss_fn=make_loss(NANO_CONFIG, TrainConfig()),
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
    """As a single device makes it, on the host; made once, since compiling it takes longer than fifty steps."""
    return jax.tree.map(np.asarray, nano.strategy("single").init())


@pytest.fixture(scope="module")
def reference(nano, first_state):
    losses = nano.losses(nano.strategy("single"), first_state)
    assert abs(losses[0] - np.log(65)) < 0.1
    assert losses[-10:].mean() < losses[0] - 1, "there must be something to agree on"
    return losses


@pytest.mark.parametrize(
    ("name", "mesh", "accumulate"),
    [*[(name, mesh, 1) for name, mesh in LAYOUTS[1:]], ("single", "", 4), ("pmap", "", 4)],
)
def test_every_layout_has_the_same_curve(nano, first_state, reference, name, mesh, accumulate):
    """1e-5 is ten times what the order of float32 sums came to over 100 steps at this rate."""
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
@pytest.mark.parametrize(("name", "mesh"), LAYOUTS)
def test_a_state_moves_between_layouts_to_the_bit(make_tiny, name, mesh, optimizer):
    """Out through numpy, as a checkpoint would go, and into every other layout."""
    tiny = make_tiny(optimizer)
    source = tiny.strategy(name, mesh)
    state = source.canonical(source.init())
    expected, on_disk = params_sha256(state), jax.tree.map(np.asarray, state)
    assert params_sha256(tiny.init_state()) == expected
    for other_name, other_mesh in LAYOUTS:
        target = tiny.strategy(other_name, other_mesh)
        restored = jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), on_disk, target.abstract())
        adopted = target.adopt(restored)
        assert jax.tree.structure(adopted) == jax.tree.structure(target.init())
        assert params_sha256(target.canonical(adopted)) == expected


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
    assert strategy.is_writer
    assert not strategy.stop_requested(1)


def test_unknown_strategy_is_refused_with_those_that_are_known(tiny):
    with pytest.raises(
        ValueError, match="strategy='ddp' is not one of single, pmap, mesh; try mesh"
    ) as caught:
        tiny.strategy("ddp")
    remedy = re.search(r"try (\w+)$", str(caught.value))[1]
    tiny.strategy(remedy)


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "mesh"])
def test_a_mesh_for_a_strategy_without_one_is_refused(tiny, name):
    with pytest.raises(
        ValueError, match=f"mesh='data=8' needs strategy mesh, not {name}; add --strategy mesh"
    ):
        tiny.strategy(name, "data=8")
