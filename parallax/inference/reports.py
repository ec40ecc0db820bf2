"""The report of a token: its log-probability by the model itself, and those of the most probable in its place.

Invariant: a report is a row of int32 on the device, so one transfer brings all; the host reads it by `read_report`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from parallax.axes import constrain
from parallax.model.transformer import TransformerLM

TOP = 10
"""How many of the most probable tokens are reported with each token."""
CHUNK = 32
"""Prompt positions whose logits [V] are in memory at once while a prompt is scored."""


def report(logits_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    """A token a row as one array int32 [B, R], which `read_report` reads; R = 2 + 2 · min(TOP, V)."""
    logprobs_BV = jax.nn.log_softmax(logits_BV, axis=1)
    top_BT, ids_BT = jax.lax.top_k(logprobs_BV, min(TOP, logits_BV.shape[1]))
    own_B1 = jnp.take_along_axis(logprobs_BV, token_B[:, None], axis=1)
    bits_BL = jax.lax.bitcast_convert_type(jnp.concatenate([own_B1, top_BT], axis=1), jnp.int32)
    return jnp.concatenate([token_B[:, None], ids_BT, bits_BL], axis=1)


def read_report(words_R: np.ndarray) -> tuple[int, float, tuple[tuple[int, float], ...]]:
    """A row of `report` on the host: token, its log-probability, the most probable tokens with theirs."""
    count, words_R = len(words_R) // 2, np.ascontiguousarray(words_R)
    ids, logprobs = words_R[:count].tolist(), words_R[count:].view(np.float32).tolist()
    return ids[0], logprobs[0], tuple(zip(ids[1:], logprobs[1:], strict=True))


def logits_of(model: TransformerLM, x_BTD: jax.Array) -> jax.Array:
    """Float32 logits [B, T, V] from what `TransformerLM.hidden` gives."""
    return constrain(model.unembed(x_BTD)[..., : model.config.vocab_size], "batch", None, None)


def report_prompt(model: TransformerLM, x_PD: jax.Array, tokens_P: jax.Array, wanted: jax.Array) -> jax.Array:
    """Reports [P, R] of what follows each token of a prompt, within it; zeros where they are not wanted."""
    P, size = len(tokens_P), math.gcd(len(tokens_P), CHUNK)

    def report_chunk(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        x_CD, next_C = chunk
        return report(logits_of(model, x_CD[None])[0], next_C)

    def report_all(x_PD: jax.Array) -> jax.Array:
        chunks = (x_PD.reshape(P // size, size, -1), jnp.roll(tokens_P, -1).reshape(-1, size))
        return jax.lax.map(report_chunk, chunks).reshape(P, -1)

    width = 2 + 2 * min(TOP, model.config.vocab_size)
    return jax.lax.cond(wanted, report_all, lambda _: jnp.zeros((P, width), jnp.int32), x_PD)
