"""generate.py on a run folder made here: what it prints where, its samples, stops, prompt loop and bad input."""

import functools

import jax
import numpy as np
import pytest

from parallax.inference.generate import Generator
from parallax.inference.request import Request
from parallax.inference.sampling import SamplingSettings
from parallax.run_folder import load_run
from parallax.text import decode
from parallax.tokenizers.hugging_face import HuggingFaceTokenizer
from parallax.tokenizers.plain import ByteTokenizer, CharTokenizer
from parallax.training.checkpoint import Checkpointer
from scripts import generate
from scripts.generation import writer
from scripts.generation.writer import Writer
from tests.parallax.interop.tokenizers import byte_level
from tests.scripts.cases import read_cases
from tests.scripts.runs import run_script
from tests.scripts.untrained import one_layer, write_untrained

TOKENIZER = CharTokenizer("\n !?abcdefé☃")
CONFIG = one_layer(TOKENIZER.vocab_size)
generator = functools.cache(Generator)  # compiles once for all tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with two checkpoints, the first of which is the better."""
    folder = tmp_path_factory.mktemp("generate") / "run"
    write_untrained(folder, TOKENIZER, CONFIG, step=10, mean=0.5, deviation=0.5)
    other = jax.tree.map(lambda leaf: -leaf, load_run(folder).params)
    checkpoints = Checkpointer(folder / "checkpoints", keep=2)
    checkpoints.save(20, {"params": other, "step": np.int32(20)}, {"progress": {}}, 2.0)
    checkpoints.close()
    return folder


@pytest.fixture
def write(folder, call, monkeypatch):
    """Calls generate.py on the run: exit status, standard output and the lines of standard error."""
    monkeypatch.setattr(writer, "Generator", generator)

    def write(*flags, stdin=""):
        status, out, err = call(generate, "--checkpoint", folder, *flags, stdin=stdin)
        return status, out, err.splitlines()

    return write


@pytest.fixture(scope="module")
def expected(folder):
    """What should be written, by way of Generator; streamed, so that no further programs are compiled."""

    def expected(step, prompt, seed, max_tokens, **settings):
        request = Request(
            prompts=[TOKENIZER.encode(prompt)],
            settings=SamplingSettings.create(1, **settings),
            seeds=[seed],
            max_tokens=max_tokens,
        )
        return TOKENIZER.decode(token for _, token in generator(CONFIG).stream(load_run(folder, step).params, request))

    return expected


def test_standard_output_is_prompt_and_continuation_of_the_best_checkpoint(write, expected):
    flags = ("--prompt", "é☃!\nab", "--max-tokens", "24", "--temperature", "1.5", "--seed", "3")
    status, out, err = write(*flags)
    assert status == 0
    assert out == "é☃!\nab" + expected(10, "é☃!\nab", 3, 24, temperature=1.5)
    assert len(err) == 2
    assert "step 10" in err[0]
    assert "24 tokens in" in err[1]
    _, newest, _ = write(*flags, "--step", "20")
    assert newest == "é☃!\nab" + expected(20, "é☃!\nab", 3, 24, temperature=1.5)
    assert newest != out


def test_a_text_longer_than_training_says_once_what_happens_to_it(write, expected):
    """The run has learned from 128 tokens, its model takes 256."""
    first = expected(10, "ab", 3, 126, temperature=0.8)
    flags = ("--interactive", "--max-tokens", "200", "--seed", "3")
    for context, words in (
        ("slide", "beyond them the last 64 are read again, and the text goes on from there"),
        ("crop", "there a text ends"),
        ("extend", "beyond them text decays"),
    ):
        status, out, err = write(*flags, "--context", context, stdin="ab\nab\n")
        assert status == 0
        assert out.startswith(f"ab{first}")
        assert len(out) > 400 or context == "crop"
        assert (out.split("\nab")[0] == f"ab{first}") == (context == "crop")
        assert [line for line in err if line.startswith("context")] == [
            f"context   128 tokens, as in training; {words}"
        ]
    assert write("--prompt", "ab", "--max-tokens", "200", "--seed", "3")[1].startswith(f"ab{first}")
    assert not any("context" in line for line in write("--prompt", "ab", "--max-tokens", "126")[2])


@pytest.mark.parametrize(("flags", "dtype"), [((), "float32"), (("--param-dtype", "bfloat16"), "bfloat16")], ids=str)
def test_parameters_are_held_as_asked_for(folder, write, monkeypatch, flags, dtype):
    held = []
    monkeypatch.setattr(Writer, "stream", lambda self, flags: held.append(self._params))
    assert write("--prompt", "ab", "--draft", folder, *flags)[0] == 0
    ((target, draft),) = held
    for params in (target, draft):
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {dtype}


def test_a_sample_of_several_is_the_one_of_its_seed(write):
    flags = ["--prompt", "ab", "--max-tokens", "20", "--top-k", "9", "--repetition-penalty", "1.2", "--stop", "é"]
    alone = [write(*flags, "--seed", str(seed))[1] for seed in (5, 6, 7)]
    status, together, err = write(*flags, "--seed", "5", "--num-samples", "3")
    assert status == 0
    assert together == "\n".join(alone)
    assert len(set(alone)) == 3
    assert err[2:] == [f"--- sample {number} ---" for number in range(3)]


def test_text_ends_before_the_first_stop(write):
    flags = ("--prompt", "ab", "--max-tokens", "28", "--seed", "1", "--temperature", "1.2")
    free = write(*flags)[1]
    stop = free[20:22]
    status, stopped, err = write(*flags, "--stop", "☃☃☃☃", "--stop", stop.replace("\n", r"\n"))
    assert status == 0
    assert stopped == "ab" + free[2:].split(stop)[0]
    # The prompt's two characters are not drawn, the stop's two are.
    assert f"{len(stopped)} tokens in" in err[1]


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


def test_the_seed_of_the_prompt_loop_goes_around(write):
    status, out, err = write("--interactive", "--max-tokens", "2", "--seed", str(2**32 - 1), stdin="a\na\n")
    assert (status, out.count("\n")) == (0, 2)
    assert not [line for line in err if line.startswith("error")]


def test_the_prompt_loop_continues_each_line(write, expected):
    lines = ["ab", "/temperature 0", "é", "é", "/stop c", "/max-tokens 3", "/help", "", "/quit", "never"]
    status, out, err = write("--interactive", "--max-tokens", "9", "--seed", "4", stdin="\n".join(lines))
    greedy = expected(10, "é", 0, 9, temperature=0.0)
    assert status == 0
    assert out == f"ab{expected(10, 'ab', 4, 9, temperature=0.8)}\né{greedy}\né{greedy}\n"
    assert sum("9 tokens in" in line for line in err) == 3
    assert "  seed 7  " in err[-1]
    assert err[-1].endswith("stop ('c',)")


def test_a_bad_line_costs_one_complaint(write, expected):
    lines = ["z", "/temperature -1", "/top-k x", "/jump", "/max-tokens 0", "a"]
    lines += ["/max-tokens 256", "a", "/max-tokens 2", "a"]
    status, out, err = write("--interactive", "--context", "extend", stdin="\n".join(lines) + "\n")
    complaints = [line for line in err if line.startswith("error: ")]
    assert status == 0
    assert len(complaints) == 6
    assert all("; " in line for line in complaints)
    assert out == f"a{expected(10, 'a', 0, 2, temperature=0.8)}\n"


def test_an_interrupt_ends_a_continuation_and_not_the_loop(write, monkeypatch):
    stream, prompts = Writer.stream, []

    def interrupted(self, flags):
        prompts.append(flags.prompt)
        if flags.prompt == "a":
            raise KeyboardInterrupt
        stream(self, flags)

    monkeypatch.setattr(Writer, "stream", interrupted)
    status, out, _ = write("--interactive", "--max-tokens", "2", stdin="a\nb\n")
    assert (status, prompts) == (0, ["a", "b"])
    assert out.startswith("b")


def test_a_text_may_begin_with_nothing_where_the_model_begins_it(tmp_path, call, monkeypatch):
    monkeypatch.setattr(writer, "Generator", generator)
    definition, begin, end, _ = byte_level()
    tokenizer = HuggingFaceTokenizer(definition, 300, [end])
    write_untrained(tmp_path / "begins", tokenizer, one_layer(300), step=1)
    flags = ("--max-tokens", "5", "--temperature", "0")
    status, out, err = call(generate, "--checkpoint", "begins", *flags)
    assert status == 0, err
    request = Request.one(np.array([begin], np.int32), max_tokens=5, temperature=0.0, eos_id=end)
    run = load_run(tmp_path / "begins")
    tokens = (token for _, token in generator(run.config).stream(run.params, request))
    assert out == "".join(decode(tokens, tokenizer))


BAD = f"""
--prompt az | character 'z' at position 1 is not among the 12
--prompt '' | prompt is empty (0 tokens); give at least one token to continue from
--interactive | --prompt cannot go with --interactive
--prompt '' --interactive --num-samples 2 | --num-samples 2 must be 1 with --interactive
--num-samples 0 | --num-samples 0 must be at least 1; try 1
--temperature -1 | temperature=-1.0 must be in [0, 1e6]; try 0.8
--temperature hot | hot
--top-k -2 | top_k=-2 must be in
--top-p 0 | top_p=0.0 must be in (0, 1]; 1 is off
--min-p 1 | min_p=1.0 must be in [0, 1); 0 is off
--repetition-penalty 0 | repetition_penalty=0.0 must be in
--max-tokens 0 | max_tokens=0 must be at least 1; try 200
--max-tokens 256 --context extend | must not exceed max_seq_len=256; try max_tokens 255
--prompt {"a" * 256} --max-tokens 1 --context extend | must not exceed max_seq_len=256; try a shorter prompt
--prompt {"a" * 128} --context crop | leaves no room in the 128 that the model was trained at; try context=slide
--context skip | skip
--seed -1 | seed=-1 must be in [0, 2^32); try 0
--stop '' | stop 0 is empty; leave it out
--stop z | character 'z' at position 0
--step 15 | checkpoint 15 is asked for
--tempo 3 | --tempo
"""


@pytest.mark.parametrize(("args", "words"), read_cases(BAD))
def test_bad_input_is_one_line_and_status_2(folder, refuses, args, words):
    refuses(generate, ["--checkpoint", folder, "--prompt", "a", *args], *words)


def test_it_runs_from_a_shell_anywhere(folder, expected, tmp_path):
    flags = ("--checkpoint", folder, "--interactive", "--max-tokens", "5")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run_script("generate.py", *flags, cwd=tmp_path, env=ascii_only, stdin="ab\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"ab{expected(10, 'ab', 0, 5, temperature=0.8)}\n"
    assert len(done.stderr.splitlines()) == 3
