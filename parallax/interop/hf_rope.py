"""The rotary embedding of a config.json, and the length that it is for.

Invariant: both spellings are read, `rope_theta` with `rope_scaling` and the newer `rope_parameters`. The older is
written, which all readers know.
"""

import math

from parallax.config import RopeScaling
from parallax.interop.hf_values import Values, given, mapping, number, whole_number
from parallax.layers.rotary import magnitude

LIMIT = "max_position_embeddings"
FIRST_LIMIT = "original_max_position_embeddings"
EXACT_LIMIT = "max_seq_len"
"""In what is exported here, where LIMIT would be read as a length that is yet to be stretched."""

ROPE_KINDS = ("default", "linear", "llama3", "yarn")


def rope_from_hf(values: Values) -> tuple[float, RopeScaling]:
    """(theta, scaling) of a config.json.

    Raises ValueError if the scaling is of another kind, lacks a number, or turns a part of each head alone.
    """
    rope, values = _rope(values), given(values)
    for name, value in rope.items():
        if isinstance(value, dict):
            raise ValueError(
                f"{name} in the rope of config.json is for some layers alone, and all must rotate alike; "
                "convert another model"
            )
    theta = number({"rope_theta": 10_000.0} | values | rope, "rope_theta")
    partial = ({"partial_rotary_factor": 1} | values | rope)["partial_rotary_factor"]
    if partial != 1:
        raise ValueError(
            f"partial_rotary_factor={partial} in config.json must be 1, since whole heads are rotated; "
            "convert another model"
        )
    return theta, _scaling(rope, values)


def longest_from_hf(values: Values, scaling: RopeScaling) -> int:
    """Tokens up to which the model is meant to be used: the length before scaling times the factor.

    LIMIT is the length before scaling with linear, and with yarn at most a little more (Qwen 2.5 and 3). With llama3 it
    is the length after scaling, which may be less than the factor gives: Llama 3.2 states 131,072, and not 32 × 8192.
    """
    if values.get(EXACT_LIMIT) is not None:
        return whole_number(values, EXACT_LIMIT)
    limit = whole_number(values, LIMIT)
    first = _first_limit(_rope(values), given(values)) if scaling.kind != "none" else limit
    if scaling.kind == "llama3" and limit > first:
        return limit
    return max(limit, int(first * scaling.factor))


def _rope(values: Values) -> Values:
    """As transformers reads it: the older spelling, where there is one, counts alone."""
    return given(mapping(values, "rope_scaling") or mapping(values, "rope_parameters"))


def _first_limit(rope: Values, values: Values) -> int:
    """The length before scaling, as transformers reads it: beside the rope, in it, or what the model takes."""
    return whole_number({FIRST_LIMIT: values.get(LIMIT)} | rope | values, FIRST_LIMIT)


def _scaling(rope: Values, values: Values) -> RopeScaling:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if not isinstance(kind, str) or kind not in ROPE_KINDS:
        raise ValueError(
            f"rope_type={kind!r} in config.json is not one of {', '.join(ROPE_KINDS)}; convert a model without it"
        )
    if kind == "default":
        return RopeScaling()
    fields: Values = {"kind": kind}
    if kind in ("llama3", "yarn"):
        fields["original_max_seq_len"] = _first_limit(rope, values)
    if kind == "yarn" and "factor" not in rope:
        longest = whole_number(values, LIMIT)
        rope = rope | {"factor": longest / max(1, fields["original_max_seq_len"])}
    fields["factor"] = number(rope, "factor")
    if kind == "llama3":
        fields |= {name: number(rope, name) for name in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        fields |= _yarn_fields(rope)
    return RopeScaling(**fields)


def rope_to_hf(theta: float, scaling: RopeScaling) -> Values:
    """The entries of a config.json."""
    if scaling.kind == "none":
        return {"rope_theta": theta, "rope_scaling": None}
    rope: Values = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn"):
        rope[FIRST_LIMIT] = scaling.original_max_seq_len
    if scaling.kind == "llama3":
        rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        rope |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        rope["attention_factor"] = magnitude(scaling)
        rope |= {} if scaling.whole_ends else {"truncate": False}
    return {"rope_theta": theta, "rope_scaling": rope}


def _yarn_fields(rope: Values) -> Values:
    factor = number(rope, "factor")
    above, below = (number(rope, name, 0.0) for name in ("mscale", "mscale_all_dim"))
    attention = 0.0  # the paper's
    if above and below:

        def scaled(by: float) -> float:
            return 0.1 * by * math.log(factor) + 1 if factor > 1 else 1.0

        attention = scaled(above) / scaled(below)
    return {
        "beta_fast": number(rope, "beta_fast", 32.0),
        "beta_slow": number(rope, "beta_slow", 1.0),
        "attention_factor": number(rope, "attention_factor", attention),
        "whole_ends": bool(rope.get("truncate", True)),
    }
