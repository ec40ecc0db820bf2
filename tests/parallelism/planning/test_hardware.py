"""Accelerators by name; peaks of one JAX device, and only of devices that are known."""

import math

import pytest

from parallelism.planning.hardware import GENERATIONS, OTHER_PEAKS, accelerator, generation_of, peak_flops


@pytest.mark.parametrize("kind", [*(kind for each in GENERATIONS.values() for kind in each.kinds), *OTHER_PEAKS])
def test_known_devices_have_plausible_peaks(kind):
    """In operations a second: tens of tera to a few peta; a slip of units would leave the range."""
    assert 1e13 < peak_flops(kind) < 1e16


def test_a_device_of_the_first_generations_is_half_a_chip():
    assert peak_flops("TPU v2") == 22.5e12
    assert peak_flops("TPU v3") == 61.5e12
    assert peak_flops("TPU v4") == 275e12


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        *(("TPU v5", 459e12), ("TPU v5p", 459e12), ("TPU v5 lite", 197e12), ("TPU v5e", 197e12)),
        *(("TPU v6 lite", 918e12), ("TPU v6e", 918e12), ("TPU7x", 1153.5e12)),
        *(("NVIDIA A100-SXM4-40GB", 312e12), ("A100-SXM4-40GB", 312e12), ("NVIDIA A100 80GB PCIe", 312e12)),
        *(("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12)),
        *(("NVIDIA L4", 121e12), ("NVIDIA B200", 2250e12)),
    ],
)
def test_a_device_has_its_peak_under_each_of_its_names(kind, flops):
    assert peak_flops(kind) == flops


def test_the_names_of_a_generation_choose_alike():
    for first, second in (("TPU v5", "TPU v5p"), ("TPU v5 lite", "TPU v5e"), ("TPU v6 lite", "TPU v6e")):
        assert generation_of(first) is generation_of(second) is not None


@pytest.mark.parametrize("kind", ["cpu", "", "TPU v99", "tpu v4", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "Tesla T4"])
def test_unknown_and_simulated_devices_have_none(kind):
    assert peak_flops(kind) is None


@pytest.mark.parametrize(
    ("name", "topology", "devices"),
    [
        *(("v2-8", "v2:2x2", 8), ("v3-8", "v3:2x2", 8), ("v3-32", "v3:4x4", 32), ("v3-64", "v3:4x8", 64)),
        *(("v4-8", "v4:2x2x1", 4), ("v4-64", "v4:2x4x4", 32), ("v5p-128", "v5p:4x4x4", 64)),
        *(("v5p-512", "v5p:4x8x8", 256), ("v5p-1024", "v5p:8x8x8", 512)),
        *(("v4-384", "v4:4x4x12", 192), ("v5p-2304", "v5p:8x12x12", 1152), ("v5p-6144", "v5p:12x16x16", 3072)),
        *(("v5p-12288", "v5p:16x16x24", 6144), ("tpu7x-128", "tpu7x:4x4x4", 128), ("v7x-8", "tpu7x:2x2x1", 8)),
        *(("2xv5litepod-256", "v5e:16x16", 512), ("4xv5p-128", "v5p:4x4x4", 256)),
        *(("v5litepod-256", "v5e:16x16", 256), ("v5e-8", "v5e:2x4", 8), ("v6e-256", "v6e:16x16", 256)),
    ],
)
def test_a_name_counts_cores_up_to_v5p_and_chips_of_the_lite_ones(name, topology, devices):
    found = accelerator(name)
    assert (found.topology, found.devices) == (topology, devices)
    assert math.prod(found.shape) * found.slices == found.chips
    assert found.device_memory * found.devices == found.generation.memory_bytes * found.chips


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9-8", r"topology='v9-8' must be one of v2, .*; try v3-8"),
        ("v3", r"topology='v3' must be one of v2, .*; try v3-8"),
        ("v3-16", r"topology='v3-16' is no slice that can be rented; try v3-8"),
        ("v3-9", r"topology='v3-9' is no slice that can be rented; try v3-8"),
        ("v5p-12416", r"topology='v5p-12416' is no slice that can be rented; try v5p-12288"),
        ("2xv5p-100", r"topology='2xv5p-100' is no slice that can be rented; try 2xv5p-128"),
        ("0xv5p-128", r"topology='0xv5p-128' must have 1 to 256 slices; try 2xv5p-128"),
        ("257xv5p-128", r"topology='257xv5p-128' must have 1 to 256 slices; try 2xv5p-128"),
        ("v5litepod-512", r"topology='v5litepod-512' is no slice that can be rented; try v5litepod-256"),
    ],
)
def test_other_names_are_refused_with_one_that_works(name, message):
    with pytest.raises(ValueError, match=message) as caught:
        accelerator(name)
    accelerator(str(caught.value).rpartition(" ")[2])
