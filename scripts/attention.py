"""Which attention a run trains with, where the config leaves it open.

Invariant: train.py and plan.py decide alike, and what cannot run is refused before anything is written.
"""

import dataclasses

from parallax.config import TransformerConfig
from parallax.layers.splash import LANES, check_length
from parallelism.hardware import Generation


def choose_attention(
    model: TransformerConfig, seq_len: int, length_parts: int, generation: Generation | None
) -> TransformerConfig:
    """The model with xla, or with splash where the devices run that kernel.

    Args:
      length_parts: how many devices share a sequence.
      generation: of the TPU, or None on other devices.

    Raises:
      ValueError: splash is asked for and cannot take such sequences.
    """
    if model.attention == "splash":
        check_length(seq_len)
        if length_parts > 1:
            raise ValueError(
                f"attention=splash needs whole sequences on a device, and {length_parts} devices share each; "
                "try --model.attention xla"
            )
    if model.attention != "auto":
        return model
    in_order = seq_len % LANES == 0 and length_parts == 1 and not model.dropout_rate
    runs = generation is not None and generation.splash
    return dataclasses.replace(model, attention="splash" if runs and in_order else "xla")
