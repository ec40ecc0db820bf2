"""What a step carries to the next.

Invariant: together with the seed and the batch of its step, a state determines the next state.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from parallax.config import TransformerConfig
from parallax.model.transformer import Params, init_params, param_axes


@chex.dataclass(frozen=True)
class TrainState:
    """Everything that training changes."""

    step: jax.Array  # int32 []: steps taken, which is also the index of the next batch
    params: Params
    opt_state: Any
    bad_steps: jax.Array  # int32 []: steps in a row, up to now, that were not finite and changed nothing


def make_init(
    config: TransformerConfig, optimizer: optax.GradientTransformation, seed: int
) -> Callable[[], TrainState]:
    """A function that makes the first state; a strategy traces it to have the state born in its place."""

    def init_state() -> TrainState:
        params = init_params(config, jax.random.key(seed))
        zero = jnp.zeros((), jnp.int32)
        return TrainState(step=zero, params=params, opt_state=optimizer.init(params), bad_steps=zero)

    return init_state


def state_axes(config: TransformerConfig, init_state: Callable[[], TrainState]) -> TrainState:
    """The tree of a state with a PartitionSpec of logical axis names for each array.

    Optimizer moments mirror the tree of parameters: a leaf whose path ends in a parameter's path is placed like it.
    """
    specs = jax.tree_util.tree_leaves_with_path(
        param_axes(config), is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
    )
    names = {tuple(path): spec for path, spec in specs}

    def of(path, leaf) -> PartitionSpec:
        suffixes = (tuple(path[start:]) for start in range(len(path)))
        return next((names[suffix] for suffix in suffixes if suffix in names), PartitionSpec(*[None] * leaf.ndim))

    return jax.tree_util.tree_map_with_path(of, jax.eval_shape(init_state))


def params_sha256(params: Any) -> str:
    """sha256 in hexadecimal over the leaves of a tree of fully addressable arrays, in the order of their paths."""
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in sorted(leaves, key=lambda item: jax.tree_util.keystr(item[0])):
        array = np.asarray(jax.device_get(leaf), order="C")  # ascontiguousarray would make a scalar [1]
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype.name}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
