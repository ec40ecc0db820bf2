"""The mixture of experts: its definition, its gradients, and that no token is dropped."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from parallax.config import ExpertsConfig, TransformerConfig
from parallax.layers import moe
from parallax.layers.feedforward import GatedFeedForward
from parallax.layers.moe import Experts, activate, mixture

B, T, D, E, K, F = 2, 5, 6, 4, 2, 3
PLAIN = ExpertsConfig(num_experts=E, experts_per_token=K, mlp_dim=F, balance_loss=0.3, router_z_loss=0.2)
KINDS = {
    "softmax": PLAIN,
    "sigmoid, scaled": dataclasses.replace(PLAIN, scores="sigmoid", scaling=2.5, balance_bias_rate=0.01),
    "not renormalised, shared": dataclasses.replace(PLAIN, renormalize=False, shared_mlp_dim=4),
    "biases, clamped": dataclasses.replace(PLAIN, bias=True, clamp=1.0),
}


def example(experts, seed=0, dtype=np.float64):
    """Structure, weights and input [B, T, D]."""
    rng = np.random.default_rng(seed)
    config = TransformerConfig(embed_dim=D, num_layers=2, experts=experts)
    graph, state = nnx.split(nnx.eval_shape(lambda: Experts(config, rngs=nnx.Rngs(0))))
    weights = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.7, leaf.shape), dtype), state)
    return graph, weights, jnp.asarray(rng.normal(size=(B, T, D)), dtype)


@functools.partial(jax.jit, static_argnums=0)
def apply(graph, weights, x):
    return nnx.merge(graph, weights)(x)


@functools.partial(jax.jit, static_argnums=0)
def of_shared(graph, weights, x):
    """What the expert gives that all tokens go through."""
    return nnx.merge(graph, weights).shared(x)[0]


route = jax.jit(moe.route, static_argnums=1)


def expected(experts, weights, x):
    """Token by token, in numpy."""
    w = {name: np.asarray(value) for name, value in nnx.to_pure_dict(weights).items() if name != "shared"}
    y = np.zeros_like(x)
    for at in np.ndindex(x.shape[:2]):
        logits = x[at] @ w["router"] + w.get("router_bias", 0)
        scores = 1 / (1 + np.exp(-logits)) if experts.scores == "sigmoid" else np.exp(logits) / np.exp(logits).sum()
        chosen = np.argsort(-(scores + w.get("balance_bias", 0)))[:K]
        gates = scores[chosen] / (scores[chosen].sum() if experts.renormalize else 1) * experts.scaling
        for expert, gate in zip(chosen, gates, strict=True):
            biases = [w[f"{name}_bias"][expert] if experts.bias else 0 for name in ("gate", "up", "down")]
            hidden = activate(
                jnp.asarray(x[at] @ w["gate"][expert] + biases[0]), x[at] @ w["up"][expert] + biases[1], experts.clamp
            )
            y[at] += gate * (np.asarray(hidden) @ w["down"][expert] + biases[2])
    return y


@pytest.mark.parametrize("experts", KINDS.values(), ids=KINDS)
def test_value_is_that_of_the_definition(x64, experts):
    graph, weights, x = example(experts)
    y, _ = apply(graph, weights, x)
    shared = of_shared(graph, weights, x) if experts.shared_mlp_dim else 0
    np.testing.assert_allclose(y, expected(experts, weights, np.asarray(x)) + np.asarray(shared), rtol=1e-10)


@pytest.mark.parametrize("experts", KINDS.values(), ids=KINDS)
def test_gradients_match_finite_differences(x64, experts):
    """Of the result through scores and gates, and of both losses; no choice changes within a step of 1e-5."""
    graph, weights, x = example(experts, seed=1)

    def results(weights, x):
        y, aux = apply(graph, weights, x)
        return y, aux["balance_loss"], aux["router_z_loss"]

    if experts.balance_bias_rate:
        gradients = jax.jit(jax.grad(lambda weights: sum(map(jnp.sum, results(weights, x)))))(weights)
        np.testing.assert_array_equal(gradients["balance_bias"][...], 0)
    check_grads(jax.jit(results), (weights, x), order=1, modes=["rev"], eps=1e-5, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("experts", KINDS.values(), ids=KINDS)
def test_no_token_is_dropped_where_all_choose_the_same(x64, experts):
    graph, weights, x = example(dataclasses.replace(experts, balance_bias_rate=0.0))
    x, router, chosen = np.array(x), np.zeros((D, E)), np.array([0.0, 5.0, 0.0, 9.0])
    if experts.bias:
        weights["router_bias"][...] = jax.device_put(chosen)
    else:
        x[:, :, 0], router[0] = 1.0, chosen
    weights["router"][...] = jax.device_put(router)
    y, aux = apply(graph, weights, x)
    shared = of_shared(graph, weights, x) if experts.shared_mlp_dim else 0
    np.testing.assert_allclose(y, expected(experts, weights, x) + np.asarray(shared), rtol=1e-10)
    np.testing.assert_array_equal(aux["expert_load"], [0, B * T, 0, B * T])


def test_losses_are_those_of_the_papers(x64):
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(B, T, E))
    counted = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    ids, _, aux = route(jnp.asarray(logits), PLAIN, counted_BT=jnp.asarray(counted))
    balance = z = entropy = 0.0
    for row in range(B):
        length = counted[row].sum()
        scores = np.exp(logits[row, :length]) / np.exp(logits[row, :length]).sum(1, keepdims=True)
        f = np.array([E / (K * length) * (np.asarray(ids)[row, :length] == e).sum() for e in range(E)])
        balance += PLAIN.balance_loss * length * (f * scores.mean(0)).sum()
        z += PLAIN.router_z_loss * (np.log(np.exp(logits[row, :length]).sum(1)) ** 2).sum()
        entropy -= (scores * np.log(scores)).sum()
    np.testing.assert_allclose(aux["balance_loss"], balance, rtol=1e-12)
    np.testing.assert_allclose(aux["router_z_loss"], z, rtol=1e-12)
    np.testing.assert_allclose(aux["router_entropy"], entropy, rtol=1e-12)
    assert aux["expert_load"].sum() == K * counted.sum()


def test_sums_over_rows_add_up(x64):
    logits = np.random.default_rng(5).normal(size=(4, T, E))
    whole = route(logits, PLAIN)[2]
    parts = [route(logits[start : start + 2], PLAIN)[2] for start in (0, 2)]
    for name, value in whole.items():
        np.testing.assert_allclose(parts[0][name] + parts[1][name], value, rtol=1e-12)


def test_the_bias_decides_who_is_chosen_and_not_their_weight():
    logits = jnp.array([[[3.0, 2.0, 1.0, 0.0]]])
    experts = dataclasses.replace(PLAIN, scores="sigmoid", renormalize=False)
    ids, gates, _ = route(logits, experts, jnp.array([0.0, 0.0, 0.0, 9.0]))
    np.testing.assert_array_equal(ids[0, 0], [3, 0])
    np.testing.assert_allclose(gates[0, 0], jax.nn.sigmoid(jnp.array([0.0, 3.0])), rtol=1e-6)


def test_an_even_load_has_the_least_balance_loss():
    even = np.tile(5 * np.eye(E, dtype=np.float32), (1, 4, 1))
    skewed = np.tile(even[:, :1], (1, 4 * E, 1))
    one = dataclasses.replace(PLAIN, experts_per_token=1, balance_loss=1.0)
    tokens = even.shape[1]
    assert float(route(even, one)[2]["balance_loss"]) / tokens == pytest.approx(1.0)
    assert float(route(skewed, one)[2]["balance_loss"]) / tokens > 3


def test_bfloat16_stays_and_the_router_is_float32():
    graph, weights, x = example(PLAIN, dtype=np.float32)
    x = np.asarray(x, jnp.bfloat16)
    y, aux = apply(graph, weights, x)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype.name for leaf in aux.values()} == {"float32"}
    near, _ = apply(graph, weights, x.astype(np.float32))
    np.testing.assert_allclose(np.asarray(y, np.float32), near, atol=0.15)  # three matmuls at 2⁻⁸ each


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_an_expert_alone_is_the_feed_forward_of_its_weights(x64, activation):
    one = ExpertsConfig(num_experts=1, experts_per_token=1)
    config = TransformerConfig(embed_dim=D, mlp_dim=F, activation=activation, experts=one)

    @jax.jit
    def both(x):
        experts, dense = (kind(config, rngs=nnx.Rngs(0)) for kind in (Experts, GatedFeedForward))
        for name in ("gate", "up", "down"):
            getattr(dense, name)[...] = getattr(experts, name)[...][0]
        return experts(x)[0], dense(x)[0]

    np.testing.assert_allclose(*both(np.random.default_rng(6).normal(size=(B, T, D))), rtol=1e-10)


def test_gradients_of_biases_are_added_up_in_float32():
    """Of 4096 equal tokens; a sum in bfloat16 stops growing at 256 addends."""

    def gradients(dtype):
        rows = np.ones((4096, D), dtype), np.zeros((4096, 1), np.int32), np.ones((4096, 1), np.float32)
        x, ids, gates = jax.device_put(rows)
        weights = [np.full(shape, 0.25, dtype) for shape in ((1, D, F), (1, D, F), (1, F, D), (1, F), (1, F))]
        total = jax.grad(lambda *w: jnp.sum(mixture(x, ids, gates, *w).astype(jnp.float32)), argnums=(3, 4))
        return jax.jit(total)(*weights)

    for found, wanted in zip(gradients(jnp.bfloat16), gradients(jnp.float32), strict=True):
        np.testing.assert_allclose(np.asarray(found, np.float32), wanted, rtol=0.03)  # a few roundings at 2⁻⁸


def test_sigmoids_that_are_all_zero_still_have_weights():
    """In float32 that of -200 is 0, and so is the sum of the chosen."""
    experts = dataclasses.replace(PLAIN, scores="sigmoid")
    logits = -200 - np.arange(E, dtype=np.float32)[None, None]

    def total(logits):
        _, gates, aux = route(logits, experts)
        return jnp.sum(gates**2) + aux["balance_loss"], gates

    grads, gates = jax.jit(jax.grad(total, has_aux=True))(logits)
    np.testing.assert_allclose(gates[0, 0], jax.nn.softmax(jnp.array([0.0, -1.0])), rtol=1e-6)
    assert np.isfinite(grads).all()
    assert np.abs(grads).max() > 0
