"""What prompts share is read once, and changes no token of any answer."""

import numpy as np
import pytest

from parallax.inference.batching import Batcher
from parallax.inference.prefixes import Prefixes
from parallax.inference.request import Request
from parallax.layers.cache import KVCache
from parallax.model.stack import prepare
from tests.parallax.inference.models import (
    CONFIG,
    SETTINGS,
    VOCAB,
    by_generator,
    draw_params,
    ids,
    nothing_compiled,
    prompt,
    run,
)

LONG = CONFIG.replace(max_seq_len=256)
SHARED = prompt(130, 7)


@pytest.fixture(scope="module")
def batcher():
    made = Batcher(LONG, prepare(LONG, draw_params(LONG)), slots=3, capacity=256, prefix_tokens=1024)
    made.warm_up()
    return made


def completion(number, head=SHARED, tail=9, **changes):
    text = np.concatenate([head, prompt(tail + number, number)])
    fields = {"max_tokens": 6, "seed": number} | SETTINGS[number % len(SETTINGS)] | changes
    return Request.one(text, **fields)


def answers(batcher, completions):
    return [*map(ids, run(batcher, completions))]


def test_answers_after_a_shared_beginning_are_those_made_alone(batcher, caplog):
    completions = [completion(number) for number in range(8)]
    expected = [by_generator(LONG, draw_params(LONG), each) for each in completions]
    before = batcher.reused
    with nothing_compiled(caplog):
        assert answers(batcher, completions) == expected
    assert batcher.reused - before >= 7 * len(SHARED)


@pytest.mark.parametrize(("shared", "length", "reused"), [(20, 30, 0), (40, 60, 0), (60, 100, 60), (130, 190, 130)])
def test_no_length_compiles_after_warming_up(batcher, caplog, shared, length, reused):
    """A part of 64 tokens fits behind what is shared in no room of 64 or less."""
    whole, before = prompt(length, 60 + length), batcher.reused
    with nothing_compiled(caplog):
        for text in (whole[:shared], whole):
            run(batcher, [Request.one(text, max_tokens=1)])
    assert batcher.reused - before == reused


def test_a_conversation_goes_on_from_its_last_turn(batcher):
    text = SHARED
    for turn in range(3):
        asked = Request.one(text, max_tokens=8, temperature=0.0)
        before = batcher.reused
        (answer,) = answers(batcher, [asked])
        assert answer == by_generator(LONG, draw_params(LONG), asked)
        assert batcher.reused - before >= (len(text) - 11 if turn else 0), "the answer, too, is not read again"
        text = np.concatenate([text, np.array(answer, np.int32), prompt(10, 40 + turn)])


@pytest.mark.parametrize("length", [65, 128, 200])
def test_every_length_of_what_is_shared_and_of_what_is_not(batcher, length):
    whole = prompt(214, 50)
    run(batcher, [Request.one(whole[:length], max_tokens=1)])
    other = np.where(np.arange(214) < length, whole, (whole + 1) % VOCAB).astype(np.int32)
    for text in (whole, other, other[: length + 1], whole[:length], whole[: length - 1]):
        asked = Request.one(text, max_tokens=5, temperature=0.0)
        assert answers(batcher, [asked]) == [by_generator(LONG, draw_params(LONG), asked)]


def test_scores_of_a_prompt_are_always_computed(batcher):
    asked = completion(0, prompt_logprobs=True, max_tokens=2)
    run(batcher, [completion(0)])
    before = batcher.reused
    tokens = batcher.admit(0, asked)
    batcher.cancel(0)
    assert sum(token.is_prompt for token in tokens) == len(asked.prompts[0])
    assert batcher.reused == before


def test_nothing_is_kept_unless_asked_for():
    made = Batcher(CONFIG, draw_params(CONFIG), slots=1, capacity=128)
    made.admit(0, Request.one(prompt(100), max_tokens=1))
    made.admit(0, Request.one(prompt(100), max_tokens=1))
    assert made.reused == 0


def test_memory_is_bounded_and_the_oldest_goes_first():
    kept = Prefixes(100)
    caches = [KVCache.create(CONFIG, 1, 32) for _ in range(4)]
    texts = [prompt(20, number) for number in range(4)]
    for text, cache in zip(texts[:3], caches[:3], strict=True):
        kept.keep(text, cache)
    assert kept.find(np.append(texts[0], 1)) == (20, caches[0])
    kept.keep(texts[3], caches[3])
    assert [kept.find(np.append(text, 1))[1] is cache for text, cache in zip(texts, caches, strict=True)] == [
        True, False, True, True,
    ]  # fmt: skip
    assert kept.find(texts[0])[0] == 19, "what follows the last token is not in a cache"
    kept.keep(np.append(texts[0], texts[1]), caches[1])
    kept.keep(texts[2], caches[2])
    assert kept.find(np.append(texts[0], 1)) == (20, caches[1]), "a longer one holds the shorter"
    assert kept.find(np.append(texts[3], 1))[1] is caches[3]
    kept.keep(prompt(90, 9), KVCache.create(CONFIG, 1, 128))
    assert kept.find(np.append(texts[3], 1))[1] is caches[3], "nothing goes for what is too large to be kept"
    assert kept.find(prompt(91, 9))[0] < 90
    kept.clear()
    assert kept.find(texts[0]) == (0, None)


@pytest.fixture(scope="module")
def windowed():
    """Of a window shorter than the prompts, whose cache is a ring."""
    config = LONG.replace(sliding_window=70)
    return Batcher(config, draw_params(config), slots=1, capacity=256, prefix_tokens=512)


@pytest.mark.parametrize(
    ("first", "then"),
    [(prompt(100)[:60], prompt(100)), (prompt(240), np.concatenate([prompt(240)[:60], prompt(40, 5)]))],
    ids=["begins it", "went round"],
)
def test_what_a_ring_has_lost_is_read_again(windowed, first, then):
    """The padding of a part would take the slots of what the next token sees, and a longer text took those of the
    beginning of a shorter one."""
    run(windowed, [Request.one(first, max_tokens=1)])
    asked = Request.one(then, max_tokens=6, temperature=0.0)
    assert answers(windowed, [asked]) == [by_generator(windowed.config, windowed.params, asked)]
    assert windowed.reused == 0
