"""A draft changes no text at temperature 0, and no distribution of texts at others.

Ties: logits of several positions at once differ from those of one by up to 1e-5 here, so texts are compared up to the
first token that wins by less than 1e-4.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallax.inference.request import Request
from parallax.inference.sampling import SamplingSettings
from parallax.inference.speculative import BothParams, SpeculativeGenerator, check_proposals, draw
from parallax.model.stack import prepare
from tests.parallax.inference.models import CONFIG, VOCAB, draw_params, generator, logprobs, nothing_compiled, prompt

SMALL = CONFIG.replace(num_layers=1)
LENGTHS = (5, 1, 9, 3, 17, 2, 88, 7)
SEEDS = 4


@functools.cache
def speculator():
    """Compiles once for all tests."""
    return SpeculativeGenerator(CONFIG, CONFIG, 4)


def near(params, noise):
    """Parameters of a draft that often agrees."""
    rng = np.random.default_rng(7)

    def moved(leaf):
        return jax.device_put(np.asarray(leaf) + np.float32(noise) * rng.normal(size=leaf.shape).astype(np.float32))

    return jax.tree.map(moved, params)


def request(seed=0, max_tokens=40, temperature=0.0, **changes):
    fields = {
        "prompts": [prompt(length, seed) for length in LENGTHS],
        "settings": SamplingSettings.create(len(LENGTHS), temperature=temperature),
        "seeds": range(seed, seed + len(LENGTHS)),
        "max_tokens": max_tokens,
    }
    return Request(**fields | changes)


def texts(rows):
    return [tokens.tolist() for tokens in rows]


def until_tie(params, prompt, tokens):
    """How many tokens come before one that wins narrowly."""
    logprobs_TV = np.sort(logprobs(CONFIG, params, [*prompt, *tokens])[len(prompt) - 1 : -1], axis=1)
    narrow = logprobs_TV[:, -1] - logprobs_TV[:, -2] < 1e-4
    return int(np.argmax(narrow)) if narrow.any() else len(tokens)


@functools.cache
def clear_texts(seed):
    """Those of the large model, each up to its first tie."""
    params, asked = draw_params(CONFIG, seed), request(seed)
    whole = zip(asked.prompts, texts(generator(CONFIG).generate(params, asked)), strict=True)
    return [tokens[: until_tie(params, given, tokens)] for given, tokens in whole]


def first_layer(params):
    """A draft of one layer, which guesses some of its tokens."""
    blocks = jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf)[:1]), params["blocks"])
    return params | {"blocks": blocks}


@pytest.mark.parametrize("noise", [0.0, 0.006, 0.02, None])
def test_greedy_texts_are_those_of_the_large_model(noise):
    """Without noise in the last case, of listed layers and a smaller draft."""
    compared, guesser = 0, SpeculativeGenerator(CONFIG, SMALL, 4) if noise is None else speculator()
    for seed in range(SEEDS):
        params = draw_params(CONFIG, seed)
        if noise is None:
            both = BothParams(prepare(CONFIG, params), prepare(SMALL, first_layer(params)))
        else:
            both = BothParams(params, near(params, noise))
        for tokens, clear in zip(guesser.generate(both, request(seed)), clear_texts(seed), strict=True):
            assert tokens[: len(clear)].tolist() == clear
            compared += len(clear)
    assert compared > 0.9 * SEEDS * len(LENGTHS) * 40
    share = guesser.accepted / guesser.proposed
    low, high = {0.0: (0.99, 1), 0.006: (0.5, 0.9), 0.02: (0.1, 0.5), None: (0.05, 0.2)}[noise]
    assert low <= share <= high, "each noise tests another mixture of proposals that pass and that do not"


def test_penalties_see_the_tokens_that_are_proposed():
    params = draw_params(CONFIG)
    settings = SamplingSettings.create(8, temperature=0.0, repetition_penalty=[1.5, 3.0] * 4)
    asked = request(settings=settings, max_tokens=20)
    for noise in (0.0, 0.01):
        got = texts(speculator().generate(BothParams(params, near(params, noise)), asked))
        assert got == texts(generator(CONFIG).generate(params, asked))


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_stops_and_eos_end_a_text_inside_a_run_of_proposals(noise):
    params = draw_params(CONFIG, 1)
    both = BothParams(params, near(params, noise))
    free = texts(generator(CONFIG).generate(params, request()))
    assert texts(speculator().generate(both, request())) == free
    lengths = set()
    for at in range(12):  # each place within a run, and between two
        stops, eos_id = [free[0][at : at + 2], free[2][at + 1 : at + 2], [free[3][at]] * 12], free[4][at]
        asked = request(stops=[np.array(stop) for stop in stops], eos_id=eos_id)
        got = texts(speculator().generate(both, asked))
        assert got == texts(generator(CONFIG).generate(params, asked))
        lengths.update(map(len, got))
    assert len(lengths) > 10


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 40])
def test_a_text_ends_at_its_last_token_be_it_the_last_of_the_cache(max_tokens):
    params = draw_params(CONFIG, 2)
    full = request(max_tokens=max_tokens, prompts=[prompt(CONFIG.max_seq_len - max_tokens - n) for n in range(8)])
    got = texts(speculator().generate(BothParams(params, params), full))
    assert got == texts(generator(CONFIG).generate(params, full))
    assert {len(tokens) for tokens in got} == {max_tokens}


@pytest.mark.parametrize("chunk", [1, 7])
def test_a_stream_is_the_whole(chunk):
    params = draw_params(CONFIG, 3)
    both, asked = BothParams(params, near(params, 0.01)), request(temperature=1.0)
    whole = texts(speculator().generate(both, asked))
    counts = speculator().proposed, speculator().accepted
    streamed = [[] for _ in whole]
    for row, token in speculator().stream(both, asked, chunk=chunk):
        streamed[row].append(token)
    assert streamed == whole
    assert (speculator().proposed, speculator().accepted) == counts


def test_a_row_is_the_same_alone_and_in_a_ragged_batch():
    params = draw_params(CONFIG, 4)
    both = BothParams(params, near(params, 0.01))
    together = texts(speculator().generate(both, request(temperature=0.9)))
    for row in (1, 4):
        alone = request(
            prompts=[request().prompts[row]],
            seeds=[request().seeds[row]],
            settings=SamplingSettings.create(1, temperature=0.9),
            max_tokens=15,  # of the sizes that test_context compiles for
        )
        assert texts(speculator().generate(both, alone)) == [together[row][:15]]
    assert texts(speculator().generate(both, request(temperature=0.9, seeds=range(50, 58)))) != together


@functools.cache
def tiny_speculator():
    """Of three tokens, two of which it proposes, so that a text of four takes two rounds at least."""
    tiny = CONFIG.replace(vocab_size=3, embed_dim=8, num_layers=1, num_heads=1, num_kv_heads=1, max_seq_len=32)
    return SpeculativeGenerator(tiny, tiny, 2)


@pytest.mark.parametrize("setting", [{}, {"temperature": 0.6, "top_k": 2}], ids=str)
def test_texts_are_distributed_as_by_the_large_model(setting):
    rows, length, few = 8192, 4, 3
    guesser = tiny_speculator()
    tiny = guesser.configs.target
    params = draw_params(tiny, 5, scale=0.6)
    asked = Request(
        prompts=[np.array([1, 0], np.int32)] * rows,
        settings=SamplingSettings.create(rows, **setting),
        seeds=range(rows),
        max_tokens=length,
    )
    got = guesser.generate(BothParams(params, near(params, 0.3)), asked)
    assert 0.2 < guesser.accepted / guesser.proposed < 0.9
    counts = np.bincount([int("".join(map(str, tokens)), few) for tokens in got], minlength=few**length)
    for number, text in enumerate(itertools.product(range(few), repeat=length)):
        logits_TV = logprobs(tiny, params, [1, 0, *text])[1:-1] / setting.get("temperature", 1)
        weights_TV = np.exp(logits_TV) * (logits_TV >= np.sort(logits_TV, axis=1)[:, [-setting.get("top_k", few)]])
        chances = (weights_TV / weights_TV.sum(axis=1, keepdims=True))[np.arange(length), text]
        chance = chances.prod()
        # five standard deviations of a frequency, and a draw for the rarest
        assert abs(counts[number] / rows - chance) <= 5 * (chance * (1 - chance) / rows) ** 0.5 + 1 / rows


def test_other_settings_and_prompts_compile_nothing(caplog):
    params = draw_params(CONFIG)
    both = BothParams(params, near(params, 0.01))
    speculator().generate(both, request())
    with nothing_compiled(caplog):
        other = request(seed=9, temperature=[0.0, 0.5] * 4, eos_id=3, stops=[prompt(3)], max_tokens=37)
        speculator().generate(both, other)


def test_drafts_that_cannot_propose_are_refused():
    with pytest.raises(ValueError, match=f"draft's vocab_size=99 must equal the model's {VOCAB}; give"):
        SpeculativeGenerator(CONFIG, CONFIG.replace(vocab_size=99))
    with pytest.raises(ValueError, match="draft_tokens=0 must be at least 1; try 4"):
        SpeculativeGenerator(CONFIG, CONFIG, 0)
    short = SpeculativeGenerator(CONFIG, CONFIG.replace(max_seq_len=64))
    with pytest.raises(ValueError, match="max_seq_len=64; try"):
        short.generate(BothParams({}, {}), request())


V, R, ROWS = 5, 3, 40_000
TOLERANCE = 5 * (0.25 / ROWS) ** 0.5
"""Five standard deviations of a frequency in so many draws."""
check = jax.jit(check_proposals)


def some_keys(seed, *shape):
    return jax.random.split(jax.random.key(seed), shape)


def some_distributions(seed, count, zeros=0):
    probs = np.random.default_rng(seed).dirichlet(np.ones(V), count)
    for row in probs:
        row[np.random.default_rng([seed, 1]).permutation(V)[:zeros]] = 0
    return (probs / probs.sum(axis=1, keepdims=True)).astype(np.float32)


def for_all_rows(probs_TV):
    return jnp.broadcast_to(probs_TV[:, None], (len(probs_TV), ROWS, V))


def run(q_RV, p_TV, seed=0):
    """What was proposed [R, B], how many passed and the token after them, for rows with the same distributions."""
    q_RBV, p_TBV = for_all_rows(q_RV), for_all_rows(p_TV)
    tokens_RB = jax.vmap(draw)(q_RBV, some_keys(seed, R, ROWS))
    passed_B, own_B = check(tokens_RB, q_RBV, p_TBV, some_keys(seed + 1, R, ROWS), some_keys(seed + 2, R + 1, ROWS))
    return np.asarray(tokens_RB), np.asarray(passed_B), np.asarray(own_B)


@pytest.mark.parametrize("zeros", [(0, 0), (2, 0), (0, 3), (3, 2)])
def test_each_place_that_is_reached_is_distributed_as_wanted(zeros):
    q_RV, p_TV = some_distributions(0, R, zeros[0]), some_distributions(1, R + 1, zeros[1])
    tokens_RB, passed_B, own_B = run(q_RV, p_TV)
    for place in range(R + 1):
        reached = passed_B >= place
        kept = own_B if place == R else np.where(passed_B > place, tokens_RB[place], own_B)
        frequencies = np.bincount(kept[reached], minlength=V) / reached.sum()
        np.testing.assert_allclose(frequencies, p_TV[place], rtol=0, atol=TOLERANCE / reached.mean() ** 0.5)
        assert not frequencies[p_TV[place] == 0].any()
    # As many pass as can: a proposal with probability Σ min(p, q).
    np.testing.assert_allclose(np.mean(passed_B > 0), np.minimum(q_RV[0], p_TV[0]).sum(), rtol=0, atol=TOLERANCE)


def test_all_pass_where_they_were_proposed_as_wanted():
    p_TV = some_distributions(2, R + 1)
    _, passed_B, own_B = run(p_TV[:-1], p_TV)
    assert set(passed_B.tolist()) == {R}
    np.testing.assert_allclose(np.bincount(own_B, minlength=V) / ROWS, p_TV[-1], rtol=0, atol=TOLERANCE)


def test_where_one_token_has_it_all_that_token_it_is():
    for wanted in range(V):
        p_TV = np.eye(V, dtype=np.float32)[[wanted] * (R + 1)]
        tokens_RB, passed_B, own_B = run(some_distributions(3, R), p_TV)
        expected_B = np.cumprod(tokens_RB == wanted, axis=0).sum(axis=0)
        np.testing.assert_array_equal(passed_B, expected_B)
        assert set(own_B.tolist()) == {wanted}


def test_no_excess_by_rounding_still_gives_a_token_that_is_wanted():
    p_TV = np.zeros((R + 1, V), np.float32)
    p_TV[:, 1] = np.float32(1 - 2**-24)
    q_RV = np.zeros((R, V), np.float32)
    q_RV[:, 1] = 1
    _, _, own_B = run(q_RV, p_TV)
    assert set(own_B.tolist()) == {1}
