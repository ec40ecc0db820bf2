"""What the devices can do, by the kind that JAX reports.

Invariant: a device that is not in the table has no peak, and no utilisation is reported for it.
"""

PEAK_BF16_FLOPS = {
    # Google Cloud TPU documentation, per chip; a v2 or v3 chip shows as two JAX devices.
    "TPU v2": 45e12 / 2,
    "TPU v3": 123e12 / 2,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 operations a second of one JAX device, or None where it is not known."""
    return PEAK_BF16_FLOPS.get(device_kind)
