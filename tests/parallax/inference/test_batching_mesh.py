"""A batch over eight devices: the tokens of one device, no compilation, and a cache that stays where it is."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from parallax.config import ExpertsConfig
from parallax.inference.batching import Batcher
from parallax.model.transformer import param_axes
from parallelism.mesh import MeshPlacement
from parallelism.rules import RULE_SETS
from tests.parallax.inference.models import (
    CONFIG,
    by_generator,
    completion,
    draw_params,
    ids,
    nothing_compiled,
    prompt,
    run,
)

SLOTS, CAPACITY = 4, 64


def make_batcher(sizes, config=CONFIG, **changes):
    """A batcher whose parameters are sharded over a mesh as the default rules say."""
    mesh = jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes),
        devices=jax.devices()[: math.prod(sizes.values())],
    )  # fmt: skip
    placement = MeshPlacement(mesh, RULE_SETS["default"])
    params = jax.tree.map(
        lambda leaf, names: jax.device_put(leaf, placement.sharding(names, leaf.shape)),
        draw_params(config),
        param_axes(config),
    )
    sizes = {"slots": SLOTS, "capacity": CAPACITY, "tokens_per_step": 3, "placement": placement}
    return Batcher(config, params, **sizes | changes)


def most_sent(program):
    """Numbers in the largest array that devices send each other."""
    moved = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)\(", program)
    return max((math.prod(map(int, shape.split(","))) for shape in moved if shape), default=0)


def test_a_mesh_gives_the_tokens_of_one_device_and_compiles_nothing_more(caplog):
    batcher = make_batcher({"data": 2, "fsdp": 2, "tensor": 2})
    batcher.warm_up()
    # Greedy: devices that add up their shares of a matmul round in another order.
    completions = [completion(number, temperature=0.0) for number in range(9)]
    with nothing_compiled(caplog):
        tokens = run(batcher, completions)
    assert [*map(ids, tokens)] == [by_generator(CONFIG, draw_params(CONFIG), each) for each in completions]


def test_experts_on_several_devices_give_the_tokens_of_one():
    """A prompt is a row that no devices share: each adds what its experts give. A step of all slots sends tokens."""
    config = dataclasses.replace(CONFIG, experts=ExpertsConfig(num_experts=8))
    batcher = make_batcher({"expert": 4, "tensor": 2}, config, capacity=32)
    completions = [completion(number, temperature=0.0, max_tokens=12) for number in range(5)]
    assert [*map(ids, run(batcher, completions))] == [
        by_generator(config, draw_params(config), each) for each in completions
    ]


def test_devices_hold_their_share_of_the_cache_and_send_none_of_it():
    batcher = make_batcher({"data": 4, "tensor": 2})
    batcher._make_room(CAPACITY)
    cache = batcher._slots.cache
    N, B, G, S, K = cache.keys.shape
    share = (N, B // 4, G // 2, S, K)
    for x in (cache.keys, cache.values):
        assert {shard.data.shape for shard in x.addressable_shards} == {share}
    program = batcher._step.lower(batcher.params, batcher._slots, np.ones(SLOTS, bool)).compile().as_text()
    assert most_sent(program) < math.prod(share[1:]), "less than one layer of a device's share"
    assert "all-reduce" in program


def test_filling_a_slot_sends_no_more_than_the_prompt():
    batcher = make_batcher({"data": 4, "tensor": 2})
    batcher._make_room(CAPACITY)
    arguments = completion(0, prompt=prompt(CAPACITY)).prompt_arrays(CAPACITY), np.bool_(False)
    row, *_ = batcher._fill(batcher.params, *arguments)
    for lowered in (
        batcher._fill.lower(batcher.params, *arguments),
        batcher._insert.lower(batcher._slots, np.int32(1), row),
        batcher._resize.lower(batcher._slots.cache, CAPACITY // 2),
    ):
        assert most_sent(lowered.compile().as_text()) < math.prod(batcher._slots.cache.keys.shape) // SLOTS


def test_slots_that_devices_cannot_share_are_refused():
    with pytest.raises(ValueError, match=r"batch=6 must be divisible by data=4; try .*batch=8"):
        make_batcher({"data": 4, "tensor": 2}, slots=6)
