"""A table of a model's parameters.

Invariant: nothing is computed; a model of any size can be shown.
"""

import dataclasses
from typing import Any

import jax
from clu import parameter_overview as clu_overview

from parallax.config import TransformerConfig
from parallax.model.transformer import Params, init_params, param_axes


@dataclasses.dataclass(frozen=True)
class _Row:
    """What clu asks of an array; its sharding column shows the logical axes here."""

    shape: tuple[int, ...]
    dtype: Any
    sharding: Any

    @property
    def size(self) -> int:
        return jax.ShapeDtypeStruct(self.shape, self.dtype).size


def parameter_overview(config: TransformerConfig, placed: Params | None = None) -> str:
    """Name, shape, dtype, count and logical axes of each parameter, and the total, as a text table.

    With a tree of the mesh axes on which each lies, as a PartitionSpec, these stand behind the logical ones.
    """
    abstract = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    axes = param_axes(config)
    if placed is not None:
        axes = jax.tree.map(lambda names, spec: f"{tuple(names)} on {tuple(spec)}", axes, placed)
    rows = jax.tree.map(lambda leaf, names: _Row(leaf.shape, leaf.dtype, names), abstract, axes)
    return clu_overview.get_parameter_overview(rows, include_stats="sharding")
