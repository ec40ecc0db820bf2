"""Adapters of low rank beside frozen matrices (LoRA, Hu et al. 2021, arXiv:2106.09685).

Invariant: an adapter follows from what `axes.describe` says of its matrix, so it is sharded along the same axes, and no
layer says twice what its matrices are.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from parallax.axes import describe, param, read
from parallax.layer_config import ADAPTED, LoraConfig, require
from parallax.layers.dropout import dropout, fold_in

ADAPTERS = "adapters"
"""The name, in each module that has some, of its adapters; nothing else of a model has it."""
KEYS = 2**31
"""Behind it come the numbers that are folded into a dropout key for adapters: those of attention are below."""


class Adapter(nnx.Module):
    """s (x A) B, which is added to x W. It begins at zero, since B does."""

    def __init__(self, weight: nnx.Param, lora: LoraConfig, *, rngs: nnx.Rngs):
        matrix = describe(weight)
        in_shape, out_shape = ([matrix.shape[dim] for dim in dims] for dims in (matrix.input_dims, matrix.output_dims))
        out_names = [matrix.names[dim] for dim in matrix.output_dims]
        bound = math.prod(in_shape) ** -0.5  # that of torch's linear layers, and so of PEFT

        def uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        self.scale, self.rate = lora.scale, lora.dropout
        hidden = functools.partial(param, decays=True, role="hidden")
        down = (*in_shape, lora.rank), (*matrix.inputs, "rank")
        self.down = hidden(uniform, rngs.params(), *down, inputs=matrix.inputs)
        up = (lora.rank, *out_shape), ("rank", *out_names)
        multiplier = matrix.multiplier
        self.up = hidden(jax.nn.initializers.zeros, rngs.params(), *up, inputs=("rank",), multiplier=multiplier)

    def __call__(self, x: jax.Array, keys_B: jax.Array | None = None) -> jax.Array:
        """x [B, T, inputs of W] to [B, T, outputs of W]; what is dropped of a row follows from its key."""
        x, down, up = dropout(x, self.rate, keys_B), read(self.down, x.dtype), read(self.up, x.dtype)
        return self.scale * jnp.tensordot(jnp.tensordot(x, down, down.ndim - 1), up, 1)


def make_adapters(module: nnx.Module, matrices: Sequence[str], lora: LoraConfig, rngs: nnx.Rngs) -> nnx.Dict:
    """An adapter for each of these matrices of a module that is to have one."""
    return nnx.Dict({name: Adapter(getattr(module, name), lora, rngs=rngs) for name in matrices if lora.adapts(name)})


def adapted(adapters: nnx.Dict, matrix: str, x: jax.Array, y: jax.Array, keys_B: jax.Array | None = None) -> jax.Array:
    """y = x W, with the part of the adapter of W where it has one."""
    if matrix not in adapters:
        return y
    return y + adapters[matrix](x, None if keys_B is None else fold_in(keys_B, KEYS + ADAPTED.index(matrix)))


def freeze(model: nnx.Module, lora: LoraConfig) -> None:
    """Has all parameters but those of adapters not learned, and held in `lora.base_dtype`.

    Raises ValueError for a target that has no adapter in this model.
    """
    found = set()
    for path, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Param) and ADAPTERS in path:
            found.add(path[path.index(ADAPTERS) + 1])
        elif isinstance(variable, nnx.Param):
            variable.set_metadata(learned=False)
            variable.set_value(variable[...].astype(lora.base_dtype))
    for target in lora.targets:
        rule = f"lora.targets has {target!r}, which is a matrix of experts alone here, and these have no adapters"
        require(target in found, f"{rule}; try query")
