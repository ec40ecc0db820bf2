"""Layers that differ: which share arrays, and that scanned, unrolled, listed and cached they compute the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallax.config import LayerSpec
from parallax.layers.cache import KVCache
from parallax.model import stack as model_stack
from parallax.model.stack import prepare
from parallax.model.transformer import TransformerLM, init_params
from parallax.pattern import loops, stacks
from tests.parallax.inference.models import CONFIG, VOCAB, draw_params

B, T = 2, 7
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (B, T))
LOCAL, GLOBAL = LayerSpec(sliding_window=3), LayerSpec(sliding_window=0, rope_theta=500.0)
PATTERNED = CONFIG.replace(num_layers=6, pattern=(LOCAL, GLOBAL), first_layers=(GLOBAL,))
"""Layers G | L G L G | L: one before the pattern, two repetitions of it, and half of a third."""
compare = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)  # float32 sums


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [[range(6)]]),
        ({"pattern": (LOCAL,)}, [[range(6)]]),
        ({"pattern": (LOCAL, GLOBAL)}, [[range(0, 6, 2), range(1, 6, 2)]]),
        ({"pattern": (LOCAL,) * 3 + (GLOBAL,)}, [[range(n, n + 1) for n in range(4)], [range(4, 5), range(5, 6)]]),
        ({"pattern": (LOCAL,) * 9}, [[range(n, n + 1) for n in range(6)]]),
        ({"first_layers": (GLOBAL,)}, [[range(1)], [range(1, 6)]]),
        ({"first_layers": (GLOBAL,) * 6}, [[range(n, n + 1) for n in range(6)]]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_each_layer_is_in_one_stack(changes, expected):
    config = CONFIG.replace(num_layers=6, **changes)
    found = loops(config)
    assert [[list(each.numbers) for each in loop] for loop in found] == [list(map(list, loop)) for loop in expected]
    for each in stacks(config):
        assert {config.layers[number] for number in each.numbers} == {each.config}
    names = [each.name for each in stacks(config)]
    assert len(set(names)) == len(names)
    assert ("" in names) == (len(names) == 1)


def test_a_layer_differs_as_its_spec_says():
    windows = [layer.sliding_window for layer in PATTERNED.layers]
    assert windows == [0, 3, 0, 3, 0, 3]
    assert [layer.rope_theta for layer in PATTERNED.layers[:2]] == [500.0, CONFIG.rope_theta]
    with pytest.raises(ValueError, match="sliding_window=-1"):
        CONFIG.replace(pattern=(LayerSpec(sliding_window=-1),))
    with pytest.raises(ValueError, match=r"first_layers of 3 layers .*num_layers=2"):
        CONFIG.replace(first_layers=(LOCAL,) * 3)


def by_hand(config, params):
    """One layer after another, each as the layer of a model in which all are like it."""
    x = params["embedding"]["table"][TOKENS]
    for number, layer in enumerate(config.layers):
        of = next(each for each in stacks(config) if number in each.numbers)
        own = jax.tree.map(lambda leaf, n=of.numbers.index(number): leaf[None, n], of.of(params["blocks"]))
        alone = layer.replace(num_layers=1)
        model = TransformerLM.from_params(alone, params | {"blocks": own})
        x, _, _ = model_stack.LayerStack(alone, model.blocks).fold(x)
    return model.unembed(model.final_norm(x))[..., :VOCAB]


def test_a_pattern_is_its_layers_one_after_another():
    params = draw_params(PATTERNED)
    logits = jax.jit(lambda params: TransformerLM.from_params(PATTERNED, params)(TOKENS)[0])(params)
    compare(logits, jax.jit(functools.partial(by_hand, PATTERNED))(params))


def test_gradients_are_those_of_unrolled_layers():
    shallow = PATTERNED.replace(num_layers=3)
    params, key = draw_params(shallow), jax.random.key(3)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(config, params):
        model = functools.partial(TransformerLM.from_params, config)
        return jax.grad(lambda params: jnp.sum(model(params)(TOKENS, dropout_key=key)[0] ** 2))(params)

    several = (shallow.replace(dropout_rate=0.2, **each) for each in ({"remat": "full"}, {"layer_loop": "unroll"}))
    scanned, unrolled = (gradients(config, params) for config in several)
    jax.tree.map(functools.partial(compare, rtol=1e-4, atol=1e-4), scanned, unrolled)


@pytest.mark.parametrize("listed", [False, True])
def test_a_cache_gives_what_the_whole_text_gives(listed):
    params = draw_params(PATTERNED)
    own = prepare(PATTERNED, params) if listed else params
    expected = np.asarray(jax.jit(lambda params: TransformerLM.from_params(PATTERNED, params)(TOKENS)[0])(params))

    @jax.jit
    def step(params, tokens, positions, cache):
        return TransformerLM.from_params(PATTERNED, params)(tokens, positions, cache=cache)

    cache = KVCache.create(PATTERNED, B, T + 1, listed=listed)
    logits, cache = step(own, TOKENS[:, :2], np.tile(np.arange(2), (B, 1)), cache)
    compare(logits, expected[:, :2])
    for t in range(2, T):
        logits, cache = step(own, TOKENS[:, t : t + 1], np.full((B, 1), t), cache)
        compare(logits, expected[:, t : t + 1])


def test_layers_begin_with_the_same_weights_however_they_are_stacked():
    plain = CONFIG.replace(num_layers=3)
    patterned = plain.replace(pattern=(LOCAL, GLOBAL))
    init = jax.jit(init_params, static_argnums=0)
    one, several = (jax.device_get(init(config, jax.random.key(1))) for config in (plain, patterned))
    for each in stacks(patterned):
        part = jax.tree.map(lambda leaf, numbers=list(each.numbers): leaf[numbers], one["blocks"])
        jax.tree.map(np.testing.assert_array_equal, each.of(several["blocks"]), part)


def test_what_layers_report_comes_in_their_order(monkeypatch):
    """The windowed layers report the sum of their input, the others nothing of that name."""
    made = model_stack.feed_forward

    def reporting(config, *, rngs):
        module = made(config, rngs=rngs)
        if not config.sliding_window:
            return module

        class Reporting(type(module)):
            def __call__(self, x_BTD, *beside):
                return super().__call__(x_BTD, *beside)[0], {"total": jnp.sum(x_BTD)}

        return Reporting(config, rngs=rngs)

    monkeypatch.setattr(model_stack, "feed_forward", reporting)
    config = PATTERNED.replace(max_seq_len=99)
    params = draw_params(config)
    listed = prepare(config, params)

    @functools.partial(jax.jit, static_argnums=0)
    def totals(config, params):
        aux = TransformerLM.from_params(config, params).hidden(TOKENS)[2]
        assert list(aux) == ["total"]
        return aux["total"]

    expected = []
    for depth in (2, 4, 6):
        some = {"blocks": {n: listed["blocks"][n] for n in range(depth)}}
        expected.append(totals(config.replace(num_layers=depth), listed | some)[-1])
    for loop, own in [("scan", params), ("unroll", params), ("scan", listed)]:
        found = totals(config.replace(layer_loop=loop), own)
        assert found.shape == (3,)
        compare(found, expected)
