"""What a request refuses, and how few shapes it comes in."""

import numpy as np
import pytest

from parallax.config import TransformerConfig
from parallax.inference.request import Request
from parallax.inference.sampling import SamplingSettings

CONFIG = TransformerConfig(vocab_size=23, max_seq_len=300)


def request(lengths=(5, 3), **changes):
    prompts = [np.arange(length) % CONFIG.vocab_size for length in lengths]
    settings = SamplingSettings.create(len(lengths))
    return Request(
        **{"prompts": prompts, "settings": settings, "seeds": range(len(lengths)), "max_tokens": 24} | changes
    )


def shapes(request):
    (tokens, lengths, seeds, _, _, stops, eos_id), capacity = request.arrays(CONFIG)
    return tokens.shape, lengths.shape, seeds.shape, stops.shape, eos_id.shape, capacity


def test_prompts_are_padded_on_the_right():
    (tokens, lengths, seeds, _, _, stops, eos_id), capacity = request(stops=[np.array([4, 5])]).arrays(CONFIG)
    assert tokens.tolist() == [[0, 1, 2, 3, 4] + 27 * [0], [0, 1, 2] + 29 * [0]]
    assert (lengths.tolist(), seeds.tolist(), int(eos_id), capacity) == ([5, 3], [0, 1], -1, 32)
    assert stops[0].tolist() == [-1] * 14 + [4, 5]


def test_sizes_are_rounded_up_to_few_within_the_model():
    stops = [np.arange(3)] * 4
    assert shapes(request(max_tokens=1)) == shapes(request((8, 2), eos_id=3, stops=stops))
    assert shapes(request((33, 1), max_tokens=32)) == shapes(request((64, 9), max_tokens=32, stops=stops))
    assert shapes(request((33, 1), max_tokens=32))[0] == (2, 64)
    capacities = [shapes(request((8,), max_tokens=size - 8))[-1] for size in range(9, 300)]
    assert sorted(set(capacities)) == [32, 64, 96, 128, 160, 192, 224, 256, 300]
    assert shapes(request((200, 1), max_tokens=100))[0] == (2, 256)
    assert shapes(request((200, 1), max_tokens=100))[-1] == 300
    assert shapes(request((299, 1), max_tokens=1))[0] == (2, 300)


def test_there_is_room_for_the_padded_prompts_and_for_the_whole():
    for longest in range(1, 300):
        for max_tokens in {1, 2, 30, 60, 100, 300 - longest}:
            if longest + max_tokens <= 300:
                (_, width), *_, capacity = shapes(request((longest,), max_tokens=max_tokens))
                assert longest <= width <= capacity <= 300
                assert longest + max_tokens <= capacity


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "prompt is empty (0 tokens); give at least one token to continue from"),
        ({"lengths": (3, 0)}, "prompt is empty (0 tokens); give at least one token to continue from"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1; try 200"),
        (
            {"max_tokens": 296},
            "prompt of 5 tokens + max_tokens=296 must not exceed max_seq_len=300; try max_tokens 295",
        ),
        (
            {"lengths": (1, 300), "max_tokens": 1},
            "prompt of 300 tokens + max_tokens=1 must not exceed max_seq_len=300; try a shorter prompt",
        ),
        ({"prompts": [np.array([0, 23])] * 2}, "token id 23 must be in [0, vocab_size=23); encode with"),
        ({"stops": [np.array([-1])]}, "token id -1 must be in [0, vocab_size=23); encode with"),
        ({"stops": [np.array([], np.int32)]}, "stop 0 is empty; leave it out, or give at least one token"),
        ({"eos_id": 99}, "token id 99 must be in [0, vocab_size=23); encode with"),
        ({"seeds": [1]}, "2 prompts have 1 seeds and 2 settings; give one a prompt"),
        ({"seeds": [1, -1]}, "seed=-1 must be in [0, 2^32); try 0"),
        ({"seeds": [1, 2**32]}, "seed=4294967296 must be in [0, 2^32); try 0"),
        ({"settings": SamplingSettings.create(3)}, "2 prompts have 2 seeds and 3 settings; give one a prompt"),
    ],
)
def test_a_bad_request_names_rule_value_and_remedy(changes, message, refused):
    with refused(message):
        request(**changes).arrays(CONFIG)
