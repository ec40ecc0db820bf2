"""generate.py on a run folder made here: what it prints where, its samples, stops, prompt loop and bad input."""

import functools
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from parallax.config import TransformerConfig, config_to_dict
from parallax.inference.generate import Generator
from parallax.inference.request import Request
from parallax.inference.sampling import SamplingSettings
from parallax.model.transformer import init_params
from parallax.text import decode
from parallax.tokenizers.plain import ByteTokenizer, CharTokenizer
from parallax.tokenizers.registry import save_tokenizer
from parallax.training.checkpoint import Checkpointer
from scripts import generate
from scripts.generation import writer
from scripts.generation.writer import Writer

TOKENIZER = CharTokenizer("\n !?abcdefé☃")
CONFIG = TransformerConfig(
    vocab_size=TOKENIZER.vocab_size, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24,
    tie_embeddings=False, max_seq_len=256,
)  # fmt: skip
generator = functools.cache(Generator)  # compiles once for all tests


def random_params(seed):
    rng, abstract = (
        np.random.default_rng(seed),
        jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0))),
    )
    return jax.tree.map(
        lambda leaf: jax.numpy.asarray(rng.normal(0.5, 0.5, leaf.shape), leaf.dtype), abstract
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with two checkpoints, the first of which is the better."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.json").write_text(json.dumps({"model": config_to_dict(CONFIG), "train": {"steps": 20}}))
    save_tokenizer(TOKENIZER, folder / "tokenizer.json")
    checkpoints = Checkpointer(folder / "checkpoints", keep=2)
    for step, eval_loss in ((10, 1.0), (20, 2.0)):
        checkpoints.save(
            step, {"params": random_params(step), "other": np.zeros(3)}, {"progress": {}}, eval_loss
        )
    checkpoints.close()
    return folder


@pytest.fixture
def call(folder, monkeypatch, capsysbinary):
    """Runs generate.py in this process; gives exit status, standard output and the lines of standard error."""

    monkeypatch.setattr(writer, "Generator", generator)

    def run(*args, stdin="", checkpoint=folder):
        monkeypatch.setattr(sys, "argv", ["generate.py", "--checkpoint", str(checkpoint), *args])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            status = generate.main()
        except SystemExit as exit:
            status = exit.code
        out, err = capsysbinary.readouterr()
        return status, out.decode(), err.decode().splitlines()

    return run


def expected(step, prompt, seed, max_tokens, **settings):
    """What should be written, by way of Generator."""
    request = Request(
        prompts=[TOKENIZER.encode(prompt)],
        settings=SamplingSettings.create(1, **settings),
        seeds=[seed],
        max_tokens=max_tokens,
    )
    (tokens,) = generator(CONFIG).generate(random_params(step), request)
    return TOKENIZER.decode(tokens)


def test_standard_output_is_prompt_and_continuation_of_the_best_checkpoint(call):
    status, out, err = call(
        "--prompt", "é☃!\nab", "--max-tokens", "24", "--temperature", "1.5", "--seed", "3"
    )
    assert status == 0
    assert out == "é☃!\nab" + expected(10, "é☃!\nab", 3, 24, temperature=1.5)
    assert len(err) == 2
    assert "step 10" in err[0]
    assert "24 tokens in" in err[1]
    _, newest, _ = call(
        "--prompt", "é☃!\nab", "--max-tokens", "24", "--temperature", "1.5", "--seed", "3", "--step", "20"
    )
    assert newest == "é☃!\nab" + expected(20, "é☃!\nab", 3, 24, temperature=1.5)
    assert newest != out


def test_a_sample_of_several_is_the_one_of_its_seed(call):
    flags = (
        "--prompt",
        "ab",
        "--max-tokens",
        "20",
        "--top-k",
        "9",
        "--repetition-penalty",
        "1.2",
        "--stop",
        "é",
    )
    alone = [call(*flags, "--seed", str(seed))[1] for seed in (5, 6, 7)]
    status, together, err = call(*flags, "--seed", "5", "--num-samples", "3")
    assert status == 0
    assert together == "\n".join(alone)
    assert len(set(alone)) == 3
    assert err[2:] == [f"--- sample {number} ---" for number in range(3)]


def test_text_ends_before_the_first_stop(call):
    flags = ("--prompt", "ab", "--max-tokens", "28", "--seed", "1", "--temperature", "1.2")
    free = call(*flags)[1]
    stop = free[20:22]
    spelled = stop.replace("\n", r"\n")
    status, stopped, err = call(*flags, "--stop", "☃☃☃☃", "--stop", spelled)
    assert status == 0
    assert stopped == "ab" + free[2:].split(stop)[0]
    assert (
        f"{len(stopped)} tokens in" in err[1]
    )  # the prompt's two characters are not drawn, the stop's two are


def test_pieces_of_characters_and_stops_that_tokens_do_not_spell_alone():
    tokenizer = ByteTokenizer()
    tokens = [*tokenizer.encode("né☃\n"), 256, *tokenizer.encode("☃"), 0xE2]
    pieces = list(decode(iter(tokens), tokenizer, []))
    assert pieces[:7] == ["n", "", "é", "", "", "☃", "\n"]
    assert "".join(pieces) == "né☃\n☃\ufffd"
    assert "".join(decode(iter(tokens), tokenizer, ["\n☃"])) == "né☃"


def test_text_is_decoded_as_it_is_drawn():
    drawn = iter(TOKENIZER.encode("abc").tolist())
    pieces = decode(drawn, TOKENIZER, ["bd"])
    assert [next(pieces), next(pieces), next(drawn)] == ["a", "", TOKENIZER.encode("c")[0]]


def test_the_prompt_loop_continues_each_line(call):
    lines = ["ab", "/temperature 0", "é", "é", "/stop c", "/max-tokens 3", "/help", "", "/quit", "never"]
    status, out, err = call("--interactive", "--max-tokens", "9", "--seed", "4", stdin="\n".join(lines))
    greedy = expected(10, "é", 0, 9, temperature=0.0)
    assert status == 0
    assert out == f"ab{expected(10, 'ab', 4, 9, temperature=0.8)}\né{greedy}\né{greedy}\n"
    assert sum("9 tokens in" in line for line in err) == 3
    assert "  seed 7  " in err[-1]
    assert err[-1].endswith("stop ('c',)")


def test_a_bad_line_costs_one_complaint(call):
    lines = [
        "z",
        "/temperature -1",
        "/top-k x",
        "/jump",
        "/max-tokens 0",
        "a",
        "/max-tokens 256",
        "a",
        "/max-tokens 2",
        "a",
    ]
    status, out, err = call("--interactive", stdin="\n".join(lines) + "\n")
    complaints = [line for line in err if line.startswith("error: ")]
    assert status == 0
    assert len(complaints) == 6
    assert all("; " in line for line in complaints)
    assert out == f"a{expected(10, 'a', 0, 2, temperature=0.8)}\n"


def test_an_interrupt_ends_a_continuation_and_not_the_loop(call, monkeypatch):
    stream, prompts = Writer.stream, []

    def interrupted(self, flags):
        prompts.append(flags.prompt)
        if flags.prompt == "a":
            raise KeyboardInterrupt
        stream(self, flags)

    monkeypatch.setattr(Writer, "stream", interrupted)
    status, out, _ = call("--interactive", "--max-tokens", "2", stdin="a\nb\n")
    assert (status, prompts) == (0, ["a", "b"])
    assert out.startswith("b")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt", "az"], "character 'z' at position 1 is not among the 12"),
        (["--prompt", ""], "--prompt is empty and must hold text to continue; try"),
        ([], "--prompt is empty"),
        (["--prompt", "a", "--interactive"], "--prompt cannot go with --interactive"),
        (["--interactive", "--num-samples", "2"], "--num-samples 2 must be 1 with --interactive"),
        (["--prompt", "a", "--num-samples", "0"], "--num-samples 0 must be at least 1; try 1"),
        (["--prompt", "a", "--temperature", "-1"], "temperature=-1.0 must lie in [0, 1e6]; try 0.8"),
        (["--prompt", "a", "--temperature", "hot"], "hot"),
        (["--prompt", "a", "--top-k", "-2"], "top_k=-2 must lie in"),
        (["--prompt", "a", "--top-p", "0"], "top_p=0.0 must lie in (0, 1]; 1 is off"),
        (["--prompt", "a", "--min-p", "1"], "min_p=1.0 must lie in [0, 1); 0 is off"),
        (["--prompt", "a", "--repetition-penalty", "0"], "repetition_penalty=0.0 must lie in"),
        (["--prompt", "a", "--max-tokens", "0"], "max_tokens=0 must be at least 1; try 200"),
        (["--prompt", "a", "--max-tokens", "256"], "must not exceed max_seq_len=256; try max_tokens 255"),
        (
            ["--prompt", "a" * 256, "--max-tokens", "1"],
            "must not exceed max_seq_len=256; try a shorter prompt",
        ),
        (["--prompt", "a", "--seed", "-1"], "seed=-1 must lie in [0, 2^32); try 0"),
        (["--prompt", "a", "--stop", ""], "stop 0 is empty; leave it out"),
        (["--prompt", "a", "--stop", "z"], "character 'z' at position 0"),
        (["--prompt", "a", "--step", "15"], "checkpoint 15 is asked for"),
        (["--prompt", "a", "--tempo", "3"], "--tempo"),
    ],
)
def test_bad_input_is_one_line_and_status_2(call, args, message):
    status, out, err = call(*args)
    assert (status, out, len(err)) == (2, "", 1)
    assert err[0].startswith("error: ")
    assert message in err[0]
    assert "; " in err[0], "no remedy"


def test_it_runs_from_a_shell_anywhere(folder, tmp_path):
    command = [
        sys.executable,
        str(Path(generate.__file__).resolve()),
        "--checkpoint",
        str(folder),
        "--interactive",
    ]
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [*command, "--max-tokens", "5"], input=b"ab\n", capture_output=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == f"ab{expected(10, 'ab', 0, 5, temperature=0.8)}\n"
    assert len(done.stderr.splitlines()) == 3
