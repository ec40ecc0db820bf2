"""generate.py with a draft: the same text, what it says of the draft, and drafts that cannot be meant."""

import functools
import sys

import pytest

from parallax.inference.generate import Generator
from parallax.tokenizers.plain import CharTokenizer
from scripts import generate
from scripts.generation import writer
from tests.scripts.untrained import one_layer, write_untrained

LETTERS = "\n !?abcdefé☃"
generator = functools.cache(Generator)  # compiles once for all tests


def write_run(folder, letters, embed_dim):
    tokenizer = CharTokenizer(letters)
    write_untrained(folder, tokenizer, one_layer(tokenizer.vocab_size, embed_dim), step=1, mean=0.5, deviation=0.5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A model, a draft for it, and one that has other letters."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "model", LETTERS, 16)
    write_run(folder / "draft", LETTERS, 8)
    write_run(folder / "other", LETTERS[:-1] + "z", 8)
    return folder


@pytest.fixture
def call(runs, monkeypatch, capsysbinary):
    """Runs generate.py on the model; gives exit status, standard output and the lines of standard error."""
    monkeypatch.setattr(writer, "Generator", generator)

    def run(*args):
        command = ["generate.py", "--checkpoint", str(runs / "model"), "--max-tokens", "30", *args]
        monkeypatch.setattr(sys, "argv", command)
        try:
            status = generate.main()
        except SystemExit as exit:
            status = exit.code
        out, err = capsysbinary.readouterr()
        return status, out.decode(), err.decode().splitlines()

    return run


def test_a_draft_changes_no_greedy_text_and_is_reported(call, runs):
    flags = ("--prompt", "ab☃", "--temperature", "0")
    plain = call(*flags)
    status, out, err = call(*flags, "--draft", str(runs / "draft"), "--draft-tokens", "3")
    assert (status, out) == (0, plain[1])
    assert err[0] == plain[2][0]
    assert err[1].startswith(f"draft     {runs / 'draft'}, step 1: ")
    words = err[-1].split()
    accepted, proposed = int(words[1]), int(words[3])
    assert words[4:] == ["proposed", "tokens", "accepted:", f"{accepted / proposed:.0%}"]
    assert 0 <= accepted <= proposed
    assert proposed % 3 == 0


def test_the_model_is_the_best_draft_of_itself(call, runs):
    flags = ("--prompt", "ab", "--num-samples", "2", "--temperature", "0")
    status, out, err = call(*flags, "--draft", str(runs / "model"))
    assert (status, out) == (0, call(*flags)[1])
    assert any(line.endswith("accepted: 100%") for line in err)


def test_a_draft_of_other_tokens_is_refused(call, runs):
    status, out, err = call("--prompt", "ab", "--draft", str(runs / "other"))
    assert (status, out, len(err)) == (2, "", 1)
    assert err[0].startswith(f"error: the tokenizer of draft {runs / 'other'} (char, 12 ids) must be that of ")
    assert "; train both on the same text with the same --tokenizer" in err[0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--draft-tokens", "0"], "--draft-tokens 0 must be in [1, 64]; try 4"),
        (["--draft-tokens", "65"], "--draft-tokens 65 must be in [1, 64]; try 4"),
        (["--draft", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_is_one_line_and_status_2(call, args, message):
    status, out, err = call("--prompt", "ab", *args)
    assert (status, out, len(err)) == (2, "", 1)
    assert err[0].startswith("error: ")
    assert message in err[0]
