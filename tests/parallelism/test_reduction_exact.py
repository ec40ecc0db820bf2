"""Exact reduction: every layout has the same bits, and they are a gradient's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from parallax.config import ExpertsConfig

ROOT = Path(__file__).parents[2]
EXPERTS = ExpertsConfig(
    num_experts=8, balance_loss=0.02, router_z_loss=0.01, balance_bias_rate=0.01, shared_mlp_dim=8, scores="sigmoid"
)
# The dense one has a size at which XLA rounds tanh in two ways on these layouts: its activation must do without.
# With experts there are eight rows: a shard a device, a loop of one, which compilers like to dissolve, or of eight; and
# Muon, whose matmuls sum over dims that fsdp splits. The tall one has a matrix whose norm XLA may add up in two orders.
MODELS = {
    "dense": ({"activation": "gelu_tanh", "embed_dim": 64}, 16, [("pmap", "", 2), ("mesh", "data=2@dcn,fsdp=4", 1)]),
    "experts": (
        {"experts": EXPERTS, "dropout_rate": 0.1, "optimizer": "muon"},
        8,
        [("single", "", 1), ("mesh", "data=2,fsdp=2,expert=2", 1)],
    ),
    "tall": (
        {"embed_dim": 128, "mlp_dim": 344, "optimizer": "muon"},
        8,
        [("single", "", 1), ("mesh", "data=2,fsdp=4", 1)],
    ),
}
"""Sizes, rows of a batch, and layouts."""
STEPS = 3


def train(tiny, name, mesh, accumulate, batch_size, steps=STEPS, reduction="exact"):
    """The losses of some steps, and the parameters after them."""
    strategy = tiny.strategy(name, mesh, accumulate, reduction=reduction, batch_size=batch_size)
    take, state, losses = strategy.compile(tiny.step(strategy)), strategy.init(), []
    for k in range(steps):
        state, metrics = take(state, strategy.put_batch(tiny.batch(k, rows=batch_size)))
        losses.append(metrics["loss"].item())
    return losses, jax.device_get(strategy.canonical(state).params)


SCRIPT = """
import json
from parallelism.hosts import fix_cpu_rounding
fix_cpu_rounding()
from parallax.training.state import params_sha256
from tests.parallelism import test_reduction_exact as test
from tests.parallelism.conftest import Tiny
found = {}
for name, (sizes, rows, layouts) in test.MODELS.items():
    runs = [test.train(Tiny(**sizes), *layout, batch_size=rows) for layout in layouts]
    found[name] = [[losses, params_sha256(params)] for losses, params in runs]
print(json.dumps(found))
"""


def test_every_layout_has_the_same_bits():
    """The loss of each step with clipping, and the parameters after them, of three models, by AdamW and by Muon.

    In a process whose rounding is fixed, compiled as for users, though in one piece. docs/evidence/equivalence.md has
    many more layouts, and real processes.
    """
    pieces = [flag for flag in os.environ["XLA_FLAGS"].split() if "split_count" in flag]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": str(ROOT), "XLA_FLAGS": " ".join(pieces)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, runs in json.loads(done.stdout).items():
        assert runs == [runs[0]] * len(MODELS[name][2])
        assert len(set(runs[0][0])) == STEPS


def test_exact_and_mean_are_the_same_gradient(make_tiny):
    tiny = make_tiny("gradient")
    exact, mean = (
        train(tiny, "pmap", "", 1, batch_size=16, steps=1, reduction=reduction)[1] for reduction in ("exact", "mean")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), exact, mean)  # float32 sums


@pytest.mark.parametrize("mesh", ["tensor=2,data=4", "sequence=2,data=4"])
def test_axes_that_split_a_gradient_are_refused(make_tiny, mesh):
    tiny = make_tiny(num_kv_heads=2)
    with pytest.raises(ValueError, match=r"reduction=exact .*; try --mesh data=8, or --reduction mean$"):
        tiny.strategy("mesh", mesh, reduction="exact")


@pytest.mark.parametrize(("name", "mesh"), [("pmap", ""), ("mesh", "data=8")])
@pytest.mark.parametrize("batch_size", [4, 24])
def test_a_batch_without_enough_shards_is_refused_with_a_remedy(tiny, name, mesh, batch_size):
    with pytest.raises(ValueError, match=f"reduction=exact cuts batch_size={batch_size} ") as caught:
        tiny.strategy(name, mesh, reduction="exact", batch_size=batch_size)
    remedy = int(str(caught.value).rpartition("--batch-size ")[2])
    tiny.strategy(name, mesh, reduction="exact", batch_size=remedy)
