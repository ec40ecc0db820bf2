"""What is said of tokens: log-probabilities, alternatives, why a completion ended, and what is refused."""

import functools

import numpy as np
import pytest

from parallax.inference.batching import TOP, Batcher
from tests.parallax.inference.models import (
    CONFIG,
    VOCAB,
    by_generator,
    completion,
    draw_params,
    logprobs,
    prompt,
)


@functools.cache
def params():
    return draw_params(CONFIG, seed=1)


@functools.cache
def batcher():
    return Batcher(CONFIG, params(), slots=2, capacity=64)


def run(each):
    """All tokens of one completion."""
    tokens = batcher().admit(5, each)
    while batcher().free < 2:
        tokens += batcher().step()
    return tokens


@pytest.mark.parametrize("number", range(9))
def test_logprobs_and_alternatives_are_those_of_the_model_itself(number):
    each = completion(number, prompt_logprobs=True)
    tokens = run(each)
    text, length = [token.token_id for token in tokens], len(each.prompt)
    assert text == [*each.prompt.tolist(), *by_generator(CONFIG, params(), each)]
    assert [token.is_prompt for token in tokens] == [at < length for at in range(len(text))]
    assert (tokens[0].logprob, tokens[0].top) == (None, ())
    expected_TV = logprobs(CONFIG, params(), text)
    for at, token in enumerate(tokens[1:]):
        # float32 against float64, on logits of a few units, summed in another order
        np.testing.assert_allclose(token.logprob, expected_TV[at, token.token_id], rtol=0, atol=2e-5)
        best = np.argsort(-expected_TV[at])[:TOP]
        assert [token_id for token_id, _ in token.top] == best.tolist()
        np.testing.assert_allclose(
            [logprob for _, logprob in token.top], expected_TV[at, best], rtol=0, atol=2e-5
        )


def test_a_text_may_be_scored_and_nothing_added():
    whole = run(completion(4, prompt_logprobs=True))
    scored = run(completion(4, prompt_logprobs=True, max_tokens=0))
    assert [token.is_prompt for token in scored] == [True] * 17
    assert [token.finish for token in scored] == [None] * 16 + ["length"]
    assert [(token.token_id, token.logprob, token.top) for token in scored] == [
        (token.token_id, token.logprob, token.top) for token in whole[:17]
    ]
    (only,) = run(completion(1, prompt_logprobs=True, max_tokens=0))
    assert (only.logprob, only.finish, only.is_prompt) == (None, "length", True)
    full = completion(0, prompt=prompt(64), prompt_logprobs=True, max_tokens=0)
    assert len(run(full)) == 64


def test_a_small_vocabulary_is_reported_whole():
    config = CONFIG.replace(vocab_size=3)
    small = Batcher(config, draw_params(config), slots=1, capacity=8)
    (token,) = small.admit(0, completion(2, prompt=np.array([2], np.int32), max_tokens=1))
    assert sorted(token_id for token_id, _ in token.top) == [0, 1, 2]
    np.testing.assert_allclose(sum(np.exp(logprob) for _, logprob in token.top), 1, rtol=1e-5)
    assert dict(token.top)[token.token_id] == token.logprob


def ends(tokens, stops, eos_id):
    for end in range(1, len(tokens) + 1):
        if tokens[end - 1] == eos_id or any(tokens[:end][-len(stop) :] == stop for stop in stops):
            return tokens[:end], "stop"
    return tokens, "length"


def test_eos_and_stops_end_a_completion_where_they_first_occur():
    free = [by_generator(CONFIG, params(), completion(number, max_tokens=24)) for number in range(12)]
    stops = [free[3][6:8], free[5][4:5], free[6][2:19], [1] * 40]
    eos_id, seen = free[7][0], set()
    for number, tokens in enumerate(free):
        each = completion(number, max_tokens=24, stops=[np.array(stop) for stop in stops], eos_id=eos_id)
        got = run(each)
        expected, finish = ends(tokens, stops, eos_id)
        assert [token.token_id for token in got] == expected
        assert [token.finish for token in got] == [None] * (len(got) - 1) + [finish]
        seen.add((finish, len(got)))
    assert len(seen) > 4
    assert ("stop", 1) in seen, "one ends as it begins"


def test_a_stop_in_the_prompt_does_not_count():
    each = completion(2)
    tokens = by_generator(CONFIG, params(), each)
    straddling = np.array([each.prompt[-1], tokens[0]])
    assert straddling.tolist() not in [tokens[at : at + 2] for at in range(len(tokens))]
    got = run(completion(2, stops=[straddling, each.prompt]))
    assert [token.token_id for token in got] == tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": prompt(0)}, "prompt is empty (0 tokens); give at least one token"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1; try 200, or 0 with prompt_logprobs"),
        ({"max_tokens": -1, "prompt_logprobs": True}, "max_tokens=-1 must be at least 1"),
        ({"prompt": prompt(60)}, "60 tokens + max_tokens=5 must not exceed the 64 tokens that a slot holds"),
        ({"prompt": prompt(60)}, "try max_tokens 4"),
        ({"prompt": prompt(64)}, "try a shorter prompt"),
        ({"prompt": np.array([VOCAB])}, f"token id {VOCAB} must lie in [0, vocab_size={VOCAB})"),
        ({"stops": [np.array([-1])]}, "token id -1 must lie in"),
        ({"stops": [prompt(0)]}, "a stop is empty; leave it out"),
        ({"eos_id": 99}, "token id 99 must lie in"),
        ({"seed": -1}, "seed=-1 must lie in [0, 2^32); try 0"),
        ({"seed": 2**32}, "seed=4294967296 must lie in"),
        ({"temperature": -0.1}, "temperature=-0.1 must lie in [0, 1e6]"),
        ({"top_p": 0.0}, "top_p=0.0 must lie in (0, 1]"),
    ],
)
def test_what_can_never_run_is_refused_with_a_remedy(changes, message):
    for attempt in (batcher().check, lambda each: batcher().admit(0, each)):
        with pytest.raises(ValueError, match="; ") as refused:
            attempt(completion(0, **changes))
        assert message in str(refused.value)
    assert batcher().free == 2


def test_a_wrong_use_is_refused_and_disturbs_nothing():
    tokens = batcher().admit(1, completion(1))
    with pytest.raises(ValueError, match="ticket=1 is under way"):
        batcher().admit(1, completion(2))
    batcher().admit(2, completion(2))
    with pytest.raises(ValueError, match="all 2 slots are busy; admit once `free` is above 0"):
        batcher().admit(3, completion(3))
    with pytest.raises(ValueError, match="warm up before the first"):
        batcher().warm_up()
    while batcher().free < 2:
        tokens += [token for token in batcher().step() if token.ticket == 1]
    assert [token.token_id for token in tokens] == by_generator(CONFIG, params(), completion(1))


@pytest.mark.parametrize("name", ["slots", "capacity", "tokens_per_step"])
def test_sizes_are_positive(name):
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1; try"):
        Batcher(CONFIG, params(), **{name: 0})


def test_no_slot_is_longer_than_the_model_reads():
    assert Batcher(CONFIG, params(), slots=1, capacity=1024).capacity == CONFIG.max_seq_len
