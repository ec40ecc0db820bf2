"""What the compiled step of each layout says over the wire: what its theory asks for, and nothing else.

Sizes are chosen so that no two arrays have the same number of bytes. `N` layers are scanned, so what a layer says is
counted N times. Scalars and norms (a few bytes, summed over what is split) are allowed everywhere and bounded.
"""

import functools

import jax
import numpy as np
import pytest

from parallax.config import ExpertsConfig, OptimizerConfig, TrainConfig, TransformerConfig
from parallax.model.transformer import parameters
from parallax.training.loss import make_loss
from parallax.training.optimizer import make_optimizer
from parallax.training.state import make_init, state_axes
from parallax.training.step import train_step
from parallelism.planning.hlo_collectives import crossed_axes, read_collectives, wire_bytes
from parallelism.strategies import get_strategy
from parallelism.strategy import Layout

B, T, D, H, K, F, V, N = 16, 24, 32, 8, 4, 48, 64, 3
FLOAT = 4  # bytes
SMALL = 1024
"""Bytes: counts, losses and squared norms of leaves, and the gradients of a norm's scale, are below."""
LAYER = FLOAT * (4 * D * H * K + 3 * D * F + 2 * D)
"""Bytes of a layer's parameters."""
TABLE = FLOAT * V * D


@functools.cache
def compiled_text(mesh, reduction="mean", experts=0):
    sizes = {"embed_dim": D, "num_heads": H, "num_kv_heads": H, "head_dim": K, "mlp_dim": F}
    config = TransformerConfig(vocab_size=V, num_layers=N, experts=ExpertsConfig(num_experts=experts), **sizes)
    optimizer = make_optimizer(OptimizerConfig(), parameters(config))
    init = make_init(config, optimizer, seed=0)
    name = "mesh" if "=" in mesh else mesh
    layout = Layout(strategy=name, mesh=mesh if name == "mesh" else "", batch_size=B, seq_len=T, reduction=reduction)
    strategy = get_strategy(layout, init, state_axes(config, init))
    step = functools.partial(
        train_step,
        loss_fn=make_loss(config, TrainConfig()),
        optimizer=optimizer,
        learning_rate=lambda step: 1e-3,
        gradients=strategy.gradients,
        seed=0,
    )
    batch = {name: jax.ShapeDtypeStruct((B, T), np.int32) for name in ("inputs", "targets")}
    return strategy.lower(step, batch).compile().as_text()


@functools.cache
def collectives_of(mesh, reduction="mean", experts=0):
    """{(kind, axes, times): bytes of all that is said so often} of a step, without what is small."""
    shape = {part.partition("=")[0]: int(part.partition("=")[2]) for part in mesh.split(",") if "=" in part}
    said, small = {}, 0
    for collective in read_collectives(compiled_text(mesh, reduction, experts)):
        if collective.bytes < SMALL:
            small += collective.bytes * collective.count
            continue
        key = (collective.kind, crossed_axes(collective, shape or {"batch": 8}), collective.count)
        said[key] = said.get(key, 0) + collective.bytes
    assert small < N * 6 * SMALL
    return said


@pytest.mark.parametrize("mesh", ["data=8", "pmap"])
def test_data_reduces_all_gradients_at_once_and_gathers_nothing(mesh):
    said = collectives_of(mesh)
    axes = ("batch" if mesh == "pmap" else "data",)
    assert set(said) == {("all-reduce", axes, 1)}
    every = N * LAYER + TABLE + FLOAT * D
    assert every <= said["all-reduce", axes, 1] <= every + SMALL


@pytest.mark.parametrize("mesh", ["fsdp=8", "data=2,fsdp=4"])
def test_fsdp_gathers_parameters_where_they_are_used_and_scatters_their_gradients(mesh):
    """A layer's parameters are gathered going forward and again going back, the table once for both its uses. Each
    gradient comes back in shards, which data then adds up."""
    said = collectives_of(mesh)
    gathers = {("all-gather", ("fsdp",), N), ("all-gather", ("fsdp",), 1)}
    scatters = {("reduce-scatter", ("fsdp",), N), ("reduce-scatter", ("fsdp",), 1)}
    sums = {("all-reduce", ("data",), 1)} if "data" in mesh else set()
    assert set(said) == gathers | scatters | sums
    matrices = LAYER - FLOAT * 2 * D
    assert said["all-gather", ("fsdp",), N] == 2 * matrices
    assert said["all-gather", ("fsdp",), 1] == TABLE
    assert said["reduce-scatter", ("fsdp",), N] == matrices
    assert said["reduce-scatter", ("fsdp",), 1] == TABLE
    if sums:
        every = (N * LAYER + TABLE + FLOAT * D) // 4
        assert every <= said["all-reduce", ("data",), 1] <= every + SMALL


def test_an_axis_in_two_parts_sends_no_more_than_a_whole_one():
    """Gathered along one part and then along the other: each byte still travels once."""
    whole, parts = (
        sum(wire_bytes(each) * each.count for each in read_collectives(compiled_text(mesh)) if each.bytes >= SMALL)
        for mesh in ("fsdp=8", "fsdp=2x4")
    )
    assert parts == pytest.approx(whole, rel=0.01)


def test_fsdp_keeps_no_whole_copy():
    """Nowhere in the program is there an array of the stacked layers that is not an eighth of it."""
    text = compiled_text("fsdp=8")
    for dims in ((D, F), (F, D), (D, H, K), (H, K, D)):
        eighth = tuple(size // 8 if size == D else size for size in dims)
        assert f"f32[{','.join(map(str, (N, *eighth)))}]" in text
        assert f"f32[{','.join(map(str, (N, *dims)))}]" not in text


def test_tensor_reduces_twice_a_block_and_twice_back():
    """Forward: the sums behind attention and behind the feed-forward. Back: one for each block's input, of the three
    projections' parts and of the two's, which this backend reduces before it adds them up. Outside: the vectors
    looked up, the gradient behind the logits, and for each token the parts of its normaliser; no logit."""
    said = collectives_of("tensor=8")
    assert set(said) == {("all-reduce", ("tensor",), N), ("all-reduce", ("tensor",), 1)}
    vectors, scalars = FLOAT * B * T * D, FLOAT * B * T
    assert said["all-reduce", ("tensor",), N] == (1 + 1) * vectors + (3 + 2) * vectors
    assert 2 * vectors + 3 * scalars <= said["all-reduce", ("tensor",), 1] <= 2 * vectors + 3 * scalars + SMALL
    largest = max(collective.bytes for collective in read_collectives(compiled_text("tensor=8")))
    assert largest < FLOAT * B * T * V * 2


def test_sequence_gathers_keys_and_values_alone():
    """In the forward pass; the backward pass reduces their gradients, and those of parameters as with data."""
    said = collectives_of("sequence=8")
    axes = ("sequence",)
    assert set(said) == {("all-gather", axes, N), ("all-reduce", axes, N), ("all-reduce", axes, 1)}
    keys = FLOAT * B * T * H * K
    assert said["all-gather", axes, N] == 2 * keys
    assert said["all-reduce", axes, N] == 2 * keys + LAYER
    assert TABLE <= said["all-reduce", axes, 1] <= 2 * TABLE + SMALL


def test_combined_axes_say_what_each_says_alone():
    """Gathers cross fsdp or sequence alone, and nothing changes places: no all-to-all, no permute."""
    for kind, axes, _ in collectives_of("fsdp=2,sequence=2,tensor=2"):
        assert kind in {"all-reduce", "all-gather"}
        assert kind == "all-reduce" or axes in {("fsdp",), ("sequence",)}


def test_exact_reduction_gathers_every_shards_gradient():
    """16 shards of each parameter, and with fsdp the parameters, once; nothing is reduced on the way. data is what
    crosses slices in test_mesh_slices.py."""
    said = collectives_of("fsdp=8", "exact")
    assert set(said) == {("all-gather", ("fsdp",), 1)}
    every = N * LAYER + TABLE + FLOAT * D
    assert said["all-gather", ("fsdp",), 1] == pytest.approx(16 * every + every, abs=SMALL)


def test_tokens_travel_to_experts_which_stay():
    """In each layer a buffer for the tokens of all devices each way, again for their gradients, and two numbers a
    token, the expert and its weight, with a gradient. What all have is reduced once, as with data; no expert is."""
    said = collectives_of("expert=8", experts=8)
    axes = ("expert",)
    assert set(said) == {("all-to-all", axes, N), ("all-reduce", axes, 1)}
    tokens = 8 * B * T // 8
    assert said["all-to-all", axes, N] == FLOAT * tokens * (4 * D + 3)
    shared = N * FLOAT * (4 * D * H * K + 8 * D + 2 * D) + TABLE + FLOAT * D
    assert shared <= said["all-reduce", axes, 1] <= shared + SMALL


@pytest.mark.parametrize("mesh", ["fsdp=2,expert=4", "expert=4,tensor=2"])
def test_tokens_cross_the_experts_axis_alone_and_parameters_never(mesh):
    said = collectives_of(mesh, experts=8)
    assert {axes for kind, axes, _ in said if kind == "all-to-all"} == {("expert",)}
    assert {axes for kind, axes, _ in said if kind in ("all-gather", "reduce-scatter")} <= {("fsdp",)}
    assert {kind for kind, _, _ in said} <= {"all-to-all", "all-gather", "reduce-scatter", "all-reduce"}
    if "tensor" in mesh:  # what tensor says of a dense block, but that experts have one gradient of their input
        vectors = FLOAT * B * T * D // 4
        assert said["all-reduce", ("tensor",), N] <= (1 + 1) * vectors + (3 + 2) * vectors
