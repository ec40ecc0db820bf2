"""Attention by the Pallas kernel that TPUs run: blocks of scores that the mask hides are never computed.

Invariant: it gives what `attend` gives, for queries and keys that are the same tokens in order.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from parallax.layers.attend import check_whole

LANES = 128
"""Rows of a kernel's blocks come in multiples of this."""
LARGEST_BLOCK = 512


def check_length(seq_len: int) -> None:
    """Raises ValueError for a sequence that the kernel cannot cut into blocks."""
    if seq_len % LANES:
        raise ValueError(
            f"attention=splash needs seq_len={seq_len} to be a multiple of {LANES}; "
            f"try {seq_len + -seq_len % LANES}, or --model.attention xla"
        )


def attend_in_kernel(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    segments_BT: jax.Array | None,
    window: int,
    softcap: float = 0.0,
    sinks_BH: jax.Array | None = None,
) -> jax.Array:
    """Causal attention within segments and the window; queries are scaled already. Returns [B, T, H, K].

    Lowered for anything but a TPU the kernel is interpreted, slowly. Raises ValueError if T is not a multiple of 128,
    or a device holds a part of each sequence.
    """
    check_whole("splash", q_BTHK.shape[1], k_BTGK.shape[1])
    check_length(q_BTHK.shape[1])
    run = functools.partial(_run, window, softcap)
    return jax.lax.platform_dependent(
        *(q_BTHK, k_BTGK, v_BTGK, segments_BT, sinks_BH),
        tpu=functools.partial(run, interpret=False),
        default=functools.partial(run, interpret=True),
    )


def _run(
    window: int,
    softcap: float,
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    segments_BT: jax.Array | None,
    sinks_BH: jax.Array | None,
    *,
    interpret: bool,
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import (  # late: Pallas takes its time to import
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, H = q_BTHK.shape[1:3]
    block = next(size for size in range(min(T, LARGEST_BLOCK), 0, -LANES) if T % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: Any = {f"block_{name}": block for name in names}
    visible = masks.LocalMask((T, T), (window - 1, 0), 0) if window else masks.CausalMask((T, T))
    on_one_row: Any = kernel.make_splash_mha(
        masks.MultiHeadMask([visible] * H),
        block_sizes=kernel.BlockSizes(**blocks),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap or None,
        interpret=interpret,
    )
    ids = None if segments_BT is None else kernel.SegmentIds(segments_BT, segments_BT)
    q_BHTK, k_BGTK, v_BGTK = (jnp.swapaxes(x, 1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
    return jnp.swapaxes(jax.vmap(on_one_row)(q_BHTK, k_BGTK, v_BGTK, ids, sinks_BH), 1, 2)
