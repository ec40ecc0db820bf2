"""Blocks of queries give what all scores at once give, forward and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallax.layers.attend import attend
from parallax.layers.attend_blocks import attend_by_blocks
from parallax.model.stack import REMAT_POLICIES


def arrays(T, H=4, G=4, K=8, B=2, dtype=jnp.float32):
    rng = np.random.default_rng(T)
    q, k, v, w = (rng.normal(size=(B, T, heads, K)) for heads in (H, G, G, H))
    return tuple(x.astype(dtype) for x in (q / K**0.5, k, v, w))


def at_once(q, k, v, segments, window):
    at = jnp.arange(q.shape[1])[None]
    within = None if segments is None else (segments, segments)
    return attend(q, k, v, positions=(at, at), segments=within, window=window)


def results(function, q, k, v, w, segments, window):
    def objective(q, k, v):
        out = function(q, k, v, segments, window)
        return jnp.sum((out * w).astype(jnp.float32)), out

    gradients, out = jax.jit(jax.grad(objective, (0, 1, 2), has_aux=True))(q, k, v)
    return out, *gradients


@pytest.mark.parametrize(
    ("T", "G", "window", "documents"),
    [
        pytest.param(1, 4, 0, False, id="one token"),
        pytest.param(64, 4, 0, False, id="one block"),
        pytest.param(128, 4, 0, True, id="two blocks, documents"),
        pytest.param(200, 2, 50, False, id="ragged, window"),
        pytest.param(1024 + 512, 4, 0, False, id="two parts"),
        pytest.param(1500, 1, 300, True, id="parts, ragged, all"),
    ],
)
def test_blocks_give_what_all_scores_give(T, G, window, documents):
    q, k, v, w = arrays(T, G=G, B=1 if T > 1024 else 2)
    segments = np.sort(np.random.default_rng(1).integers(0, 4, (len(q), T))) if documents else None
    found = results(attend_by_blocks, q, k, v, w, segments, window)
    expected = results(at_once, q, k, v, w, segments, window)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)  # sums of up to 1,500 terms of size 1


@pytest.mark.parametrize("T", [10, 64, 192])
def test_in_bfloat16_they_agree_to_its_rounding(T):
    q, k, v, w = arrays(T, dtype=jnp.bfloat16)
    found, expected = (results(f, q, k, v, w, None, 0) for f in (attend_by_blocks, at_once))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == jnp.bfloat16
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        np.testing.assert_allclose(one, other, rtol=0.05, atol=0.05)


def test_no_token_sees_the_future():
    q, k, v, _ = arrays(160)
    gradient = np.asarray(jax.jit(jax.grad(lambda v: jnp.sum(attend_by_blocks(q, k, v, None, 0)[:, 70])))(v))
    assert not np.any(gradient[:, 71:])
    assert np.all(np.any(gradient[:, :71], axis=(0, 2, 3)))


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_memory_is_far_below_that_of_all_scores(remat):
    """Under rematerialisation too, which would keep the masks of all parts where they follow from no argument."""
    T, H = 8192, 2
    q, k, v, w = arrays(T, H=H, G=H, B=1)
    value = jax.checkpoint(
        lambda q, k, v: jnp.sum(attend_by_blocks(q, k, v, None, 0) * w), policy=REMAT_POLICIES[remat]
    )
    analysis = jax.jit(jax.grad(value, (0, 1, 2))).lower(q, k, v).compile().memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < T * T, "an eighth of the scores, which masks of all pairs would take"


def test_a_part_of_a_sequence_is_refused():
    q, k, v, _ = arrays(8)
    with pytest.raises(ValueError, match="attention=blocks needs whole sequences on a device, not 4 of 8 tokens; try"):
        attend_by_blocks(q[:, :4], k, v, None, 0)
