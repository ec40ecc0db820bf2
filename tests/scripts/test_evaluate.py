"""evaluate.py against what can be computed by hand."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from parallax.model.transformer import TransformerLM
from parallax.run_folder import load_run
from parallax.tokenizers.plain import ByteTokenizer
from scripts import convert, evaluate
from scripts.preparing import automatic
from tests.parallax.interop.folders import write_folder
from tests.scripts.cases import read_cases
from tests.scripts.untrained import one_layer, write_untrained

TEXT = "Ça va? To be, or not to be: that is the question. 🙂\n" * 3


@pytest.fixture
def score(call, tmp_path):
    """Evaluates an untrained run, whose windows had 24 tokens, on a text: (the line it prints, its JSON)."""
    (tmp_path / "text.txt").write_text(TEXT)
    write_untrained(tmp_path / "run", ByteTokenizer(), one_layer(257), step=0, seq_len=24)

    def score(*flags, dataset="text.txt", run="run"):
        given = ("--checkpoint", run, "--dataset", dataset, *flags, "--json", "out/result.json")
        status, out, err = call(evaluate, *given)
        assert status == 0, err
        return out, json.loads(Path("out/result.json").read_text())

    return score


def nats(tokens, window, stride, **options):
    """Token by token, each with the context of its window and nothing more."""
    total, run = 0.0, load_run("run", **options)
    model = jax.jit(lambda ids: TransformerLM.from_params(run.config, run.params)(ids)[0])
    for target in range(1, len(tokens)):
        number = max(0, -(-(target - window) // stride))  # of the first window that reaches it
        start = number * stride
        context = np.zeros((1, window), np.int32)
        context[0, : target - start] = tokens[start:target]
        logits = model(context)[0, target - start - 1]
        total += float(jax.nn.logsumexp(logits) - logits[tokens[target]])
    return total


def test_parameters_may_be_held_in_bfloat16(score):
    _, result = score("--param-dtype", "bfloat16", "--stride", "24")
    expected = nats(ByteTokenizer().encode(TEXT), 24, 24, param_dtype="bfloat16")
    assert result["nats"] == pytest.approx(expected, rel=1e-5)  # sums in float32
    assert result["nats"] != pytest.approx(score("--stride", "24")[1]["nats"], rel=2e-5)


@pytest.mark.parametrize(("window", "stride"), [(24, 12), (24, 24), (8, 3)])
def test_it_is_the_sum_over_tokens_with_their_context(score, window, stride):
    out, result = score("--window", window, "--stride", stride, "--batch-size", "4")
    expected = nats(ByteTokenizer().encode(TEXT), window, stride)
    count = len(TEXT.encode()) - 1  # of the first nothing is asked
    assert (result["tokens"], result["bytes"]) == (count, count)
    assert result["nats"] == pytest.approx(expected, rel=1e-5)  # sums in float32
    assert result["perplexity"] == pytest.approx(math.exp(expected / count), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(expected / math.log(2) / count, rel=1e-5)
    assert out.startswith(f"perplexity {result['perplexity']:.4f} a token, {result['bits_per_byte']:.4f} bits")


def test_a_mesh_gives_the_same_by_default_in_the_window_of_training_and_half_of_it(score):
    out, one = score()
    assert out.endswith(", window 24, stride 12, trained at 24\n")
    assert (one["window"], one["stride"], one["trained_length"], one["step"]) == (24, 12, 24, 0)
    _, eight = score("--mesh", "data=2,sequence=4")
    assert eight["nats"] == pytest.approx(one["nats"], rel=1e-5)


def test_only_the_held_out_tenth(score):
    assert score("--held-out")[1]["bytes"] == len(TEXT[int(len(TEXT) * 0.9) :].encode()) - 1


def test_of_text_that_train_prepares_another_part_is_held_out(score, refuses, monkeypatch):
    monkeypatch.setattr(automatic, "READ_WHOLE", 100)
    words = ("--held-out of text.txt is what its store holds out", "give that store as --dataset")
    refuses(evaluate, ["--checkpoint", "run", "--dataset", "text.txt", "--held-out"], *words)


def test_documents_stand_alone_and_their_ends_are_scored(score, tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(3):
        (tmp_path / f"texts/{number}.txt").write_text("abcd")
    assert "12 tokens of 9 bytes" in score(dataset="texts")[0]  # three bytes and an end each


def test_a_tokenizer_with_a_first_id_has_all_of_the_text_scored(score, call, tmp_path):
    write_folder(tmp_path / "hf")
    assert call(convert, "import", "hf", "imported")[0] == 0
    assert f"of {len(TEXT.encode())} bytes" in score("--window", "32", run="imported")[0]


BAD = """
--checkpoint nowhere | run folder nowhere has no readable config.json
--dataset nothing.txt | dataset 'nothing.txt' must be tiny_shakespeare or a path that exists
--dataset one.txt | dataset one.txt has no token to score; give a longer text
--dataset one.txt --held-out | dataset one.txt has no token to score
--dataset ones | dataset ones has no token to score
--dataset a.jsonl | dataset a.jsonl holds no plain text to count the bytes of; give plain text, or a store
--window 257 | --window 257 must not exceed max_seq_len=256; try --window 256
--stride 25 | --stride 25 must not exceed the window of 24; try
--window 0 | --window 0 must be at least 1;
--batch-size 9 --mesh data=8 | batch_size=9 must be divisible by data=8
--step 3 | checkpoint 3 is asked for
--json ones | --json ones must be a file and is a folder; choose another
--json one.txt/a/b.json | --json one.txt/a/b.json must be a file and is below
"""


@pytest.mark.parametrize(("args", "words"), read_cases(BAD))
def test_bad_input_is_one_line(score, refuses, tmp_path, args, words):
    (tmp_path / "one.txt").write_text("a")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "ones").mkdir()
    for number in range(3):  # whose ends are tokens, of no bytes
        (tmp_path / f"ones/{number}.txt").write_text("a")
    refuses(evaluate, ["--checkpoint", "run", "--dataset", "text.txt", *args], *words)
