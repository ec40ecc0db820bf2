"""The closed vocabulary of logical axis names, and the one seam between the model and where it runs.

Invariant: the model speaks only these names and never a mesh axis. Unless a strategy binds a `Placement`, every
function here leaves its argument as it is, so the model runs unchanged on one device.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

PARAM_AXES = frozenset({"layers", "vocab", "embed", "heads", "kv_heads", "head_dim", "mlp"})
ACTIVATION_AXES = frozenset(
    {"batch", "length", "act_embed", "act_heads", "act_kv_heads", "act_mlp", "act_vocab"}
)
LOGICAL_AXES = PARAM_AXES | ACTIVATION_AXES

Names = Sequence[str | None]
"""One logical axis a dim, None for a dim that is never split."""


class Placement(Protocol):
    """What a strategy binds: how arrays with named dims lie over its devices."""

    def constrain(self, x: jax.Array, names: Names) -> jax.Array: ...

    def gather(self, x: jax.Array, names: Names) -> jax.Array: ...

    def local(self, fn: Callable, in_names: Sequence[Names], out_names: Names) -> Callable: ...


_placement: contextvars.ContextVar[Placement | None] = contextvars.ContextVar("placement", default=None)


@contextlib.contextmanager
def bound(placement: Placement | None) -> Iterator[None]:
    """Binds a placement while a function is traced; None unbinds it, as inside shard_map and pmap.

    JAX caches a trace by function, not by context: trace a fresh closure under each placement.
    """
    token = _placement.set(placement)
    try:
        yield
    finally:
        _placement.reset(token)


def check_names(names: Names) -> None:
    """Raises ValueError for a name that is not in the vocabulary."""
    for name in names:
        if name is not None and name not in LOGICAL_AXES:
            raise ValueError(f"logical axis {name!r} is unknown; known are {', '.join(sorted(LOGICAL_AXES))}")


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Says which logical axis each dim of `x` carries; the bound placement decides where it lies.

    Raises:
      ValueError: a name is unknown, or there is not one name a dim.
    """
    check_names(names)
    if len(names) != x.ndim:
        raise ValueError(f"axes {names} must be one a dim of shape {x.shape}; give {x.ndim} names")
    placement = _placement.get()
    return x if placement is None else placement.constrain(x, names)


def local(fn: Callable, in_names: Sequence[Names], out_names: Names) -> Callable:
    """`fn` run on each device's own shards (`shard_map`) under a bound placement; `fn` itself otherwise.

    An argument may be None. A PRNG key, named (), becomes another one on each device, so that shards draw apart.
    """
    for names in (*in_names, out_names):
        check_names(names)
    placement = _placement.get()
    return fn if placement is None else placement.local(fn, in_names, out_names)


def param(init: Callable[..., jax.Array], key: jax.Array, shape: tuple[int, ...], names: Names) -> nnx.Param:
    """A float32 parameter `init(key, shape)` that carries its logical axes as metadata."""
    check_names(names)
    if len(names) != len(shape):
        raise ValueError(f"axes {tuple(names)} must be one a dim of shape {shape}; give {len(shape)} names")
    return nnx.Param(init(key, shape, jnp.float32), out_sharding=tuple(names), eager_sharding=False)


def read(variable: nnx.Param, dtype: Any) -> jax.Array:
    """All of a parameter in the compute dtype, wherever its shards lie.

    It is cast first: what travels between devices, and the gradient that travels back, is in the compute dtype.
    """
    value = variable[...].astype(dtype)
    placement = _placement.get()
    names = names_of(variable)[-value.ndim :]  # a scan over layers has taken the leading dim
    return value if placement is None else placement.gather(value, names)


def names_of(variable: Any) -> tuple[str | None, ...]:
    """The logical axes that `param` gave to an nnx Variable."""
    return tuple(variable.get_metadata()["out_sharding"])
