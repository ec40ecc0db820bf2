"""What rows that ended once asked for is no longer computed for those that go on."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from parallax.inference import sampling
from parallax.inference.batching import Batcher
from parallax.inference.generate import Generator
from parallax.inference.request import Request
from parallax.inference.sampling import SamplingSettings
from parallax.inference.speculative import BothParams, SpeculativeGenerator
from parallax.model.stack import prepare
from tests.parallax.inference.models import CONFIG, completion, draw_params, prompt

TOKENS = 24
TWO = Request(
    prompts=[prompt(5), prompt(9)],
    settings=SamplingSettings.create(2, temperature=[0.0, 1.0], top_k=[0, 5]),
    seeds=[1, 2],
    max_tokens=TOKENS,
)
"""A greedy row, and one whose filter is searched for at each token."""


@functools.cache
def params():
    return prepare(CONFIG, draw_params(CONFIG))


@pytest.fixture
def searches(monkeypatch):
    """How often the device searched for a filter's least logit since it was last asked."""
    counted, search = [], sampling._beginning

    def counting(*arguments):
        jax.debug.callback(lambda: counted.append(1))
        return search(*arguments)

    def searches():
        jax.effects_barrier()
        number = len(counted)
        counted.clear()
        return number

    monkeypatch.setattr(sampling, "_beginning", counting)
    return searches


def early_end(rows, within):
    """A token that ends the second row within so many tokens and is not in the first, and the length that is left."""
    greedy, drawn = (list(map(int, row)) for row in rows)
    end = next(token for token in drawn[:within] if token not in greedy)
    return end, drawn.index(end) + 1


@pytest.mark.parametrize("streamed", [False, True], ids=["generate", "stream"])
def test_a_filter_is_searched_for_while_its_row_goes_on(searches, streamed):
    own = Generator(CONFIG)

    def texts(request):
        if not streamed:
            return own.generate(params(), request)
        rows = [[], []]
        for row, token in own.stream(params(), request, chunk=5):
            rows[row].append(token)
        return rows

    free = texts(TWO)
    assert searches() == TOKENS
    eos_id, length = early_end(free, TOKENS // 2)
    ended = texts(dataclasses.replace(TWO, eos_id=eos_id))
    assert list(map(len, ended)) == [TOKENS, length]
    np.testing.assert_array_equal(ended[0], free[0])
    assert searches() == length


def test_a_draft_searches_no_longer_either(searches):
    """Whose proposals all pass, since it is the model itself: five tokens a round."""
    own, both = SpeculativeGenerator(CONFIG, CONFIG, 4), BothParams(draw_params(CONFIG), draw_params(CONFIG))
    free = own.generate(both, TWO)
    in_all = searches()
    eos_id, _ = early_end(free, 5)
    ended = own.generate(both, dataclasses.replace(TWO, eos_id=eos_id))
    np.testing.assert_array_equal(ended[0], free[0])
    assert searches() * -(-TOKENS // 5) == in_all > 0


def test_a_slot_that_is_free_again_asks_for_nothing(searches):
    batcher = Batcher(CONFIG, params(), slots=3, capacity=64, tokens_per_step=3)
    batcher.admit(0, completion(0, temperature=0.0, repetition_penalty=1.0, max_tokens=TOKENS))
    batcher.step()
    assert searches() == 0, "slots that were never used included"
    batcher.admit(1, completion(1, temperature=1.0, top_k=5, max_tokens=3))
    assert [token.finish for token in batcher.step() if token.ticket == 1] == [None, "length"]
    assert searches() == 1 + 3
    batcher.step()
    assert searches() == 0
