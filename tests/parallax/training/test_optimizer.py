"""Rates by closed form, AdamW against its algorithm written out, Muon's updates against their geometry."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from parallax.axes import Parameter
from parallax.config import PRESETS, OptimizerConfig, TransformerConfig
from parallax.model.transformer import parameters
from parallax.pattern import stacks
from parallax.training.optimizer import make_optimizer

CONFIG = TransformerConfig(
    vocab_size=13, embed_dim=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=40,
    attention_bias=True, qk_norm=True, tie_embeddings=False,
)  # fmt: skip
VARIANTS = {
    **PRESETS,
    "biases": TransformerConfig(attention_bias=True, attention_out_bias=True),
    "qk_norm": TransformerConfig(qk_norm=True, num_kv_heads=1),
    "all, untied": CONFIG,
    "all, tied": CONFIG.replace(tie_embeddings=True, attention_out_bias=True),
}
MUON = {  # summed and resulting dims, after that of the layers
    "query": ((1,), (2, 3)), "key": ((1,), (2, 3)), "value": ((1,), (2, 3)), "out": ((1, 2), (3,)),
    "gate": ((1,), (2,)), "up": ((1,), (2,)), "down": ((1,), (2,)),
}  # fmt: skip
NOT_DECAYED = {"scale", "sinks"}
"""Beside all biases."""


def matrix(*shape):
    return Parameter(shape, ("layers", "embed", "mlp"), ("embed",), decays=True, role="hidden")


SCALE = Parameter((2, 3), ("layers", "embed"), (), decays=False, role="input")
TREES = {
    "model": parameters(CONFIG),
    "few": {"up": matrix(2, 12, 5), "scale": SCALE},
    "plain": {
        "gate": matrix(2, 3, 4),
        "scale": SCALE,
        "table": Parameter((5, 2), ("vocab", "embed"), (), decays=True, role="input"),
    },
    "regression": {"up": matrix(1, 6, 32), "down": matrix(1, 32, 3)},
}


def name_of(path):
    return path[-1].key


def random_like(tree, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(0, scale, leaf.shape).astype(np.float32), tree)


def scaled(tree, factor):
    return jax.tree.map(lambda leaf: leaf * np.float32(factor), tree)


@functools.cache
def compiled(config, tree):
    optimizer = make_optimizer(config, TREES[tree])
    return optimizer.init, jax.jit(optimizer.update)


def updates_of(config, gradients, params, tree="model"):
    """The updates that a sequence of gradients gives, with the parameters standing still."""
    init, update = compiled(config, tree)
    state, updates = init(params), []
    for gradient in gradients:
        step, state = update(gradient, state, params)
        updates.append(step)
    return updates


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_every_parameter_has_the_labels_that_its_updates_follow_from(config):
    leaves = jax.tree_util.tree_leaves_with_path(parameters(config))
    for path, known in leaves:
        hidden, behind = known.role == "hidden", "experts" in known.names  # then another dim comes first
        dims = MUON.get(name_of(path))
        expected = tuple(tuple(dim + behind for dim in part) for part in dims) if dims else None
        assert known.decays == (not name_of(path).endswith(("bias", *NOT_DECAYED))), path
        assert ((known.input_dims, known.output_dims) if hidden else None) == expected, path
    outputs = [name_of(path) for path, known in leaves if known.role == "output"]
    routers = ["router" for stack in stacks(config) if stack.config.feed_forward == "experts"]
    assert outputs == routers + ([] if config.tie_embeddings else ["table"])


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_only_matrices_decay(kind):
    """Without a gradient an update is decay alone."""
    params = random_like(TREES["model"], 0)
    zeros = jax.tree.map(np.zeros_like, params)
    (updates,) = updates_of(OptimizerConfig(optimizer=kind, weight_decay=0.3), [zeros], params)
    decayed = {*MUON, "table"}

    def check(path, update, param):
        expected = -0.3 * param if name_of(path) in decayed else 0 * param
        np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=str(path))

    jax.tree_util.tree_map_with_path(check, updates, params)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("decays", [True, False])
def test_a_new_matrix_of_each_expert_is_updated_by_its_label_as_it_is_alone(kind, decays):
    """Whatever its name is. Under Muon experts do not merge into one matrix of orthogonal rows."""
    names = ("layers", "experts", "embed", "mlp")
    stacked = Parameter((2, 3, 12, 5), names, ("embed",), decays=decays, role="hidden")
    alone = Parameter((12, 5), names[2:], ("embed",), decays=decays, role="hidden")
    config = OptimizerConfig(optimizer=kind, weight_decay=0.3, clip_norm=0.0)

    @functools.partial(jax.jit, static_argnums=0)
    def update(labels, gradient, param):
        optimizer = make_optimizer(config, {"new": labels})
        return optimizer.update({"new": gradient}, optimizer.init({"new": param}), {"new": param})[0]["new"]

    gradient, param = (random_like(np.empty(stacked.shape), seed) for seed in (8, 9))
    together = update(stacked, gradient, param)
    for at in np.ndindex(2, 3):
        expected = update(alone, gradient[at], param[at])
        np.testing.assert_allclose(together[at], expected, rtol=1e-4, atol=1e-5)  # float32, through 5 Newton-Schulz
    without = update(stacked, gradient, np.zeros_like(param))
    np.testing.assert_allclose(together - without, -0.3 * param * decays, rtol=1e-4, atol=1e-6)
    values = np.linalg.svd(without, compute_uv=False) / (0.2 * 12**0.5)
    assert (values.min() > 0.65 and values.max() < 1.16) == (kind == "muon")


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_gradients_are_clipped_to_the_norm_and_no_further(kind):
    """A long gradient acts as if scaled to the norm, a short one as it is; 0 turns clipping off."""
    few = TREES["few"]
    params, unit = random_like(few, 1), random_like(few, 2)
    unit = scaled(unit, 1 / float(optax.tree.norm(unit)))
    other = random_like(few, 3, 1e-2)  # a second one, since the first step of Adam forgets all scale
    times = [scaled(unit, factor) for factor in (100.0, 2.0, 1.0)]
    run = functools.partial(OptimizerConfig, optimizer=kind)
    clipped = [updates_of(run(clip_norm=2.0), [gradient, other], params, "few")[1] for gradient in times]
    free = [updates_of(run(clip_norm=0.0), [gradient, other], params, "few")[1] for gradient in times]
    same = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-6)  # float32, through 5 Newton-Schulz
    jax.tree.map(same, clipped[0], free[1])
    jax.tree.map(same, clipped[1], free[1])
    jax.tree.map(same, clipped[2], free[2])
    assert max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (free[0], free[1])), strict=True)) > 0.1


def test_adamw_is_its_algorithm():
    """Three steps of algorithm 2 of arXiv:1711.05101 in float64, clipping before it."""
    config = OptimizerConfig(beta1=0.8, beta2=0.9, weight_decay=0.2, clip_norm=1.5)
    params = {"gate": np.full((2, 3, 4), 0.5, "f"), "scale": np.ones((2, 3), "f")}
    params["table"] = np.linspace(-1, 1, 10, dtype="f").reshape(5, 2)
    gradients = [random_like(params, seed, scale) for seed, scale in enumerate((1.0, 0.1, 2.0))]
    updates = updates_of(config, gradients, params, "plain")
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape), params)
    first, second = zeros, zeros
    for t, (gradient, update) in enumerate(zip(gradients, updates, strict=True), start=1):
        norm = np.sqrt(sum(np.sum(leaf.astype(np.float64) ** 2) for leaf in jax.tree.leaves(gradient)))
        gradient = scaled(gradient, min(1, 1.5 / norm))
        first = jax.tree.map(lambda m, g: 0.8 * m + 0.2 * g, first, gradient)
        second = jax.tree.map(lambda v, g: 0.9 * v + 0.1 * g.astype(np.float64) ** 2, second, gradient)

        def check(path, update, m, v, param, t=t):
            expected = -(m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-8)
            expected = expected - (0 if name_of(path) == "scale" else 0.2) * param
            np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-6)  # float32 against float64

        jax.tree_util.tree_map_with_path(check, update, first, second, params)


def flattened(name, leaf):
    """A stacked kernel as one (input, output) matrix a layer."""
    inputs = np.prod([leaf.shape[dim] for dim in MUON[name][0]])
    return np.asarray(leaf, np.float64).reshape(leaf.shape[0], inputs, -1)


@pytest.fixture(scope="module")
def muon_updates():
    """First and second gradients and updates, a layer's gradient 100 times the other's, clipping and decay off."""
    params, *gradients = (random_like(TREES["model"], seed) for seed in (4, 5, 6))
    for gradient in gradients:
        for leaf in jax.tree.leaves(gradient["blocks"]):
            leaf[1] *= 100
    config = OptimizerConfig(optimizer="muon", clip_norm=0.0, weight_decay=0.0)
    return params, gradients, updates_of(config, gradients, params)


def test_muon_turns_each_layers_gradient_into_a_nearly_orthogonal_matrix(muon_updates):
    """With g = U S Vᵀ the first update is -U S' Vᵀ with S' near 1, times 0.2 √max(in, out), whatever the scale of g.

    The band is what five Newton-Schulz iterations with Jordan's coefficients leave: 0.68 to 1.13, and a little room.
    """
    _, (gradient, _), (update, _) = muon_updates
    gradients, updates = (
        {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree["blocks"])}
        for tree in (gradient, update)
    )
    for name in MUON:
        for g, step in zip(flattened(name, gradients[name]), flattened(name, updates[name]), strict=True):
            u, _, vt = np.linalg.svd(g, full_matrices=False)
            core = -u.T @ step @ vt.T / (0.2 * np.sqrt(max(g.shape)))
            values = np.diag(core)
            assert values.min() > 0.65, name
            assert values.max() < 1.16, name
            np.testing.assert_allclose(core, np.diag(values), atol=1e-4, err_msg=name)  # float32 matmuls
            rest = step - u @ (u.T @ step @ vt.T) @ vt
            np.testing.assert_allclose(rest, 0, atol=1e-4, err_msg=name)


def test_muon_leaves_the_rest_to_adam(muon_updates):
    params, gradients, updates = muon_updates
    adam = optax.adamw(1.0, 0.9, 0.95, weight_decay=0.0, nesterov=True)
    state, adam_update = adam.init(params), jax.jit(adam.update)
    for gradient, update in zip(gradients, updates, strict=True):
        expected, state = adam_update(gradient, state, params)

        def check(path, ours, adams):
            if name_of(path) not in MUON:
                np.testing.assert_allclose(ours, adams, rtol=1e-5, err_msg=str(path))  # float32
            else:
                assert np.abs(ours - adams).max() > 1e-2, path

        jax.tree_util.tree_map_with_path(check, update, expected)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_loss_falls(kind):
    """A two-layer regression: both optimizers learn it to a twentieth of the loss."""
    rng = np.random.default_rng(7)
    x, teacher = rng.normal(size=(64, 6)), rng.normal(size=(6, 3))
    y = np.tanh(x @ teacher)
    params = {"up": rng.normal(0, 0.4, (1, 6, 32)), "down": rng.normal(0, 0.2, (1, 32, 3))}
    params = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
    optimizer = make_optimizer(OptimizerConfig(optimizer=kind, weight_decay=0.0), TREES["regression"])

    def loss(params):
        hidden = jnp.tanh(x.astype(np.float32) @ params["up"][0])
        return jnp.mean((hidden @ params["down"][0] - y) ** 2)

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return jax.tree.map(lambda p, u: p + 0.02 * u, params, updates), state, value

    state, values = optimizer.init(params), []
    for _ in range(150):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < values[0] / 20
