"""Attention cut by hand into rows, queries and heads: each device's part, put together, is the whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from parallax import axes
from parallax.config import TransformerConfig
from parallax.layers import attention
from parallax.layers.attention import Attention

B, T = 4, 8
SIZES = {
    "embed_dim": 8,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 4,
    "num_layers": 1,
    "sliding_window": 5,
}
SEGMENTS = np.array([[1] * 8, [1, 1, 1, 2, 2, 2, 2, 0], [1, 2, 2, 2, 2, 2, 3, 3], [1] * 7 + [0]])
SHIFTED = np.arange(T, dtype=np.int32) + np.array([[0], [3], [0], [9]], np.int32)


class Knife:
    """A placement that cuts each named dim into pieces, one after the other on one device."""

    def __init__(self, **pieces):
        self._pieces, self.keys = pieces, 0

    def constrain(self, x, names):
        return x

    def local(self, fn, in_names, out_names):
        def call(*arrays):
            assert len(arrays) == len(in_names)
            return self._assemble(fn, arrays, in_names, out_names, {})

        return call

    def gather(self, x, names):
        return x

    def _assemble(self, fn, arrays, in_names, out_names, at):
        """The pieces of the dims that are not yet chosen, joined along one dim after the other."""
        for dim, name in enumerate(out_names):
            count = self._pieces.get(name, 1)
            if count > 1 and name not in at:
                parts = [
                    self._assemble(fn, arrays, in_names, out_names, {**at, name: i}) for i in range(count)
                ]
                return jnp.concatenate(parts, axis=dim)
        return fn(*(self._piece(x, names, at) for x, names in zip(arrays, in_names, strict=True)))

    def _piece(self, x, names, at):
        if x is None:
            return None
        assert len(names) == x.ndim
        self.keys += names == ()
        for dim, name in enumerate(names):
            # Each group of heads goes with its own keys and values.
            i, count = at.get("act_heads" if name == "act_kv_heads" else name), self._pieces.get(name, 1)
            if count > 1:
                x = jnp.split(x, count, axis=dim)[i]
        return x


def apply(placement, positions, segments, key=None, **changes):
    """The output [B, T, D] of one layer under a placement."""
    config = TransformerConfig(**{**SIZES, **changes})
    rng = np.random.default_rng(0)
    graph, state = nnx.split(nnx.eval_shape(lambda: Attention(config, rngs=nnx.Rngs(0))))
    weights = jax.tree.map(lambda leaf: rng.normal(0.3, 0.6, leaf.shape).astype(np.float32), state)
    x = rng.normal(size=(B, T, config.embed_dim)).astype(np.float32)

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def output(weights):
        with axes.bound(placement):
            return nnx.merge(graph, weights)(x, positions, segments, None, key)[0]

    return output(weights)


@pytest.mark.parametrize(
    ("chunk", "positions", "segments"),
    [(attention.CHUNK, np.arange(T, dtype=np.int32)[None], None), (1, SHIFTED, SEGMENTS)],
    ids=["one row of positions", "segments, in chunks"],
)
def test_parts_put_together_are_the_whole(chunk, positions, segments, monkeypatch):
    monkeypatch.setattr(attention, "CHUNK", chunk)
    knife = Knife(batch=2, length=2, act_heads=2, act_kv_heads=2)
    found, expected = (apply(placement, positions, segments) for placement in (knife, None))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)  # float32 sums in another order


def test_a_dropout_key_goes_to_every_part_as_a_key():
    """Its name is (), so that a placement can tell it from arrays that it cuts."""
    knife, key = Knife(batch=2, length=2, act_heads=2, act_kv_heads=2), jax.random.key(1)
    positions = np.arange(T, dtype=np.int32)[None]
    dropped = apply(knife, positions, None, key, dropout_rate=0.5)
    plain = apply(None, positions, None, dropout_rate=0.5)
    assert knife.keys == 2 * 2 * 2
    assert np.abs(dropped - plain).max() > 0.1
