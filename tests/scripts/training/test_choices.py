"""train.py decides how a run computes by the devices, unless it is asked."""

from typing import NamedTuple

import pytest

from parallax.config import PRESETS, TrainConfig
from parallax.cpu import FEW_LAYERS
from parallelism.planning.hardware import attention_of
from scripts.training.choices import MICROBATCH, choose_accumulate, choose_attention, choose_layer_loop
from scripts.training.flags import Flags


class Device(NamedTuple):
    """What JAX says of one."""

    device_kind: str
    platform: str
    compute_capability: str = ""


DEVICES = {
    **{kind: Device(kind, "tpu") for kind in ("TPU v3", "TPU v4", "TPU v5p")},
    "cpu": Device("cpu", "cpu"),
    "H100": Device("NVIDIA H100 80GB HBM3", "gpu", "9.0"),
    "T4": Device("Tesla T4", "gpu", "7.5"),
    "MI300": Device("AMD Instinct MI300X", "gpu", "gfx942"),
}
HALF = {"dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("kind", "changes", "length", "parts", "expected"),
    [
        ("TPU v4", {}, 256, 1, "splash"),
        ("TPU v5p", {}, 256, 1, "splash"),
        ("TPU v3", {}, 256, 1, "xla"),
        ("cpu", {}, 256, 1, "blocks"),
        ("cpu", {}, 256, 2, "xla"),
        ("cpu", {"dropout_rate": 0.1}, 256, 1, "xla"),
        ("TPU v4", {}, 200, 1, "xla"),
        ("TPU v4", {"dropout_rate": 0.1}, 256, 1, "xla"),
        ("TPU v4", {}, 256, 8, "xla"),
        ("TPU v4", {"attention": "xla"}, 256, 1, "xla"),
        ("cpu", {"attention": "splash"}, 256, 1, "splash"),
        ("H100", HALF, 200, 1, "cudnn"),
        ("H100", {**HALF, "head_dim": 128, "attention": "cudnn"}, 256, 1, "cudnn"),
        ("H100", {}, 256, 1, "xla"),
        ("H100", {**HALF, "head_dim": 36}, 256, 1, "xla"),
        ("H100", {**HALF, "head_dim": 256}, 256, 1, "xla"),
        ("H100", {**HALF, "dropout_rate": 0.1}, 256, 1, "xla"),
        ("H100", HALF, 256, 2, "xla"),
        ("T4", HALF, 256, 1, "xla"),
        ("MI300", HALF, 256, 1, "xla"),
    ],
)
def test_attention_is_the_kernels_where_the_devices_run_it_unless_asked(kind, changes, length, parts, expected):
    model = PRESETS["tiny"].replace(**changes)
    assert choose_attention(model, length, parts, attention_of(DEVICES[kind])).attention == expected


@pytest.mark.parametrize(
    ("attention", "length", "parts", "words"),
    [
        ("splash", 100, 1, "try 128"),
        ("splash", 128, 2, "2 devices share each"),
        ("blocks", 128, 2, "2 devices share each"),
        ("cudnn", 128, 2, "2 devices share each"),
    ],
)
def test_what_skips_blocks_is_refused_where_it_cannot_run(attention, length, parts, words):
    with pytest.raises(ValueError, match=words):
        choose_attention(PRESETS["tiny"].replace(attention=attention, **HALF), length, parts, attention)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("cpu", HALF, "needs NVIDIA GPUs .*; try --model.attention auto"),
        ("T4", HALF, "needs NVIDIA GPUs of compute capability 8.0 or later"),
        ("H100", {}, "needs bfloat16 and .*, not float32 and head_dim=32; try --model.attention xla"),
        ("H100", {**HALF, "head_dim": 130}, "heads of a multiple of 8 up to 128, not bfloat16 and head_dim=130"),
    ],
)
def test_cudnn_is_refused_where_it_is_not_or_has_no_such_heads(kind, changes, words):
    model = PRESETS["tiny"].replace(attention="cudnn", **changes)
    with pytest.raises(ValueError, match=words):
        choose_attention(model, 128, 1, attention_of(DEVICES[kind]))


@pytest.mark.parametrize(
    ("platform", "changes", "reduction", "expected"),
    [
        ("cpu", {}, "mean", "unroll"),
        ("cpu", {"num_layers": FEW_LAYERS + 1}, "mean", "scan"),
        ("cpu", {"remat": "dots"}, "mean", "scan"),
        ("cpu", {}, "exact", "scan"),
        ("cpu", {"layer_loop": "scan"}, "mean", "scan"),
        ("tpu", {}, "mean", "scan"),
        ("tpu", {"layer_loop": "unroll"}, "mean", "unroll"),
    ],
)
def test_few_layers_are_unrolled_on_a_cpu_unless_asked(platform, changes, reduction, expected):
    model = PRESETS["tiny"].replace(**changes)
    assert choose_layer_loop(model, platform, reduction).layer_loop == expected


def test_unrolled_layers_are_never_called_exact():
    with pytest.raises(ValueError, match=r"try --model\.layer-loop scan"):
        choose_layer_loop(PRESETS["tiny"].replace(layer_loop="unroll"), "cpu", "exact")


def flags_of(rows, length, strategy="single", mesh="", dropout=0.0, **train):
    model = PRESETS["tiny"].replace(dropout_rate=dropout)
    train = TrainConfig(batch_size=rows, seq_len=length, **train)
    return Flags(strategy=strategy, mesh=mesh, model=model, train=train)


@pytest.mark.parametrize(
    ("platform", "devices", "rows", "length", "changes", "expected"),
    [
        ("cpu", 1, 12, 64, {}, 1),
        ("cpu", 1, 32, 256, {}, 4),
        ("cpu", 1, 33, 256, {}, 3),
        ("cpu", 1, 4, 8192, {}, 4),
        ("cpu", 4, 32, 256, {}, 4),  # of which one is used
        ("cpu", 4, 64, 128, {"strategy": "pmap"}, 1),
        ("cpu", 2, 64, 128, {"strategy": "pmap"}, 2),
        ("cpu", 2, 64, 128, {"strategy": "mesh"}, 2),
        ("cpu", 2, 64, 128, {"strategy": "mesh", "mesh": "fsdp=2"}, 1),
        ("cpu", 4, 64, 128, {"strategy": "mesh", "mesh": "data=2,tensor=2"}, 1),
        ("cpu", 8, 4, 8192, {"strategy": "mesh"}, 1),  # fewer rows than devices, which is refused elsewhere
        ("cpu", 1, 32, 256, {"dropout": 0.1}, 4),
        ("cpu", 1, 32, 256, {"reduction": "exact"}, 1),
        ("cpu", 1, 32, 256, {"accumulate": 2}, 2),
        ("tpu", 1, 32, 256, {}, 1),
    ],
)
def test_a_cpu_takes_few_thousand_tokens_at_a_time_where_that_costs_nothing_unless_asked(
    platform, devices, rows, length, changes, expected
):
    assert choose_accumulate(flags_of(rows, length, **changes), platform, devices) == expected


def test_microbatches_divide_the_rows_of_a_device_and_are_not_small():
    for rows in range(2, 97, 2):
        for length in (32, 100, 512, 4096):
            parts = choose_accumulate(flags_of(rows, length, strategy="pmap"), "cpu", 2)
            assert rows % (2 * parts) == 0
            assert parts == 1 or rows // 2 // parts * length >= MICROBATCH
