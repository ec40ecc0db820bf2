"""Rotary position embeddings.

Invariant: the product of a rotated query and a rotated key depends on their distance alone.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from parallax.config import RopeScaling


def frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Angle a token for each of the head_dim / 2 pairs, in radians, [K/2] float32.

    ω_i = θ^(-2i/K) (Su et al. 2021, arXiv:2104.09864, eq. 15), then stretched as `scaling` says.
    """
    omega = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling.kind == "linear":
        omega = omega / scaling.factor
    if scaling.kind == "llama3":
        turns = scaling.original_max_seq_len * omega / (2 * math.pi)  # over the length of the first training
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)  # 1 for short wavelengths, 0 for long ones
        omega = kept * omega + (1 - kept) * omega / scaling.factor
    return omega.astype(np.float32)


def rotate(x_BTHK: jax.Array, positions_BT: jax.Array, omega: np.ndarray) -> jax.Array:
    """Turns each pair (x_i, x_{i+K/2}) of [B, T, H, K] by position · ω_i; positions are [B, T] or [1, T].

    R(m) x as in eq. 34 of the paper, with the halves of a head as the pair (the layout of Llama checkpoints).
    """
    wide = jnp.promote_types(x_BTHK.dtype, jnp.float32)
    angle = positions_BT[:, :, None, None].astype(wide) * jnp.asarray(omega, wide)[None, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x_BTHK.astype(wide), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(
        x_BTHK.dtype
    )
