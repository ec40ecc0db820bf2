"""What a completion may and may not depend on, when others come and go beside it."""

import functools

import jax
import numpy as np
import pytest

from parallax.inference.batching import Batcher
from tests.parallax.inference.models import CONFIG, SETTINGS, by_generator, completion, draw_params, prompt

COUNT = 18


@functools.cache
def params():
    return draw_params(CONFIG)


@functools.cache
def warm_batcher():
    batcher = Batcher(CONFIG, params(), slots=4, capacity=100, tokens_per_step=3)
    batcher.warm_up()
    return batcher


@pytest.fixture
def batcher():
    """One for all tests, with every slot free."""
    warm = warm_batcher()
    for ticket in range(COUNT):
        warm.cancel(ticket)
    assert warm.free == 4
    return warm


def run(batcher, completions, order=None, cancel=lambda under_way: ()):
    """The tokens of completions that are admitted in an order whenever a slot is free, by ticket."""
    waiting = list(range(len(completions)) if order is None else order)
    tokens, slots = {ticket: [] for ticket in waiting}, batcher.free
    while waiting or batcher.free < slots:
        came = []
        while waiting and batcher.free:
            came += batcher.admit(waiting[0], completions[waiting.pop(0)])
        came += batcher.step()
        for token in came:
            tokens[token.ticket].append(token)
        for ticket in cancel(
            {token.ticket for token in came} - {token.ticket for token in came if token.finish}
        ):
            batcher.cancel(ticket)
    return tokens


def ids(tokens):
    return [token.token_id for token in tokens if not token.is_prompt]


@functools.cache
def expected(number):
    return by_generator(CONFIG, params(), completion(number))


@pytest.mark.parametrize("seed", range(3))
def test_completions_equal_those_of_generate_whatever_the_order(batcher, seed):
    order = np.random.default_rng(seed).permutation(COUNT).tolist()
    tokens = run(batcher, [completion(number) for number in range(COUNT)], order)
    assert [ids(tokens[number]) for number in range(COUNT)] == [expected(number) for number in range(COUNT)]
    assert len({tuple(expected(number)) for number in range(COUNT)}) == COUNT


@pytest.mark.parametrize("seed", range(3))
def test_those_that_are_cancelled_change_nothing_for_the_others(batcher, seed):
    rng, gone = np.random.default_rng(seed), set()

    def cancel(under_way):
        chosen = {ticket for ticket in under_way if rng.random() < 0.2}
        gone.update(chosen)
        return chosen

    tokens = run(batcher, [completion(number) for number in range(COUNT)], cancel=cancel)
    assert 3 < len(gone) < COUNT - 3
    for number in range(COUNT):
        got = ids(tokens[number])
        assert got == (expected(number)[: len(got)] if number in gone else expected(number))
        assert number not in gone or len(got) < len(expected(number))


def test_what_is_said_of_a_token_is_the_same_in_any_slot_and_company(batcher):
    completions = [completion(number) for number in range(8)]
    together = run(batcher, completions)
    for number in range(8):
        last = [each for each in range(7, -1, -1) if each != number] + [number]
        for order in (last, [number]):
            tokens = run(batcher, completions, order)[number]
            assert ids(tokens) == ids(together[number])
            logprobs = [[token.logprob for token in each] for each in (tokens, together[number])]
            np.testing.assert_allclose(*logprobs, rtol=0, atol=1e-5)  # kernels differ in the rows of a matrix


@pytest.mark.parametrize("slot", range(4))
@pytest.mark.parametrize("number", [0, 2])
def test_what_other_slots_hold_does_not_change_a_bit(batcher, slot, number):
    said = []
    for company in (0, 4, None):  # other texts in the other slots, or none that goes on
        for place in range(4):
            other = completion(
                place + (company or 8), prompt=prompt(5, place + (company or 8)), max_tokens=20
            )
            batcher.admit(place, completion(number) if place == slot else other)
        for place in set(range(4)) - {slot}:
            if company is None:
                batcher.cancel(place)
        said.append([])
        while batcher.free < 4:
            said[-1] += [token for token in batcher.step() if token.ticket == slot]
    assert said[0] == said[1] == said[2]
    assert len(said[0]) > 3


def test_how_many_tokens_a_step_takes_changes_no_token():
    other = Batcher(CONFIG, params(), slots=2, capacity=64, tokens_per_step=1)
    tokens = run(other, [completion(number) for number in range(6)])
    assert [ids(tokens[number]) for number in range(6)] == [expected(number) for number in range(6)]


def test_bfloat16_is_reported_alike():
    config = CONFIG.replace(dtype="bfloat16")
    small = Batcher(config, params(), slots=2, capacity=64)
    one, two = (run(small, [completion(number) for number in order]) for order in ((0, 2), (0, 3)))
    assert ids(one[0]) == ids(two[0])
    assert all(np.isfinite(token.logprob) for token in one[0] + one[1])


def test_after_warming_up_nothing_is_compiled(batcher, caplog):
    completions = [
        completion(0, prompt=prompt(60), prompt_logprobs=True),
        completion(1, stops=[prompt(20)] * 9, eos_id=3),
        completion(2, prompt=prompt(99), max_tokens=1),
        completion(3, prompt_logprobs=True, max_tokens=0, seed=2**32 - 1),
        *[completion(number) for number in range(4, 12)],
    ]
    with jax.log_compiles(True):
        run(batcher, completions)
        assert not [record.message for record in caplog.records if "ompil" in record.message]
        Batcher(CONFIG, params(), slots=1, capacity=8).step()
        assert [record.message for record in caplog.records if "ompil" in record.message], "the log works"


def test_a_slot_is_free_at_once(batcher):
    first = batcher.admit(0, completion(0, max_tokens=1))
    assert [token.finish for token in first] == ["length"]
    assert batcher.free == 4
    for ticket in range(4):
        assert len(batcher.admit(ticket, completion(ticket, max_tokens=12))) == 1
    assert batcher.free == 0
    batcher.cancel(2)
    batcher.cancel(99)
    assert batcher.free == 1
    batcher.admit(7, completion(7, max_tokens=2))
    finished = [token.ticket for token in batcher.step() if token.finish]
    assert finished == [7]
    assert batcher.free == 1
    assert {token.ticket for token in batcher.step()} == {0, 1, 3}
    batcher.cancel(0)
    batcher.cancel(0)
    assert {token.ticket for token in batcher.step()} == {1, 3}


def test_a_free_batch_takes_no_step(batcher):
    assert batcher.step() == []


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 65, 99])
def test_a_slot_may_be_filled_to_its_last_token(batcher, length):
    full = [completion(n, prompt=prompt(length, n), max_tokens=100 - length) for n in range(len(SETTINGS))]
    tokens = run(batcher, full)
    for number, each in enumerate(full):
        assert ids(tokens[number]) == by_generator(CONFIG, params(), each)
        assert tokens[number][-1].finish == "length"
