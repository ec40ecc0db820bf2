"""Rotary position embeddings.

Invariant: the dot product of a rotated query and a rotated key depends on their distance alone.
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
    if scaling.kind == "yarn":
        omega = _yarn(omega, head_dim, theta, scaling)
    return omega.astype(np.float32)


def _yarn(omega: np.ndarray, head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Between the pairs that turn β_fast and β_slow times over the first length, ω is blended with ω / factor.

    Peng et al. 2023, arXiv:2309.00071, section 3.2. As in the authors' code, the ramp is linear in the number of the
    pair, not in its turns, and begins and ends at whole numbers unless the scaling says otherwise, as gpt-oss does.
    """

    def pair_of(turns: float) -> float:
        at_one_radian = scaling.original_max_seq_len / (2 * math.pi * turns)
        return head_dim * math.log(at_one_radian) / (2 * math.log(theta))

    first, last = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.whole_ends:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = max(last - first, 1e-3)  # a step where both are one pair
    stretched = np.clip((np.arange(head_dim // 2) - first) / width, 0, 1)
    return stretched * omega / scaling.factor + (1 - stretched) * omega


def magnitude(scaling: RopeScaling) -> float:
    """By what a rotated query and a rotated key are each multiplied: yarn's √(1/t) (its eq. 22), and 1 otherwise."""
    if scaling.kind != "yarn":
        return 1.0
    return scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1


def rotate(x_BTHK: jax.Array, positions_BT: jax.Array, omega: np.ndarray) -> jax.Array:
    """Turns each pair (x_i, x_{i+K/2}) of [B, T, H, K] by position · ω_i; positions are [B, T] or [1, T].

    R(m) x as in eq. 34 of the paper, with the halves of a head as the pair (the layout of Llama checkpoints).
    """
    wide = jnp.promote_types(x_BTHK.dtype, jnp.float32)
    angle = positions_BT[:, :, None, None].astype(wide) * jnp.asarray(omega, wide)[None, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x_BTHK.astype(wide), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTHK.dtype)
