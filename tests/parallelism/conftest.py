"""A tiny model with everything that a strategy is given, made to compile in moments.

Invariant: its initialisation, step and batches are pure functions, so every strategy starts from the same bits.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from parallax.config import OptimizerConfig, TrainConfig, TransformerConfig
from parallax.model.transformer import init_params, parameters
from parallax.training.balance import make_balance
from parallax.training.loss import make_loss
from parallax.training.optimizer import make_optimizer
from parallax.training.state import TrainState, state_axes
from parallax.training.step import train_step
from parallelism.strategies import get_strategy
from parallelism.strategy import Layout


class Tiny:
    """One layer, 16 wide, so that 8 devices can split it; `gradient` descends by the bare gradient, at rate 1."""

    def __init__(self, optimizer="adamw", **sizes):
        usual = {"vocab_size": 11, "embed_dim": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "mlp_dim": 24}
        self.config = TransformerConfig(head_dim=4, **usual | sizes)
        bare = optimizer == "gradient"
        self._optimizer = (
            optax.identity() if bare else make_optimizer(OptimizerConfig(optimizer=optimizer), parameters(self.config))
        )
        self._rate = -1.0 if bare else 1e-2
        self._shapes = jax.eval_shape(lambda: init_params(self.config, jax.random.key(0)))
        self.axes = state_axes(self.config, self.init_state)

    def init_state(self):
        """Weights from a sine, which compiles faster than random numbers."""
        leaves, structure = jax.tree.flatten(self._shapes)
        waves = [
            0.3 * jnp.sin((i + 1.7) * jnp.arange(leaf.size, dtype=jnp.float32)).reshape(leaf.shape)
            for i, leaf in enumerate(leaves)
        ]
        params, zero = jax.tree.unflatten(structure, waves), jnp.zeros((), jnp.int32)
        return TrainState(step=zero, params=params, opt_state=self._optimizer.init(params), bad_steps=zero)

    def strategy(self, name, mesh="", accumulate=1, **layout):
        sizes = {"batch_size": 16, "seq_len": 6} | layout
        wanted = Layout(strategy=name, mesh=mesh, accumulate=accumulate, **sizes)
        return get_strategy(wanted, self.init_state, self.axes)

    def step(self, strategy, loss_fn=None):
        return functools.partial(
            train_step,
            loss_fn=loss_fn or make_loss(self.config, TrainConfig()),
            optimizer=self._optimizer,
            learning_rate=lambda step: self._rate,
            gradients=strategy.gradients,
            seed=0,
            balance=make_balance(self.config),
        )

    def batch(self, seed, rows=16, length=6):
        """Rows with very different numbers of targets; the first two have none."""
        rng = np.random.default_rng(seed)
        ids = rng.integers(0, 11, (rows, length + 1)).astype(np.int32)
        lengths = np.concatenate([[0, 0], rng.integers(0, length + 1, rows - 2)])
        targets = np.where(np.arange(length)[None] < lengths[:, None], ids[:, 1:], -1)
        return {"inputs": ids[:, :-1], "targets": targets.astype(np.int32)}


@pytest.fixture(scope="session")
def make_tiny():
    return functools.cache(Tiny)


@pytest.fixture(scope="session")
def tiny(make_tiny):
    return make_tiny()
