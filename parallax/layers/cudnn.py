"""Attention by cuDNN, which NVIDIA's GPUs run: blocks of scores that the mask hides are never computed.

Invariant: it gives what `attend` gives, for queries and keys that are the same tokens in order.
"""

import jax

from parallax.layers.attend import check_whole
from parallax.layers.attend_blocks import attend_by_blocks

WIDEST = 128
"""The widest head that every card since Ampere takes; later ones take 256."""


def takes(head_dim: int, dtype: str) -> bool:
    """Whether cuDNN's kernel has heads of this width in this dtype."""
    return dtype == "bfloat16" and head_dim % 8 == 0 and head_dim <= WIDEST


def check_heads(head_dim: int, dtype: str) -> None:
    """Raises ValueError where it has not."""
    if not takes(head_dim, dtype):
        raise ValueError(
            f"attention=cudnn needs bfloat16 and heads of a multiple of 8 up to {WIDEST}, not {dtype} and "
            f"head_dim={head_dim}; try --model.attention xla"
        )


def attend_by_cudnn(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    segments_BT: jax.Array | None,
    window: int,
    softcap: float = 0.0,
    sinks_BH: jax.Array | None = None,
) -> jax.Array:
    """Causal attention within segments and the window; queries are scaled already. Returns [B, T, H, K].

    Packed documents are attended to by blocks instead, on GPUs too: cuDNN has no mask of segments that is not [T, T].
    Raises ValueError if a device holds a part of each sequence, or cuDNN has no such heads, soft cap or sinks.
    """
    if softcap or sinks_BH is not None:
        raise ValueError("attention=cudnn has neither soft caps nor sinks; try --model.attention blocks")
    check_whole("cudnn", q_BTHK.shape[1], k_BTGK.shape[1])
    check_heads(q_BTHK.shape[-1], q_BTHK.dtype.name)
    if segments_BT is not None:
        return attend_by_blocks(q_BTHK, k_BTGK, v_BTGK, segments_BT, window)
    return jax.nn.dot_product_attention(
        *(q_BTHK, k_BTGK, v_BTGK),
        scale=1.0,
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,
        implementation="cudnn",
    )
