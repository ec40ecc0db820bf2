"""The remedies that are printed: those of train.py are tried, and every flag that any message names exists."""

import ast
import dataclasses
import re

from parallax.config import TransformerConfig
from scripts import convert, evaluate, generate, ladder, launch, plan, prepare, serve, train
from scripts.training.flags import read_flags
from scripts.training.job import prepare_job
from tests.scripts.cases import read_cases
from tests.scripts.runs import ROOT
from tests.scripts.test_train_bad_input import CASES, FILES

MODEL = {field.name for field in dataclasses.fields(TransformerConfig)}


def remedies(message):
    """The flags to give instead, (flag, value), of each way out that a message names with a value."""
    rule, _, advice = message.rpartition("; ")
    named = re.match(r"(?:--)?([\w.-]+)[= ]", rule)
    for part in re.split(r", or (?:try )?| or ", advice.removeprefix("add ").removeprefix("try ")):
        if flag := re.fullmatch(r"(--[\w.-]+) (\S+)", part):
            yield flag[1], flag[2]
        elif re.fullmatch(r"[\w.:-]+", part) and advice.startswith("try ") and named:
            name = named[1].replace("_", "-")
            yield f"--model.{name}" if name.replace("-", "_") in MODEL else f"--{name}", part


def replaced(args, flag, value):
    """The arguments with that flag, in place of one that they have by this name or as the model's."""
    for at, arg in enumerate(args):
        if arg == flag:
            return [*args[: at + 1], value, *args[at + 2 :]]
    return [*args, flag, value]


def complaint(args):
    try:
        prepare_job(read_flags(["--dataset", "text.txt", *args]))
    except ValueError as error:
        return str(error)
    return ""


def pasteable():
    """Cases that read_flags and prepare_job refuse with a remedy: those of processes and of runs aside."""
    cases = [case.values for case in read_cases(CASES)]
    advised = [args for args, words in cases if re.search(r"try |--(?!help)", words[-1])]
    return [args for args in advised if "--coordinator" not in args and "--resume" not in args]


def test_a_remedy_works_when_it_is_pasted(tmp_path, monkeypatch):
    """What it breaks then, if anything, is another rule."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(FILES["text.txt"] * 10)
    (tmp_path / "good.json").write_text(FILES["good.json"])
    tried = 0
    for args in pasteable():
        message = complaint(args)
        for flag, value in remedies(message):
            again = complaint(replaced(args, flag, value))
            assert again.split(" ")[0] != message.split(" ")[0], f"{flag} {value}, of: {message}"
            tried += 1
    assert tried >= 20


def messages():
    """The texts that scripts and packages raise or print, with … for what is computed."""
    for package in ("parallax", "parallelism", "data", "scripts"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if "benchmarks" in path.parts:
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                call = node.exc if isinstance(node, ast.Raise) else node
                if isinstance(call, ast.Call) and (node is not call or ast.unparse(call.func) in ("say", "print")):
                    yield from ((path.name, text_of(part)) for part in call.args)


def text_of(node):
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    return "…"


def test_every_flag_that_a_message_names_exists(call):
    commands = [(script,) for script in (train, prepare, generate, evaluate, serve, plan)]
    commands += [(launch, name) for name in ("local", "run", "up")] + [(convert, name) for name in ("import", "export")]
    commands += [(ladder, name) for name in ladder.COMMANDS]
    known = {"--help", "--upgrade", "--dpo"}  # which the message completes
    for script, *name in commands:
        status, out, _ = call(script, *name, "--help")
        assert status == 0
        known |= set(re.findall(r"--[a-z][\w.-]*[a-z]", out))
    named = {(flag, file) for file, text in messages() for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*[a-z]", text)}
    assert len(named) > 40
    assert {(flag, file) for flag, file in named if flag not in known} == set()
