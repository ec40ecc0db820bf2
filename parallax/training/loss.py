"""Next-token cross-entropy with label smoothing and z-loss.

Invariant: everything is a sum over target tokens. Whoever holds all shards divides by the global number of targets,
so padding, microbatches and shards change nothing.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from parallax.config import TrainConfig, TransformerConfig
from parallax.model.transformer import TransformerLM

NO_TARGET = -1
"""The target id of a position that is not learned from: padding."""

ROW_LOGITS = 2**22
"""Logits a row held at once: 16 MiB of float32, so a 128 k vocabulary goes 32 tokens at a time."""

Sums = dict[str, jax.Array]
LossFn = Callable[[Any, dict[str, jax.Array], jax.Array | None], tuple[Sums, jax.Array]]
"""(params, batch, dropout key) to (sums with the objective under "loss", number of target tokens)."""


def token_losses(
    logits_BTW: jax.Array,
    targets_BT: jax.Array,
    *,
    vocab_size: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Sums:
    """Sums over target tokens of the cross-entropy, the z-loss and both, in nats; scalars in the logits' dtype.

    Logits from V = vocab_size on are masked. All is a sum along W, so that devices that share the vocabulary add up
    their parts and no logit travels.

    With Z = Σ_v exp(logit_v), target y and smoothing ε (Szegedy et al. 2016, arXiv:1512.00567, section 7):
      ce = log Z - (1-ε) logit_y - ε mean_v logit_v          z = z_loss · log²Z   (PaLM, arXiv:2204.02311, section 5)
    """
    counted = targets_BT != NO_TARGET
    log_Z = jax.nn.logsumexp(logits_BTW, axis=-1)
    ids_W = jnp.arange(logits_BTW.shape[-1])[None, None]
    wanted_BTW = (1 - label_smoothing) * (ids_W == targets_BT[..., None])
    if label_smoothing:
        wanted_BTW = wanted_BTW + label_smoothing / vocab_size * (ids_W < vocab_size)
    hit = jnp.sum(wanted_BTW.astype(logits_BTW.dtype) * logits_BTW, axis=-1)
    ce = jnp.sum(jnp.where(counted, log_Z - hit, 0))
    z = jnp.sum(jnp.where(counted, z_loss * log_Z**2, 0))
    return {"loss": ce + z, "ce_loss": ce, "z_loss": z}


def chunked_losses(
    unembed: Callable[[jax.Array], jax.Array],
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    *,
    chunk: int,
    vocab_size: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Sums:
    """`token_losses(unembed(x), targets)` with logits of `chunk` tokens a row at a time, recomputed going back."""

    def losses(x_BTD, targets_BT):
        return token_losses(
            unembed(x_BTD), targets_BT, vocab_size=vocab_size, label_smoothing=label_smoothing, z_loss=z_loss
        )

    B, T, D = x_BTD.shape
    if chunk >= T:
        return losses(x_BTD, targets_BT)
    padding = -T % chunk
    x_BTD = jnp.pad(x_BTD, ((0, 0), (0, padding), (0, 0)))
    targets_BT = jnp.pad(targets_BT, ((0, 0), (0, padding)), constant_values=NO_TARGET)
    x_chunks = jnp.moveaxis(x_BTD.reshape(B, -1, chunk, D), 1, 0)
    target_chunks = jnp.moveaxis(targets_BT.reshape(B, -1, chunk), 1, 0)
    losses = jax.checkpoint(losses, prevent_cse=False)

    def add(sums, chunked):
        return jax.tree.map(jnp.add, sums, losses(*chunked)), None

    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(losses, x_chunks[0], target_chunks[0])
    )
    return jax.lax.scan(add, zeros, (x_chunks, target_chunks))[0]


def make_loss(config: TransformerConfig, train: TrainConfig) -> LossFn:
    """The training objective of a batch: `inputs`, `targets` and perhaps `segments`, each [B, T] int32."""

    def loss_fn(params, batch, key):
        model = TransformerLM.from_params(config, params)
        x_BTD, _ = model.hidden(batch["inputs"], segments=batch.get("segments"), dropout_key=key)
        sums = chunked_losses(
            model.unembed,
            x_BTD,
            batch["targets"],
            chunk=max(1, ROW_LOGITS // config.vocab_size),
            vocab_size=config.vocab_size,
            label_smoothing=train.label_smoothing,
            z_loss=train.z_loss,
        )
        return sums, jnp.sum(batch["targets"] != NO_TARGET)

    return loss_fn


def make_evaluation(
    config: TransformerConfig,
) -> Callable[[Any, dict[str, jax.Array]], tuple[jax.Array, jax.Array]]:
    """(params, batch) to (summed cross-entropy in nats, number of target tokens): no dropout, smoothing or z-loss."""
    loss_fn = make_loss(config, TrainConfig(label_smoothing=0.0, z_loss=0.0))

    def evaluate(params, batch):
        sums, tokens = loss_fn(params, batch, None)
        return sums["ce_loss"], tokens

    return evaluate
