"""From averaged gradients to updates, and the learning rate of a step.

Invariant: the rate is a function of the step alone, so a skipped step delays nothing.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from parallax.axes import Parameter, alike
from parallax.config import OptimizerConfig
from parallax.model.transformer import Params
from parallax.mup import muon_rate

NEWTON_SCHULZ, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
"""Muon's a, b and c, with the steepest slope at 0 (Jordan et al. 2024)."""
UPDATE_RMS = 0.2
"""Root mean square of an update of a matrix, about that of Adam's (Moonlight, arXiv:2502.16982, eq. 4)."""

Schedule = Callable[[jax.Array], jax.Array]
"""Step, int32 from 0, to learning rate."""


def make_learning_rate(config: OptimizerConfig, steps: int) -> Schedule:
    """Step, from 0, to rate: linear to the peak, then a cosine to `final_rate` of it, where it stays.

    Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5. The first step of a warm-up already moves.

    Args:
      steps: of the run; the schedule is as long unless the config says otherwise.

    Raises:
      ValueError: the warm-up is longer than the schedule.
    """
    settled = config.settled(steps)
    warmup, length, peak = settled.warmup_steps or 0, settled.schedule_steps or steps, config.learning_rate
    if warmup > length:
        what = "steps" if config.schedule_steps in (None, steps) else "schedule_steps"
        raise ValueError(f"warmup_steps={warmup} must not exceed {what}={length}; try {max(1, length // 10)}")

    def learning_rate(step: jax.Array) -> jax.Array:
        rising = (step + 1) / (warmup + 1)
        done = jnp.clip((step - warmup) / max(1, length - 1 - warmup), 0, 1)
        falling = config.final_rate + (1 - config.final_rate) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        return peak * jnp.where(step < warmup, rising, falling)

    return learning_rate


def make_optimizer(config: OptimizerConfig, labels: Params) -> optax.GradientTransformation:
    """Averaged gradient to update at rate 1, which the step scales by its rate: clipping, then AdamW or Muon.

    AdamW: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2.
    Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum orthogonalised by Newton-Schulz
    iterations for hidden matrices, scaled to the size of an Adam update (Moonlight, arXiv:2502.16982, eq. 4), so
    that the same rate serves both; for all else Adam, in its Nesterov form (Dozat 2016).
    Under both what its label says decays: matrices and tables, not norms and biases. Updates are multiplied by the
    rates of labels, which µP sets (`parallax/mup.py`), and decay is not. What is not learned keeps no moments and does
    not change.

    Args:
      labels: the tree of what is trained with an `axes.Parameter` for each array, as `parameters` gives it.
    """
    learned = jax.tree.map(lambda parameter: parameter.learned, labels)
    optimizer = _of_learned(config, labels)
    return optimizer if all(jax.tree.leaves(learned)) else optax.masked(optimizer, learned)


def _of_learned(config: OptimizerConfig, labels: Params) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    decays = jax.tree.map(lambda parameter: parameter.decays, labels)
    scaled = any(parameter.rate != 1 for parameter in jax.tree.leaves(labels))
    decay = optax.add_decayed_weights(-config.weight_decay, decays)
    if config.optimizer == "adamw" and scaled:
        adam = optax.adam(1.0, config.beta1, config.beta2)
        return optax.chain(clip, adam, _at_rates(labels, lambda parameter: parameter.rate), decay)
    if config.optimizer == "adamw":
        adamw = optax.adamw(1.0, config.beta1, config.beta2, weight_decay=config.weight_decay, mask=decays)
        return optax.chain(clip, adamw)
    # The momentum alone: no steps of its iteration, and a preconditioning that would come with the first of them.
    moments = optax.contrib.muon(
        1.0,
        ns_steps=0,
        preconditioning="schatten",
        adam_b1=config.beta1,
        adam_b2=config.beta2,
        muon_weight_dimension_numbers=jax.tree.map(_muon_dims, labels),
    )

    def update(grads: optax.Updates, state: optax.OptState, params: optax.Params | None) -> Any:
        updates, state = moments.update(grads, state, params)
        turned = jax.tree.map(
            lambda own, part: jax.tree.map(lambda x: _orthogonalize(own, x), part) if _muon_dims(own) else part,
            labels,
            updates,
        )
        return turned, state

    muon = optax.GradientTransformation(moments.init, alike(update))
    # Its own decay would go by who updates a parameter, and leave out the tables.
    rates = [_at_rates(labels, _muon_rate)] if scaled else []
    return optax.chain(clip, muon, *rates, decay)


def _orthogonalize(parameter: Parameter, update: jax.Array) -> jax.Array:
    """Each matrix of a stack with singular values near 1, in 0.7 to 1.2, times UPDATE_RMS √(the larger of its sides).

    Five Newton-Schulz iterations, X ← aX + (bA + cA²)X with A = XXᵀ, from X divided by its Frobenius norm. A tall
    matrix is multiplied from the right, with A = XᵀX, and not transposed as in optax: XLA adds up the norm of a
    transposed matrix in another order for one device than for several.
    """
    inputs, outputs = parameter.input_dims, parameter.output_dims
    stacked = tuple(dim for dim in range(update.ndim) if dim not in (*inputs, *outputs))
    order = (*stacked, *inputs, *outputs)
    fan_in, fan_out = (math.prod(update.shape[dim] for dim in dims) for dims in (inputs, outputs))
    x_Nio = update.transpose(order).reshape(-1, fan_in, fan_out)
    x_Nio = x_Nio / (jnp.sqrt(jnp.sum(x_Nio * x_Nio, axis=(1, 2), keepdims=True)) + 1e-8)
    a, b, c = NEWTON_SCHULZ
    for _ in range(ITERATIONS):
        if fan_in > fan_out:
            gram_Noo = jnp.einsum("Nio,Nip->Nop", x_Nio, x_Nio)
            x_Nio = a * x_Nio + x_Nio @ (b * gram_Noo + c * gram_Noo @ gram_Noo)
        else:
            gram_Nii = jnp.einsum("Nio,Njo->Nij", x_Nio, x_Nio)
            x_Nio = a * x_Nio + (b * gram_Nii + c * gram_Nii @ gram_Nii) @ x_Nio
    turned = x_Nio.reshape([update.shape[dim] for dim in order]).transpose(
        [order.index(dim) for dim in range(len(order))]
    )
    return UPDATE_RMS * math.sqrt(max(fan_in, fan_out)) * turned


def _at_rates(labels: Params, rate: Callable[[Parameter], float]) -> optax.GradientTransformation:
    """Multiplies each update by the rate of its parameter; those that are masked have none."""

    def scale(updates: optax.Updates, _: optax.Params | None) -> optax.Updates:
        return jax.tree.map(lambda own, part: jax.tree.map(lambda x: x * rate(own), part), labels, updates)

    return optax.stateless(scale)


def _muon_rate(parameter: Parameter) -> float:
    return muon_rate(parameter) if _muon_dims(parameter) else parameter.rate


def _muon_dims(parameter: Parameter) -> optax.contrib.MuonDimensionNumbers | None:
    """The summed and the resulting dims of a hidden matrix; None for what Adam updates."""
    if parameter.role != "hidden":
        return None
    return optax.contrib.MuonDimensionNumbers(parameter.input_dims, parameter.output_dims)
