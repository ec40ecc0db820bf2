"""Direct preference optimisation: of two answers, the preferred one is made likelier than under a reference.

Invariant: a row holds both answers, each behind the prompt in a segment of its own, so that no layout parts a pair.
Everything is a sum over pairs; whoever holds all shards divides by their global number.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from parallax.config import TransformerConfig
from parallax.layer_config import require
from parallax.layers.attend import cut
from parallax.model.stack import Aux
from parallax.model.transformer import TransformerLM
from parallax.training.loss import NO_TARGET, LossFn, Sums, described, tokens_at_once, with_experts

CHOSEN, REJECTED = 1, 2
"""The segments of a row."""
REFERENCES = ("reference_chosen", "reference_rejected")
"""What a batch holds of them, each float32 [B]: the log-probabilities under the reference."""


@chex.dataclass(frozen=True)
class PreferenceConfig:
    """How much a preference weighs."""

    beta: float = 0.1
    """How far the model may go from the reference: the smaller, the farther."""
    label_smoothing: float = 0.0
    """Probability that a preference is the wrong way round (Mitchell 2023, ericmitchell.ai/cdpo.pdf)."""
    length_normalized: bool = False
    """Log-probabilities are divided by the learned tokens of their answer (Meng et al. 2024, arXiv:2405.14734)."""

    def __post_init__(self):
        require(self.beta > 0, f"dpo.beta={self.beta} must be positive; try 0.1")
        smoothing = self.label_smoothing
        require(0 <= smoothing < 0.5, f"dpo.label_smoothing={smoothing} must be in [0, 0.5); try 0.1")


LogProbs = Callable[[Any, dict[str, jax.Array], jax.Array | None], tuple[jax.Array, jax.Array, Aux]]


def make_log_probs(config: TransformerConfig, *, length_normalized: bool = False) -> LogProbs:
    """(params, batch, dropout keys) to log p(chosen | prompt) and log p(rejected | prompt), each float32 [B], in nats.

    Of the target tokens of each segment: a sum, or their mean. With them comes what routers report of those tokens, in
    which all of a pair count as one.
    """

    def log_probs(params: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> tuple[jax.Array, jax.Array, Aux]:
        model = TransformerLM.from_params(config, params)
        shares_BT = _shares(batch)
        x_BTD, _, aux = model.hidden(batch["inputs"], segments=batch["segments"], dropout_key=key, counted_BT=shares_BT)
        found_BT = _of_targets(model, x_BTD, batch["targets"])

        def of(segment: int) -> jax.Array:
            counted_BT = _counted(batch, segment)
            total_B = jnp.sum(jnp.where(counted_BT, found_BT, 0), axis=1)
            return total_B / jnp.maximum(jnp.sum(counted_BT, axis=1), 1) if length_normalized else total_B

        return of(CHOSEN), of(REJECTED), aux

    return log_probs


def _counted(batch: Mapping[str, Any], segment: int) -> jax.Array:
    """The targets of one segment, bool [B, T]."""
    return (batch["segments"] == segment) & (batch["targets"] != NO_TARGET)


def is_pair(batch: Mapping[str, Any]) -> jax.Array:
    """Which rows show a target of both answers, bool [B]: neither is cut off whole."""
    return jnp.any(_counted(batch, CHOSEN), axis=1) & jnp.any(_counted(batch, REJECTED), axis=1)


def _shares(batch: Mapping[str, Any]) -> jax.Array:
    """The share of each target in those of its pair, float32 [B, T]; 0 everywhere else."""
    counted_BT = (batch["targets"] != NO_TARGET) & is_pair(batch)[:, None]
    return counted_BT / jnp.maximum(jnp.sum(counted_BT, axis=1, keepdims=True), 1)


def _of_targets(model: TransformerLM, x_BTD: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """log p of each target, [B, T], the logits of a chunk of tokens at a time and again in the backward pass."""
    table_WD, (B, T, _) = model.head.whole(), x_BTD.shape
    chunk = tokens_at_once(model.config.vocab_size, T)

    @jax.checkpoint
    def of_chunk(table_WD: jax.Array, x_BCD: jax.Array, targets_BC: jax.Array) -> jax.Array:
        logits_BCW = model.head.logits(table_WD, x_BCD)
        ids_W = jnp.arange(logits_BCW.shape[-1])[None, None]
        hit_BC = jnp.sum(jnp.where(ids_W == targets_BC[..., None], logits_BCW, 0), axis=-1)
        return hit_BC - jax.nn.logsumexp(logits_BCW, axis=-1)

    if chunk >= T:
        return of_chunk(table_WD, x_BTD, targets_BT)
    found = jax.lax.map(lambda part: of_chunk(table_WD, *part), (cut(x_BTD, chunk), cut(targets_BT, chunk)))
    return jnp.moveaxis(found, 0, 1).reshape(B, -1)[:, :T]


def make_preference_loss(config: TransformerConfig, preference: PreferenceConfig) -> LossFn:
    """The objective of a batch of pairs, with the arrays of REFERENCES in it (Rafailov et al. 2023, arXiv:2305.18290).

    With the rewards r = β (log π(y | x) − log π_ref(y | x)) of both answers, their margin m = r_chosen − r_rejected and
    the smoothing ε:  loss = −(1 − ε) log σ(m) − ε log σ(−m)  (eq. 7). A row without a target of both is no pair.
    The losses of routers are added: of each pair their mean over its targets.
    """
    log_probs = make_log_probs(config, length_normalized=preference.length_normalized)

    def loss_fn(params: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> tuple[Sums, jax.Array]:
        *both, aux = log_probs(params, batch, key)
        chosen_B, rejected_B = (preference.beta * (of - batch[name]) for of, name in zip(both, REFERENCES, strict=True))
        margin_B, eps = chosen_B - rejected_B, preference.label_smoothing
        loss_B = -(1 - eps) * jax.nn.log_sigmoid(margin_B) - eps * jax.nn.log_sigmoid(-margin_B)
        found = {
            "loss": loss_B,
            "reward_chosen": chosen_B,
            "reward_rejected": rejected_B,
            "reward_margin": margin_B,
            "reward_accuracy": (margin_B > 0).astype(jnp.float32),
        }
        is_pair_B = is_pair(batch)
        sums = {name: jnp.sum(jnp.where(is_pair_B, value, 0)) for name, value in found.items()}
        return with_experts(jax.lax.stop_gradient(sums) | {"loss": sums["loss"]}, aux), jnp.sum(is_pair_B)

    return described(loss_fn, config)


def make_preference_evaluation(
    config: TransformerConfig, preference: PreferenceConfig
) -> Callable[[Any, dict[str, jax.Array]], tuple[jax.Array, jax.Array]]:
    """(params, batch) to (summed loss, number of pairs), without dropout and losses of routers."""
    experts = dataclasses.replace(config.experts, balance_loss=0.0, router_z_loss=0.0)
    loss_fn = make_preference_loss(dataclasses.replace(config, experts=experts), preference)

    def evaluate(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        sums, pairs = loss_fn(params, batch, None)
        return sums["loss"], pairs

    return evaluate
