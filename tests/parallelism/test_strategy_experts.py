"""Experts on one curve: what routers choose, report and learn does not depend on the layout."""

import functools

import jax
import numpy as np
import pytest

from parallax.config import ExpertsConfig
from parallax.training.state import params_sha256

EXPERTS = ExpertsConfig(
    num_experts=4, balance_loss=0.02, router_z_loss=0.01, balance_bias_rate=0.01, shared_mlp_dim=8, scores="sigmoid",
    bias=True,
)  # fmt: skip
LAYOUTS = {
    "pmap, unrolled": ("pmap", "", 2, {"layer_loop": "unroll"}),
    "expert and fsdp": ("mesh", "expert=2,fsdp=4", 1, {}),
    "expert and others": ("mesh", "expert=2,sequence=2,tensor=2", 2, {"remat": "full"}),
}
"""One device alone has the bits of a mesh in test_reduction_exact.py."""
STEPS = 4


@pytest.fixture(scope="module")
def compiled(make_tiny):
    """A model, a strategy for it, and its step."""

    @functools.cache
    def of(layout):
        name, mesh, accumulate, changes = LAYOUTS[layout]
        tiny = make_tiny(num_layers=2, num_kv_heads=2, experts=EXPERTS, **changes)
        strategy = tiny.strategy(name, mesh, accumulate)
        return tiny, strategy, strategy.compile(tiny.step(strategy))

    return of


@pytest.fixture(scope="module")
def trained(compiled):
    """Metrics of a few steps with clipping, and the parameters after them."""

    @functools.cache
    def run(layout):
        tiny, strategy, take = compiled(layout)
        state, rows = strategy.init(), []
        for number in range(STEPS):
            state, metrics = take(state, strategy.put_batch(tiny.batch(number)))
            rows.append({name: float(value) for name, value in metrics.items()})
        return rows, jax.device_get(strategy.canonical(state).params)

    return run


@pytest.mark.parametrize("layout", ["expert and fsdp", "expert and others"])
def test_losses_and_reports_are_the_same_on_every_layout(trained, layout):
    rows, params = trained(layout)
    expected, biases = trained("pmap, unrolled")
    for row, other in zip(rows, expected, strict=True):
        assert {"balance_loss", "router_z_loss", "router_entropy", "fullest_expert"} < row.keys()
        for name in ("balance_loss", "router_z_loss", "router_entropy", "fullest_expert"):
            # The first step within 1e-6; AdamW then amplifies rounding.
            assert row[name] == pytest.approx(other[name], rel=1e-6 if row is rows[0] else 1e-4), name
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-6 if row is rows[0] else 1e-5)
    found, expected = (each["blocks"]["mlp"]["balance_bias"] for each in (params, biases))
    assert np.abs(found).max() > 0
    np.testing.assert_allclose(found, expected, atol=1e-7)


def test_what_is_not_learned_has_no_moments(make_tiny):
    for optimizer in ("adamw", "muon"):
        tiny = make_tiny(optimizer, num_layers=2, num_kv_heads=2, experts=EXPERTS)
        state = jax.eval_shape(tiny.init_state)
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)]
        assert any("router" in path for path in paths)
        assert not any("balance_bias" in path for path in paths)


def test_a_bad_step_leaves_the_bias(compiled):
    tiny, strategy, take = compiled("expert and fsdp")
    state, batch = strategy.init(), tiny.batch(0)
    before = params_sha256(state.params)
    batch["targets"][0, 0] = 99  # no id: its loss is NaN
    state, metrics = take(state, strategy.put_batch(batch))
    assert metrics["bad_steps"] == 1
    assert params_sha256(state.params) == before
