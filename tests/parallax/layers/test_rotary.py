"""Rotary embeddings: rotations whose dot products depend on distance alone, and the stretched wavelengths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from parallax.config import RopeScaling
from parallax.layers.rotary import frequencies, magnitude, rotate

B, T, H, K = 2, 5, 3, 8
THETA = 10_000.0
LLAMA3 = RopeScaling(kind="llama3", factor=8.0)
YARN = RopeScaling(kind="yarn", factor=8.0, original_max_seq_len=4096)


def example(seed):
    return np.random.default_rng(seed).normal(size=(B, T, H, K))


def omega(scaling=RopeScaling(), head_dim=K):
    return frequencies(head_dim, THETA, scaling)


def positions(*values):
    return np.asarray([values], np.int32)


def test_gradient_matches_finite_differences(x64):
    at = positions(*range(3, 3 + T))
    turn = jax.jit(lambda x: rotate(x, at, omega()))
    check_grads(turn, (example(0),), order=1, eps=1e-5, atol=1e-7, rtol=1e-7)  # differences are off by 1e-10


@pytest.mark.parametrize("scaling", [RopeScaling(), RopeScaling(kind="linear", factor=3.0), LLAMA3, YARN])
@pytest.mark.parametrize("shift", [1, 17, 4000])
def test_products_depend_on_distance_alone(shift, scaling, x64):
    q, k = example(1), example(2)
    turn = functools.partial(rotate, omega=omega(scaling))
    rng = np.random.default_rng(3)
    q_at, k_at = rng.integers(0, 100, (2, B, T))
    dots = np.sum(turn(q, q_at) * turn(k, k_at), axis=-1)
    shifted = np.sum(turn(q, q_at + shift) * turn(k, k_at + shift), axis=-1)
    np.testing.assert_allclose(shifted, dots, atol=1e-10)  # cosines of angles up to 4000 in float64
    moved = np.sum(turn(q, q_at + shift) * turn(k, k_at), axis=-1)
    assert np.abs(moved - dots).max() > 0.1


def test_pairs_turn_by_their_own_angle(x64):
    """Each (x_i, x_{i+K/2}) as a complex number times exp(i · position · ω_i)."""
    x, at = example(5), np.random.default_rng(6).integers(0, 50, (B, T))
    turned = np.asarray(rotate(x, at, omega()))
    angle = at[:, :, None, None] * omega().astype(np.float64)
    expected = (x[..., : K // 2] + 1j * x[..., K // 2 :]) * np.exp(1j * angle)
    np.testing.assert_allclose(turned[..., : K // 2] + 1j * turned[..., K // 2 :], expected, atol=1e-12)


def test_bfloat16_is_turned_in_float32():
    x, at = jnp.bfloat16(example(9)), positions(0, 999, 1000, 5000, 8191)
    turned = rotate(x, at, omega())
    assert turned.dtype == jnp.bfloat16
    expected = rotate(x.astype(jnp.float32), at, omega()).astype(jnp.bfloat16)
    np.testing.assert_array_equal(turned, expected)  # one rounding, at the end


def test_frequencies_fall_geometrically_from_one():
    plain = omega()
    assert plain.shape == (K // 2,)
    assert plain.dtype == np.float32
    np.testing.assert_allclose(plain, THETA ** (-2 * np.arange(K // 2) / K), rtol=1e-7)  # float32 rounding


@pytest.mark.parametrize("factor", [1.0, 2.5, 8.0])
def test_linear_scaling_divides_the_positions(factor, x64):
    x, at = example(10), np.array([[0, 3, 10, 31, 100]])
    scaled = rotate(x, at, omega(RopeScaling(kind="linear", factor=factor)))
    np.testing.assert_allclose(scaled, rotate(x, at / factor, omega()), atol=1e-5)  # float32 ω at 100


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_stretches_long_wavelengths_only(factor):
    """Short waves as they were, long ones divided by the factor, monotone in between."""
    scaling = RopeScaling(kind="llama3", factor=factor)
    plain, scaled = omega(head_dim=128), omega(scaling, head_dim=128)
    wavelength = 2 * np.pi / plain.astype(np.float64)
    short = wavelength < scaling.original_max_seq_len / scaling.high_freq_factor
    long = wavelength > scaling.original_max_seq_len / scaling.low_freq_factor
    between = ~short & ~long
    assert min(short.sum(), long.sum(), between.sum()) >= 3
    np.testing.assert_array_equal(scaled[short], plain[short])
    np.testing.assert_allclose(scaled[long], plain[long] / factor, rtol=1e-6)  # float32 rounding
    divided_by = plain / scaled.astype(np.float64)
    assert np.all(np.diff(divided_by) >= -1e-6)
    assert np.all((divided_by[between] > 1) & (divided_by[between] < factor))
    assert np.all(np.diff(scaled) < 0)


def test_yarn_leaves_the_pairs_that_turn_often_and_stretches_those_that_turn_seldom():
    """Peng et al. 2023, section 3.2: more than 32 rotations over the first length, and less than one."""
    plain, scaled = omega(head_dim=128).astype(np.float64), omega(YARN, head_dim=128).astype(np.float64)
    turns = YARN.original_max_seq_len * plain / (2 * np.pi)
    step = turns[0] / turns[1]  # the ramp ends at whole pairs: one more may be touched
    often, seldom = turns > 32 * step, turns < 1 / step
    assert min(often.sum(), seldom.sum(), (~often & ~seldom).sum()) >= 3
    np.testing.assert_array_equal(scaled[often], plain[often])
    np.testing.assert_allclose(scaled[seldom], plain[seldom] / 8, rtol=1e-6)  # float32 rounding
    divided_by = plain / scaled
    assert np.all(np.diff(divided_by) >= -1e-6)
    kept = (1 / divided_by - 1 / 8) / (1 - 1 / 8)  # 1 before the ramp, 0 behind it, linear on it
    ramp = kept[(kept > 1e-5) & (kept < 1 - 1e-5)]
    np.testing.assert_allclose(np.diff(ramp), ramp[1] - ramp[0], atol=1e-5)  # float32 frequencies


def test_yarn_sharpens_attention_and_no_other_scaling_does():
    assert magnitude(YARN) == pytest.approx(0.1 * np.log(8) + 1)
    assert magnitude(RopeScaling(kind="yarn", factor=8.0, attention_factor=1.7)) == 1.7
    assert magnitude(RopeScaling(kind="yarn", factor=1.0)) == 1
    assert [magnitude(scaling) for scaling in (RopeScaling(), LLAMA3)] == [1, 1]


@pytest.mark.parametrize("kind", ["none", "linear", "llama3", "yarn"])
def test_a_factor_of_one_changes_nothing(kind):
    np.testing.assert_allclose(omega(RopeScaling(kind=kind, factor=1.0), 64), omega(head_dim=64), rtol=1e-7)
