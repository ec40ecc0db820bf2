"""Layers of a pattern as words: what they are read as, and that what is written reads as the same."""

import pytest

from parallax.config import PRESETS, LayerSpec, RopeScaling
from scripts.common.layer_words import read_layer, write_layer
from scripts.training.flags import flags_from_dict, flags_to_dict, read_flags

LOCAL = LayerSpec(sliding_window=64, rope_theta=1e4)


@pytest.mark.parametrize(
    "layer",
    [
        LayerSpec(),
        LOCAL,
        LayerSpec(norms="both", qk_norm=True, attention_sinks=False, feed_forward="dense"),
        LayerSpec(rope_scaling=RopeScaling()),
        LayerSpec(rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_max_seq_len=64), attention_softcap=30.0),
    ],
    ids=write_layer,
)
def test_what_is_written_reads_as_the_same(layer):
    assert read_layer(write_layer(layer)) == layer


def test_a_command_line_gives_a_pattern_which_a_run_folder_keeps():
    words = ["sliding_window=64,rope_theta=10000", "same"]
    flags = read_flags(["--model.pattern", *words, "--model.first-layers", "same", "--steps", "3"])
    assert flags.model.pattern == (LOCAL, LayerSpec())
    assert flags.model.first_layers == (LayerSpec(),)
    assert flags_from_dict(flags_to_dict(flags)).model == flags.model


@pytest.mark.parametrize("preset", ["gemma3-4b", "gpt-oss-20b"])
def test_a_preset_brings_a_pattern_that_may_be_replaced(preset):
    """Of six layers, and of two, which tyro takes for another type."""
    assert read_flags(["--config", preset, "--steps", "3"]).model == PRESETS[preset]
    words = ["--model.pattern", "sliding_window=64,rope_theta=1e4"]
    assert read_flags(["--config", preset, *words]).model.pattern == (LOCAL,)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("window=3", "'window' of layer 'window=3' is not one of sliding_window, .*; try"),
        ("sliding_window=wide", "sliding_window=wide of a layer must be a whole number; try 1024"),
        ("sliding_window=1.5", "sliding_window=1.5 of a layer must be a whole number; try 1024"),
        ("sliding_window=true", "sliding_window=true of a layer must be a whole number; try 1024"),
        ("sliding_window=3000000000", r"sliding_window=3000000000 must be in \[0, 2\^31\)"),
        ("sliding_window=8,sliding_window=16", "gives sliding_window twice; give it once"),
        ("rope_theta=1e400", "rope_theta=1e400 of a layer must be a number"),
        ("rope_theta=[1]", r"rope_theta=\[1\] of a layer must be a number"),
        ("feed_forward=auto", "feed_forward='auto' is not one of dense, experts"),
        ("qk_norm=1", "qk_norm=1 of a layer must be true or false; try true"),
        ("sliding_window=-1", r"sliding_window=-1 must be in \[0, 2\^31\)"),
        ("rope_scaling.kind=dynamic", "kind='dynamic' is not one of"),
    ],
)
def test_a_word_that_is_wrong_is_refused_on_the_command_line(word, message):
    with pytest.raises(ValueError, match=message) as refused:
        read_flags(["--model.pattern", word])
    assert "\n" not in str(refused.value)
