"""Stops found on the device as tokens and on the host as text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallax.inference.stopping import NO_TOKEN, StopFilter, ends_with_stop, pack_stops


def first_completed(text: str, stops: list[str]) -> str:
    """The text before the stop that completes first, looking at one more character at a time."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@pytest.mark.parametrize("stops", [["ab"], ["aab", "ba"], ["abab", "bb"], ["aaaa"], []], ids=str)
def test_text_is_cut_at_the_first_stop_however_it_arrives(stops):
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = "".join(rng.choice(list("abc"), rng.integers(0, 12)))
        filtered, shown, at = StopFilter(stops), "", 0
        while at < len(text):
            size = int(rng.integers(1, 4))
            shown += filtered.push(text[at : at + size])
            assert first_completed(text, stops).startswith(shown)
            at += size
        assert filtered.stopped == any(stop in text for stop in stops)
        assert shown + filtered.flush() == first_completed(text, stops)


def test_text_is_held_back_only_while_it_may_begin_a_stop():
    filtered = StopFilter(["\n\n"])
    assert filtered.push("one\n") == "one"
    assert filtered.push("two") == "\ntwo"
    assert filtered.push(" three\n\nfour") == " three"
    assert filtered.stopped
    assert filtered.push("five") == filtered.flush() == ""


def test_tails_match_only_generated_tokens():
    rng = np.random.default_rng(1)
    stops = [np.array([1]), np.array([2, 0]), np.array([0, 0, 2])]
    tokens_BS = rng.integers(0, 4, (512, 9)).astype(np.int32)
    prompts_B = rng.integers(0, 6, 512).astype(np.int32)
    lengths_B = (prompts_B + rng.integers(0, 4, 512)).astype(np.int32)
    found_B = jax.jit(ends_with_stop)(tokens_BS, prompts_B, lengths_B, pack_stops(stops))
    for row, tokens_S in enumerate(tokens_BS):
        generated = tokens_S[prompts_B[row] : lengths_B[row]].tolist()
        assert found_B[row] == any(generated[-len(stop) :] == stop.tolist() for stop in stops)


def test_packed_stops_have_few_shapes():
    assert pack_stops([]).shape == pack_stops([np.arange(16)] * 4).shape == (4, 16)
    assert pack_stops([np.arange(17)] * 5).shape == (8, 32)
    assert (pack_stops([]) == NO_TOKEN).all()
    assert not jnp.any(ends_with_stop(jnp.zeros((1, 4), jnp.int32), jnp.ones(1, int), jnp.full(1, 3), pack_stops([])))


def test_an_empty_stop_is_refused():
    with pytest.raises(ValueError, match="stop 1 is empty; leave it out"):
        pack_stops([np.array([3]), np.array([], np.int32)])
