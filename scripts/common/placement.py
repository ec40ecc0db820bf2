"""Where a model is placed that is used and not trained.

Invariant: the placement is that of the training strategies, by the same rules.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from parallax.config import TransformerConfig
from parallax.model.transformer import Params, init_params
from parallax.training.state import TrainState, state_axes
from parallelism.strategies import get_strategy
from parallelism.strategy import Layout, Strategy


def place_model(config: TransformerConfig, mesh: str = "", *, batch_size: int, seq_len: int) -> Strategy:
    """A strategy without an optimizer: one device, or a mesh such as fsdp=8. Nothing is computed.

    Raises:
      ValueError: the mesh does not fit the devices, the model or the batch.
    """

    def init_state() -> TrainState:
        zero = jnp.zeros((), jnp.int32)
        params = init_params(config, jax.random.key(0))
        return TrainState(step=zero, params=params, opt_state=(), bad_steps=zero)

    strategy = "mesh" if mesh else "single"
    layout = Layout(strategy=strategy, mesh=mesh, batch_size=batch_size, seq_len=seq_len)
    return get_strategy(layout, init_state, state_axes(config, init_state))


def place_params(mesh: str) -> Callable[[TransformerConfig], Params]:
    """Where the parameters of a config go: a function to ShapeDtypeStructs with shardings.

    Nothing is fed, so one row and token a device fits any mesh.
    """

    def place(config: TransformerConfig) -> Params:
        devices = jax.device_count()
        return place_model(config, mesh, batch_size=devices, seq_len=devices).abstract().params

    return place
