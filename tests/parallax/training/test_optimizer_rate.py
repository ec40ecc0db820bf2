"""The learning rate of a step, by closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallax.config import OptimizerConfig
from parallax.training.optimizer import make_learning_rate


def rates(config, steps):
    learning_rate = make_learning_rate(config, steps)
    return np.array([learning_rate(step) for step in np.arange(steps, dtype=np.int32)])


@pytest.mark.parametrize(
    ("steps", "warmup"),
    [(1, None), (1, 0), (1, 1), (2, 0), (2, 1), (5, 5), (7, 6), (7, 3), (12, 0), (60, None), (70, 20)],
)
def test_rate_rises_in_a_line_and_falls_along_a_cosine(steps, warmup):
    config = OptimizerConfig(learning_rate=0.5, warmup_steps=warmup, final_rate=0.2)
    rate, warmup = rates(config, steps), config.settled(steps).warmup_steps
    rising = 0.5 * np.arange(1, warmup + 1) / (warmup + 1)
    np.testing.assert_allclose(rate[:warmup], rising, rtol=1e-6)  # float32
    if warmup < steps:
        progress = np.arange(steps - warmup) / max(1, steps - 1 - warmup)
        falling = 0.5 * (0.2 + 0.8 * (1 + np.cos(np.pi * progress)) / 2)
        np.testing.assert_allclose(rate[warmup:], falling, rtol=1e-6)
        np.testing.assert_allclose(rate[warmup], 0.5, rtol=1e-6)
    if warmup < steps - 1:
        np.testing.assert_allclose(rate[-1], 0.5 * 0.2, rtol=1e-6)


def test_rate_is_the_same_traced_and_never_rises_again():
    config, steps = OptimizerConfig(learning_rate=1e-3, warmup_steps=4), 30
    traced = jax.jit(jax.vmap(make_learning_rate(config, steps)))(jnp.arange(2 * steps, dtype=jnp.int32))
    np.testing.assert_allclose(traced[:steps], rates(config, steps), rtol=1e-6)
    np.testing.assert_allclose(traced[steps:], 1e-4, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 9, 10, 15, 999, 1000, 100_000])
def test_default_warmup_is_a_tenth_of_the_run_up_to_a_hundred_steps(steps):
    assert OptimizerConfig().settled(steps).warmup_steps == min(100, steps // 10)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 2), (10, 11), (100, 1000)])
def test_warmup_longer_than_the_run_is_refused_with_a_remedy(steps, warmup):
    with pytest.raises(ValueError, match=f"warmup_steps={warmup} must not exceed steps={steps}") as caught:
        make_learning_rate(OptimizerConfig(warmup_steps=warmup), steps)
    assert "\n" not in str(caught.value)
    remedy = int(str(caught.value).split("try ")[1])
    make_learning_rate(OptimizerConfig(warmup_steps=remedy), steps)


def test_a_schedule_of_its_own_length_ends_there_and_keeps_its_rate():
    """Of 60 steps, in a run of 120: the same rates as in a run of 60, then the last of them."""
    settled = OptimizerConfig().settled(60)
    assert (settled.schedule_steps, settled.warmup_steps) == (60, 6)
    longer = rates(settled, 120)
    np.testing.assert_array_equal(longer[:60], rates(OptimizerConfig(), 60))
    np.testing.assert_allclose(longer[60:], 1e-4, rtol=1e-6)
    assert settled.settled(120) == settled


def test_a_warmup_longer_than_the_schedule_is_refused():
    with pytest.raises(ValueError, match="warmup_steps=9 must not exceed schedule_steps=5; try 1"):
        make_learning_rate(OptimizerConfig(warmup_steps=9, schedule_steps=5), 100)
