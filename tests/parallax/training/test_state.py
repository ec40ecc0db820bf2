"""The first state, and the names of the axes of everything in it."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from parallax.config import OptimizerConfig, TransformerConfig
from parallax.model.transformer import param_axes, parameters
from parallax.training.optimizer import make_optimizer
from parallax.training.state import make_init, params_sha256, state_axes

CONFIG = TransformerConfig(
    vocab_size=13, embed_dim=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=12,
    attention_bias=True, qk_norm=True,
)  # fmt: skip


def is_spec(leaf):
    return isinstance(leaf, PartitionSpec)


def init_of(kind):
    return make_init(CONFIG, make_optimizer(OptimizerConfig(optimizer=kind), parameters(CONFIG)), 0)


@pytest.fixture(scope="module")
def first_state():
    """Seed to first state, compiled once for all seeds."""
    optimizer = make_optimizer(OptimizerConfig(), parameters(CONFIG))
    return jax.jit(lambda seed: make_init(CONFIG, optimizer, seed)())


def test_first_state_is_a_pure_function_of_the_seed(first_state):
    first, again, other = (first_state(seed) for seed in (0, 0, 1))
    assert params_sha256(first.params) == params_sha256(again.params) != params_sha256(other.params)
    for counter in (first.step, first.bad_steps):
        assert counter == 0
        assert counter.dtype == jnp.int32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(first.params))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(first.opt_state))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_array_has_one_name_a_dim_and_moments_lie_like_their_parameters(kind):
    """Two Adam moments a parameter, or Muon's one for a matrix, carry exactly the parameter's names."""
    state = jax.eval_shape(init_of(kind))
    axes = state_axes(CONFIG, init_of(kind))
    assert jax.tree.structure(axes, is_leaf=is_spec) == jax.tree.structure(state)
    jax.tree.map(lambda leaf, spec: np.testing.assert_equal(len(spec), leaf.ndim), state, axes)

    params = jax.tree_util.tree_leaves_with_path(param_axes(CONFIG), is_leaf=is_spec)
    moments = jax.tree_util.tree_leaves_with_path(axes.opt_state, is_leaf=is_spec)
    for path, spec in params:
        found = [names for other, names in moments if tuple(other[-len(path) :]) == tuple(path)]
        assert found in ([spec, spec], [spec] if kind == "muon" else None), path
    named = sum(any(spec) for _, spec in moments)
    assert named == sum(2 if kind == "adamw" or spec_is_adams(path) else 1 for path, _ in params)
    assert axes.step == axes.bad_steps == PartitionSpec()


def spec_is_adams(path):
    """Whether Muon leaves a parameter to Adam."""
    return path[-1].key in {"scale", "table", "query_bias", "key_bias", "value_bias"}


def tree():
    rng = np.random.default_rng(0)
    return {
        "blocks": {"gate": rng.normal(size=(2, 3)).astype(np.float32), "scale": np.ones(2, np.float32)},
        "count": np.asarray(7, np.int32),
        "table": jnp.asarray(rng.normal(size=4), jnp.bfloat16),
    }


def test_hash_is_over_path_shape_dtype_and_bytes():
    """Held fixed, since users compare the hashes of runs made months apart."""
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.asarray(1, np.int32)
    content = b"['a'] (2, 3) float32\n" + a.tobytes() + b"['b']['c'] () int32\n" + b.tobytes()
    assert params_sha256({"a": a, "b": {"c": b}}) == hashlib.sha256(content).hexdigest()


def test_neither_insertion_order_nor_layout_nor_place_counts():
    original = tree()
    expected = params_sha256(original)
    backwards = dict(reversed(original.items())) | {"blocks": dict(reversed(original["blocks"].items()))}
    assert list(backwards) != list(original)
    assert params_sha256(backwards) == expected
    columns = jax.tree.map(lambda leaf: np.array(leaf, order="F"), original)
    assert not columns["blocks"]["gate"].flags["C_CONTIGUOUS"]
    assert params_sha256(columns) == expected
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    split = {"blocks": NamedSharding(mesh, PartitionSpec("x"))}
    whole = NamedSharding(mesh, PartitionSpec())
    placed = {name: jax.device_put(leaf, split.get(name, whole)) for name, leaf in original.items()}
    assert params_sha256(placed) == expected
