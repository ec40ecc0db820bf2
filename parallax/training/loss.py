"""Next-token cross-entropy with label smoothing and z-loss.

Invariant: everything is a sum over target tokens. Whoever holds all shards divides by the global number of targets,
so padding, microbatches and shards change nothing.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from parallax.config import TrainConfig, TransformerConfig
from parallax.layers.attend import cut
from parallax.layers.attention import KERNELS
from parallax.model.stack import Aux
from parallax.model.transformer import TransformerLM, parameters

NO_TARGET = -1
"""The target id of a position that is not learned from: padding."""

ROW_LOGITS = 2**22
"""Logits a row held at once, if CHUNKS allows: 16 MiB of float32."""
CHUNKS = 8
"""At most, of a row. Their gradients of the table are added up in the compute dtype, and few sums round little."""

Sums = dict[str, jax.Array]
LossFn = Callable[[Any, dict[str, jax.Array], jax.Array | None], tuple[Sums, jax.Array]]
"""(params, batch, dropout keys, one a row) to (sums, number of target tokens); the objective, "loss", alone has a
gradient."""


def token_losses(
    logits_BTW: jax.Array, targets_BT: jax.Array, *, vocab_size: int, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> Sums:
    """Sums over target tokens of the cross-entropy, the z-loss and both, in nats; scalars in the logits' dtype.

    Logits from V = vocab_size on are masked. All is a sum along W, so that devices that share the vocabulary add up
    their parts and no logit travels. A target that is neither an id nor NO_TARGET makes the sums NaN; targets of
    another shape than the logits raise ValueError.

    With Z = Σ_v exp(logit_v), target y and smoothing ε (Szegedy et al. 2016, arXiv:1512.00567, section 7):
      ce = log Z - (1-ε) logit_y - ε mean_v logit_v          z = z_loss · log²Z   (PaLM, arXiv:2204.02311, section 5)
    """
    _check_targets(logits_BTW, targets_BT)
    counted = targets_BT != NO_TARGET
    log_Z = jax.nn.logsumexp(logits_BTW, axis=-1)
    ids_W = jnp.arange(logits_BTW.shape[-1])[None, None]
    wanted_BTW = (1 - label_smoothing) * (ids_W == targets_BT[..., None])
    if label_smoothing:
        wanted_BTW = wanted_BTW + label_smoothing / vocab_size * (ids_W < vocab_size)
    hit = jnp.sum(wanted_BTW.astype(logits_BTW.dtype) * logits_BTW, axis=-1)
    hit = jnp.where(counted & ((targets_BT < 0) | (targets_BT >= vocab_size)), jnp.nan, hit)
    ce = jnp.sum(jnp.where(counted, log_Z - hit, 0))
    z = jnp.sum(jnp.where(counted, z_loss * log_Z**2, 0))
    return {"loss": ce + z, "ce_loss": ce, "z_loss": z}


def _check_targets(of_BT: jax.Array, targets_BT: jax.Array) -> None:
    """Raises ValueError unless there is one target, an integer, for each [B, T] of an array."""
    if targets_BT.shape != of_BT.shape[:2] or not jnp.issubdtype(targets_BT.dtype, jnp.integer):
        raise ValueError(
            f"targets={targets_BT.dtype}{list(targets_BT.shape)} must be integers {list(of_BT.shape[:2])}; "
            "give one an input"
        )


def tokens_at_once(vocab_size: int, length: int) -> int:
    """How many tokens of a row have their logits held at once, by ROW_LOGITS and CHUNKS."""
    return max(1, ROW_LOGITS // vocab_size, -(-length // CHUNKS))


def chunked_losses(
    logits: Callable[[jax.Array, jax.Array], jax.Array],
    table_WD: jax.Array,
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    *,
    chunk: int,
    vocab_size: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Sums:
    """`token_losses(logits(table, x), targets)` with logits of `chunk` tokens a row at a time; see `LossFn`.

    A chunk's gradient is taken while its logits are there, so they are computed once.
    """

    def losses(table_WD, x_BTD, targets_BT):
        sums = token_losses(
            logits(table_WD, x_BTD), targets_BT, vocab_size=vocab_size, label_smoothing=label_smoothing, z_loss=z_loss
        )
        return sums["loss"], sums

    _check_targets(x_BTD, targets_BT)
    if chunk >= x_BTD.shape[1]:
        loss, sums = losses(table_WD, x_BTD, targets_BT)
    else:
        loss, sums = _sum_over_chunks(losses)(table_WD, cut(x_BTD, chunk), cut(targets_BT, chunk, NO_TARGET))
    return jax.lax.stop_gradient(sums) | {"loss": loss}


def _sum_over_chunks(losses: Callable) -> Callable:
    """`losses(table, x, targets)` -> (loss, sums), added up over a leading dim of x and targets."""

    @jax.custom_vjp
    def summed(table, x_chunks, target_chunks):
        def add(sofar, chunk):
            return jax.tree.map(jnp.add, sofar, losses(table, *chunk)), None

        one = jax.eval_shape(losses, table, x_chunks[0], target_chunks[0])
        return jax.lax.scan(add, _zeros(one, x_chunks), (x_chunks, target_chunks))[0]

    def forward(table, x_chunks, target_chunks):
        def add(sofar, chunk):
            results, (grad_table, grad_x) = jax.value_and_grad(losses, (0, 1), has_aux=True)(table, *chunk)
            return jax.tree.map(jnp.add, sofar, (results, grad_table)), grad_x

        one = jax.eval_shape(losses, table, x_chunks[0], target_chunks[0])
        (results, grad_table), grad_x = jax.lax.scan(add, _zeros((one, table), x_chunks), (x_chunks, target_chunks))
        return results, (grad_table, grad_x)

    def backward(gradients, cotangents):
        grad_table, grad_x = jax.tree.map(lambda x: (cotangents[0] * x).astype(x.dtype), gradients)
        return grad_table, grad_x, None

    summed.defvjp(forward, backward)
    return summed


def _zeros(tree: Any, like: jax.Array) -> Any:
    """Inside shard_map they may differ between devices, where `like` does."""
    return jax.tree.map(lambda leaf: jax.lax.full_like(like, 0, leaf.dtype, leaf.shape), tree)


def make_loss(config: TransformerConfig, train: TrainConfig) -> LossFn:
    """The training objective of a batch: `inputs`, `targets` and perhaps `segments`, each [B, T] int32."""

    def loss_fn(params, batch, key):
        model = TransformerLM.from_params(config, params)
        table_WD = model.head.whole() if config.tie_embeddings else None
        is_target_BT = batch["targets"] != NO_TARGET
        x_BTD, _, aux = model.hidden(
            batch["inputs"], segments=batch.get("segments"), dropout_key=key, table_WD=table_WD, counted_BT=is_target_BT
        )
        if table_WD is None:
            # Gathered after the blocks, and its gradient scattered before theirs: never two whole tables at once.
            shards = (x_BTD, model.head.table[...])
            x_BTD, model.head.table[...] = jax.lax.optimization_barrier(shards)
            table_WD = model.head.whole()
        sums = chunked_losses(
            model.head.logits,
            table_WD,
            x_BTD,
            batch["targets"],
            chunk=tokens_at_once(config.vocab_size, x_BTD.shape[1]),
            vocab_size=config.vocab_size,
            label_smoothing=train.label_smoothing,
            z_loss=train.z_loss,
        )
        return with_experts(sums, aux), jnp.sum(is_target_BT)

    return described(loss_fn, config)


def described(loss_fn: Any, config: TransformerConfig) -> LossFn:
    """The loss of a model, with what a gradient function must know of it: `has_kernels`, and perhaps `learned`."""
    # A shard_map that checks what differs between devices can hold no kernel: JAX cannot see into it.
    experts = any(layer.feed_forward == "experts" for layer in config.layers)
    loss_fn.has_kernels = config.attention in KERNELS or experts
    if config.lora.rank:
        loss_fn.learned = jax.tree.map(lambda parameter: parameter.learned, parameters(config))
    return loss_fn


def with_experts(sums: Sums, aux: Aux) -> Sums:
    """The losses of routers added to the objective, and what else routers report of the target tokens.

    `balance_loss` and `router_z_loss` are summed over layers, `router_entropy` is averaged; `expert_load`
    [layers with experts, E] counts in int32, and so exactly however many devices add it up.
    """
    if "expert_load" not in aux:
        return sums
    losses = {name: jnp.sum(aux[name]) for name in ("balance_loss", "router_z_loss")}
    found = losses | {"router_entropy": jnp.mean(aux["router_entropy"])}
    found = jax.lax.stop_gradient(found) | {"expert_load": aux["expert_load"].astype(jnp.int32)}
    return sums | found | {"loss": sums["loss"] + sum(losses.values())}


def make_evaluation(config: TransformerConfig) -> Callable[[Any, dict[str, jax.Array]], tuple[jax.Array, jax.Array]]:
    """(params, batch) to (summed cross-entropy in nats, number of target tokens): no dropout, smoothing or z-loss."""
    loss_fn = make_loss(config, TrainConfig(label_smoothing=0.0, z_loss=0.0))

    def evaluate(params, batch):
        sums, tokens = loss_fn(params, batch, None)
        return sums["ce_loss"], tokens

    return evaluate
