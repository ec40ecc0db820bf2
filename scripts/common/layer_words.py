"""A layer of a pattern as one word of the command line, such as sliding_window=1024,rope_scaling.kind=none.

Invariant: a word that is read gives the LayerSpec that is written as it; `same` is one that differs in nothing.
"""

import dataclasses
import json
import math
from typing import Any, get_args, get_origin

import tyro

from parallax.config import LayerSpec, RopeScaling

SAME = "same"

REGISTRY = tyro.constructors.ConstructorRegistry()
"""For `parse`, so that --model.pattern takes words."""


@REGISTRY.primitive_rule
def _rule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """For all layers at once: of a word that stands for one of them tyro would not say what is wrong."""
    # tyro makes a typing.Tuple of the type where two layers are the default.
    if (get_origin(info.type), get_args(info.type)) != (tuple, (LayerSpec, ...)):
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="[FIELD=VALUE,…|same] …",
        instance_from_str=lambda words: tuple(map(read_layer, words)),
        is_instance=lambda value: isinstance(value, tuple) and all(isinstance(each, LayerSpec) for each in value),
        str_from_instance=lambda layers: list(map(write_layer, layers)),
    )


def read_layer(word: str) -> LayerSpec:
    """Raises ValueError for a field that no layer has, or a value of another kind."""
    values: dict[str, Any] = {}
    scaling: dict[str, Any] = {}
    for pair in [] if word == SAME else word.split(","):
        name, _, value = pair.partition("=")
        kind, inner = (RopeScaling, name.removeprefix("rope_scaling.")) if "." in name else (LayerSpec, name)
        annotations = {field.name: str(field.type) for field in dataclasses.fields(kind)}
        if inner not in annotations or inner == "rope_scaling":
            known = ", ".join(field.name for field in dataclasses.fields(LayerSpec))
            raise ValueError(f"{name!r} of layer {word!r} is not one of {known}; try sliding_window=1024, or {SAME}")
        fields = scaling if kind is RopeScaling else values
        if inner in fields:
            raise ValueError(f"layer {word!r} gives {name} twice; give it once")
        fields[inner] = _value(annotations[inner], name, value)
    return LayerSpec(**values, rope_scaling=RopeScaling(**scaling) if scaling else None)


def _value(annotation: str, name: str, text: str) -> Any:
    if "Literal" in annotation:
        return text
    try:
        value = json.loads(text)
        if "bool" in annotation or isinstance(value, bool):
            holds = "bool" in annotation and isinstance(value, bool)
        elif "float" in annotation:
            holds, value = math.isfinite(value), float(value)
        else:
            holds = isinstance(value, int)
        if holds:
            return value
    except (ValueError, TypeError, OverflowError, RecursionError):
        pass
    wanted = "true or false" if "bool" in annotation else "a number" if "float" in annotation else "a whole number"
    raise ValueError(f"{name}={text} of a layer must be {wanted}; try {'true' if 'bool' in annotation else 1024}")


def write_layer(layer: LayerSpec) -> str:
    """The word that reads as it."""
    words = []
    for name, value in layer.given().items():
        if isinstance(value, RopeScaling):
            fields = ((field.name, getattr(value, field.name), field.default) for field in dataclasses.fields(value))
            words += [f"rope_scaling.{field}={own}" for field, own, usual in fields if own != usual or field == "kind"]
        else:
            words.append(f"{name}={str(value).lower() if isinstance(value, bool) else value}")
    return ",".join(words) or SAME
