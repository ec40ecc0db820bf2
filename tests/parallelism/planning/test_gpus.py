"""GPUs by name: whole hosts, what joins them, what a program can have of a card."""

import pytest

from parallelism.planning.gpus import GIB, cards, gpus, target_config
from parallelism.planning.hardware import machine, peak_flops


@pytest.mark.parametrize(
    ("name", "hosts", "topology"),
    [
        *(("h100-8", 1, "1x1x8"), ("h100-64", 8, "1x8x8"), ("h200-8", 1, "1x1x8"), ("b200-8", 1, "1x1x8")),
        *(("gb200-64", 16, "1x16x4"), ("a100-4", 1, "1x1x4"), ("l4-1", 1, "1x1x1"), ("rtx4090-2", 1, "1x1x2")),
    ],
)
def test_a_name_counts_gpus_in_whole_hosts_or_a_part_of_one(name, hosts, topology):
    found = machine(name)
    assert (found.hosts, found.topology, found.devices) == (hosts, topology, int(name.partition("-")[2]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h100-7", "topology='h100-7' must be a power of two, which all meshes divide; try h100-8"),
        ("h100-12", "must be whole hosts of 8 GPUs, and a power of two of them; try h100-16"),
        ("h100-0", "must be a power of two, which all meshes divide; try h100-1"),
        ("h100-16384", "is more than 4096; try h100-4096"),
        ("rtx4090-16", "is more than 8, which no network joins; try rtx4090-8"),
        ("h100", "topology='h100' must be one of h100, .* with a number of GPUs; try h100-8"),
    ],
)
def test_other_names_are_refused_with_one_that_works(name, message):
    with pytest.raises(ValueError, match=message) as caught:
        machine(name)
    machine(str(caught.value).rpartition(" ")[2])


@pytest.mark.parametrize(
    ("name", "groups", "link", "rate"),
    [
        ("h100-64", [range(8), range(8, 16)], "NVLink 4", 450e9),
        ("h100-64", [range(64)], "400 Gb/s a GPU", 50e9),
        ("h100-64", [(7, 8)], "400 Gb/s a GPU", None),
        ("gb200-128", [range(64), range(64, 128)], "NVLink 5", 900e9),
        ("gb200-128", [(0, 64)], "400 Gb/s a GPU", 50e9),
        ("l4-8", [range(8)], "PCI Express 4", 32e9),
    ],
)
def test_a_collective_goes_as_slowly_as_the_slowest_link_that_it_crosses(name, groups, link, rate):
    found = gpus(name)
    assert found.level(groups) == link
    if rate:
        assert {dim.level: dim.rate for dim in found.dims}[link] == rate


def test_a_program_has_what_the_runtime_leaves_of_a_card():
    assert gpus("h100-8").device_memory == pytest.approx(0.9 * 79.11 * GIB)


@pytest.mark.parametrize("card", cards().values(), ids=lambda card: card.name)
def test_a_card_has_numbers_of_the_right_size(card):
    """Units slip by thousands; cards do not differ by as much."""
    assert 1e14 < card.flops < 1e16
    assert 20 * GIB < card.memory_bytes < 300 * GIB
    assert 2e11 < card.memory_rate < 2e13
    assert card.link_rate > card.network_rate
    assert card.joined % card.host_gpus == 0
    assert [peak_flops(f"NVIDIA {kind}") for kind in card.kinds] == [card.flops] * len(card.kinds)
    assert f"device_memory_size: {card.memory_bytes}" in target_config(card)
