"""The rotary embedding in a Hugging Face config.json, and back.

Invariant: both spellings are read, `rope_theta` with `rope_scaling` and the newer `rope_parameters`; the older, which
all readers know, is written.
"""

import math
from typing import Any

from parallax.layers.rotary import magnitude
from parallax.rope_scaling import RopeScaling

KINDS = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}


def rope_from_hf(values: dict[str, Any]) -> tuple[float, RopeScaling]:
    """(theta, scaling) of a config.json.

    Raises:
      ValueError: the scaling is of another kind, lacks a number, or turns a part of each head alone.
    """
    rope = {**(values.get("rope_parameters") or {}), **(values.get("rope_scaling") or {})}
    theta = float(rope.get("rope_theta") or values.get("rope_theta") or 10_000.0)
    partial = rope.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0
    if partial != 1:
        raise ValueError(
            f"partial_rotary_factor={partial} in config.json must be 1, since whole heads are rotated; "
            "convert another model"
        )
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in KINDS:
        raise ValueError(
            f"rope_type={kind!r} in config.json is not one of {', '.join(KINDS)}; convert a model without it"
        )
    if kind == "default":
        return theta, RopeScaling()
    # As transformers reads it: beside the rope, in it, or what the model takes.
    first = (
        values.get("original_max_position_embeddings")
        or rope.get("original_max_position_embeddings")
        or values.get("max_position_embeddings")
    )
    fields: dict[str, Any] = {"kind": KINDS[kind]}
    if kind == "yarn" and rope.get("factor") is None and first:
        rope = rope | {"factor": values["max_position_embeddings"] / first}
    fields["factor"] = _number(rope, "factor")
    if kind in ("llama3", "yarn"):
        fields["original_max_seq_len"] = int(first or 8192)
    if kind == "llama3":
        fields |= {name: _number(rope, name) for name in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        fields |= _yarn_fields(rope)
    return theta, RopeScaling(**fields)


def rope_to_hf(theta: float, scaling: RopeScaling) -> dict[str, Any]:
    """The entries of a config.json."""
    if scaling.kind == "none":
        return {"rope_theta": theta, "rope_scaling": None}
    rope: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = scaling.original_max_seq_len
    if scaling.kind == "llama3":
        rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        rope |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        rope["attention_factor"] = magnitude(scaling)
    return {"rope_theta": theta, "rope_scaling": rope}


def _yarn_fields(rope: dict[str, Any]) -> dict[str, float]:
    if not rope.get("truncate", True):
        raise ValueError(
            "truncate=false of yarn in config.json is not supported; convert a model whose ramp has whole ends"
        )
    factor = _number(rope, "factor")
    given, above, below = (rope.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is None and above and below:

        def scaled(by: float) -> float:
            return 0.1 * by * math.log(factor) + 1 if factor > 1 else 1.0

        given = scaled(above) / scaled(below)
    return {
        "beta_fast": float(rope.get("beta_fast") or 32),
        "beta_slow": float(rope.get("beta_slow") or 1),
        "attention_factor": float(given or 0),
    }


def _number(rope: dict[str, Any], name: str) -> float:
    number = rope.get(name)
    if not isinstance(number, int | float) or isinstance(number, bool):
        raise ValueError(
            f"{name}={number!r} of the rope scaling in config.json must be a number; restore the model's file"
        )
    return float(number)
