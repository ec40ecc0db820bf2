"""Configs as plain values, and back: what config.json holds.

Invariant: a config that went out and came in is equal to what it was.
"""

import dataclasses
from typing import Any

from parallax.config import RopeScaling, TransformerConfig


def config_to_dict(config: Any) -> dict[str, Any]:
    """A config as JSON-ready values, nested configs as nested objects."""
    fields = ((field.name, getattr(config, field.name)) for field in dataclasses.fields(config))
    return {name: config_to_dict(x) if dataclasses.is_dataclass(x) else x for name, x in fields}


def config_from_dict(values: dict[str, Any]) -> TransformerConfig:
    """The model config that `config_to_dict` wrote.

    Raises:
      ValueError: a field is unknown, or the values break a rule of the config.
    """
    _refuse_unknown(values, TransformerConfig, "model config")
    scaling = values.get("rope_scaling") or {}
    _refuse_unknown(scaling, RopeScaling, "rope_scaling")
    return TransformerConfig(**{**values, "rope_scaling": RopeScaling(**scaling)})


def _refuse_unknown(values: dict[str, Any], kind: type, what: str) -> None:
    known = sorted(field.name for field in dataclasses.fields(kind))
    unknown = ", ".join(sorted(set(values) - set(known)))
    if unknown:
        raise ValueError(f"{what} has unknown field {unknown}; known are {', '.join(known)}")
