"""Adapters and preferences on one curve: only adapters are learned, and every layout learns the same of them."""

import jax
import numpy as np

from parallax.config import ExpertsConfig
from parallax.layer_config import LoraConfig
from parallax.model.adapters import take_adapters, take_base
from parallax.training.preference import REFERENCES, PreferenceConfig, make_preference_loss

SIZES = {"num_kv_heads": 2, "lora": LoraConfig(rank=2, dropout=0.1)}
EXPERTS = SIZES | {"experts": ExpertsConfig(num_experts=4, shared_mlp_dim=8)}
STEPS = 4


def train(tiny, strategy, loss_fn, batch):
    """The losses of some steps, and the first and the last state."""
    take, state, losses = strategy.compile(tiny.step(strategy, loss_fn)), strategy.init(), []
    first = jax.device_get(strategy.canonical(state))
    for number in range(STEPS):
        state, metrics = take(state, strategy.put_batch(batch(number)))
        losses.append(metrics["loss"].item())  # simulated devices may lock up when steps are queued
    return losses, first, jax.device_get(strategy.canonical(state))


def test_adapters_learn_the_same_on_every_layout(make_tiny):
    """Adapters of attention and of the feed-forward that all tokens go through, beside experts."""
    tiny, curves = make_tiny(**EXPERTS), []
    for layout in ("single", "", 1), ("pmap", "", 1), ("mesh", "fsdp=2,expert=2,tensor=2", 2):
        losses, first, last = train(tiny, tiny.strategy(*layout), None, tiny.batch)
        curves.append(losses)
        jax.tree.map(np.testing.assert_array_equal, take_base(last.params), take_base(first.params))
        moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), take_adapters(last.params), take_adapters(first.params))
        assert all(jax.tree.leaves(moved))
    assert np.ptp(curves[0]) > 0.01, "there must be something to agree on"
    for curve in curves[1:]:
        np.testing.assert_allclose(curve, curves[0], rtol=1e-5)  # order of float32 sums


def test_a_device_holds_moments_of_its_share_of_the_adapters(make_tiny):
    state = make_tiny(**SIZES).strategy("mesh", "fsdp=8").abstract()

    def held(tree):
        """Bytes on one device, of arrays that are no counters."""
        leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim]
        return sum(4 * int(np.prod(leaf.sharding.shard_shape(leaf.shape))) for leaf in leaves)

    adapters = take_adapters(state.params)
    assert held(state.opt_state) == 2 * held(adapters)
    assert held(adapters) < sum(4 * leaf.size for leaf in jax.tree.leaves(adapters))  # some dims are split


def pairs(number):
    """Rows of two segments, of which the last two targets are learned; the first row is none."""
    rng = np.random.default_rng(number)
    ids, targets = rng.integers(0, 11, (16, 6)).astype(np.int32), rng.integers(0, 11, (16, 6)).astype(np.int32)
    segments = np.tile(np.repeat(np.arange(1, 3), 3), (16, 1)).astype(np.int32)
    targets[:, [0, 3]] = -1
    targets[0], segments[0] = -1, 0
    references = rng.normal(-5, 1, (2, 16)).astype(np.float32)
    return {"inputs": ids, "targets": targets, "segments": segments} | dict(zip(REFERENCES, references, strict=True))


def test_preferences_have_the_same_curve_on_every_layout(make_tiny):
    """Of one adapter in attention and one in the feed-forward; the others learn in the test above."""
    tiny = make_tiny(num_kv_heads=2, lora=LoraConfig(rank=2, dropout=0.1, targets=("query", "down")))
    loss_fn = make_preference_loss(tiny.config, PreferenceConfig())
    layouts = ("single", ""), ("mesh", "fsdp=2,sequence=2,tensor=2")
    expected, found = (train(tiny, tiny.strategy(*layout), loss_fn, pairs)[0] for layout in layouts)
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(found, expected, rtol=1e-5)
