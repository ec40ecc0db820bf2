"""Decoding from a cache gives the logits of the full forward pass, whatever is in the slots to come."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallax.config import RopeScaling
from parallax.layers.cache import KVCache, LayerCache
from parallax.model.transformer import TransformerLM
from tests.parallax.inference.models import CONFIG, draw_params

B, T, V, SLOTS = 3, 9, 13, 12
SMALL = CONFIG.replace(vocab_size=V, embed_dim=16, num_kv_heads=4, head_dim=4, mlp_dim=24, tie_embeddings=True)
VARIANTS = {
    "plain": {},
    "grouped, untied": {"num_kv_heads": 2, "tie_embeddings": False},
    "qk_norm, bias": {"num_kv_heads": 1, "qk_norm": True, "attention_bias": True},
    "window": {"sliding_window": 3},
    "softcap, scaled": {"logit_softcap": 2.0, "rope_scaling": RopeScaling(kind="linear", factor=2.0)},
}
TOKENS = np.random.default_rng(1).integers(0, V, (B, T))


@functools.cache
def model(variant):
    """A config, weights far from their start, the logits of the full forward pass, and a jitted cached one."""
    config = SMALL.replace(**VARIANTS[variant])
    params = draw_params(config, scale=0.3)

    @jax.jit
    def full(params, tokens):
        return TransformerLM.from_params(config, params)(tokens)[0]

    @jax.jit
    def step(params, tokens, positions, cache, lengths=None):
        return TransformerLM.from_params(config, params)(tokens, positions, cache=cache, lengths=lengths)

    return config, params, full(params, TOKENS), functools.partial(step, params), step


@pytest.mark.parametrize("variant", VARIANTS)
def test_token_by_token_equals_the_full_forward_pass_in_one_compilation(variant):
    config, _, expected, step, jitted = model(variant)
    cache = KVCache.create(config, B, SLOTS)
    before = jitted._cache_size()
    for t in range(T):
        logits, cache = step(TOKENS[:, t : t + 1], np.full((B, 1), t, np.int32), cache)
        np.testing.assert_allclose(logits[:, 0], expected[:, t], rtol=1e-5, atol=1e-5)  # float32 sums
    assert jitted._cache_size() - before <= 1


@pytest.mark.parametrize("variant", ["qk_norm, bias", "window"])
def test_ragged_rows_padded_on_the_right_then_decoded(variant):
    """Rows of 2, 7 and 4 tokens share one prefill; then each goes on at its own position over the padding."""
    config, _, expected, step, _ = model(variant)
    lengths, rng = np.array([2, 7, 4]), np.random.default_rng(2)
    at = np.tile(np.arange(7, dtype=np.int32), (B, 1))
    padding = at >= lengths[:, None]
    prompt = np.where(padding, rng.integers(0, V, at.shape), TOKENS[:, :7])
    logits, cache = step(prompt, at, KVCache.create(config, B, SLOTS), lengths)
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)  # float32 sums
    compare(logits[~padding], expected[:, :7][~padding])
    rows = np.arange(B)
    for more in range(2):
        position = lengths + more
        logits, cache = step(TOKENS[rows, position][:, None], position[:, None].astype(np.int32), cache)
        compare(logits[:, 0], expected[rows, position])


def test_several_tokens_at_once_after_a_prefix():
    config, _, expected, step, _ = model("plain")
    _, cache = step(TOKENS[:, :4], np.tile(np.arange(4, dtype=np.int32), (B, 1)), KVCache.create(config, B, SLOTS))
    logits, _ = step(TOKENS[:, 4:8], np.tile(np.arange(4, 8, dtype=np.int32), (B, 1)), cache)
    np.testing.assert_allclose(logits, expected[:, 4:8], rtol=1e-5, atol=1e-5)  # float32 sums


def test_rubbish_in_later_slots_does_not_matter():
    config, _, expected, step, _ = model("plain")
    empty = KVCache.create(config, B, SLOTS)
    cache = jax.tree.map(lambda leaf: leaf.at[:, :, :, 1:].set(1e3), empty)
    for t in range(2):
        logits, cache = step(TOKENS[:, t : t + 1], np.full((B, 1), t, np.int32), cache)
        np.testing.assert_allclose(logits[:, 0], expected[:, t], rtol=1e-5, atol=1e-5)  # float32 sums


def test_a_step_writes_its_own_slots_and_leaves_its_argument_alone():
    config, _, _, step, _ = model("plain")
    before = jax.tree.map(lambda leaf: leaf + 7.0, KVCache.create(config, B, SLOTS))
    at = np.array([[0], [5], [11]], np.int32)
    _, after = step(TOKENS[:, :1], at, before)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        changed = np.asarray(old != new).any((0, 2, 4))
        np.testing.assert_array_equal(changed, np.arange(SLOTS) == at)
        np.testing.assert_array_equal(old, np.full_like(old, 7.0))


def test_cache_has_the_compute_dtype_and_one_slot_a_token():
    config = SMALL.replace(num_kv_heads=2, dtype="bfloat16")
    cache = KVCache.create(config, B, SLOTS)
    for leaf in (cache.keys, cache.values):
        assert leaf.shape == (2, B, 2, SLOTS, 4)
        assert leaf.dtype == jnp.bfloat16
        assert not leaf.any()


@pytest.mark.parametrize("rows", [1, B])
def test_a_layers_own_arrays_are_written_like_its_part_of_the_stack(rows):

    @jax.jit
    def both(k, v):
        stack = jax.tree.map(lambda leaf: leaf + 7.0, KVCache.create(SMALL, rows, SLOTS))
        own = LayerCache(keys=stack.keys[1], values=stack.values[1])
        part = LayerCache(keys=stack.keys, values=stack.values, layer=jnp.int32(1))
        return own.extend(k, v, at)[0].read(), part.extend(k, v, at)[0].read()

    k, v = np.random.default_rng(4).normal(size=(2, rows, 2, 4, 4)).astype(np.float32)
    at = np.arange(rows, dtype=np.int32)[:, None] + np.array([[2, SLOTS]], np.int32)  # the second in no slot
    for mine, shared in zip(*both(k, v), strict=True):
        np.testing.assert_array_equal(mine, shared)
        assert (np.asarray(mine != 7.0).any((2, 3)).sum(axis=1) == 1).all()


def test_layer_writes_and_reads_its_own_part():
    cache = KVCache.create(SMALL, B, SLOTS)
    k, v = np.random.default_rng(3).normal(size=(2, B, 2, 4, 4)).astype(np.float32)

    @jax.jit
    def write(cache, k, v):
        view = LayerCache(keys=cache.keys, values=cache.values, layer=jnp.int32(1))
        written, *_ = view.extend(k, v, np.array([[3, 8]], np.int32))  # one row of positions for the whole batch
        return written.read(), written.keys

    read, keys = jax.device_get(write(cache, k, v))
    for stored, given in zip(read, (k, v), strict=True):
        np.testing.assert_array_equal(stored[:, [3, 8]], given)
        assert not np.delete(stored, [3, 8], axis=1).any()
    assert not keys[0].any()
    assert not np.any(cache.keys)


def test_decoding_neither_drops_nor_recomputes():
    """With a dropout rate and rematerialisation in the config, a step without a key is the plain step."""
    _, params, expected, _, _ = model("plain")
    trained = SMALL.replace(dropout_rate=0.5, remat="full")
    cache = KVCache.create(trained, B, SLOTS)
    at = np.arange(T, dtype=np.int32)[None]

    @jax.jit
    def prefill(params, cache):
        return TransformerLM.from_params(trained, params)(TOKENS, at, cache=cache)[0]

    np.testing.assert_allclose(prefill(params, cache), expected, rtol=1e-5, atol=1e-5)  # float32 sums


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "positions=None .*cache.*; give positions"),
        ({"positions": np.zeros((B, 1), np.int32), "segments": np.ones((B, 1), np.int32)}, "a cache .*segments; give "),
    ],
    ids=["positions", "segments"],
)
def test_what_a_cache_refuses(given, message):
    config, params, *_ = model("plain")
    cache = KVCache.create(config, B, SLOTS)
    with pytest.raises(ValueError, match=message):
        TransformerLM.from_params(config, params)(TOKENS[:, :1], cache=cache, **given)
