"""Texts that outgrow what a model reads: what it is asked for, where rows end, and what is refused."""

import functools
from typing import Any

import numpy as np
import pytest

from parallax.inference.context import ContextGenerator
from parallax.inference.request import Request
from parallax.inference.sampling import SamplingSettings
from parallax.inference.speculative import BothParams, SpeculativeGenerator
from tests.parallax.inference.models import CONFIG, draw_params, generator, prompt

LENGTH = 32
params = functools.cache(lambda: draw_params(CONFIG))


class Watched:
    """The generator of a model, and what it was asked for."""

    def __init__(self):
        self.asked = []

    def generate(self, params, request):
        self.asked.append(request)
        return generator(CONFIG).generate(params, request)

    def stream(self, params, request, chunk=8):
        self.asked.append(request)
        return generator(CONFIG).stream(params, request, chunk)


def request(lengths=(5,), max_tokens=70, temperature=1.0, **changes):
    rows = len(lengths)
    fields = {
        "prompts": [prompt(length) for length in lengths],
        "settings": SamplingSettings.create(rows, temperature=temperature),
        "seeds": range(3, 3 + rows),
        "max_tokens": max_tokens,
    }
    return Request(**fields | changes)


def texts(asked, context: Any = "slide"):
    return [row.tolist() for row in ContextGenerator(generator(CONFIG), context, LENGTH).generate(params(), asked)]


def test_a_window_begins_with_the_last_half_and_no_token_is_far_from_its_context():
    watched = Watched()
    (found,) = ContextGenerator(watched, "slide", LENGTH).generate(params(), request())
    assert len(found) == 70
    whole = [*prompt(5), *found]
    assert [len(each.prompts[0]) for each in watched.asked] == [5, 16, 16, 16]
    assert [each.max_tokens for each in watched.asked] == [27, 16, 16, 11]
    ends = 5
    for each in watched.asked:
        assert each.prompts[0].tolist() == whole[:ends][-16:]
        ends += each.max_tokens
    assert len({each.seeds[0] for each in watched.asked}) == 4, "a place in the window has other draws each time"
    (plain,) = generator(CONFIG).generate(params(), request(max_tokens=27))
    assert found[:27].tolist() == plain.tolist()


def test_a_long_prompt_is_read_from_its_last_half():
    (found,) = texts(request((60,), max_tokens=9))
    (cut,) = generator(CONFIG).generate(params(), request(prompts=[prompt(60)[-16:]], max_tokens=9))
    assert found == cut.tolist()


def test_a_row_is_the_same_alone_streamed_and_in_a_ragged_batch():
    lengths = (5, 40, 5, 17)
    together = texts(request(lengths))
    for row, length in enumerate(lengths):
        assert texts(request((length,), seeds=[3 + row])) == [together[row]]
    streamed = [[] for _ in lengths]
    for row, token in ContextGenerator(generator(CONFIG), "slide", LENGTH).stream(params(), request(lengths)):
        streamed[row].append(token)
    assert streamed == together


def test_a_row_ends_with_a_stop_that_began_in_another_window():
    (free,) = texts(request())
    for at in (25, 26, 40):  # the first window ends behind the 27th token
        stop = free[at : at + 3]
        first = next(end for end in range(3, 71) if free[end - 3 : end] == stop)
        assert texts(request(stops=[np.array(stop)])) == [free[:first]]
    assert texts(request(eos_id=free[50])) == [free[: free.index(free[50]) + 1]]


def test_a_text_that_is_cropped_ends_at_the_length():
    lengths = (5, 31)
    whole = zip(texts(request(lengths)), lengths, strict=True)
    assert texts(request(lengths), "crop") == [row[: LENGTH - length] for row, length in whole]
    with pytest.raises(
        ValueError,
        match=r"prompt of 32 tokens leaves no room in the 32 that .*; try context=slide, or a shorter prompt",
    ):
        texts(request((5, 32)), "crop")


def test_a_text_that_fits_or_extends_is_the_generators():
    for asked, context in ((request(max_tokens=27), "slide"), (request(), "extend")):
        (expected,) = generator(CONFIG).generate(params(), asked)
        assert texts(asked, context) == [expected.tolist()]
    with pytest.raises(ValueError, match="must not exceed max_seq_len=128; try max_tokens 123"):
        texts(request(max_tokens=124), "extend")
    with pytest.raises(ValueError, match="prompt is empty"):
        texts(request(prompts=[prompt(0)]))
    with pytest.raises(ValueError, match="context='skip' is not one of slide, crop, extend; try slide"):
        texts(request(), "skip")


def test_a_draft_is_counted_over_all_windows():
    both = BothParams(params(), params())
    drafted = ContextGenerator(SpeculativeGenerator(CONFIG, CONFIG, 4), "slide", LENGTH)
    greedy = request(temperature=0.0)
    assert [row.tolist() for row in drafted.generate(both, greedy)] == texts(greedy)
    assert 4 * 14 <= drafted.proposed <= 4 * 20
    assert drafted.accepted == drafted.proposed
