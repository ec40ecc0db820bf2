"""How a run computes, where the config leaves it open.

Invariant: train.py and plan.py decide alike, and what cannot run is refused before anything is written.
"""

import dataclasses

from parallax.config import TransformerConfig
from parallax.cpu import FEW_LAYERS
from parallax.layers.attention import BY_BLOCKS
from parallax.layers.cudnn import check_heads, takes
from parallax.layers.splash import LANES, check_length
from scripts.training.flags import Flags

MICROBATCH = 1536
"""Tokens of a microbatch on each device of a CPU, at the least; a NANO layer's arrays of them are 1 to 2 MB."""


def choose_eval_tokens(flags: Flags, *, of_store: bool) -> int | None:
    """The most tokens of an evaluation, or None for all that are held out.

    Of a store, which may hold out more than a run ever trains on, 2% of the time of the steps between two evaluations:
    a forward pass takes a third of a step.
    """
    if flags.eval_tokens is not None or not of_store:
        return flags.eval_tokens
    return 6 * flags.train.eval_interval * flags.train.batch_size * flags.train.seq_len // 100


def choose_attention(model: TransformerConfig, seq_len: int, length_parts: int, fastest: str) -> TransformerConfig:
    """The model with what attends fastest on the devices, where that takes its heads and sequences, or with xla.

    Args:
      length_parts: how many devices share a sequence.
      fastest: see `attention_of` in planning/hardware.py.

    Raises:
      ValueError: a kernel is asked for that the devices do not have, or that cannot take such sequences or heads.
    """
    if model.attention == "splash":
        check_length(seq_len)
    if model.attention == "cudnn":
        check_heads(model.head_dim, model.dtype)
        if fastest != "cudnn":
            raise ValueError(
                "attention=cudnn needs NVIDIA GPUs of compute capability 8.0 or later, and the devices are others; "
                "try --model.attention auto"
            )
    if model.attention in BY_BLOCKS and length_parts > 1:
        raise ValueError(
            f"attention={model.attention} needs whole sequences on a device, and {length_parts} devices share each; "
            "try --model.attention xla"
        )
    if model.attention != "auto":
        return model
    plain = not any(layer.attention_softcap or layer.attention_sinks for layer in model.layers)
    by_cudnn = takes(model.head_dim, model.dtype) and plain
    taken = {"blocks": True, "splash": seq_len % LANES == 0, "cudnn": by_cudnn}
    whole = length_parts == 1 and not model.dropout_rate
    return dataclasses.replace(model, attention=fastest if whole and taken.get(fastest) else "xla")


def choose_layer_loop(model: TransformerConfig, platform: str, reduction: str) -> TransformerConfig:
    """The model with its layers unrolled on CPUs, unless there are many, or results are to be exact.

    There a step of NANO takes 0.81 to 0.91 of the time of one that scans. Other devices were not measured. Raises
    ValueError if layers are to be unrolled and results exact: what is unrolled is fused by the layout.
    """
    if model.layer_loop == "unroll" and reduction == "exact":
        raise ValueError(
            "reduction=exact does not hold with layer_loop=unroll, since XLA fuses unrolled layers by the layout; "
            "try --model.layer-loop scan"
        )
    if model.layer_loop != "auto":
        return model
    few = model.num_layers <= FEW_LAYERS and model.remat == "none"
    unroll = platform == "cpu" and few and reduction != "exact"
    return dataclasses.replace(model, layer_loop="unroll" if unroll else "scan")


def choose_accumulate(flags: Flags, platform: str, devices: int) -> int:
    """Microbatches of a step: as many as asked for, or on CPUs so many that each keeps MICROBATCH tokens.

    On one device NANO at 32 × 256 takes 0.84 of the time that it takes at once. Not where layers communicate with other
    devices, which they would do for each microbatch. Exact reduction cuts the batch itself.
    """
    train = flags.train
    if train.accumulate:
        return train.accumulate
    alone = flags.strategy != "mesh" or (flags.mesh.partition("=")[0] in ("", "data") and "," not in flags.mesh)
    rows, rest = divmod(train.batch_size, 1 if flags.strategy in (None, "single") else devices)
    if platform != "cpu" or not alone or rest or train.reduction == "exact":
        return 1
    most = max(1, rows * train.seq_len // MICROBATCH)
    return max(parts for parts in range(1, min(rows, most) + 1) if rows % parts == 0)
