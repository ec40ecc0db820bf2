"""Peaks are of one JAX device, and only of devices that are known."""

import jax
import pytest

from parallelism.hardware import PEAK_BF16_FLOPS, peak_flops


@pytest.mark.parametrize("kind", PEAK_BF16_FLOPS)
def test_known_devices_have_plausible_peaks(kind):
    """In operations a second: tens of tera to a few peta; a slip of units would leave the range."""
    assert 1e13 < peak_flops(kind) < 1e16


def test_a_device_of_the_first_generations_is_half_a_chip():
    assert peak_flops("TPU v2") == 22.5e12
    assert peak_flops("TPU v3") == 61.5e12
    assert peak_flops("TPU v4") == 275e12


@pytest.mark.parametrize("kind", ["cpu", "", "TPU v99", "tpu v4"])
def test_unknown_devices_have_none(kind):
    assert peak_flops(kind) is None


def test_simulated_devices_have_none():
    assert {peak_flops(device.device_kind) for device in jax.devices()} == {None}
