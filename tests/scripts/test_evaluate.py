"""evaluate.py against what can be computed by hand."""

import json
import math
import sys

import jax
import numpy as np
import pytest

from parallax.config import TransformerConfig, config_to_dict
from parallax.model.transformer import TransformerLM, init_params
from parallax.tokenizers.plain import ByteTokenizer
from parallax.tokenizers.registry import save_tokenizer
from parallax.training.checkpoint import Checkpointer
from scripts import convert, evaluate
from tests.parallax.interop.folders import write_folder

CONFIG = TransformerConfig(
    vocab_size=257, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=16, max_seq_len=64
)  # fmt: skip
TEXT = "Ça va? To be, or not to be: that is the question. 🙂\n" * 3


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Calls a script's main in a folder with a run and a text: (exit status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "run").mkdir()
    settings = {"model": config_to_dict(CONFIG), "train": {"seq_len": 24}}
    (tmp_path / "run/config.json").write_text(json.dumps(settings))
    save_tokenizer(ByteTokenizer(), tmp_path / "run/tokenizer.json")
    checkpoints = Checkpointer(tmp_path / "run/checkpoints", keep=1)
    checkpoints.save(0, {"params": params()}, {"progress": {}})
    checkpoints.close()

    def call(*args, script=evaluate):
        monkeypatch.setattr(sys, "argv", [script.__name__, *args])
        try:
            status = script.main()
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return call


def params():
    """Other than the initial ones, under which every token is as likely as another."""
    return jax.tree.map(lambda leaf: 3 * leaf, init_params(CONFIG, jax.random.key(1)))


def nats(tokens, window, stride):
    """Token by token, each with the context of its window and nothing more."""
    total = 0.0
    model = jax.jit(lambda ids: TransformerLM.from_params(CONFIG, params())(ids)[0])
    for target in range(1, len(tokens)):
        number = max(0, -(-(target - window) // stride))  # of the first window that reaches it
        start = number * stride
        context = np.zeros((1, window), np.int32)
        context[0, : target - start] = tokens[start:target]
        logits = model(context)[0, target - start - 1]
        total += float(jax.nn.logsumexp(logits) - logits[tokens[target]])
    return total


@pytest.mark.parametrize(("window", "stride"), [(24, 12), (24, 24), (8, 3), (64, 1)])
def test_it_is_the_sum_over_tokens_with_their_context(call, window, stride):
    flags = (
        "--window",
        str(window),
        "--stride",
        str(stride),
        "--batch-size",
        "4",
        "--json",
        "out/result.json",
    )
    status, out, err = call("--checkpoint", "run", "--dataset", "text.txt", *flags)
    assert status == 0, err
    tokens = ByteTokenizer().encode(TEXT)
    expected = nats(tokens, window, stride)
    with open("out/result.json") as file:
        result = json.load(file)
    count = len(TEXT.encode()) - 1  # of the first nothing is asked
    assert (result["tokens"], result["bytes"]) == (count, count)
    assert result["nats"] == pytest.approx(expected, rel=1e-5)  # sums in float32
    assert result["perplexity"] == pytest.approx(math.exp(expected / count), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(expected / math.log(2) / count, rel=1e-5)
    assert out.startswith(
        f"perplexity {result['perplexity']:.4f} a token, {result['bits_per_byte']:.4f} bits"
    )


def test_the_window_of_training_and_half_of_it_are_the_default(call):
    status, out, _ = call("--checkpoint", "run", "--dataset", "text.txt", "--json", "a.json")
    assert status == 0
    with open("a.json") as file:
        result = json.load(file)
    assert out.endswith(", window 24, stride 12\n")
    assert (result["window"], result["stride"], result["step"]) == (24, 12, 0)


def test_a_mesh_gives_the_same(call):
    flags = ("--checkpoint", "run", "--dataset", "text.txt", "--json")
    assert call(*flags, "one.json")[0] == 0
    with open("one.json") as file:
        one = json.load(file)["nats"]
    for mesh in ("data=2,fsdp=2,tensor=2", "data=2,sequence=4"):
        assert call(*flags, "eight.json", "--mesh", mesh)[0] == 0
        with open("eight.json") as file:
            assert json.load(file)["nats"] == pytest.approx(one, rel=1e-5)


def test_a_text_too_short_to_score_is_refused(call, tmp_path):
    (tmp_path / "one.txt").write_text("a")
    (tmp_path / "ones").mkdir()
    for number in range(3):  # whose ends are tokens, of no bytes
        (tmp_path / f"ones/{number}.txt").write_text("a")
    for flags in (("one.txt",), ("one.txt", "--held-out"), ("ones",)):
        status, _, err = call("--checkpoint", "run", "--dataset", *flags)
        assert status == 2
        assert f"dataset {flags[0]} has no token to score; give a longer text" in err


def test_only_the_held_out_tenth(call, tmp_path):
    status, out, _ = call("--checkpoint", "run", "--dataset", "text.txt", "--held-out")
    rest = TEXT[int(len(TEXT) * 0.9) :]
    assert status == 0
    assert f"{len(rest.encode()) - 1} bytes" in out


def test_documents_stand_alone_and_their_ends_are_scored(call, tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(3):
        (tmp_path / f"texts/{number}.txt").write_text("abcd")
    status, out, _ = call("--checkpoint", "run", "--dataset", "texts")
    assert status == 0
    assert "12 tokens of 9 bytes" in out  # three bytes and an end each


def test_a_tokenizer_with_a_first_id_has_all_of_the_text_scored(call, tmp_path):
    write_folder(tmp_path / "hf")
    assert call("import", "hf", "imported", script=convert)[0] == 0
    status, out, _ = call("--checkpoint", "imported", "--dataset", "text.txt", "--window", "32")
    assert status == 0
    assert f"of {len(TEXT.encode())} bytes" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--checkpoint", "nowhere"), "run folder nowhere has no readable config.json"),
        (
            ("--dataset", "nothing.txt"),
            "dataset 'nothing.txt' must be tiny_shakespeare or a path that exists",
        ),
        (("--window", "65"), "--window 65 must not exceed max_seq_len=64; try --window 64"),
        (("--stride", "25"), "--stride 25 must not exceed the window of 24; try"),
        (("--window", "0"), "--window 0 must be at least 1;"),
        (("--batch-size", "9", "--mesh", "data=8"), "batch_size=9 must be divisible by data=8"),
        (("--step", "3"), "checkpoint 3 is asked for"),
    ],
)
def test_bad_input_is_one_line(call, args, message):
    given = dict(zip(args[::2], args[1::2], strict=True))
    flags = {"--checkpoint": "run", "--dataset": "text.txt"} | given
    status, out, err = call(*(word for pair in flags.items() for word in pair))
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (status, out, len(errors)) == (2, "", 1)
    assert message in errors[0]
    assert "; " in errors[0]
