"""Layers that differ, with every variant of attention and norms, in µP, have the curve of one device on a mesh."""

import numpy as np

from parallax.config import LayerSpec
from parallax.parametrization import Parametrization

VARIED = {
    "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "norms": "both", "activation": "gelu_tanh",
    "embedding_scale": 4.0, "attention_softcap": 2.0, "attention_sinks": True, "attention_bias": True,
    "qk_norm": True, "qk_norm_over": "heads", "attention_scale": 0.4,
    "pattern": (LayerSpec(sliding_window=3, rope_theta=500.0), LayerSpec()),
    "parametrization": Parametrization(kind="mup", base_width=8, base_depth=1),
}  # fmt: skip


def losses(tiny, name, mesh=""):
    strategy, losses = tiny.strategy(name, mesh), []
    take, state = strategy.compile(tiny.step(strategy)), strategy.init()
    for number in range(4):
        state, metrics = take(state, strategy.put_batch(tiny.batch(number)))
        losses.append(metrics["loss"].item())  # simulated devices may lock up when steps are queued
    return losses


def test_a_mesh_has_the_curve_of_one_device(make_tiny):
    """A device of pmap computes what one alone does, of fewer rows: test_strategy.py shows it of any layers."""
    tiny = make_tiny("adamw", **VARIED)
    expected = losses(tiny, "single")
    assert np.ptp(expected) > 0.02, "there must be something to agree on"
    np.testing.assert_allclose(losses(tiny, "mesh", "fsdp=2,sequence=2,tensor=2"), expected, rtol=1e-5)  # float32 sums
