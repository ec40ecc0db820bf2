"""What a step of a batch holds and reads: the cache as large as its longest text, and no copy of it."""

import functools

import jax
import numpy as np
import pytest

from parallax.inference.batching import Batcher
from parallax.inference.request import bucket
from parallax.model.stack import prepare
from tests.parallax.inference.models import CONFIG, by_generator, completion, draw_params, prompt

SLOTS, TOKENS_PER_STEP = 8, 3


class Watched:
    """A compiled function that notes, of each call, the bytes of the cache that it is given and of its temporaries."""

    def __init__(self, function):
        self.function, self.calls = function, []

    def __call__(self, params, slots, *others):
        held = sum(x.nbytes for x in jax.tree.leaves(slots.cache))
        program = self.function.lower(params, slots, *others).compile()
        self.calls.append((held, program.memory_analysis().temp_size_in_bytes))
        return self.function(params, slots, *others)


@functools.cache
def make(layers):
    """A config, parameters, and a batcher that compiles once for all tests, which leave every slot free."""
    config = CONFIG.replace(num_layers=layers)
    params = prepare(config, draw_params(config))
    return config, params, Batcher(config, params, slots=SLOTS, capacity=128, tokens_per_step=TOKENS_PER_STEP)


@pytest.mark.parametrize("layers", [2, 16], ids=["listed", "stacked"])
def test_a_step_copies_none_of_the_cache(layers, monkeypatch):
    """Half of it bounds what else there is: one layer of a stack, scores, logits, joined weights."""
    _, _, batcher = make(layers)
    watched = Watched(batcher._step)
    monkeypatch.setattr(batcher, "_step", watched)
    batcher.admit(0, completion(0, prompt=prompt(59), max_tokens=60))
    for _ in range(2):  # in 64 tokens of room, then in 128
        batcher.step()
    batcher.cancel(0)
    (first, _), (second, _) = watched.calls
    assert 2 * first == second
    for held, temporaries in watched.calls:
        assert temporaries < held / 2


def test_room_follows_the_longest_text_and_changes_none():
    config, params, batcher = make(2)
    texts = {0: completion(0, prompt=prompt(3), max_tokens=100), 1: completion(1, prompt=prompt(70), max_tokens=9)}
    said = {ticket: [] for ticket in texts}

    def take(tokens):
        for token in tokens:
            said[token.ticket].append(token.token_id)

    def room():
        return batcher._slots.cache.capacity

    take(batcher.admit(0, texts[0]))
    take(batcher.step())
    assert room() == 32
    take(batcher.admit(1, texts[1]))
    rooms = [room()]
    while batcher.free < SLOTS:
        longest = max(len(texts[ticket].prompts[0]) + len(said[ticket]) for ticket in batcher.under_way)
        take(batcher.step())
        rooms.append(room())
        assert room() == bucket(longest + TOKENS_PER_STEP, 128)
    assert rooms[0] == 128
    assert {32, 64, 128} == set(rooms), "shrinks once the long one ended, and grows with the other"
    for ticket, text in texts.items():
        assert said[ticket] == by_generator(config, params, text)


def test_slots_are_made_again():
    config, params, batcher = make(2)
    batcher.admit(0, completion(0, prompt=prompt(70), max_tokens=9))
    lost = jax.tree.leaves(batcher._slots)
    batcher.rebuild()
    assert all(x.is_deleted() for x in lost)
    assert (batcher.free, batcher.under_way, batcher._slots.cache.capacity) == (SLOTS, set(), 32)
    tokens = batcher.admit(0, completion(4))
    while batcher.free < SLOTS:
        tokens += batcher.step()
    assert [token.token_id for token in tokens if not token.is_prompt] == by_generator(config, params, completion(4))


def test_no_slot_is_taken_to_score_a_text():
    _, _, batcher = make(2)
    before = batcher._slots.cache.keys
    tokens = batcher.admit(0, completion(0, prompt=prompt(100), max_tokens=0, prompt_logprobs=True))
    assert len(tokens) == 100
    assert np.all([x is y for x, y in zip(batcher._slots.cache.keys, before, strict=True)])
