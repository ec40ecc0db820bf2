"""A table of a model's parameters.

Invariant: nothing is computed; a model of any size can be shown.
"""

import dataclasses
from typing import Any

import jax
from clu import parameter_overview as clu_overview
from jax.sharding import PartitionSpec

from parallax.config import TransformerConfig
from parallax.model.transformer import init_params, param_axes


@dataclasses.dataclass(frozen=True)
class _Row:
    """What clu asks of an array; its sharding column shows the logical axes here."""

    shape: tuple[int, ...]
    dtype: Any
    sharding: PartitionSpec

    @property
    def size(self) -> int:
        return jax.ShapeDtypeStruct(self.shape, self.dtype).size


def parameter_overview(config: TransformerConfig) -> str:
    """Name, shape, dtype, count and logical axes of each parameter, and the total, as a text table."""
    abstract = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    rows = jax.tree.map(lambda leaf, names: _Row(leaf.shape, leaf.dtype, names), abstract, param_axes(config))
    return clu_overview.get_parameter_overview(rows, include_stats="sharding")
