"""The rule against the distribution that it should leave, whatever was proposed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallax.inference.rejection import check_proposals, draw

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
