"""How the gradients of a batch are combined.

Invariant: what comes back is the gradient of (sum of losses) / (global number of target tokens), whatever microbatches
and devices the batch was cut into. A row's dropout key follows from its number in the global batch, so that is the same
too. Accumulation and exact reduction live here and nowhere else.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from parallelism.rows import canonical_shards


def _of_sums(loss_fn: Callable, microbatches: int) -> Callable:
    """(params, batch, key, number) to (sums, tokens, gradient of sums["loss"]) over this batch, a microbatch at a time.

    It is the block of that number among the equal ones that a global batch is cut into, by default all of it.
    """

    def objective(params, batch, keys):
        sums, tokens = loss_fn(params, batch, keys)
        return sums["loss"], (sums, tokens)

    @functools.partial(jax.jit, inline=True)  # traced once, for the shapes of the totals and for the loop
    def whole(params, batch, rows, key):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
        (_, (sums, tokens)), grads = jax.value_and_grad(objective, has_aux=True)(params, batch, keys)
        return sums, tokens, grads

    def in_parts(params, batch, rows, key):
        def add(total, part):
            return jax.tree.map(jnp.add, total, whole(params, *part, key)), None

        parts = jax.tree.map(lambda x: _deal(x, microbatches), (batch, rows))
        one = jax.eval_shape(whole, params, *jax.tree.map(lambda x: x[0], parts), key)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), one)
        return jax.lax.scan(add, zeros, parts)[0]

    def of_block(params, batch, key, number=0):
        size = jax.tree.leaves(batch)[0].shape[0]
        rows = number * size + jnp.arange(size)
        return (whole if microbatches == 1 else in_parts)(params, batch, rows, key)

    return of_block


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
        over = structure.flatten_up_to(unreduced)
        for group in filter(None, dict.fromkeys(over)):  # in one order in every process
            places = [place for place, each in enumerate(over) if each == group]
            for place, leaf in zip(places, jax.lax.psum([leaves[i] for i in places], group), strict=True):
                leaves[place] = leaf
        sums, tokens = jax.lax.psum((sums, tokens), axis_names)
        return sums, tokens, _divide(structure.unflatten(leaves), tokens)

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
        if axis_names:
            results = jax.lax.all_gather(results, axis_names, tiled=True)
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


def _divide(grads: Any, tokens: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: leaf / _at_least_one(tokens), grads)


def _at_least_one(tokens: jax.Array) -> jax.Array:
    """Never to divide by zero: a batch without a target teaches nothing."""
    return jnp.where(tokens == 0, 1, tokens)
