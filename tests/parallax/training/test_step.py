"""One step: what it reports, what it refuses to learn from, and that nothing but its arguments decides it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from parallax.axes import Parameter
from parallax.config import OptimizerConfig, TrainConfig, TransformerConfig
from parallax.model.transformer import parameters
from parallax.training.loss import make_loss
from parallax.training.optimizer import make_optimizer
from parallax.training.state import TrainState
from parallax.training.step import train_step
from parallelism import reduction
from tests.parallax.inference.models import draw_params

METRICS = {"loss", "ce_loss", "z_loss", "grad_norm", "param_norm", "learning_rate", "tokens", "bad_steps"}
CONFIG = TransformerConfig(
    vocab_size=11, embed_dim=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=12
)

VECTOR = {"w": Parameter((2,), ("embed",), (), decays=False, role="input")}


def linear_loss(params, batch, keys):
    """Σ x·w over the tokens: the averaged gradient is the mean of x, whatever w is. There is a key for each row."""
    loss = jnp.sum(batch["x"] * params["w"][None])
    noise = jax.random.uniform(keys[0], ())
    return {"loss": loss, "ce_loss": loss, "z_loss": noise}, jnp.int32(batch["x"].shape[0])


def make_step(loss_fn, params, learning_rate=lambda step: 1.0, seed=0, **optimizer):
    """A step, and its first state."""
    labels = VECTOR if "w" in params else parameters(CONFIG)
    optimizer = make_optimizer(OptimizerConfig(**optimizer), labels)
    how = {"loss_fn": loss_fn, "optimizer": optimizer, "learning_rate": learning_rate, "seed": seed}
    zero = np.zeros((), np.int32)
    state = TrainState(step=zero, params=params, opt_state=jax.jit(optimizer.init)(params), bad_steps=zero)
    return functools.partial(train_step, gradients=reduction.mean(), **how), state


@functools.cache
def linear_step(clip_norm=1.0):
    """A compiled step on `linear_loss`, and its first state."""
    params = {"w": np.linspace(0.5, 1.5, 4, dtype=np.float32)}
    step, state = make_step(linear_loss, params, lambda step: 0.01 * (step + 1), seed=3, clip_norm=clip_norm)
    return jax.jit(step), state


def rows(seed, scale=1.0):
    return {"x": np.random.default_rng(seed).normal(0, scale, (6, 4)).astype(np.float32)}


def spoiled(value):
    batch = rows(0)
    batch["x"][2, 1] = value
    return batch


def assert_same_bits(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.fixture(scope="module")
def transformer():
    """A step on a tiny model, compiled to donate its state, and a maker of equal first states."""
    step, state = make_step(make_loss(CONFIG, TrainConfig()), draw_params(CONFIG, scale=0.3), lambda step: 1e-2)
    copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state))
    return jax.jit(step, donate_argnums=0), lambda: copy(state)


def tokens(seed):
    ids = np.random.default_rng(seed).integers(0, 11, (4, 7)).astype(np.int32)
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:]}


def test_metrics_are_complete_finite_scalars(transformer):
    step, first = transformer
    state, metrics = step(first(), tokens(0))
    assert set(metrics) == METRICS
    for name, value in metrics.items():
        assert value.shape == (), name
        assert np.isfinite(value), name
    assert metrics["tokens"] == 24
    np.testing.assert_allclose(metrics["loss"], metrics["ce_loss"] + metrics["z_loss"], rtol=1e-6)
    squares = [np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(jax.device_get(state.params))]
    np.testing.assert_allclose(metrics["param_norm"], np.sqrt(sum(squares)), rtol=1e-5)  # float32 sums
    assert metrics["learning_rate"] == np.float32(1e-2)
    assert state.step == 1


def test_randomness_follows_from_seed_and_step_alone():
    """`linear_loss` reports its random number as z_loss: it repeats with the step and differs between steps."""
    step, state = linear_step()
    numbers = [
        float(step(state.replace(step=np.int32(k)), rows(seed))[1]["z_loss"]) for seed in (0, 1) for k in range(8)
    ]
    assert numbers[:8] == numbers[8:]
    assert len(set(numbers)) == 8


def test_state_is_donated(transformer):
    """Every buffer of the old state is reused, so that two states are never held."""
    step, first = transformer
    old = first()
    step(old, tokens(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(value):
    step, state = linear_step()
    good, _ = step(state, rows(1))
    bad, metrics = step(good, spoiled(value))
    assert_same_bits((bad.params, bad.opt_state), (good.params, good.opt_state))
    assert not jnp.isfinite(metrics["loss"])
    assert metrics["bad_steps"] == bad.bad_steps == 1
    assert jnp.isfinite(metrics["param_norm"])
    assert bad.step == good.step + 1


def test_a_finite_loss_with_a_gradient_that_is_not_is_a_bad_step():
    def root(params, batch, keys):
        loss = jnp.sqrt(jnp.sum(params["w"]))  # value 0 and an infinite slope at 0
        return {"loss": loss}, jnp.int32(1)

    step, state = make_step(root, {"w": np.zeros(2, np.float32)})
    new, metrics = step(state, rows(0))
    assert metrics["loss"] == 0
    assert metrics["bad_steps"] == 1
    assert_same_bits((new.params, new.opt_state), (state.params, state.opt_state))


def test_bad_steps_count_runs_and_the_step_always_advances():
    step, state = linear_step()
    finite = [True, False, False, True, False, True, True, False]
    counts = []
    for k, good in enumerate(finite):
        before = state.params["w"]
        state, metrics = step(state, rows(k) if good else spoiled(np.nan))
        assert state.step == k + 1
        assert np.array_equal(before, state.params["w"]) != good
        counts.append(int(metrics["bad_steps"]))
    assert counts == [0, 1, 2, 0, 1, 0, 0, 1]


def test_a_skipped_step_delays_neither_rate_nor_randomness():
    """Step 1 after a bad step 0 has the rate and the key of step 1."""
    step, state = linear_step()
    skipped, _ = step(state, spoiled(np.nan))
    taken, _ = step(state, rows(0))
    (_, after_bad), (_, after_good) = step(skipped, rows(1)), step(taken, rows(1))
    assert after_bad["learning_rate"] == after_good["learning_rate"] == np.float32(0.02)
    assert after_bad["z_loss"] == after_good["z_loss"]  # where linear_loss reports its random number


def test_gradient_norm_is_of_the_averaged_gradient_before_clipping():
    batch = rows(2, scale=50.0)
    expected = np.linalg.norm(batch["x"].mean(axis=0))
    assert expected > 10
    outcomes = []
    for clip_norm in (1.0, 0.0):
        step, state = linear_step(clip_norm)
        new, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["grad_norm"], expected, rtol=1e-6)
        outcomes.append(new)
    moments = [optax.tree.norm(optax.tree.get(new.opt_state, "mu")) for new in outcomes]
    np.testing.assert_allclose(moments, [0.1 * 1.0, 0.1 * expected], rtol=1e-5)  # what was clipped is what is kept


def test_update_is_scaled_by_the_rate_of_the_step():
    """At twice the step number plus one the same update is twice as long."""
    step, state = linear_step()
    moved = [step(state.replace(step=np.int32(k)), rows(4))[0].params["w"] for k in (0, 1)]
    start = state.params["w"]
    np.testing.assert_allclose(moved[1] - start, 2 * (moved[0] - start), rtol=1e-4, atol=1e-7)  # cancellation


def test_a_batch_without_targets_is_finite():
    def nothing(params, batch, keys):
        return {"loss": 0.0 * jnp.sum(params["w"])}, jnp.int32(0)

    step, state = make_step(nothing, {"w": np.ones(2, np.float32)}, weight_decay=0.0)
    new, metrics = step(state, rows(0))
    assert metrics["loss"] == metrics["grad_norm"] == metrics["bad_steps"] == 0
    assert_same_bits(new.params, state.params)
