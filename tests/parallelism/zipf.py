"""Ids as common as words are, and how far gradients of them in bfloat16 are from those in float32.

A row of a table that is read thousands of times has a gradient of thousands of addends; ids drawn alike have none such.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from parallax.config import TrainConfig
from parallax.training.loss import make_loss
from parallax.training.state import TrainState, state_axes
from parallax.training.step import train_step
from parallelism.strategies import get_strategy
from parallelism.strategy import Layout


def zipf_batch(vocab_size, rows, length, seed=0):
    """The i-th id is as frequent as 1/i."""
    shares = 1 / np.arange(1, vocab_size + 1)
    ids = np.random.default_rng(seed).choice(vocab_size, (rows, length + 1), p=shares / shares.sum()).astype(np.int32)
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:]}


class Descent:
    """An optimizer whose parameters, after a step at rate 1, are the gradient."""

    @staticmethod
    def init(params):
        return ()

    @staticmethod
    def update(gradients, state, params):
        return jax.tree.map(jnp.subtract, gradients, params), state


def gradient(config, init_params, batch, name="single", mesh="", accumulate=1):
    """The averaged gradient of a batch on a layout, {path: array}."""
    rows, length = batch["inputs"].shape
    layout = Layout(strategy=name, mesh=mesh, accumulate=accumulate, batch_size=rows, seq_len=length)

    def init_state():
        zero = jnp.zeros((), jnp.int32)
        return TrainState(step=zero, params=init_params(), opt_state=(), bad_steps=zero)

    strategy = get_strategy(layout, init_state, state_axes(config, init_state))
    step = functools.partial(
        train_step,
        loss_fn=make_loss(config, TrainConfig()),
        optimizer=Descent,
        learning_rate=lambda step: 1.0,
        gradients=strategy.gradients,
        seed=0,
    )
    state, _ = strategy.compile(step)(strategy.init(), strategy.put_batch(batch))
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(strategy.canonical(state).params))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.float64(leaf) for path, leaf in leaves}


def norm_error(found, exact):
    """Relative, of arrays or of their rows."""
    return float(np.max(np.abs(np.linalg.norm(found, axis=-1) / np.linalg.norm(exact, axis=-1) - 1)))


def direction_error(found, exact):
    """How far two arrays are apart when both are scaled to length 1."""
    return float(np.linalg.norm(found / np.linalg.norm(found) - exact / np.linalg.norm(exact)))
