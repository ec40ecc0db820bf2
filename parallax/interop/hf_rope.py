"""The rotary embedding in a Hugging Face config.json, and back.

Invariant: both spellings are read, `rope_theta` with `rope_scaling` and the newer `rope_parameters`; the older, which
all readers know, is written.
"""

import math

from parallax.interop.hf_values import Values, mapping, number, whole_number
from parallax.layers.rotary import magnitude
from parallax.rope_scaling import RopeScaling

KINDS = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}


def rope_from_hf(values: Values) -> tuple[float, RopeScaling]:
    """(theta, scaling) of a config.json.

    Raises:
      ValueError: the scaling is of another kind, lacks a number, or turns a part of each head alone.
    """
    # As transformers reads them: the older spelling, where there is one, counts alone.
    rope = _given(mapping(values, "rope_scaling") or mapping(values, "rope_parameters"))
    values = _given(values)
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


def _scaling(rope: Values, values: Values) -> RopeScaling:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(
            f"rope_type={kind!r} in config.json is not one of {', '.join(KINDS)}; convert a model without it"
        )
    if kind == "default":
        return RopeScaling()
    fields: Values = {"kind": KINDS[kind]}
    if kind in ("llama3", "yarn"):
        # As transformers reads it: beside the rope, in it, or what the model takes.
        first = {"original_max_position_embeddings": values.get("max_position_embeddings")} | rope | values
        fields["original_max_seq_len"] = whole_number(first, "original_max_position_embeddings")
    if kind == "yarn" and "factor" not in rope:
        longest = whole_number(values, "max_position_embeddings")
        rope = rope | {"factor": longest / max(1, fields["original_max_seq_len"])}
    fields["factor"] = number(rope, "factor")
    if kind == "llama3":
        fields |= {name: number(rope, name) for name in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        fields |= _yarn_fields(rope)
    return RopeScaling(**fields)


def _given(values: Values) -> Values:
    """Without what is null, which stands for what is missing."""
    return {name: value for name, value in values.items() if value is not None}


def rope_to_hf(theta: float, scaling: RopeScaling) -> Values:
    """The entries of a config.json."""
    if scaling.kind == "none":
        return {"rope_theta": theta, "rope_scaling": None}
    rope: Values = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = scaling.original_max_seq_len
    if scaling.kind == "llama3":
        rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        rope |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        rope["attention_factor"] = magnitude(scaling)
    return {"rope_theta": theta, "rope_scaling": rope}


def _yarn_fields(rope: Values) -> dict[str, float]:
    if not rope.get("truncate", True):
        raise ValueError(
            "truncate=false of yarn in config.json is not supported; convert a model whose ramp has whole ends"
        )
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
    }
