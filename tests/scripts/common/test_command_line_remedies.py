"""The remedies that scripts beside train.py print: each is given, and what was refused is no longer.

What a remedy breaks then, if anything, is another rule. Where a script would begin to compute, it is stopped.
"""

import importlib.util
import re
import shlex
from unittest.mock import Mock

import pytest

from parallax.inference import generate as generating
from parallax.serving.engine import Engine
from parallax.tokenizers.plain import CharTokenizer
from scripts import convert, evaluate, generate, launch, plan, prepare, serve
from scripts.launching import gcloud, local
from tests.scripts.cases import read_cases
from tests.scripts.test_convert import BAD as CONVERT
from tests.scripts.test_evaluate import BAD as EVALUATE
from tests.scripts.test_generate import BAD as GENERATE
from tests.scripts.test_launch import BAD as LOCAL
from tests.scripts.test_launch_tpu import BAD as TPU
from tests.scripts.test_plan import BAD as PLAN
from tests.scripts.test_prepare import BAD as PREPARE
from tests.scripts.test_train_remedies import remedies, replaced
from tests.scripts.untrained import one_layer, write_untrained

SERVE = """
--slots 0 | must be
--capacity 0 | must be
--max-body-bytes 0 | at least 1
--max-answers 9 --queue 8 | must not exceed
--host no.such.host.invalid | must be an address
"""
SCRIPTS = [
    (generate, "--checkpoint run --prompt a", GENERATE, 6),
    (evaluate, "--checkpoint run --dataset text.txt", EVALUATE, 4),
    (convert, "", CONVERT, 1),
    (serve, "--checkpoint run --port 0", SERVE, 5),
    (prepare, "--workers 1", PREPARE, 4),
    (plan, "", PLAN, 12),
    (launch, "", LOCAL, 5),
    (launch, "", TPU, 8),
]


class Begun(Exception):
    """The script has taken all of its input."""


def mended(args, message):
    """The arguments after each remedy: with a flag that they lack or have otherwise, or without one."""
    rule, _, advice = message.rpartition("; ")
    for flag, value in remedies(message):
        yield replaced(args, flag, value)
    for field, value in re.findall(r"^try (\w+)=(\w+)", advice):
        yield replaced(args, f"--{field.replace('_', '-')}", value)
    for flag in re.findall(r"^add (--[\w-]+)$", advice):
        yield [*args, flag]
    for flag, value in re.findall(r"^add (--[\w-]+) (\S+) after --$", advice):
        yield [*args, flag, value]
    if advice == "leave it out" and (named := re.match(r"--[\w-]+", rule)) and named[0] in args:
        at = args.index(named[0])
        yield args[:at] + args[at + 2 :]


@pytest.mark.parametrize(
    ("script", "always", "table", "least"),
    SCRIPTS,
    ids=["generate", "evaluate", "convert", "serve", "prepare", "plan", "local", "tpu"],
)
def test_a_remedy_works_when_it_is_pasted(script, always, table, least, call, tmp_path, monkeypatch):
    begun = Mock(side_effect=Begun)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if "cuda" in name or name == "libtpu" else Mock()
    )
    beginnings = [(generating, "start"), (generating, "whole"), (Engine, "warm_up"), (local, "supervise")]
    for module, name in (*beginnings, (gcloud, "_start")):
        monkeypatch.setattr(module, name, begun)
    write_untrained(
        tmp_path / "run", CharTokenizer("abc"), one_layer(3), step=1, seq_len=24 if script is evaluate else 128
    )
    for name, content in (("text.txt", "abc" * 100), ("one.txt", "a"), ("web/a.jsonl", '{"text": "abc"}\n' * 9)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)

    def complaint(args):
        try:
            status, _, err = call(script, *args)
        except Begun:
            return ""
        return err.splitlines()[-1].removeprefix("error: ") if status == 2 else ""

    tried = []
    for args, words in (case.values for case in read_cases(table)):
        if not re.search(r"try |add |leave |at least|must", " ".join(words)):
            continue
        given = [*args, *shlex.split(always)] if script is prepare else [*shlex.split(always), *args]
        message = complaint(given)
        for again in mended(given, message):
            now = complaint(again)
            assert not now or now.split(" ")[0] != message.split(" ")[0], f"{shlex.join(again)} after: {message}"
            tried.append(shlex.join(again))
    assert len(tried) >= least, tried
