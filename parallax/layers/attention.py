"""Causal self-attention with grouped key/value heads.

Invariant: a query sees a key only at its own or an earlier position, in its own segment and within the window,
whether keys come from the same tokens or from a cache.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from parallax import cpu, mup
from parallax.axes import constrain, local, param, read
from parallax.config import TransformerConfig
from parallax.layers.attend import attend, attend_in_chunks
from parallax.layers.attend_blocks import attend_by_blocks
from parallax.layers.cache import LayerCache
from parallax.layers.cudnn import attend_by_cudnn
from parallax.layers.dropout import split
from parallax.layers.lora import adapted, make_adapters
from parallax.layers.normalization import RMSNorm
from parallax.layers.rotary import frequencies, magnitude, rotate
from parallax.layers.splash import attend_in_kernel

CHUNK = 512
"""Above twice this length scores are computed chunk by chunk: [T, S] no longer fits caches, and memory stays linear."""

BY_BLOCKS = {"blocks": attend_by_blocks, "splash": attend_in_kernel, "cudnn": attend_by_cudnn}
"""What skips blocks of scores that the mask hides, for whole sequences in order."""
KERNELS = {"splash", "cudnn"}
"""Those of them that XLA does not compile, and that neither JAX nor a count of matmuls can look into."""


class Attention(nnx.Module):
    """softmax(q kᵀ / √K) v (Vaswani et al. 2017, arXiv:1706.03762, eq. 1), H query heads over G key/value heads.

    Grouped heads: Ainslie et al. 2023, arXiv:2305.13245. QK-norm: Dehghani et al. 2023, arXiv:2302.05442, and over all
    heads OLMo 2, arXiv:2501.00656, section 3.2. Sliding window: Mistral 7B, arXiv:2310.06825. Soft cap and sinks: see
    `attend`.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        D, H, G, K = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        self.config = config
        inward = jax.nn.initializers.normal(D**-0.5)
        outward = jax.nn.initializers.normal(mup.branch_deviation(config, H * K))
        multiplier = mup.branch_multiplier(config)
        matrix = functools.partial(param, decays=True, role="hidden")
        into_heads = functools.partial(matrix, inward, inputs=("embed",))
        self.query = into_heads(rngs.params(), (D, H, K), ("embed", "heads", "head_dim"))
        self.key = into_heads(rngs.params(), (D, G, K), ("embed", "kv_heads", "head_dim"))
        self.value = into_heads(rngs.params(), (D, G, K), ("embed", "kv_heads", "head_dim"))
        names = ("heads", "head_dim", "embed")
        self.out = matrix(outward, rngs.params(), (H, K, D), names, inputs=names[:2], multiplier=multiplier)
        bias = functools.partial(param, jax.nn.initializers.zeros, inputs=(), decays=False, role="input")
        if config.attention_bias:
            self.query_bias = bias(rngs.params(), (H, K), ("heads", "head_dim"))
            self.key_bias = bias(rngs.params(), (G, K), ("kv_heads", "head_dim"))
            self.value_bias = bias(rngs.params(), (G, K), ("kv_heads", "head_dim"))
        if config.attention_out_bias:
            self.out_bias = bias(rngs.params(), (D,), ("embed",), multiplier=multiplier)
        if config.attention_sinks:
            self.sinks = bias(rngs.params(), (H,), ("heads",))
        if config.qk_norm and config.qk_norm_over == "head":
            self.query_norm = RMSNorm(K, "head_dim", eps=config.norm_eps, rngs=rngs)
            self.key_norm = RMSNorm(K, "head_dim", eps=config.norm_eps, rngs=rngs)
        elif config.qk_norm:
            self.query_norm = RMSNorm((H, K), ("heads", "head_dim"), eps=config.norm_eps, rngs=rngs)
            self.key_norm = RMSNorm((G, K), ("kv_heads", "head_dim"), eps=config.norm_eps, rngs=rngs)
        self.adapters = make_adapters(self, ("query", "key", "value", "out"), config.lora, rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        cache: LayerCache | None = None,
        dropout_keys_B: jax.Array | None = None,
        lengths_B: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """[B, T, D] to [B, T, D], and the cache with these tokens written into it.

        `positions_BT` is [B, T] or [1, T], by default 0 … T-1; segments are for training and do not mix with a cache.
        `lengths_B` is for `LayerCache.extend`.
        """
        by_blocks = self.config.attention in BY_BLOCKS and positions_BT is None and cache is None
        if positions_BT is None:
            positions_BT = jnp.arange(x_BTD.shape[1], dtype=jnp.int32)[None, :]
        joined = cache is not None and cache.listed
        q_BTHK, k_BSGK, v_BSGK = self._project(x_BTD, positions_BT, joined, dropout_keys_B)
        key_positions = positions_BT
        if cache is not None:
            cache, k_BSGK, v_BSGK, key_positions = cache.extend(k_BSGK, v_BSGK, positions_BT, lengths_B)
        if by_blocks:
            heads_BTHK = self._attend_by_blocks(q_BTHK, k_BSGK, v_BSGK, segments_BT)
        else:
            heads_BTHK = self._attend(q_BTHK, k_BSGK, v_BSGK, positions_BT, key_positions, segments_BT, dropout_keys_B)
        y_BTD = jnp.einsum("BTHK,HKD->BTD", heads_BTHK, read(self.out, x_BTD.dtype))
        y_BTD = adapted(self.adapters, "out", heads_BTHK, y_BTD, dropout_keys_B)
        if self.config.attention_out_bias:
            y_BTD = _plus(y_BTD, self.out_bias)
        return y_BTD, cache

    def _attend_by_blocks(
        self, q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, segments_BT: jax.Array | None
    ) -> jax.Array:
        """[B, T, H, K]. Each device takes its rows and heads, and whole sequences."""
        queries, keys = ("batch", "length", "act_heads", None), ("batch", None, "act_kv_heads", None)
        function, config = BY_BLOCKS[self.config.attention], self.config

        def on_device(q_BTHK, k_BTGK, v_BTGK, segments_BT, sinks_BH):
            shape = config.sliding_window, config.attention_softcap
            return function(q_BTHK, k_BTGK, v_BTGK, segments_BT, *shape, sinks_BH)

        names = queries, keys, keys, ("batch", None), ("batch", "act_heads")
        # JAX does not know what a kernel returns.
        on_shards = local(on_device, names, queries, checked=self.config.attention not in KERNELS)
        return on_shards(q_BTHK, k_BTGK, v_BTGK, segments_BT, self._sinks(q_BTHK))

    def _attend(
        self,
        q_BTHK: jax.Array,
        k_BSGK: jax.Array,
        v_BSGK: jax.Array,
        positions_BT: jax.Array,
        key_positions_BS: jax.Array,
        segments_BT: jax.Array | None,
        dropout_keys_B: jax.Array | None,
    ) -> jax.Array:
        """[B, T, H, K]. Each device takes its rows, queries and heads, with all keys and values of these."""
        heads, length = q_BTHK.shape[2], q_BTHK.shape[1]
        keys_BHT = None if dropout_keys_B is None else split(dropout_keys_B, heads, length)

        def on_device(q_BTHK, k_BSGK, v_BSGK, q_at, k_at, q_in, k_in, keys_BHT, sinks_BH):
            long = q_BTHK.shape[1] > 2 * CHUNK
            return (attend_in_chunks if long else attend)(
                q_BTHK,
                k_BSGK,
                v_BSGK,
                positions=(q_at, k_at),
                segments=None if q_in is None else (q_in, k_in),
                window=self.config.sliding_window,
                softcap=self.config.attention_softcap,
                sinks_BH=sinks_BH,
                dropout=(self.config.dropout_rate, keys_BHT),
                **({"chunk": CHUNK} if long else {}),
            )

        queries = ("batch", "length", "act_heads", None)
        keys = ("batch", None, "act_kv_heads", None)
        # One row of positions may stand for all: those of the slots of a cache always do.
        row, key_row = (None if x.shape[0] == 1 else "batch" for x in (positions_BT, key_positions_BS))
        names = (
            *(queries, keys, keys, (row, "length"), (key_row, None)),
            *(("batch", "length"), ("batch", None), ("batch", "act_heads", "length"), ("batch", "act_heads")),
        )
        return local(on_device, names, queries)(
            *(q_BTHK, k_BSGK, v_BSGK, positions_BT, key_positions_BS, segments_BT, segments_BT, keys_BHT),
            self._sinks(q_BTHK),
        )

    def _sinks(self, q_BTHK: jax.Array) -> jax.Array | None:
        """[B, H], at least float32: each row has them for itself, and their gradient is a sum over rows."""
        if not self.config.attention_sinks:
            return None
        sinks_H = read(self.sinks, jnp.promote_types(q_BTHK.dtype, jnp.float32))
        return jnp.broadcast_to(sinks_H[None], (q_BTHK.shape[0], len(sinks_H)))

    def _project(
        self, x_BTD: jax.Array, positions_BT: jax.Array, joined: bool, dropout_keys_B: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, H, K], scaled, and keys and values [B, T, G, K]; queries and keys are rotated.

        Joined, they come from one matmul with the three weights side by side.
        """
        dtype = x_BTD.dtype
        weights = [read(weight, dtype) for weight in (self.query, self.key, self.value)]
        if joined:
            q_BTHK, k_BTGK, v_BTGK = cpu.project_joined(x_BTD, weights)
        else:
            q_BTHK, k_BTGK, v_BTGK = (jnp.einsum("BTD,DHK->BTHK", x_BTD, weight) for weight in weights)
        q_BTHK = adapted(self.adapters, "query", x_BTD, q_BTHK, dropout_keys_B)
        k_BTGK = adapted(self.adapters, "key", x_BTD, k_BTGK, dropout_keys_B)
        v_BTGK = adapted(self.adapters, "value", x_BTD, v_BTGK, dropout_keys_B)
        if self.config.attention_bias:
            q_BTHK = _plus(q_BTHK, self.query_bias)
            k_BTGK = _plus(k_BTGK, self.key_bias)
            v_BTGK = _plus(v_BTGK, self.value_bias)
        if self.config.qk_norm:
            q_BTHK, k_BTGK = self.query_norm(q_BTHK), self.key_norm(k_BTGK)
        omega = frequencies(self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
        own_scale = self.config.attention_scale
        divisor = 1 / own_scale if own_scale else math.sqrt(self.config.head_dim)
        # yarn's factor of queries and of keys, both here.
        q_BTHK = rotate(q_BTHK, positions_BT, omega) / (divisor / magnitude(self.config.rope_scaling) ** 2)
        # Each device projects its own tokens; what others need of keys and values is gathered afterwards.
        own = ("batch", "length", "act_kv_heads", None)
        return q_BTHK, constrain(rotate(k_BTGK, positions_BT, omega), *own), constrain(v_BTGK, *own)


def _plus(x: jax.Array, bias: nnx.Param) -> jax.Array:
    """x [B, T, ...] + bias [...], in float32, as the gradient of the bias is summed: it is a sum over all tokens."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return (x.astype(wide) + read(bias, wide)[None, None]).astype(x.dtype)
