"""The bias of the choice: its rule, and that it evens out a load which is uneven without it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from parallax.config import ExpertsConfig, LayerSpec, TrainConfig, TransformerConfig
from parallax.model.transformer import init_params
from parallax.training.balance import make_balance
from parallax.training.loss import make_loss
from parallax.training.state import TrainState
from parallax.training.step import train_step
from parallelism.reduction import mean
from tests.parallax.inference.models import draw_params

SIZES = {"vocab_size": 16, "embed_dim": 16, "num_heads": 1, "num_kv_heads": 1, "head_dim": 4, "mlp_dim": 8}


def test_the_bias_moves_by_the_sign_of_what_is_missing():
    """In each layer that has experts, here the first and the third, whose parameters are in stacks of their own."""
    pattern = (LayerSpec(feed_forward="experts"), LayerSpec(feed_forward="dense"))
    experts = ExpertsConfig(num_experts=3, balance_bias_rate=0.1)
    config = TransformerConfig(**SIZES, num_layers=3, pattern=pattern, experts=experts)
    params = jax.tree.map(np.zeros_like, draw_params(config))
    moved = jax.jit(make_balance(config))(params, jnp.array([[4, 1, 1], [2, 2, 2]]))
    biases = [block["mlp"]["balance_bias"] for block in moved["blocks"].values() if "balance_bias" in block["mlp"]]
    np.testing.assert_allclose(np.concatenate(biases), [[-0.1, 0.1, 0.1], [0, 0, 0]], rtol=1e-6)
    for name, block in moved["blocks"].items():
        jax.tree.map(
            np.testing.assert_array_equal,
            {**block, "mlp": {**block["mlp"], "balance_bias": 0}},
            {**params["blocks"][name], "mlp": {**params["blocks"][name]["mlp"], "balance_bias": 0}},
        )


def test_without_a_rate_nothing_moves():
    assert make_balance(TransformerConfig(**SIZES, experts=ExpertsConfig(num_experts=2))) is None
    assert make_balance(TransformerConfig(**SIZES)) is None


def test_the_bias_evens_out_a_skewed_load():
    """Of a router that begins with two favourites, and of which nothing but the bias moves."""
    experts = ExpertsConfig(num_experts=4, experts_per_token=1, scores="sigmoid", balance_bias_rate=0.003)
    config = TransformerConfig(**SIZES, num_layers=1, experts=experts)
    loss_fn = make_loss(config, TrainConfig())
    params = jax.tree.map(np.array, draw_params(config))
    # A direction that all embeddings share, which the router reads as a liking for the first two experts.
    params["embedding"]["table"][:, 0] += 1.0
    params["blocks"]["mlp"]["router"][:, 0] += np.array([0.3, 0.3, -0.3, -0.3])

    @jax.jit
    def step(state, key):
        ids = jax.random.categorical(key, jnp.linspace(2, 0, 16), shape=(16, 17))  # frequent and rare words
        batch = {"inputs": ids[:, :-1], "targets": ids[:, 1:]}
        load = loss_fn(state.params, batch, None)[0]["expert_load"][0]
        state, _ = train_step(
            state, batch, loss_fn=loss_fn, optimizer=optax.set_to_zero(), learning_rate=lambda step: 0.0,
            gradients=mean(), seed=0, balance=make_balance(config),
        )  # fmt: skip
        return state, load

    zero = jnp.zeros((), jnp.int32)
    state = TrainState(step=zero, params=params, opt_state=optax.set_to_zero().init(params), bad_steps=zero)
    _, loads = jax.jit(lambda state: jax.lax.scan(step, state, jax.random.split(jax.random.key(1), 300)))(state)

    def spread(loads):
        load = loads.mean(0)
        return (load.max() - load.min()) / load.mean()

    loads = np.asarray(loads)
    assert spread(loads[:5]) > 0.5
    assert spread(loads[-50:]) < 0.1


def test_loads_are_counted_as_whole_numbers():
    """So sums over devices and microbatches are exact beyond 2²⁴, from where on float32 has no odd numbers."""
    config = TransformerConfig(**SIZES, num_layers=1, experts=ExpertsConfig(num_experts=2))
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    sums, _ = jax.eval_shape(
        lambda params, batch: make_loss(config, TrainConfig())(params, batch, None),
        params,
        {"inputs": ids, "targets": ids},
    )
    assert (sums["expert_load"].shape, sums["expert_load"].dtype) == ((1, 2), jnp.int32)
