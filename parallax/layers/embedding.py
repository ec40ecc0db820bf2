"""Token ids to vectors, and vectors to logits.

Invariant: logits are float32, whatever the compute dtype, and those of table rows that stand for no token never count.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from parallax import cpu, mup
from parallax.axes import Role, constrain, local, param, read
from parallax.config import TransformerConfig
from parallax.layers.attend import capped

MASKED = -1e30
"""The logit of a row without a token: finite, so that zero times it is zero."""


class Embedding(nnx.Module):
    """A table of V vectors, read by `embed` and, as the output layer, by `unembed`; W ≥ V rows, see `table_rows`.

    A table that does both has the role "input", as µP initialises it; one that only unembeds is "output".
    The initial deviation 1/(4√D) makes the first logits small (variance 1/16), so the first loss is near ln V. What is
    looked up is at least 5√ε, so that the norm behind it gives vectors of 0.98 or more, and not ones that drown in its
    ε; ε = 1e-5 sets this floor from a width of 250 on, and there the first logits of a tied table grow as √D.
    """

    def __init__(self, config: TransformerConfig, role: Role = "input", *, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(config.dtype)
        self.softcap, self.scale = config.logit_softcap, config.embedding_scale
        self.vocab_size, rows = config.vocab_size, config.table_rows
        ratio = mup.width_ratio(config)
        deviation = 0.25 * (config.embed_dim / ratio) ** -0.5
        deviation = max(deviation, 5 * config.norm_eps**0.5) if role == "input" else deviation / ratio
        init = jax.nn.initializers.normal(deviation)
        shape, inputs = (rows, config.embed_dim), ("embed",) if role == "output" else ()
        self.table = param(init, rngs.params(), shape, ("vocab", "embed"), inputs=inputs, decays=True, role=role)

    def whole(self) -> jax.Array:
        """The table [W, D] in the compute dtype; read once for several uses, its shards travel once."""
        return read(self.table, self.dtype)

    def embed(self, tokens_BT: jax.Array, table_WD: jax.Array | None = None) -> jax.Array:
        """[B, T] ids to [B, T, D], with the table that was read, if it was."""
        # Whole vectors: looked up in slices of them, tokens and results would change places between devices.
        table_WD = constrain(self.whole() if table_WD is None else table_WD, "vocab", None)
        x_BTD: Any = _look_up(table_WD.shape[0], table_WD, tokens_BT)
        if self.scale != 1:
            x_BTD = x_BTD * jnp.asarray(self.scale, x_BTD.dtype)
        return constrain(x_BTD, "batch", "length", "act_embed")

    def unembed(self, x_BTD: jax.Array) -> jax.Array:
        """`logits` with the table of this layer."""
        return self.logits(read(self.table, x_BTD.dtype), x_BTD)

    def logits(self, table_WD: jax.Array, x_BTD: jax.Array) -> jax.Array:
        """[W, D] and [B, T, D] to float32 logits [B, T, W], squashed to ±c by c·tanh(logit/c) when there is a soft cap.

        Those from V on are MASKED. The cap is Gemma 2's (arXiv:2408.00118, section 2).
        """
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        logits_BTW = cpu.unembed(table_WD, x_BTD, wide)
        logits_BTW = constrain(logits_BTW, "batch", "length", "act_vocab")
        logits_BTW = capped(logits_BTW, self.softcap)
        if table_WD.shape[0] > self.vocab_size:
            ids_W = jnp.arange(table_WD.shape[0])[None, None]
            logits_BTW = jnp.where(ids_W < self.vocab_size, logits_BTW, jnp.asarray(MASKED, wide))
        return logits_BTW


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _look_up(num_rows: int, table_WD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Rows of the table, [B, T, D].

    Its gradient is summed in float32. JAX's own adds up in the dtype of the table, and a bfloat16 sum stops growing at
    256 times its addends: of 13,700 equal ones 8% are left.
    """
    return jnp.take(table_WD, tokens_BT, axis=0)


def _look_up_forward(num_rows: int, table_WD: jax.Array, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.take(table_WD, tokens_BT, axis=0), tokens_BT


def _look_up_backward(num_rows: int, tokens_BT: jax.Array, g_BTD: jax.Array) -> tuple[jax.Array, None]:
    """Each device adds up its own tokens in float32 and rounds once; what devices send is in the compute dtype.

    Left to the compiler the float32 sums would be what is added up among devices, apart from those of a tied head.
    """

    def add_up(ids_W: jax.Array, tokens_BT: jax.Array, g_BTD: jax.Array) -> jax.Array:
        """[1, 1, W, D] of the rows with these ids, some of the tokens and their gradients."""
        wide = jnp.promote_types(g_BTD.dtype, jnp.float32)
        own_BT = tokens_BT - ids_W[0]
        own_BT = jnp.where(own_BT < 0, ids_W.size, own_BT)  # beyond the rows, where nothing is added
        zeros_WD = jax.lax.full_like(g_BTD, 0, wide, (ids_W.size, g_BTD.shape[-1]))
        return zeros_WD.at[own_BT].add(g_BTD.astype(wide)).astype(g_BTD.dtype)[None, None]

    tokens = ("batch", "length")
    on_devices = local(add_up, [("act_vocab",), tokens, (*tokens, None)], (*tokens, "act_vocab", None))
    of_devices = on_devices(jnp.arange(num_rows), tokens_BT, g_BTD)
    return jax.lax.reduce(of_devices, jnp.zeros((), g_BTD.dtype), jax.lax.add, (0, 1)), None


_look_up.defvjp(_look_up_forward, _look_up_backward)
