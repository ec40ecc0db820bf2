"""Which mesh axes shard a logical axis.

Invariant: an array is split only as its rule says. A rule that would use one mesh axis twice in an array, or cut a dim
into unequal pieces, is refused, never bent.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import PartitionSpec

from parallax.axes import LOGICAL_AXES

MESH_AXES = ("data", "fsdp", "expert", "sequence", "tensor")
"""Outermost first: neighbours along the last axis talk the most."""

Rules = Mapping[str, tuple[str, ...]]
"""Logical axis to the mesh axes that split it, outermost first; a logical axis without a rule is not split."""

RULE_SETS: dict[str, Rules] = {
    "default": {
        "batch": ("data", "fsdp", "expert"),
        # Parameters, gradients and optimizer state cut along the embedding (ZeRO, arXiv:1910.02054).
        "embed": ("fsdp",),
        # Tokens travel to the devices that hold their experts (GShard, arXiv:2006.16668, section 3.2).
        "experts": ("expert",),
        # Heads, hidden units and words shared by devices that sum their results (Megatron-LM, arXiv:1909.08053).
        **dict.fromkeys(("heads", "kv_heads", "mlp", "vocab"), ("tensor",)),
        **dict.fromkeys(("act_heads", "act_kv_heads", "act_mlp", "act_vocab"), ("tensor",)),
        # Queries stay with their tokens; keys and values are gathered (Llama 3, arXiv:2407.21783, section 3.3.2).
        "length": ("sequence",),
    },
    # Every device holds all parameters: the plainest layout, to compare others to.
    "replicated": {"batch": ("data", "fsdp", "expert"), "length": ("sequence",)},
}


def load_rules(name_or_path: str) -> Rules:
    """The rule set of that name, or of a JSON file such as {"batch": ["data", "fsdp"], "mlp": ["tensor"]}.

    Raises ValueError if there is neither, or the file does not hold rules.
    """
    if name_or_path in RULE_SETS:
        return RULE_SETS[name_or_path]
    path = Path(name_or_path)
    known = ", ".join(RULE_SETS)
    if not path.is_file():
        raise ValueError(f"rules={name_or_path!r} is no rule set ({known}) and no file; check the spelling")
    form = 'write an object such as {"batch": ["data", "fsdp"], "mlp": ["tensor"]}'
    try:
        rules = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"rules file {path} must be JSON ({error}); {form}") from None
    if not isinstance(rules, dict) or not all(_is_names(axes) for axes in rules.values()):
        raise ValueError(f"rules file {path} must give each logical axis a list of mesh axes; {form}")
    return check_rules({name: tuple(axes) for name, axes in rules.items()})


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def check_rules(rules: Rules) -> Rules:
    """The rules themselves.

    Raises ValueError if a rule names an axis that does not exist or names one twice, or parts heads from their keys.
    """
    for name, mesh_axes in rules.items():
        if name not in LOGICAL_AXES:
            raise ValueError(f"rule for {name!r} names no logical axis; known are {', '.join(sorted(LOGICAL_AXES))}")
        for axis in mesh_axes:
            if axis not in MESH_AXES:
                raise ValueError(f"rule {name!r} -> {axis!r} names no mesh axis; known are {', '.join(MESH_AXES)}")
            if mesh_axes.count(axis) > 1:
                raise ValueError(f"rule {name!r} names {axis!r} twice; name each mesh axis once")
    queries, keys = (tuple(rules.get(name, ())) for name in ("act_heads", "act_kv_heads"))
    if queries != keys:
        raise ValueError(
            f"rules act_heads={list(queries)} and act_kv_heads={list(keys)} must be the same, since heads attend to "
            "keys on their own device; give both the longer list"
        )
    experts, tokens = set(rules.get("experts", ())), {*rules.get("batch", ()), *rules.get("length", ())}
    if experts & tokens and not experts <= tokens:
        raise ValueError(
            f"rule experts={list(rules['experts'])} must name axes that split tokens, or none that does; "
            f"remove {', '.join(sorted(experts - tokens))} from it, or add it to batch"
        )
    return rules


ACROSS = ".dcn"
"""Behind the name of an axis, that of its part which crosses slices of TPUs, or hosts of GPUs, over the data-center
network; written data=2@dcn."""


def crosses_slices(axis: str) -> bool:
    """Whether devices that differ along this mesh axis are in different slices."""
    return axis.endswith(ACROSS)


def whole_axis(axis: str) -> str:
    """What an axis is part of within slices, or across them: fsdp of fsdp.0, but data.dcn of itself."""
    return axis if crosses_slices(axis) else axis.partition(".")[0]


def parts_of(axis: str, count: int) -> tuple[str, ...]:
    """What a mesh axis is called where it is laid along `count` dims of the network: fsdp, or fsdp.0, fsdp.1."""
    return (axis,) if count == 1 else tuple(f"{axis}.{part}" for part in range(count))


def in_parts(rules: Rules, mesh_axes: Sequence[str]) -> Rules:
    """Rules that name the axes of a mesh, some of which are parts, outermost first.

    Parts that cross slices come first where they split rows, so that a slice has neighbouring rows, and last elsewhere:
    gathered from the last axis to the first, and scattered from the first to the last, arrays cross slices in shards.
    """

    def named(rule: str, axes: Sequence[str]) -> tuple[str, ...]:
        parts = [part for axis in axes for part in mesh_axes if part.partition(".")[0] == axis]
        return tuple(sorted(parts, key=crosses_slices, reverse=rule == "batch"))

    return {rule: named(rule, axes) for rule, axes in rules.items()}


def check_used(rules: Rules, mesh_shape: Mapping[str, int]) -> None:
    """Raises ValueError where a mesh axis splits nothing: its devices would all do the same work."""
    used = {axis for mesh_axes in rules.values() for axis in mesh_axes}
    for axis, size in mesh_shape.items():
        if size > 1 and axis not in used:
            raise ValueError(
                f"mesh axis {axis}={size} splits nothing under these rules; try --mesh data=all, or --rules default"
            )


def check_experts(mesh_shape: Mapping[str, int], state_axes: Any) -> None:
    """Raises ValueError where a mesh has an axis for experts and no array of the state has any."""
    size = math.prod(count for axis, count in mesh_shape.items() if axis.partition(".")[0] == "expert")
    specs = jax.tree.leaves(state_axes, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
    if size > 1 and not any("experts" in spec for spec in specs):
        raise ValueError(f"mesh axis expert={size} shares experts, and the model has none; try data={size}")


def check_activations(rules: Rules, mesh_shape: Mapping[str, int]) -> None:
    """Raises ValueError where a mesh axis would split both the tokens of an activation and its features."""
    for name in (each for each in rules if each == "length" or each.startswith("act_")):
        for tokens in {"batch", "length"} - {name}:
            shared = [axis for axis in split_by(name, rules, mesh_shape) if axis in rules.get(tokens, ())]
            if shared:
                raise ValueError(
                    f"mesh axis {shared[0]!r} cannot split both {tokens!r} and {name!r} of one array; "
                    f"remove it from one of the two rules"
                )


def split_by(name: str, rules: Rules, mesh_shape: Mapping[str, int]) -> dict[str, int]:
    """The mesh axes of more than one device that split a logical axis, with their sizes."""
    return {axis: mesh_shape[axis] for axis in rules.get(name, ()) if mesh_shape.get(axis, 1) > 1}


def partition_spec(
    names: Sequence[str | None], shape: Sequence[int], rules: Rules, mesh_shape: Mapping[str, int]
) -> PartitionSpec:
    """How an array with these logical names and this shape is cut over a mesh of these axis sizes.

    Raises ValueError if two dims would use the same mesh axis, or a dim is not divisible by the devices that split it.
    """
    spec, used = [], {}
    for name, size in zip(names, shape, strict=True):
        sizes = split_by(name or "", rules, mesh_shape)
        for axis in sizes:
            if axis in used:
                raise ValueError(
                    f"mesh axis {axis!r} cannot split both {used[axis]!r} and {name!r} of one array; "
                    f"remove it from one of the two rules"
                )
            used[axis] = name
        if size % math.prod(sizes.values()):
            product = "×".join(f"{axis}={count}" for axis, count in sizes.items())
            raise ValueError(f"{name}={size} must be divisible by {product}; try {_remedy(name, size, sizes)}")
        spec.append(tuple(sizes) if len(sizes) != 1 else next(iter(sizes)))
    return PartitionSpec(*(axes or None for axes in spec))


def _remedy(name: str | None, size: int, sizes: dict[str, int]) -> str:
    """The nearest larger dim and, where one helps, a last mesh axis that leaves whole devices to another axis."""
    pieces, (last, count) = math.prod(sizes.values()), list(sizes.items())[-1]
    larger = f"{name}={size + -size % pieces}"
    fewer = [d for d in range(1, count) if count % d == 0 and size % (pieces // count * d) == 0]
    return f"a mesh with {last}={fewer[-1]} or {larger}" if fewer else larger
