"""Exact reduction: every layout has the same bits, and they are a gradient's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
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


SCRIPT = """
import json, os, sys
sys.path.insert(0, os.getcwd())
from parallelism.hosts import fix_cpu_rounding
fix_cpu_rounding()
import jax
from parallax.training.fingerprint import params_sha256
from tests.parallelism.conftest import Tiny
from tests.parallelism import test_reduction_exact as test
for rate, batch_size, layouts in ((0.0, 16, test.LAYOUTS), (0.1, 16, test.LAYOUTS[:1] + test.LAYOUTS[-4:]),
                                  (0.0, 8, [test.LAYOUTS[0], test.LAYOUTS[2], test.LAYOUTS[5]])):
    for layout in layouts:
        losses, params = test.train(Tiny(dropout_rate=rate), *layout, batch_size=batch_size)
        print(json.dumps([rate, batch_size, losses, params_sha256(params)]))
"""


@pytest.fixture(scope="module")
def results():
    """(losses, sha256) of each layout by dropout rate and batch size, from a process whose rounding is fixed."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for rate, batch_size, losses, digest in map(json.loads, done.stdout.splitlines()):
        found.setdefault((rate, batch_size), []).append((tuple(losses), digest))
    return found


@pytest.mark.parametrize(
    ("rate", "batch_size", "layouts"),
    [
        (0.0, 16, len(LAYOUTS)),
        (0.1, 16, 5),  # dropout keys belong to shards, not to devices
        (0.0, 8, 3),  # a shard a device: a loop of one, which compilers like to dissolve, or of eight
    ],
)
def test_every_layout_has_the_same_bits(results, rate, batch_size, layouts):
    """The loss of each AdamW step with clipping, and the parameters after them."""
    same = results[rate, batch_size]
    assert len(same) == layouts
    assert len(set(same)) == 1
    assert len(set(same[0][0])) == STEPS


def test_dropout_drops(results):
    assert results[0.0, 16][0] != results[0.1, 16][0]


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
def test_axes_that_split_a_gradient_are_refused(make_tiny, mesh):
    tiny = make_tiny(num_kv_heads=2)
    with pytest.raises(ValueError, match=r"reduction=exact .*; try --mesh data=8, or --reduction mean$"):
        tiny.strategy("mesh", mesh, reduction="exact")


@pytest.mark.parametrize(("name", "mesh"), [("pmap", ""), ("mesh", "data=8")])
@pytest.mark.parametrize("batch_size", [4, 12, 24, 31])
def test_a_batch_without_enough_shards_is_refused_with_a_remedy(tiny, name, mesh, batch_size):
    with pytest.raises(ValueError, match=f"reduction=exact cuts batch_size={batch_size} ") as caught:
        tiny.strategy(name, mesh, reduction="exact", batch_size=batch_size)
    remedy = int(str(caught.value).rpartition("--batch-size ")[2])
    tiny.strategy(name, mesh, reduction="exact", batch_size=remedy)
