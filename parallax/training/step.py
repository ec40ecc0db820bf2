"""The one training step.

Invariant: (state, batch) to (state, metrics), pure. Where arrays are placed and how gradients are combined is the
strategy's, which comes in as `gradients`; the mathematics is here and nowhere else.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from parallax import cpu
from parallax.training.loss import LossFn, Sums
from parallax.training.optimizer import Schedule
from parallax.training.state import TrainState

Gradients = Callable[[LossFn], Callable[[Any, dict[str, jax.Array], jax.Array], tuple[Sums, jax.Array, Any]]]
"""From a loss to (params, batch, key) -> (sums over the global batch, its target tokens, the averaged gradient)."""

DROPOUT = 1
"""What a key is for is folded into it; initialisation uses the bare seed."""


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    learning_rate: Schedule,
    gradients: Gradients,
    seed: int,
    balance: Callable[[Any, jax.Array], Any] | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step on a batch of [B, T] arrays.

    A loss or gradient that is not finite changes neither parameters nor optimizer, and is counted in `bad_steps`.

    Args:
      balance: (params, load) to params whose routers even out the load that experts had in this batch.

    Returns:
      The next state and scalar metrics: losses in nats a target token, `grad_norm` of the averaged gradient before
      clipping, `param_norm` of what is not frozen after the update, `learning_rate`, `tokens` (targets in the global
      batch), `bad_steps`. Of experts also `balance_loss` and `router_z_loss`, `router_entropy` in nats, and
      `fullest_expert`: the largest share of a layer's tokens that one of its experts got.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), state.step), DROPOUT)
    sums, tokens, grads = gradients(loss_fn)(state.params, batch, key)
    load_NE = sums.get("expert_load")
    losses = {name: value / jnp.maximum(tokens, 1) for name, value in sums.items() if name != "expert_load"}
    grad_norm = optax.tree.norm(grads)
    rate = learning_rate(state.step)
    finite = jnp.isfinite(losses["loss"]) & jnp.isfinite(grad_norm)

    def updated() -> tuple[Any, Any]:
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(  # what is frozen has neither gradient nor update
            lambda param, update: param if update is None else param + rate * update, state.params, updates
        )
        if balance is not None and load_NE is not None:
            params = balance(params, load_NE)
        return params, opt_state

    params, opt_state = cpu.replace_if(finite, updated, (state.params, state.opt_state))
    bad_steps = jnp.where(finite, 0, state.bad_steps + 1)
    metrics = losses | {
        "grad_norm": grad_norm,
        "param_norm": optax.tree.norm(jax.tree.map(lambda param, grad: None if grad is None else param, params, grads)),
        "learning_rate": rate,
        "tokens": tokens,
        "bad_steps": bad_steps,
    }
    if load_NE is not None:
        metrics["fullest_expert"] = jnp.max(load_NE / jnp.maximum(jnp.sum(load_NE, axis=1, keepdims=True), 1))
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state, bad_steps=bad_steps), metrics
