"""Exact reduction: every layout has the same bits, and they are a gradient's."""

import jax
import numpy as np
import pytest

from parallax.training.fingerprint import params_sha256

LAYOUTS = [
    *(("single", "", 1), ("single", "", 4), ("pmap", "", 1), ("pmap", "", 2)),
    *(
        ("mesh", "data=8", 1),
        ("mesh", "fsdp=8", 1),
        ("mesh", "data=2,fsdp=4", 2),
        ("mesh", "data=4,fsdp=2", 1),
    ),
]
STEPS = 4


def train(tiny, name, mesh, accumulate, batch_size, steps=STEPS, reduction="exact"):
    """The losses of some steps, and the parameters after them."""
    strategy = tiny.strategy(name, mesh, accumulate, reduction=reduction, batch_size=batch_size)
    take, state, losses = strategy.compile(tiny.step(strategy)), strategy.init(), []
    for k in range(steps):
        state, metrics = take(state, strategy.put_batch(tiny.batch(k, rows=batch_size)))
        losses.append(metrics["loss"].item())
    return losses, jax.device_get(strategy.canonical(state).params)


@pytest.mark.parametrize("dropout_rate", [0.0, 0.1])
def test_every_layout_has_the_same_bits(make_tiny, dropout_rate):
    """Parameters after AdamW steps with clipping, and the loss of each; dropout keys belong to shards, not devices."""
    tiny = make_tiny(dropout_rate=dropout_rate)
    results = [train(tiny, *layout, batch_size=16) for layout in LAYOUTS]
    assert {params_sha256(params) for _, params in results} == {params_sha256(results[0][1])}
    assert all(losses == results[0][0] for losses, _ in results)
    assert len(set(results[0][0])) == STEPS


def test_one_shard_a_device_is_as_good_as_eight(tiny):
    """8 rows are 8 shards: a device has a loop of one, which compilers like to dissolve, or one of eight."""
    layouts = (LAYOUTS[0], LAYOUTS[2], LAYOUTS[5])
    assert len({params_sha256(train(tiny, *layout, batch_size=8)[1]) for layout in layouts}) == 1


def test_dropout_drops(make_tiny):
    kept, dropped = (
        train(make_tiny(dropout_rate=rate), *LAYOUTS[0], batch_size=16)[0] for rate in (0.0, 0.1)
    )
    assert kept != dropped


def test_exact_and_mean_are_the_same_gradient(make_tiny):
    tiny = make_tiny("gradient")
    exact, mean = (
        train(tiny, "pmap", "", 1, batch_size=16, steps=1, reduction=reduction)[1]
        for reduction in ("exact", "mean")
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), exact, mean
    )  # float32 sums


@pytest.mark.parametrize("mesh", ["tensor=2,data=4", "sequence=2,data=4"])
def test_axes_that_split_a_gradient_are_refused(tiny, mesh):
    with pytest.raises(ValueError, match=r"reduction=exact .*; try --mesh data=8, or --reduction mean$"):
        tiny.strategy("mesh", mesh, reduction="exact")


@pytest.mark.parametrize(("name", "mesh"), [("pmap", ""), ("mesh", "data=8")])
@pytest.mark.parametrize("batch_size", [4, 12, 24, 31])
def test_a_batch_without_enough_shards_is_refused_with_a_remedy(tiny, name, mesh, batch_size):
    with pytest.raises(ValueError, match=f"reduction=exact cuts batch_size={batch_size} ") as caught:
        tiny.strategy(name, mesh, reduction="exact", batch_size=batch_size)
    remedy = int(str(caught.value).rpartition("--batch-size ")[2])
    tiny.strategy(name, mesh, reduction="exact", batch_size=remedy)
