"""What a completion may and may not depend on when others come and go beside it, what is reported, what is refused."""

import functools

import jax
import numpy as np
import pytest

from parallax.inference.batching import Batcher
from parallax.inference.reports import TOP
from parallax.model.stack import prepare
from tests.parallax.inference.models import (
    CONFIG,
    SETTINGS,
    VOCAB,
    by_generator,
    completion,
    draw_params,
    ended,
    ids,
    logprobs,
    nothing_compiled,
    prompt,
    run,
)

COUNT = 18


@functools.cache
def params():
    return prepare(CONFIG, draw_params(CONFIG))


@functools.cache
def warm_batcher():
    batcher = Batcher(CONFIG, params(), slots=4, capacity=50, tokens_per_step=3)
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


def alone(batcher, each):
    """All tokens of one completion."""
    return run(batcher, [each])[0]


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


@pytest.mark.parametrize("slot", range(4))
@pytest.mark.parametrize("number", [0, 2])
def test_what_other_slots_hold_does_not_change_a_bit(batcher, slot, number):
    said = []
    for company in (0, 4, None):  # other texts in the other slots, or none that goes on
        for place in range(4):
            other = completion(place + (company or 8), prompt=prompt(5, place + (company or 8)), max_tokens=20)
            batcher.admit(place, completion(number) if place == slot else other)
        for place in set(range(4)) - {slot}:
            if company is None:
                batcher.cancel(place)
        said.append([])
        while batcher.free < 4:
            said[-1] += [token for token in batcher.step() if token.ticket == slot]
    assert said[0] == said[1] == said[2]
    assert len(said[0]) > 3


@pytest.mark.parametrize(("prepared", "tokens_per_step"), [(False, 8), (True, 1)], ids=["stacked", "a token a step"])
def test_neither_how_layers_are_held_nor_how_many_tokens_a_step_takes_changes_a_token(prepared, tokens_per_step):
    weights = params() if prepared else draw_params(CONFIG)
    other = Batcher(CONFIG, weights, slots=2, capacity=64, tokens_per_step=tokens_per_step)
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
        completion(0, prompt=prompt(40), prompt_logprobs=True),
        completion(1, stops=[prompt(20)] * 9, eos_id=3),
        completion(2, prompt=prompt(49), max_tokens=1),
        completion(3, prompt_logprobs=True, max_tokens=0, seed=2**32 - 1),
        *[completion(number) for number in range(4, 12)],
    ]
    with nothing_compiled(caplog):
        run(batcher, completions)
    with jax.log_compiles(True):
        Batcher(CONFIG, params(), slots=1, capacity=8).step()
        assert [record.message for record in caplog.records if "ompil" in record.message], "the log works"


def test_a_slot_is_free_at_once(batcher):
    assert batcher.step() == []
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


@pytest.mark.parametrize("length", [1, 31, 32, 33, 49])
def test_a_slot_may_be_filled_to_its_last_token(batcher, length):
    full = [completion(n, prompt=prompt(length, n), max_tokens=50 - length) for n in range(len(SETTINGS))]
    tokens = run(batcher, full)
    for number, each in enumerate(full):
        assert ids(tokens[number]) == by_generator(CONFIG, params(), each)
        assert tokens[number][-1].finish == "length"


@pytest.mark.parametrize("number", range(9))
def test_logprobs_and_alternatives_are_those_of_the_model_itself(batcher, number):
    each = completion(number, prompt_logprobs=True)
    tokens = alone(batcher, each)
    text, length = [token.token_id for token in tokens], len(each.prompts[0])
    assert text == [*each.prompts[0].tolist(), *by_generator(CONFIG, params(), each)]
    assert [token.is_prompt for token in tokens] == [at < length for at in range(len(text))]
    assert (tokens[0].logprob, tokens[0].top) == (None, ())
    expected_TV = logprobs(CONFIG, params(), text)
    for at, token in enumerate(tokens[1:]):
        # float32 against float64, on logits of a few units, summed in another order
        np.testing.assert_allclose(token.logprob, expected_TV[at, token.token_id], rtol=0, atol=2e-5)
        best = np.argsort(-expected_TV[at])[:TOP]
        assert [token_id for token_id, _ in token.top] == best.tolist()
        np.testing.assert_allclose([logprob for _, logprob in token.top], expected_TV[at, best], rtol=0, atol=2e-5)


def test_a_text_may_be_scored_and_nothing_added(batcher):
    whole = alone(batcher, completion(4, prompt_logprobs=True))
    scored = alone(batcher, completion(4, prompt_logprobs=True, max_tokens=0))
    assert [token.is_prompt for token in scored] == [True] * 17
    assert [token.finish for token in scored] == [None] * 16 + ["length"]
    assert [(token.token_id, token.logprob, token.top) for token in scored] == [
        (token.token_id, token.logprob, token.top) for token in whole[:17]
    ]
    (only,) = alone(batcher, completion(1, prompt_logprobs=True, max_tokens=0))
    assert (only.logprob, only.finish, only.is_prompt) == (None, "length", True)
    full = completion(0, prompt=prompt(50), prompt_logprobs=True, max_tokens=0)
    assert len(alone(batcher, full)) == 50


def test_a_small_vocabulary_is_reported_whole():
    config = CONFIG.replace(vocab_size=3)
    small = Batcher(config, draw_params(config), slots=1, capacity=8)
    (token,) = small.admit(0, completion(2, prompt=np.array([2], np.int32), max_tokens=1))
    assert sorted(token_id for token_id, _ in token.top) == [0, 1, 2]
    np.testing.assert_allclose(sum(np.exp(logprob) for _, logprob in token.top), 1, rtol=1e-5)
    assert dict(token.top)[token.token_id] == token.logprob


def test_eos_and_stops_end_a_completion_where_they_first_occur(batcher):
    free = [by_generator(CONFIG, params(), completion(number, max_tokens=16)) for number in range(12)]
    stops = [free[3][6:8], free[5][4:5], free[6][2:15], [1] * 40]
    eos_id, seen = free[7][0], set()
    for number, tokens in enumerate(free):
        each = completion(number, max_tokens=16, stops=[np.array(stop) for stop in stops], eos_id=eos_id)
        got = alone(batcher, each)
        expected, finish = ended(tokens, stops, eos_id)
        assert [token.token_id for token in got] == expected
        assert [token.finish for token in got] == [None] * (len(got) - 1) + [finish]
        seen.add((finish, len(got)))
    assert len(seen) > 4
    assert ("stop", 1) in seen, "one ends as it begins"


def test_a_stop_in_the_prompt_does_not_count(batcher):
    each = completion(2)
    tokens = by_generator(CONFIG, params(), each)
    straddling = np.array([each.prompts[0][-1], tokens[0]])
    assert straddling.tolist() not in [tokens[at : at + 2] for at in range(len(tokens))]
    got = alone(batcher, completion(2, stops=[straddling, each.prompts[0]]))
    assert [token.token_id for token in got] == tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1; try 200, or 0 with prompt_logprobs"),
        ({"max_tokens": -1, "prompt_logprobs": True}, "max_tokens=-1 must be at least 1"),
        ({"prompt": prompt(46)}, "46 tokens + max_tokens=5 must not exceed the 50 tokens that a slot holds"),
        ({"prompt": prompt(46)}, "try max_tokens 4"),
        ({"prompt": prompt(50)}, "try a shorter prompt"),
        ({"prompt": np.array([VOCAB])}, f"token id {VOCAB} must be in [0, vocab_size={VOCAB})"),
        ({"stops": [np.array([-1])]}, "token id -1 must be in"),
        ({"seed": -1}, "seed=-1 must be in [0, 2^32); try 0"),
        ({"temperature": -0.1}, "temperature=-0.1 must be in [0, 1e6]"),
    ],
)
def test_what_can_never_run_is_refused_with_a_remedy(batcher, changes, message):
    for attempt in (batcher.check, lambda each: batcher.admit(0, each)):
        with pytest.raises(ValueError, match="; ") as refused:
            attempt(completion(0, **changes))
        assert message in str(refused.value)
    assert batcher.free == 4


def test_a_wrong_use_is_refused_and_disturbs_nothing(batcher):
    tokens = batcher.admit(1, completion(1))
    with pytest.raises(ValueError, match="ticket=1 is under way"):
        batcher.admit(1, completion(2))
    for ticket in (2, 3, 4):
        batcher.admit(ticket, completion(ticket))
    with pytest.raises(ValueError, match="all 4 slots are busy; admit once `free` is above 0"):
        batcher.admit(5, completion(5))
    with pytest.raises(ValueError, match="warm up before the first"):
        batcher.warm_up()
    while batcher.free < 4:
        tokens += [token for token in batcher.step() if token.ticket == 1]
    assert [token.token_id for token in tokens] == by_generator(CONFIG, params(), completion(1))


@pytest.mark.parametrize("name", ["slots", "capacity", "tokens_per_step"])
def test_sizes_are_positive(name):
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1; try"):
        Batcher(CONFIG, params(), **{name: 0})


def test_no_slot_is_longer_than_the_model_reads():
    assert Batcher(CONFIG, params(), slots=1, capacity=1024).capacity == CONFIG.max_seq_len
