"""How the gradients of a batch are combined.

Invariant: what comes back is the gradient of (sum of losses) / (global number of target tokens), whatever microbatches
and devices the batch was cut into. A row's dropout key follows from its number in the global batch, so that is the same
too. Accumulation and exact reduction live here and nowhere else.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from parallelism.rows import canonical_shards
from parallelism.rules import crosses_slices


def _of_sums(loss_fn: Callable, microbatches: int) -> Callable:
    """(params, batch, key, number) to (sums, tokens, gradient of sums["loss"]) over this batch, a microbatch at a time.

    It is the block of that number among the equal ones that a global batch is cut into, by default all of it.
    """

    def objective(learned, params, batch, keys):
        params = jax.tree.map(lambda held, given: held if given is None else given, params, learned)
        sums, tokens = loss_fn(params, batch, keys)
        return sums["loss"], (sums, tokens)

    @functools.partial(jax.jit, inline=True)  # traced once, for the shapes of the totals and for the loop
    def whole(params, batch, rows, key):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
        gradient = jax.value_and_grad(objective, has_aux=True)
        (_, (sums, tokens)), grads = gradient(of_learned(loss_fn, params), params, batch, keys)
        return sums, tokens, grads

    def in_parts(params, batch, rows, key):
        def add(total, part):
            return jax.tree.map(jnp.add, total, whole(params, *part, key)), None

        parts = jax.tree.map(lambda x: _deal(x, microbatches), (batch, rows))
        one = jax.eval_shape(whole, params, *jax.tree.map(lambda x: x[0], parts), key)
        like = jax.tree.leaves(batch)[0]  # inside shard_map it differs between devices, as totals do
        zeros = jax.tree.map(lambda leaf: jax.lax.full_like(like, 0, leaf.dtype, leaf.shape), one)
        return jax.lax.scan(add, zeros, parts)[0]

    def of_block(params, batch, key, number=0):
        size = jax.tree.leaves(batch)[0].shape[0]
        rows = number * size + jnp.arange(size)
        return (whole if microbatches == 1 else in_parts)(params, batch, rows, key)

    return of_block


def of_learned(loss_fn: Callable, tree: Any) -> Any:
    """A tree like the parameters, or one that has something for each of them, with None for those that stay frozen.

    A loss says as `learned`, a tree of bools, which have a gradient; by default all.
    """
    learned = getattr(loss_fn, "learned", None)
    return tree if learned is None else jax.tree.map(lambda kept, leaf: leaf if kept else None, learned, tree)


def _deal(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] to [parts, B/parts, ...], dealt like cards, so that each part holds rows of every device."""
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)


def mean(microbatches: int = 1) -> Callable[[Callable], Callable]:
    """The gradient function where one program sees the whole batch: on one device, and on a mesh under jit."""

    def gradients(loss_fn, params, batch, key):
        sums, tokens, grads = _of_sums(loss_fn, microbatches)(params, batch, key)
        return sums, tokens, _divide(grads, tokens)

    return lambda loss_fn: functools.partial(gradients, loss_fn)


def pmean(axis_name: str, microbatches: int = 1) -> Callable[[Callable], Callable]:
    """The gradient function where each device sees its rows under the mapped axis `axis_name`.

    Rows may hold different numbers of targets, so both the gradient of the sum and the count are averaged, and the
    quotient is the global mean.
    """

    def gradients(loss_fn, params, batch, key):
        sums, tokens, grads = _of_sums(loss_fn, microbatches)(params, batch, key, jax.lax.axis_index(axis_name))
        grads, mean_tokens = jax.lax.pmean((grads, tokens.astype(jnp.float32)), axis_name)
        sums, tokens = jax.lax.psum((sums, tokens), axis_name)
        return sums, tokens, _divide(grads, mean_tokens)

    return lambda loss_fn: functools.partial(gradients, loss_fn)


def scatter(axis_names: tuple[str, ...], unreduced: Any, microbatches: int = 1) -> Callable[[Callable], Callable]:
    """The gradient function inside `shard_map`, for parameters in shards that the model gathers as it uses them.

    Going back, a gather scatters and adds up the gradient over the axes that it crossed; over those that split the
    batch and not the parameter it is added up here.

    Args:
      axis_names: the mapped axes, outermost first.
      unreduced: a tree like the parameters, of the axes over which a gradient is still to be added up.
    """

    def gradients(loss_fn, params, batch, key):
        sums, tokens, grads = _of_sums(loss_fn, microbatches)(params, batch, key, jax.lax.axis_index(axis_names))
        leaves, structure = jax.tree.flatten(grads)
        over = structure.flatten_up_to(of_learned(loss_fn, unreduced))
        for group in filter(None, dict.fromkeys(over)):  # in one order in every process
            places = [place for place, each in enumerate(over) if each == group]
            for place, leaf in zip(places, _add_up([leaves[i] for i in places], group), strict=True):
                leaves[place] = leaf
        sums, tokens = jax.lax.psum((sums, tokens), axis_names)
        return sums, tokens, _divide(structure.unflatten(leaves), tokens)

    return lambda loss_fn: functools.partial(gradients, loss_fn)


def _add_up(leaves: list[jax.Array], over: tuple[str, ...]) -> list[jax.Array]:
    """Sums over mapped axes; see `_add_up_by_levels` where they are of both kinds."""
    within, across = _levels(over)
    if within and across:
        return [_add_up_by_levels(leaf, within, across) for leaf in leaves]
    return [_add_up_across(leaf, across) for leaf in leaves] if across else jax.lax.psum(leaves, over)


def _add_up_across(x: jax.Array, across: tuple[str, ...]) -> jax.Array:
    """The sum over slices, of numbers in one row.

    A TPU sends whole tiles of 8 × 128 numbers. Of four heads of 32 each row would fill one, with four times the bytes.
    """
    return jax.lax.psum(x.reshape(-1), across).reshape(x.shape)


def _add_up_by_levels(x: jax.Array, within: tuple[str, ...], across: tuple[str, ...]) -> jax.Array:
    """The sum over slices and the devices within: scattered within, so that a device sends its shard alone across."""
    devices = math.prod(jax.lax.axis_size(axis) for axis in within)
    dim = next((dim for dim, size in enumerate(x.shape) if size % devices == 0), None)
    shard = jnp.pad(x.reshape(-1), (0, -x.size % devices)) if dim is None else x
    for axis in within:
        shard = jax.lax.psum_scatter(shard, axis, scatter_dimension=dim or 0, tiled=True)
    shard = _add_up_across(shard, across)
    for axis in reversed(within):
        shard = jax.lax.all_gather(shard, axis, axis=dim or 0, tiled=True, to="invarying")
    return shard[: x.size].reshape(x.shape) if dim is None else shard


def _levels(axis_names: str | tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes within slices, and those across them."""
    names = (axis_names,) if isinstance(axis_names, str) else axis_names
    return tuple(a for a in names if not crosses_slices(a)), tuple(a for a in names if crosses_slices(a))


def slices(axis_names: tuple[str, ...], shards: Any, specs: Any, microbatches: int) -> Callable:
    """The gradient function inside a `shard_map` over slices, in each of which the compiler sees all devices.

    Args:
      axis_names: the mapped axes, those that cross slices.
      shards: a tree like the parameters, of how a gradient is cut within its slice to cross.
      specs: the same, of how the parameters are.
    """
    place = functools.partial(jax.tree.map, jax.lax.with_sharding_constraint)

    def gradients(loss_fn, params, batch, key):
        sums, tokens, grads = _of_sums(loss_fn, microbatches)(params, batch, key, jax.lax.axis_index(axis_names))
        cut, whole = of_learned(loss_fn, shards), of_learned(loss_fn, specs)
        sums, tokens, grads = jax.lax.psum((sums, tokens, place(grads, cut)), axis_names)
        return sums, tokens, _divide(place(grads, whole), tokens)

    return lambda loss_fn: functools.partial(gradients, loss_fn)


def exact(axis_names: str | tuple[str, ...] = (), devices: int = 1) -> Callable[[Callable], Callable]:
    """The gradient function whose result has the same bits on every layout: one order of sums, whatever the devices.

    Float32 addition is not associative, so the order must not depend on who adds. The batch is cut into canonical
    shards, `canonical_shards(batch_size)` of them; each device takes the gradient of its own, one shard after another;
    all are gathered, and every device adds all of them in the order of the batch. Microbatches are the shards,
    whatever `accumulate` says.

    Costs: every device holds as many gradients as there are shards, and receives those of the others, where the mean
    holds one and reduces it on the way.

    Args:
      axis_names: the mapped axes over which the batch is sharded, outermost first; none on one device.
      devices: how many those axes hold.
    """

    def gradients(loss_fn, params, batch, key):
        held = jax.tree.leaves(batch)[0].shape[0]
        shards = canonical_shards(held * devices) // devices
        first = jax.lax.axis_index(axis_names) * shards if axis_names else 0
        parts = jax.tree.map(lambda x: x.reshape(shards, -1, *x.shape[1:]), batch)
        one = _of_sums(loss_fn, 1)

        def of_shard(numbered):
            number, rows = numbered
            return one(params, rows, key, first + number)

        results = jax.lax.map(of_shard, (jnp.arange(shards), parts))
        results = _gather(results, axis_names)
        sums, tokens, grads = results
        total = jnp.sum(tokens)
        share = 1 / _at_least_one(total).astype(jnp.float32)

        def add(sofar, shard):
            sums, grads = shard
            summed = jax.tree.map(jnp.add, sofar[0], sums)
            return (summed, jax.tree.map(lambda a, b: a + b * share.astype(b.dtype), sofar[1], grads)), None

        # One division, and matmuls within the loop, whose results no compiler merges with the optimizer: many
        # divisions become multiplications by a reciprocal, or multiply-adds are fused, on some layouts alone.
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), (sums, grads))
        (sums, grads), _ = jax.lax.scan(add, zeros, (sums, grads))
        return jax.lax.optimization_barrier((sums, total, grads))

    return lambda loss_fn: functools.partial(gradients, loss_fn)


def _gather(results: Any, axis_names: str | tuple[str, ...]) -> Any:
    """[shards of a device, ...] to [all shards, ...] in the order of the batch, in which slices come first."""
    within, across = _levels(axis_names)
    if across:  # before there are any of the neighbours, so that a device sends its own alone
        results = jax.lax.all_gather(results, across, to="invarying")
    if within:
        results = jax.lax.all_gather(results, within, axis=1 if across else 0, tiled=True, to="invarying")
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results) if across else results


def _divide(grads: Any, tokens: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: leaf / _at_least_one(tokens), grads)


def _at_least_one(tokens: jax.Array) -> jax.Array:
    """Never to divide by zero: a batch without a target teaches nothing."""
    return jnp.where(tokens == 0, 1, tokens)
