"""Which mesh axes a logical axis lies on.

Invariant: an array is split only as its rule says. A rule that would use one mesh axis twice in an array, or cut a dim
into unequal pieces, is refused, never bent.
"""

import math
from collections.abc import Mapping, Sequence

from jax.sharding import PartitionSpec

from parallax.axes import LOGICAL_AXES

MESH_AXES = ("data", "fsdp")
"""Outermost first: neighbours along the last axis talk the most."""

Rules = Mapping[str, tuple[str, ...]]
"""Logical axis to the mesh axes that split it, outermost first; a logical axis without a rule is not split."""

RULE_SETS: dict[str, Rules] = {
    # Batch over everything; parameters, gradients and optimizer state cut along the embedding (ZeRO, arXiv:1910.02054).
    "default": {"batch": ("data", "fsdp"), "embed": ("fsdp",)},
}


def check_rules(rules: Rules) -> Rules:
    """The rules themselves.

    Raises:
      ValueError: a rule names an axis that does not exist.
    """
    for name, mesh_axes in rules.items():
        if name not in LOGICAL_AXES:
            raise ValueError(
                f"rule for {name!r} names no logical axis; known are {', '.join(sorted(LOGICAL_AXES))}"
            )
        for axis in mesh_axes:
            if axis not in MESH_AXES:
                raise ValueError(
                    f"rule {name!r} -> {axis!r} names no mesh axis; known are {', '.join(MESH_AXES)}"
                )
    return rules


def partition_spec(
    names: Sequence[str | None], shape: Sequence[int], rules: Rules, mesh_shape: Mapping[str, int]
) -> PartitionSpec:
    """How an array with these logical names and this shape is cut over a mesh of these axis sizes.

    Raises:
      ValueError: two dims would use the same mesh axis, or a dim is not divisible by the devices that split it.
    """
    spec, used = [], {}
    for name, size in zip(names, shape, strict=True):
        mesh_axes = tuple(axis for axis in rules.get(name or "", ()) if mesh_shape.get(axis, 1) > 1)
        for axis in mesh_axes:
            if axis in used:
                raise ValueError(
                    f"mesh axis {axis!r} cannot split both {used[axis]!r} and {name!r} of one array; "
                    f"remove it from one of the two rules"
                )
            used[axis] = name
        sizes = {axis: mesh_shape[axis] for axis in mesh_axes}
        if size % math.prod(sizes.values()):
            product = "×".join(f"{axis}={count}" for axis, count in sizes.items())
            raise ValueError(
                f"{name}={size} must be divisible by {product}; try {_remedy(name, size, sizes)}"
            )
        spec.append(mesh_axes if len(mesh_axes) != 1 else mesh_axes[0])
    return PartitionSpec(*(axes or None for axes in spec))


def _remedy(name: str | None, size: int, sizes: dict[str, int]) -> str:
    """The nearest larger dim and, where one helps, a last mesh axis that leaves whole devices to another axis."""
    pieces, (last, count) = math.prod(sizes.values()), list(sizes.items())[-1]
    larger = f"{name}={size + -size % pieces}"
    fewer = [d for d in range(1, count) if count % d == 0 and size % (pieces // count * d) == 0]
    return f"a mesh with {last}={fewer[-1]} or {larger}" if fewer else larger
