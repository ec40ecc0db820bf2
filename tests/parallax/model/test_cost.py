"""The count of operations against the compiler's own, and against the definition."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallax.config import PRESETS, TrainConfig, TransformerConfig
from parallax.layer_config import LoraConfig
from parallax.model.cost import StepCost
from parallax.model.flops import forward_flops, step_flops
from parallax.model.transformer import TransformerLM, init_params
from parallax.training.loss import make_loss
from parallelism.planning.hlo_flops import read_flops

SIZES = {"embed_dim": 64, "num_layers": 1, "num_heads": 4, "num_kv_heads": 4, "head_dim": 16, "mlp_dim": 256}


def compiled_flops(config, batch_size, seq_len):
    """Of one forward pass; with a single layer the compiler, which counts the body of a loop once, counts all."""
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((batch_size, seq_len), jnp.int32)

    def forward(params, tokens):
        return TransformerLM.from_params(config, params)(tokens)[0]

    return jax.jit(forward).lower(params, tokens).compile().cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("changes", "T"),
    [
        ({"vocab_size": 512}, 32),
        ({"num_kv_heads": 1, "tie_embeddings": False}, 48),
        ({"num_layers": 1, "mlp_dim": 128, "num_heads": 8, "sliding_window": 8}, 96),
    ],
    ids=["matrices", "grouped", "attention"],
)
def test_forward_flops_agree_with_the_compiler(changes, T):
    config = TransformerConfig(**{**SIZES, **changes})
    # The compiler multiplies masked keys too, which the model does not need: all T keys a query, not the visible.
    visible = np.mean(np.minimum(np.arange(1, T + 1), config.sliding_window or T))
    masked = 4 * config.num_heads * config.head_dim * (T - visible)
    ratio = compiled_flops(config, 2, T) / (2 * T * (forward_flops(config, T) + masked))
    assert 1 <= ratio < 1.05  # norms, softmax and gates come on top


@pytest.mark.parametrize("window", [0, 1, 5, 12, 13, 100])
def test_attention_counts_the_visible_keys(window):
    T = 13
    config = TransformerConfig(**SIZES, sliding_window=window)
    keys = np.mean([sum(not window or t - s < window for s in range(t + 1)) for t in range(T)])
    matrices = config.num_params() - 3 * 64  # without the norms' scales; the tied table counts once
    expected = 2 * matrices + 4 * 4 * 16 * keys
    assert forward_flops(config, T) == pytest.approx(expected, rel=1e-12)


def test_deeper_costs_as_much_again():
    by_depth = [forward_flops(TransformerConfig(**{**SIZES, "num_layers": n}), 20) for n in (1, 2, 5)]
    assert by_depth[2] - by_depth[0] == pytest.approx(4 * (by_depth[1] - by_depth[0]))


def test_a_step_costs_three_forward_passes_of_the_batch():
    config = TransformerConfig(**SIZES)
    assert step_flops(config, 6, 20) == pytest.approx(3 * 6 * 20 * forward_flops(config, 20))


def test_a_frozen_matrix_costs_two_of_them():
    config = TransformerConfig(**SIZES, lora=LoraConfig(rank=2))
    base = dataclasses.replace(config, lora=LoraConfig())
    adapters = 2 * (4 * (64 + 64) + 3 * (64 + 256))
    matrices = base.num_params() - 3 * 64  # as above
    attended = forward_flops(base, 20) - 2 * matrices
    assert step_flops(config, 6, 20) == pytest.approx(6 * 20 * (2 * 2 * matrices + 3 * 2 * adapters + 3 * attended))


@pytest.mark.parametrize(
    ("remat", "changes"),
    [
        ("none", {}),
        ("dots", {}),
        ("full", {"num_kv_heads": 1, "tie_embeddings": False, "vocab_size": 200}),
        ("none", {"attention": "blocks"}),
        ("dots", {"attention": "blocks", "sliding_window": 40}),
        ("full", {"attention": "blocks", "sliding_window": 40}),
    ],
    ids=str,
)
def test_a_steps_products_are_those_that_the_compiled_program_executes(remat, changes):
    """Exactly, with three layers in a loop, recomputation and masked scores included, skipped blocks not."""
    config = TransformerConfig(**{**SIZES, "num_layers": 3, "remat": remat, **changes})
    rows, length = 2, 24 if config.attention == "auto" else 150  # three blocks, the last of 22
    loss_fn = make_loss(config, TrainConfig())
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    batch = dict.fromkeys(("inputs", "targets"), jax.ShapeDtypeStruct((rows, length), jnp.int32))
    gradient = jax.jit(jax.grad(lambda params, batch: loss_fn(params, batch, None)[0]["loss"]))
    executed = read_flops(gradient.lower(params, batch).compile().as_text())
    cost = StepCost(config=config, batch_size=rows, seq_len=length)
    assert executed == pytest.approx(cost.product_flops({}), rel=0.01)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_step_of_adapters_computes_no_gradient_of_frozen_matrices(remat):
    config = TransformerConfig(**{**SIZES, "num_layers": 3, "remat": remat}, lora=LoraConfig(rank=2))
    loss_fn: Any = make_loss(config, TrainConfig())
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    learned = jax.tree.map(lambda kept, leaf: leaf if kept else None, loss_fn.learned, params)
    batch = dict.fromkeys(("inputs", "targets"), jax.ShapeDtypeStruct((2, 24), jnp.int32))

    def loss(learned, params, batch):
        params = jax.tree.map(lambda held, given: held if given is None else given, params, learned)
        return loss_fn(params, batch, None)[0]["loss"]

    executed = read_flops(jax.jit(jax.grad(loss)).lower(learned, params, batch).compile().as_text())
    cost = StepCost(config=config, batch_size=2, seq_len=24)
    assert executed == pytest.approx(cost.product_flops({}), rel=0.01)
    whole = StepCost(config=dataclasses.replace(config, lora=LoraConfig()), batch_size=2, seq_len=24)
    assert cost.product_flops({}) < 0.85 * whole.product_flops({})


def test_adapters_alone_are_summed_and_hold_gradients():
    config = TransformerConfig(**SIZES, lora=LoraConfig(rank=2))
    whole = StepCost(config=dataclasses.replace(config, lora=LoraConfig()), batch_size=16, seq_len=32)
    cost, sizes = StepCost(config=config, batch_size=16, seq_len=32), {"data": 2, "fsdp": 2}
    sent, all_sent = ({each.kind: each.wire_bytes for each in of.sent(sizes)} for of in (cost, whole))
    assert sent["reduce-scatter"] < 0.1 * all_sent["reduce-scatter"]
    assert sent["all-reduce"] < 0.1 * all_sent["all-reduce"]
    assert sent["all-gather"] >= all_sent["all-gather"]
    assert cost.temporary_bytes(sizes, 1e6) < whole.temporary_bytes(sizes, 1e6) - 0.9e6


def test_what_is_sent_depends_on_the_axes_that_there_are():
    cost = StepCost(config=TransformerConfig(**SIZES), batch_size=16, seq_len=32)
    assert cost.sent({"data": 1}) == []
    sent = {(each.kind, each.axis) for each in cost.sent({"data": 2, "fsdp": 2, "tensor": 2})}
    assert sent == {
        ("all-reduce", "data"),
        ("all-gather", "fsdp"),
        ("reduce-scatter", "fsdp"),
        ("all-reduce", "tensor"),
    }
    alone = {each.axis: each.wire_bytes for each in cost.sent({"data": 8})}
    assert alone["data"] == pytest.approx(2 * 7 / 8 * 4 * (cost.config.num_params() - 3 * 64))


def temporary_bytes(cost, sizes, on_chip=0.0):
    """With parameters as they are, without what tiles add."""
    shares = sizes.get("fsdp", 1) * sizes.get("tensor", 1)
    return cost.temporary_bytes(sizes, 4 * cost.config.num_params() / shares, on_chip)


def test_a_device_holds_less_where_more_share():
    def temporary(microbatches=1, **sizes):
        cost = StepCost(config=TransformerConfig(), batch_size=64, seq_len=256, microbatches=microbatches)
        return temporary_bytes(cost, sizes)

    assert temporary(data=8) < temporary(data=4) < temporary(data=2)
    assert temporary(fsdp=8) < temporary(data=8)
    assert temporary(microbatches=4, data=2) < temporary(data=2)
    assert temporary(data=2, tensor=2) < temporary(data=2)


def test_memory_on_the_chip_takes_as_much_of_what_is_no_gradient():
    cost = StepCost(config=TransformerConfig(), batch_size=64, seq_len=256)
    gradients = 4 * cost.config.num_params()
    for sizes in ({"data": 8}, {"fsdp": 8}, {}):
        taken = temporary_bytes(cost, sizes) - temporary_bytes(cost, sizes, 1e5)
        assert taken == pytest.approx(1e5)
    assert temporary_bytes(cost, {"data": 8}, 1e12) == pytest.approx(gradients)
    assert temporary_bytes(cost, {"fsdp": 8}, 1e12) == pytest.approx(gradients / 8)


def test_gradients_are_summed_when_the_blocks_are_done():
    few, many = (StepCost(config=TransformerConfig(), batch_size=size, seq_len=8) for size in (8, 8000))
    # Parts beside the sum, which is more than blocks need.
    assert few.temporary_bytes({"data": 8}, 1e8) == 2e8
    assert few.temporary_bytes({}, 1e8) < 1.1e8
    assert many.temporary_bytes({"data": 8}, 1e5) == pytest.approx(many.temporary_bytes({"data": 8}, 0) + 1e5)


def test_blocks_hold_no_scores_but_those_of_one():
    def temporary(attention, seq_len):
        config = TransformerConfig(attention=attention)
        return temporary_bytes(StepCost(config=config, batch_size=8192 // seq_len, seq_len=seq_len), {})

    assert temporary("xla", 512) - temporary("blocks", 512) > 8192 * 512 * TransformerConfig().num_heads * 4
    assert temporary("blocks", 512) < 1.1 * temporary("blocks", 256)


def test_keys_of_a_chunk_are_those_that_scores_are_there_for_at_once():
    def temporary(seq_len):
        config = TransformerConfig(attention="xla", remat="dots", num_layers=1)
        return StepCost(config=config, batch_size=8192 // seq_len, seq_len=seq_len).temporary_bytes({}, 0)

    a_score = 3 * 4 * TransformerConfig().num_heads
    assert temporary(2048) - temporary(4096) == pytest.approx(8192 * 512 * (512 / 2048 - 512 / 4096) * a_score)
    assert temporary(1024) - temporary(2048) == pytest.approx(8192 * (1024 - 512 * 512 / 2048) * a_score)


def test_shards_are_cast_once_for_all_microbatches_where_the_compiler_gathers():
    config = TransformerConfig(remat="full", dtype="bfloat16", num_heads=4, num_kv_heads=4)

    def of_four_more_layers(dtype="bfloat16", microbatches=2, **sizes):
        cost = StepCost(config.replace(dtype=dtype), batch_size=8, seq_len=128, microbatches=microbatches)
        doubled = dataclasses.replace(cost, config=cost.config.replace(num_layers=2 * config.num_layers))
        return doubled.temporary_bytes(sizes, 0) - cost.temporary_bytes(sizes, 0)

    def kept(microbatches, item, shares):
        """What blocks as such keep: their input."""
        return config.num_layers * 8 * 128 / microbatches / shares * item * 128

    shard = 2 * config.num_layers * 128 / 2 * (2 * 2 * 4 * 128 + 3 * 344 / 2)
    assert of_four_more_layers(fsdp=2, tensor=2) == pytest.approx(shard + kept(2, 2, 2))
    assert of_four_more_layers(fsdp=2) == pytest.approx(kept(2, 2, 2))
    assert of_four_more_layers(fsdp=2, tensor=2, microbatches=1) == pytest.approx(kept(1, 2, 2))
    assert of_four_more_layers(fsdp=2, tensor=2, dtype="float32") == pytest.approx(kept(2, 4, 2))


def test_gradients_take_what_parameters_take():
    cost = StepCost(config=TransformerConfig(), batch_size=8, seq_len=64)
    again = dataclasses.replace(cost, microbatches=2)
    for each, times in ((cost, 1), (again, 2)):
        assert each.temporary_bytes({"fsdp": 2}, 1e6) - each.temporary_bytes({"fsdp": 2}, 0) == times * 1e6


MIB = 2**20


@pytest.mark.parametrize(
    ("config", "batch_size", "seq_len", "sizes", "parameters", "compiled"),
    [
        ("small", 64, 512, {"data": 8}, 96, 124),  # by pmap too
        ("small", 64, 512, {"data": 2, "tensor": 4}, 24, 112),
        ("base", 64, 1024, {"fsdp": 8}, 45, 444),
        ("llama-1b", 16, 1024, {"fsdp": 8}, 589, 1008),
    ],
)
def test_an_evaluation_takes_no_more_than_its_estimate(config, batch_size, seq_len, sizes, parameters, compiled):
    """At least what libtpu reports for v3-8 in bfloat16, in MiB beside arguments, and at most twice that."""
    config = dataclasses.replace(PRESETS[config], dtype="bfloat16", remat="none")
    cost = StepCost(config=config, batch_size=batch_size, seq_len=seq_len)
    estimated = cost.evaluation_bytes(sizes, parameters * MIB) / MIB
    assert compiled <= estimated <= 2 * compiled
    in_parts = dataclasses.replace(cost, microbatches=8)
    assert in_parts.evaluation_bytes(sizes, parameters * MIB) == estimated * MIB
