"""Tokens that travel to their experts come back as if they had stayed, and once from each device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from parallax import axes
from parallax.layers import dispatch
from parallelism.mesh import MeshPlacement
from parallelism.mesh_shape import parse_mesh
from parallelism.rules import RULE_SETS

B, T, D, F, E, k = 8, 6, 4, 16, 8, 3
ROW = ("batch", "length", None)
MESHES = ["expert=8", "data=2,expert=4", "fsdp=4,expert=2", "expert=2,sequence=2,tensor=2", "expert=4x2"]
TOKENS = ["random", "all on the first", "all on the last"]


def placement(mesh, rules=RULE_SETS["default"]):
    sizes = {axis: size for axis, size in parse_mesh(mesh, 8).items() if size > 1}
    kinds = (AxisType.Auto,) * len(sizes)
    return MeshPlacement(jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds), rules)


def inputs(tokens):
    rng = np.random.default_rng(0)
    wanted = {"random": np.zeros(E), "all on the first": -np.arange(E), "all on the last": np.arange(E)}[tokens]
    scores = wanted * 100 + rng.random((B, T, E))
    ids = np.argsort(-scores, axis=-1)[..., :k].astype(np.int32)
    shapes = (B, T, D), (B, T, k), (E, D, F), (E, F, D)
    x, gates, into, out = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return x, gates, into, out, ids


def experts_of(into_EDF, out_EFD):
    """Every expert on every row, then those that are wanted."""

    def compute(x_nD, ids_nk, gates_nk):
        wanted_nkE = ids_nk[..., None] == jnp.arange(into_EDF.shape[0])[None, None]
        weights_nE = jnp.sum(jnp.where(wanted_nkE, gates_nk[..., None], 0), axis=1)
        hidden_EnF = jnp.sin(jnp.einsum("nD,EDF->EnF", x_nD, into_EDF))
        return jnp.einsum("EnF,EFD,nE->nD", hidden_EnF, out_EFD, weights_nE)

    return compute


def layer(x_BTD, gates_BTk, into_EDF, out_EFD, ids_BTk):
    def on_device(x_BTD, gates_BTk, into_EDF, out_EFD, ids_BTk):
        x_nD, ids_nk, gates_nk = (x.reshape(-1, x.shape[-1]) for x in (x_BTD, ids_BTk, gates_BTk))
        compute = experts_of(into_EDF, out_EFD)
        y_nD = dispatch.on_devices_of_experts(compute, x_nD, ids_nk, gates_nk, num_experts=E, width=F)
        return y_nD.reshape(*x_BTD.shape[:2], 1, -1)

    names = (ROW, ROW, ("experts", None, "act_mlp"), ("experts", "act_mlp", None), ROW)
    run = axes.local(on_device, names, ("batch", "length", "act_mlp", None))
    return jnp.sum(run(x_BTD, gates_BTk, into_EDF, out_EFD, ids_BTk), axis=2)


def value_and_gradients(arrays, bound=None):
    """Of a sum over all outputs, each weighted by another number."""

    def loss(x, gates, into, out, ids):
        with axes.bound(bound):
            y_BTD = layer(x, gates, into, out, ids)
        return jnp.sum(y_BTD * jnp.cos(jnp.arange(y_BTD.size).reshape(y_BTD.shape)))

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(*arrays)


@functools.cache
def on_one_device(tokens):
    return value_and_gradients(inputs(tokens))


def assert_close(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()), found, wanted)


@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_computes_what_one_device_does(mesh):
    """Outputs and all gradients, where tokens go anywhere."""
    assert_close(value_and_gradients(inputs("random"), placement(mesh)), on_one_device("random"))


@pytest.mark.parametrize("tokens", TOKENS[1:])
def test_no_token_is_dropped_where_all_go_to_one_device(tokens):
    assert_close(value_and_gradients(inputs(tokens), placement("data=2,expert=4")), on_one_device(tokens))


def test_rounds_change_nothing(monkeypatch):
    arrays, bound = inputs("random"), placement("data=2,expert=4")
    wanted = on_one_device("random")
    monkeypatch.setattr(dispatch, "LARGEST", 1)
    for each in (bound, None):
        assert_close(value_and_gradients(arrays, each), wanted)


def test_devices_with_the_same_tokens_add_what_their_experts_give():
    """Rules under which the axis splits experts alone, as for a row that no devices share."""
    rules = {"batch": ("data",), "experts": ("expert",)}
    bound = placement("data=2,expert=4", rules)
    assert_close(value_and_gradients(inputs("random"), bound), on_one_device("random"))


def test_a_token_travels_once_to_each_device():
    """One buffer for a device's tokens on each device of the group, each way, and as much for their gradients."""
    arrays, bound = inputs("random"), placement("expert=8")
    text = jax.jit(lambda *arrays: value_and_gradients(arrays, bound)).lower(*arrays).as_text()
    sent = [line for line in text.splitlines() if "all_to_all" in line and f"{T}x{D}xf32" in line]
    assert len(sent) == 4


@pytest.mark.parametrize("tokens", TOKENS)
def test_what_is_sent_in_parts_is_what_arrives(monkeypatch, tokens):
    """The sizes and offsets of `ragged_all_to_all`, which XLA has not for CPUs, by its definition."""

    def by_definition(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
        sent = (operand, input_offsets, send_sizes, output_offsets)
        operands, starts, sizes, ends = (jax.lax.all_gather(x, axis_name) for x in sent)
        me, rows = jax.lax.axis_index(axis_name), jnp.arange(output.shape[0])
        for sender in range(operands.shape[0]):
            at = rows - ends[sender, me]
            taken = jnp.take(operands[sender], starts[sender, me] + at, axis=0, mode="clip")
            output = jnp.where(((at >= 0) & (at < sizes[sender, me]))[:, None], taken, output)
        # A row beyond what this device was to receive would be NaN.
        total = jnp.sum(sizes[:, me]) == jnp.sum(recv_sizes)
        return jnp.where(total, output, jnp.nan)

    arrays, bound = inputs(tokens), placement("data=2,expert=4")
    wanted = on_one_device(tokens)
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", by_definition)
    bound.ragged = True
    assert_close(value_and_gradients(arrays, bound), wanted)


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_the_even_share_is_that_of_random_experts(devices):
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((20_000, E)), axis=1)[:, :k]
    share = np.mean(np.any(ids // (E // devices) == 0, axis=1))
    assert dispatch.even_share(E, k, devices) == pytest.approx(share, abs=0.01)
