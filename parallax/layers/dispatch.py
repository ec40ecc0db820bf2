"""Tokens to the devices that hold their experts, and what these make of them back.

Invariant: no token is dropped, however uneven the load: buffers have room for all tokens of all devices. A token goes
once to each device that holds any of its experts, not once to each expert.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from parallax import axes

LARGEST = 2**27
"""Numbers of the largest array that experts work on at once, if ROUNDS allow: 256 MiB of bfloat16."""
ROUNDS = (1, 2, 4, 8)
"""Into how many the tokens of a device may be cut. The gradients of the experts are added up over them in the compute
dtype, and few sums round little."""

Compute = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(x [n, D], experts [n, k], gates [n, k]) to Σ_k gate · expert(x), [n, D]. Experts are numbered as the device holds
them; a number that it does not hold adds nothing."""


def on_devices_of_experts(
    compute: Compute, x_nD: jax.Array, ids_nk: jax.Array, gates_nk: jax.Array, *, num_experts: int, width: int
) -> jax.Array:
    """`compute(x, ids, gates)`, [n, D], of tokens whose experts may be on other devices.

    Call it inside `axes.local`, with a `compute` that holds the weights of this device's experts. Where devices hold
    different tokens, these travel (GShard, arXiv:2006.16668, section 3.2); where they hold the same, each adds what its
    experts give.

    Args:
      ids_nk: int32, the k different experts of each token, of all `num_experts`.
      gates_nk: float32, by how much each counts.
      width: the most numbers that an expert makes of a token at once.
    """
    group, tokens = axes.group("experts"), {*axes.group("batch"), *axes.group("length")}
    if group and not tokens.issuperset(group):
        return _on_same_tokens(compute, x_nD, ids_nk, gates_nk, num_experts, group)
    devices = jax.lax.axis_size(group) if group else 1
    rows = x_nD.shape[0] * devices * min(ids_nk.shape[1], num_experts // devices)
    run = functools.partial(_exchanged, compute, num_experts, group) if group else compute
    return _in_rounds(run, math.ceil(rows * max(width, x_nD.shape[1]) / LARGEST), x_nD, ids_nk, gates_nk)


def even_share(num_experts: int, experts_per_token: int, devices: int) -> float:
    """The share of a device's tokens that each device of a group gets, if all sets of experts are as frequent.

    It is what the buffers that travel hold: they have room for all tokens.
    """
    others = num_experts - num_experts // devices
    return 1 - math.comb(others, experts_per_token) / math.comb(num_experts, experts_per_token)


def _in_rounds(run: Compute, wanted: int, x_nD: jax.Array, ids_nk: jax.Array, gates_nk: jax.Array) -> jax.Array:
    """`run` on some tokens after others, in about so many rounds, so that the buffers are small.

    A round is computed again in the backward pass, or the buffers of all would be kept until then.
    """
    possible = [rounds for rounds in ROUNDS if x_nD.shape[0] % rounds == 0]
    rounds = next((rounds for rounds in possible if rounds >= wanted), possible[-1])
    if rounds == 1:
        return run(x_nD, ids_nk, gates_nk)

    again = jax.checkpoint(run, prevent_cse=False)
    parts = jax.tree.map(lambda x: x.reshape(rounds, -1, x.shape[-1]), (x_nD, ids_nk, gates_nk))
    return jax.lax.map(lambda tokens: again(*tokens), parts).reshape(x_nD.shape)


def _on_same_tokens(
    compute: Compute, x_nD: jax.Array, ids_nk: jax.Array, gates_nk: jax.Array, num_experts: int, group: tuple[str, ...]
) -> jax.Array:
    """Each device adds what its own experts give: a prompt alone, whose row no devices share."""
    held = num_experts // jax.lax.axis_size(group)
    own_nk = ids_nk - jax.lax.axis_index(group) * held
    own_nk = jnp.where((own_nk >= 0) & (own_nk < held), own_nk, held)
    return jax.lax.psum(compute(x_nD, own_nk, gates_nk), group)


def _exchanged(
    compute: Compute, num_experts: int, group: tuple[str, ...], x_nD: jax.Array, ids_nk: jax.Array, gates_nk: jax.Array
) -> jax.Array:
    """`compute` on the devices of a group, P of them, each with tokens of its own.

    Buffers are [P, n, …]: n slots for each other device, of which the first are used. Of the experts of a token at most
    m, as many as a device holds, are on one device.
    """
    P, (n, k) = jax.lax.axis_size(group), ids_nk.shape
    held = num_experts // P
    m = min(k, held)
    there_Pnk = ids_nk[None] // held == jnp.arange(P)[:, None, None]
    first_Pnm = jnp.argsort(~there_Pnk, axis=2, stable=True)[:, :, :m]
    ids_Pnm = jnp.take_along_axis(jnp.where(there_Pnk, ids_nk[None] % held, held), first_Pnm, axis=2)
    gates_Pnm = jnp.take_along_axis(jnp.where(there_Pnk, gates_nk[None], 0), first_Pnm, axis=2)

    goes_Pn = jnp.any(there_Pnk, axis=2)
    slot_Pn = jnp.cumsum(goes_Pn, axis=1, dtype=jnp.int32) - 1
    token_Pn = jnp.argsort(~goes_Pn, axis=1, stable=True)  # in each slot
    sent_P = jnp.sum(goes_Pn, axis=1, dtype=jnp.int32)
    used_Pn = jnp.arange(n)[None] < sent_P[:, None]
    slots = (token_Pn, used_Pn, slot_Pn, goes_Pn)
    ids_Pnm = jnp.where(used_Pn[..., None], jnp.take_along_axis(ids_Pnm, token_Pn[..., None], axis=1), held)
    gates_Pnm = jnp.where(used_Pn[..., None], jnp.take_along_axis(gates_Pnm, token_Pn[..., None], axis=1), 0)

    # A few bytes a token, which tell too how many arrive.
    ids_Pnm, gates_Pnm = (jax.lax.all_to_all(x, group, 0, 0, tiled=True) for x in (ids_Pnm, gates_Pnm))
    got_P = jnp.sum(ids_Pnm[..., 0] < held, axis=1, dtype=jnp.int32)
    ragged = axes.sends_ragged()
    x_PnD: Any = _exchange(group, ragged, _spread(x_nD, slots), sent_P, got_P)
    y_mD = compute(x_PnD.reshape(P * n, -1), ids_Pnm.reshape(P * n, m), gates_Pnm.reshape(P * n, m))
    return _collect(_exchange(group, ragged, y_mD.reshape(P, n, -1), got_P, sent_P), slots)


Slots = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""[P, n] each: the token in a slot and whether the slot is used; the slot of a token and whether it travels."""


@jax.custom_vjp
def _spread(x_nD: jax.Array, slots: Slots) -> jax.Array:
    """Each token into its slot for each device that it goes to, [P, n, D]; other slots are zero.

    Its gradient is `_collect`, and the other way round: both only read, where JAX's own would add into rows.
    """
    token_Pn, used_Pn, _, _ = slots
    return jnp.where(used_Pn[..., None], x_nD[token_Pn], 0)


@jax.custom_vjp
def _collect(y_PnD: jax.Array, slots: Slots) -> jax.Array:
    """The sum over all devices of what came back of each token, [n, D]; added up in float32."""
    _, _, slot_Pn, goes_Pn = slots
    wide = jnp.promote_types(y_PnD.dtype, jnp.float32)
    back_PnD = jnp.take_along_axis(y_PnD, jnp.maximum(slot_Pn, 0)[..., None], axis=1)
    return jnp.sum(jnp.where(goes_Pn[..., None], back_PnD, 0), axis=0, dtype=wide).astype(y_PnD.dtype)


_spread.defvjp(lambda x, slots: (_spread(x, slots), slots), lambda slots, g: (_collect(g, slots), None))
_collect.defvjp(lambda y, slots: (_collect(y, slots), slots), lambda slots, g: (_spread(g, slots), None))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _exchange(group: tuple[str, ...], ragged: bool, x_PnD: jax.Array, sent_P: jax.Array, got_P: jax.Array) -> jax.Array:
    """x[p] to the device p of the group, and what p has for this one in its place; [P, n, D].

    Ragged, only the first sent[p] rows travel, and the others come as zeros; else whole buffers do. Gradients go back
    the same way.
    """
    if not ragged:
        return jax.lax.all_to_all(x_PnD, group, 0, 0, tiled=True)
    P, n, D = x_PnD.shape
    starts_P = n * jnp.arange(P, dtype=jnp.int32)
    at_P = jnp.full_like(starts_P, n) * jax.lax.axis_index(group)  # of this device's rows, on all others
    rows = x_PnD.reshape(P * n, D)
    nothing = jax.lax.full_like(rows, 0)
    found = jax.lax.ragged_all_to_all(rows, nothing, starts_P, sent_P, at_P, got_P, axis_name=group)
    return found.reshape(P, n, D)


def _exchange_forward(group, ragged, x_PnD, sent_P, got_P):
    return _exchange(group, ragged, x_PnD, sent_P, got_P), (sent_P, got_P)


def _exchange_backward(group, ragged, counts, g_PnD):
    sent_P, got_P = counts
    return _exchange(group, ragged, g_PnD, got_P, sent_P), None, None


_exchange.defvjp(_exchange_forward, _exchange_backward)
