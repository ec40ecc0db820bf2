"""From averaged gradients to updates, and the learning rate of a step.

Invariant: the rate is a function of the step alone, so a skipped step delays nothing.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from parallax.config import OptimizerConfig
from parallax.model.transformer import Params

Schedule = Callable[[jax.Array], jax.Array]
"""Step, int32 from 0, to learning rate."""

INPUT_DIMS = {"gate": 1, "up": 1, "down": 1, "query": 1, "key": 1, "value": 1, "out": 2}
"""How many dims of each stacked matrix, after the leading layers dim, are summed over."""


def warmup_steps(config: OptimizerConfig, steps: int) -> int:
    """The warm-up asked for, else min(100, steps / 10)."""
    return min(100, steps // 10) if config.warmup_steps is None else config.warmup_steps


def make_learning_rate(config: OptimizerConfig, steps: int) -> Schedule:
    """Step, from 0, to rate: linear to the peak, then a cosine to `final_rate` of it at the last step.

    Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5. The first step of a warm-up already moves.

    Raises:
      ValueError: the warm-up is longer than the run.
    """
    warmup, peak = warmup_steps(config, steps), config.learning_rate
    if warmup > steps:
        raise ValueError(f"warmup_steps={warmup} must not exceed steps={steps}; try {max(1, steps // 10)}")

    def learning_rate(step: jax.Array) -> jax.Array:
        rising = (step + 1) / (warmup + 1)
        done = jnp.clip((step - warmup) / max(1, steps - 1 - warmup), 0, 1)
        falling = config.final_rate + (1 - config.final_rate) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        return peak * jnp.where(step < warmup, rising, falling)

    return learning_rate


def _name(path: tuple) -> str:
    return path[-1].key


def is_matrix(params: Params) -> Params:
    """True for the leaves that multiply activations; False for norm scales and biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: _name(path) in INPUT_DIMS or _name(path) == "table", params
    )


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Averaged gradient to update at rate 1, which the step scales by its rate: clipping, then AdamW or Muon.

    AdamW: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2; matrices decay, norms and biases do not.
    Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum orthogonalised by Newton-Schulz
    iterations for the matrices of the blocks, scaled to the size of an Adam update (Moonlight, arXiv:2502.16982,
    eq. 4), so that the same rate serves both; for all else Adam without decay, in its Nesterov form (Dozat 2016).
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    if config.optimizer == "adamw":
        decay = {"weight_decay": config.weight_decay, "mask": is_matrix}
        return optax.chain(clip, optax.adamw(1.0, config.beta1, config.beta2, **decay))
    muon = optax.contrib.muon(
        1.0,
        adam_b1=config.beta1,
        adam_b2=config.beta2,
        weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=_matrix_dims,
        consistent_rms=0.2,
    )
    return optax.chain(clip, muon)


def _matrix_dims(params: Any) -> Any:
    """For each stacked matrix of a block its summed and its resulting dims; None for what Adam updates."""

    def of(path, leaf):
        if _name(path) not in INPUT_DIMS:
            return None
        split = 1 + INPUT_DIMS[_name(path)]  # dim 0 is the layer
        return optax.contrib.MuonDimensionNumbers(tuple(range(1, split)), tuple(range(split, leaf.ndim)))

    return jax.tree_util.tree_map_with_path(of, params)
