"""The closed vocabulary of logical axis names, what each parameter is, and the one seam to where the model runs.

Invariant: the model uses only these names and never a mesh axis. Unless a strategy binds a `Placement`, every
function here leaves its argument as it is, so the model runs unchanged on one device.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

STACK_AXES = frozenset({"layers", "experts"})
"""Parameters are stacked along these, which are no dim of a matmul: each layer, and each expert, has its own."""
PARAM_AXES = STACK_AXES | {"vocab", "embed", "heads", "kv_heads", "head_dim", "mlp", "rank"}
ACTIVATION_AXES = frozenset({"batch", "length", "act_embed", "act_heads", "act_kv_heads", "act_mlp", "act_vocab"})
LOGICAL_AXES = PARAM_AXES | ACTIVATION_AXES

Names = Sequence[str | None]
"""One logical axis a dim, None for a dim that is never split."""

Role = Literal["input", "hidden", "output"]
"""What of a parameter grows with the width of the model, as µP divides them (Yang et al. 2022, arXiv:2203.03466, table
8). input: its fan-out alone, as of tables that are looked up, scales and biases; hidden: both; output: its fan-in."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter as the optimizer and the counts must know it, with or without a value."""

    shape: tuple[int, ...]
    names: tuple[str | None, ...]
    """One a dim."""
    inputs: tuple[str, ...]
    """The dims that its matmul sums over, which make its fan-in; none where it is looked up, added or scales."""
    decays: bool
    """Whether weight decay applies."""
    role: Role
    learned: bool = True
    """Whether it follows its gradient; one that does not has no moments in the optimizer."""
    multiplier: float = 1.0
    """What µP would multiply by where the parameter is used; it is in the initial value, and its rate must follow."""
    rate: float = 1.0
    """By what its updates are multiplied, weight decay aside (`parallax/mup.py`)."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def input_dims(self) -> tuple[int, ...]:
        return tuple(self.names.index(name) for name in self.inputs)

    @property
    def output_dims(self) -> tuple[int, ...]:
        """All dims that are neither inputs nor stacked."""
        others = STACK_AXES.union(self.inputs)
        return tuple(dim for dim, name in enumerate(self.names) if name not in others)


class Placement:
    """What a strategy binds: how arrays with named dims are sharded over its devices.

    Here nothing is split; a strategy's own overrides what it splits. The functions of this file say what each does.
    """

    ragged: bool = False

    def constrain(self, x: jax.Array, names: Names) -> jax.Array:
        return x

    def gather(self, x: jax.Array, names: Names) -> jax.Array:
        return x

    def local(self, fn: Callable, in_names: Sequence[Names], out_names: Names, *, checked: bool) -> Callable:
        return fn

    def group(self, name: str) -> tuple[str, ...]:
        return ()

    def alike(self, fn: Callable) -> Callable:
        return fn


_UNBOUND = Placement()
_placement: contextvars.ContextVar[Placement] = contextvars.ContextVar("placement", default=_UNBOUND)


@contextlib.contextmanager
def bound(placement: Placement | None) -> Iterator[None]:
    """Binds a placement while a function is traced; None unbinds it, as inside shard_map and pmap.

    JAX caches a trace by function, not by context: trace a fresh closure under each placement.
    """
    token = _placement.set(placement or _UNBOUND)
    try:
        yield
    finally:
        _placement.reset(token)


def is_bound() -> bool:
    """Whether a placement is, under which a function may see shards of its arrays."""
    return _placement.get() is not _UNBOUND


def check_names(names: Names) -> None:
    """Raises ValueError for a name that is not in the vocabulary."""
    for name in names:
        if name is not None and name not in LOGICAL_AXES:
            raise ValueError(f"logical axis {name!r} is unknown; known are {', '.join(sorted(LOGICAL_AXES))}")


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Says which logical axis each dim of `x` carries; the bound placement decides how it is sharded.

    Raises ValueError if a name is unknown, or there is not one name a dim.
    """
    check_names(names)
    if len(names) != x.ndim:
        raise ValueError(f"axes {names} must be one a dim of shape {x.shape}; give {x.ndim} names")
    return _placement.get().constrain(x, names)


def local(fn: Callable, in_names: Sequence[Names], out_names: Names, *, checked: bool = True) -> Callable:
    """`fn` run on each device's own shards (`shard_map`) under a bound placement; `fn` itself otherwise.

    An argument may be None. `checked=False` takes it on trust that what is not split is the same on all devices, for
    what JAX cannot follow.
    """
    for names in (*in_names, out_names):
        check_names(names)
    return _placement.get().local(fn, in_names, out_names, checked=checked)


def group(name: str) -> tuple[str, ...]:
    """The devices that share a logical axis of what a function inside `local` got, as JAX's collectives name them.

    Of experts and activations alone; () where each device has all of that axis, and outside `local`.
    """
    check_names((name,))
    return _placement.get().group(name)


def alike(fn: Callable) -> Callable:
    """`fn` of whole arrays on every device where a strategy promises the same bits on all layouts; else `fn` itself.

    For what sums over dims that layouts split, as the matmuls of an optimizer do. Arguments and results are trees.
    """

    def call(*arguments: Any) -> Any:
        return _placement.get().alike(fn)(*arguments)

    return call


def sends_ragged() -> bool:
    """Whether the devices can send parts of buffers that only a run knows (`jax.lax.ragged_all_to_all`)."""
    return _placement.get().ragged


def param(
    init: Callable[..., jax.Array],
    key: jax.Array,
    shape: tuple[int, ...],
    names: Names,
    *,
    inputs: Sequence[str],
    decays: bool,
    role: Role,
    learned: bool = True,
    multiplier: float = 1.0,
) -> nnx.Param:
    """A float32 parameter `init(key, shape)`, times the multiplier, with what `Parameter` says of it as metadata.

    Raises:
      ValueError: a name is unknown, there is not one a dim, an input is no dim of a matmul, or the role is unknown.
    """
    check_names(names)
    if len(names) != len(shape):
        raise ValueError(f"axes {tuple(names)} must be one a dim of shape {shape}; give {len(shape)} names")
    dims = [name for name in names if name not in STACK_AXES]
    if not set(inputs) <= set(dims):
        raise ValueError(f"inputs={tuple(inputs)} must be dims of one matrix; choose from {', '.join(map(str, dims))}")
    if role not in get_args(Role):
        raise ValueError(f"role={role!r} is not one of {', '.join(get_args(Role))}")
    label = {"inputs": tuple(inputs), "decays": decays, "role": role, "learned": learned, "multiplier": multiplier}
    value = init(key, shape, jnp.float32)
    value = value if multiplier == 1 else multiplier * value
    return nnx.Param(value, out_sharding=tuple(names), eager_sharding=False, **label)


def read(variable: nnx.Param, dtype: Any) -> jax.Array:
    """All of a parameter in the compute dtype, wherever its shards are placed.

    It is cast first: what devices send, in the backward pass too, is in the compute dtype.
    """
    value = variable[...].astype(dtype)
    names = names_of(variable)[-value.ndim :]  # a scan over layers has taken the leading dim
    return _placement.get().gather(value, names)


def names_of(variable: Any) -> tuple[str | None, ...]:
    """The logical axes of a parameter, with those that it was stacked along."""
    return tuple(variable.get_metadata()["out_sharding"])


def describe(variable: nnx.Variable) -> Parameter:
    """What `param` was given, of a parameter that may be stacked or abstract by now; raises ValueError for others."""
    known = variable.get_metadata()
    labels = ("out_sharding", "inputs", "decays", "role")
    if missing := [label for label in labels if label not in known]:
        raise ValueError(f"a parameter of shape {variable.shape} lacks {', '.join(missing)}; make it with axes.param")
    values = (known[label] for label in labels[1:])
    more = {name: known[name] for name in ("learned", "multiplier") if name in known}
    return Parameter(variable.shape, names_of(variable), *values, **more)
