"""train.py decides how a run computes by the devices, unless it is asked."""

import pytest

from parallax.config import PRESETS, TrainConfig
from parallax.model.transformer import UNSTACKED
from parallelism.hardware import generation_of
from scripts.execution import choose_accumulate, choose_attention, choose_layer_loop


@pytest.mark.parametrize(
    ("kind", "changes", "length", "parts", "expected"),
    [
        ("TPU v4", {}, 256, 1, "splash"),
        ("TPU v6 lite", {}, 256, 1, "splash"),
        ("TPU v3", {}, 256, 1, "xla"),
        ("cpu", {}, 256, 1, "blocks"),
        ("cpu", {}, 64, 1, "blocks"),
        ("cpu", {}, 8192, 1, "blocks"),
        ("cpu", {}, 256, 2, "xla"),
        ("cpu", {"dropout_rate": 0.1}, 256, 1, "xla"),
        ("TPU v4", {}, 200, 1, "xla"),
        ("TPU v4", {"dropout_rate": 0.1}, 256, 1, "xla"),
        ("TPU v4", {}, 256, 8, "xla"),
        ("TPU v4", {"attention": "xla"}, 256, 1, "xla"),
        ("cpu", {"attention": "splash"}, 256, 1, "splash"),
    ],
)
def test_attention_is_the_kernels_where_the_devices_run_it_unless_asked(
    kind, changes, length, parts, expected
):
    model = PRESETS["tiny"].replace(**changes)
    assert choose_attention(model, length, parts, generation_of(kind)).attention == expected


@pytest.mark.parametrize(
    ("attention", "length", "parts", "words"),
    [
        ("splash", 100, 1, "try 128"),
        ("splash", 128, 2, "2 devices share each"),
        ("blocks", 128, 2, "2 devices share each"),
    ],
)
def test_what_skips_blocks_is_refused_where_it_cannot_run(attention, length, parts, words):
    with pytest.raises(ValueError, match=words):
        choose_attention(PRESETS["tiny"].replace(attention=attention), length, parts, None)


@pytest.mark.parametrize(
    ("platform", "changes", "reduction", "expected"),
    [
        ("cpu", {}, "mean", "unroll"),
        ("cpu", {"num_layers": UNSTACKED}, "mean", "unroll"),
        ("cpu", {"num_layers": UNSTACKED + 1}, "mean", "scan"),
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


@pytest.mark.parametrize(
    ("platform", "devices", "changes", "rows", "length", "expected"),
    [
        ("cpu", 1, {}, 12, 64, 1),
        ("cpu", 1, {}, 32, 256, 4),
        ("cpu", 1, {}, 33, 256, 11),  # the fewest that divide the rows and leave at most eight
        ("cpu", 4, {}, 32, 256, 1),
        ("cpu", 1, {}, 4, 8192, 4),
        ("cpu", 8, {}, 4, 8192, 1),  # fewer rows than devices
        ("cpu", 1, {"dropout_rate": 0.1}, 32, 256, 1),
        ("cpu", 1, {"reduction": "exact"}, 32, 256, 1),
        ("cpu", 1, {"accumulate": 2}, 32, 256, 2),
        ("tpu", 1, {}, 32, 256, 1),
        ("tpu", 1, {"accumulate": 2}, 32, 256, 2),
    ],
)
def test_a_cpu_takes_as_many_tokens_at_a_time_as_its_caches_hold_unless_asked(
    platform, devices, changes, rows, length, expected
):
    model = PRESETS["tiny"].replace(dropout_rate=changes.get("dropout_rate", 0.0))
    asked = {name: value for name, value in changes.items() if name != "dropout_rate"}
    train = TrainConfig(batch_size=rows, seq_len=length, **asked)
    assert choose_accumulate(train, model, platform, devices) == expected
