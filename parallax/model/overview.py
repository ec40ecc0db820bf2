"""A table of a model's parameters.

Invariant: nothing is computed; a model of any size can be shown.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from clu import parameter_overview as clu_overview

from parallax.config import TransformerConfig
from parallax.model.transformer import Params, param_axes, parameters


@dataclasses.dataclass(frozen=True)
class _Row:
    """What clu asks of an array; its sharding column shows the logical axes here."""

    shape: tuple[int, ...]
    size: int
    sharding: Any
    dtype: Any = jnp.dtype("float32")


def parameter_overview(config: TransformerConfig, placed: Params | None = None) -> str:
    """Name, shape, dtype, count and logical axes of each parameter, and the total, as a text table.

    With a tree of the mesh axes along which each is sharded, as a PartitionSpec, these stand behind the logical ones.
    """
    axes = param_axes(config)
    if placed is not None:
        axes = jax.tree.map(lambda names, spec: f"{tuple(names)} on {tuple(spec)}", axes, placed)
    rows = jax.tree.map(lambda known, names: _Row(known.shape, known.size, names), parameters(config), axes)
    return clu_overview.get_parameter_overview(rows, include_stats="sharding")
