"""Where a model is placed that is used and not trained.

Invariant: the placement is that of the training strategies, by the same rules.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from parallax.config import TransformerConfig
from parallax.model.transformer import Params, init_params
from parallax.run_folder import abstract_params
from parallax.training.state import TrainState, state_axes
from parallelism.placement import on_mesh
from parallelism.strategies import get_strategy
from parallelism.strategy import Layout, Strategy


def place_model(config: TransformerConfig, mesh: str = "", *, batch_size: int, seq_len: int) -> Strategy:
    """A strategy without an optimizer: one device, or a mesh such as fsdp=8. Nothing is computed.

    Raises ValueError if the mesh does not fit the devices, the model or the batch.
    """

    def init_state() -> TrainState:
        zero = jnp.zeros((), jnp.int32)
        params = init_params(config, jax.random.key(0))
        return TrainState(step=zero, params=params, opt_state=(), bad_steps=zero)

    strategy = "mesh" if mesh else "single"
    layout = Layout(strategy=strategy, mesh=mesh, batch_size=batch_size, seq_len=seq_len)
    return get_strategy(layout, init_state, state_axes(config, init_state))


def place_params(mesh: str) -> Callable[[TransformerConfig], Params]:
    """Where the parameters of a config go, the first device or a mesh: a function to ShapeDtypeStructs."""
    return functools.partial(abstract_params, place=on_mesh(mesh) if mesh else None)
