"""How a run computes, where the config leaves it open.

Invariant: train.py and plan.py decide alike, and what cannot run is refused before anything is written.
"""

import dataclasses

from parallax.config import TrainConfig, TransformerConfig
from parallax.layers.attention import BY_BLOCKS
from parallax.layers.splash import LANES, check_length
from parallax.model.transformer import UNSTACKED
from parallelism.hardware import Generation

MICROBATCH = 2048
"""Tokens that a CPU's device takes at a time: a NANO layer's arrays of them are 1 to 3 MB each."""


def choose_attention(
    model: TransformerConfig, seq_len: int, length_parts: int, generation: Generation | None
) -> TransformerConfig:
    """The model with splash where the devices run that kernel, with blocks on what is no TPU, or with xla.

    Blocks were measured on CPUs alone.

    Args:
      length_parts: how many devices share a sequence.
      generation: of the TPU, or None on other devices.

    Raises:
      ValueError: splash is asked for and cannot take such sequences.
    """
    if model.attention == "splash":
        check_length(seq_len)
    if model.attention in BY_BLOCKS and length_parts > 1:
        raise ValueError(
            f"attention={model.attention} needs whole sequences on a device, and {length_parts} devices share each; "
            "try --model.attention xla"
        )
    if model.attention != "auto":
        return model
    chosen = "xla"
    if length_parts == 1 and not model.dropout_rate:
        if generation is None:
            chosen = "blocks"
        elif generation is not None and generation.splash and seq_len % LANES == 0:
            chosen = "splash"
    return dataclasses.replace(model, attention=chosen)


def choose_layer_loop(model: TransformerConfig, platform: str, reduction: str) -> TransformerConfig:
    """The model with its layers unrolled on CPUs, unless there are many, or results are to be exact.

    There a step of NANO takes 0.81 to 0.91 of the time of one that scans. Other devices were not measured.

    Raises:
      ValueError: layers are to be unrolled and results exact: what is unrolled is fused by the layout.
    """
    if model.layer_loop == "unroll" and reduction == "exact":
        raise ValueError(
            "reduction=exact does not hold with layer_loop=unroll, since XLA fuses unrolled layers by the layout; "
            "try --model.layer-loop scan"
        )
    if model.layer_loop != "auto":
        return model
    few = model.num_layers <= UNSTACKED and model.remat == "none"
    unroll = platform == "cpu" and few and reduction != "exact"
    return dataclasses.replace(model, layer_loop="unroll" if unroll else "scan")


def choose_accumulate(train: TrainConfig, model: TransformerConfig, platform: str, devices: int) -> int:
    """Microbatches of a step: as many as asked for, or on CPUs of at most about MICROBATCH tokens on each device.

    There NANO at 32 × 256 takes 0.84 of the time that it takes at once, and SMALL with 4,096 tokens 0.95. Not where it
    would change the curve: dropout draws anew for each microbatch. Under exact reduction it has no say.
    """
    if train.accumulate:
        return train.accumulate
    rows, rest = divmod(train.batch_size, devices)
    if platform != "cpu" or rest or model.dropout_rate or train.reduction == "exact":
        return 1
    fitting = max(1, MICROBATCH // train.seq_len)
    return next(parts for parts in range(1, rows + 1) if rows % parts == 0 and rows // parts <= fitting)
