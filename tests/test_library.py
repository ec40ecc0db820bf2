"""The wheel in an environment of its own, outside the checkout: the library and the command `parallax`.

Invariant: what runs there sees the dependencies of this environment and nothing of the checkout.
"""

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.parallax.interop.folders import SMALL, write_folder
from tests.parallax.serving.server import serving, write_run

ROOT = Path(__file__).resolve().parents[1]
SAMPLED = {"max_tokens": 30, "temperature": 0.9, "top_k": 12, "top_p": 0.95, "repetition_penalty": 1.2, "seed": 7}
AFTERWARDS = """
import importlib.util, json, os, parallelism, sys
sampled = json.loads(sys.argv[1])
text = model.generate("ROMEO", **sampled)
imported = parallax.load("model", dtype="float32")
found = {
    "homes": [parallax.__file__, parallelism.__file__],
    "scattered": [name for name in ("data", "scripts", "tests") if importlib.util.find_spec(name)],
    "sampled": text,
    "streamed": "".join(model.stream("ROMEO", **sampled)),
    "batch": model.generate(["Juliet"] * 2, **sampled | {"seed": 6}),
    "log_probs": score.log_probs.tolist(),
    "imported": [imported.config.embed_dim, imported.generate("the cat", max_tokens=5, temperature=0)],
    "compute": [imported.config.dtype, parallax.load("model", dtype="bfloat16").config.dtype],
}
json.dump(found, open("found.json", "w"))
"""


class Installed:
    """An environment with the wheel, and a folder to work in that has a run and a Hugging Face folder."""

    def __init__(self, folder: Path):
        self.environment, self.work = folder / "environment", folder / "work"
        self.python, self.parallax = (str(self.environment / "bin" / name) for name in ("python", "parallax"))
        build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
        subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
        (wheel,) = folder.glob("*.whl")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", self.environment], check=True)
        pip = [sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check", "install"]
        install = [*pip, "--no-deps", "--no-index", "--no-compile", str(wheel)]
        subprocess.run(install, check=True, capture_output=True)
        # A folder that a .pth names is searched, but its own .pth files, one of which names the checkout, are not read.
        (home,) = self.environment.glob("lib/python*/site-packages")
        (home / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
        self.home = home
        (self.work / "runs").mkdir(parents=True)
        self.run_folder = write_run(self.work / "runs" / "tiny_shakespeare")
        write_folder(self.work / "model", SMALL | {"num_hidden_layers": 1})

    def run(self, *command: str, status: int = 0) -> str:
        """Standard output of a command there."""
        removed = ("PYTHONPATH", "JAX_NUM_CPU_DEVICES")
        env = {name: value for name, value in os.environ.items() if name not in removed}
        done = subprocess.run(command, cwd=self.work, env=env, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        self.errors = done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    return Installed(tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="module")
def found(installed):
    """What the example of docs/library.md and the lines above come to."""
    pages = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    example = re.findall(r"^```python\n(.*?)^```", pages, re.MULTILINE | re.DOTALL)[0]
    example = example.replace("To be, or not to be", "To be or not to be")  # the letters that the run knows
    example = example.replace("ROMEO:", "ROMEO").replace("JULIET:", "JULIET")
    installed.run(installed.python, "-c", example + AFTERWARDS, json.dumps(SAMPLED))
    return json.loads((installed.work / "found.json").read_text())


def test_the_library_needs_no_checkout(installed, found):
    assert all(Path(file).is_relative_to(installed.home) for file in found["homes"])
    assert found["scattered"] == []
    assert len(found["log_probs"]) == len("To be or not to be") - 1
    assert found["imported"][0] == SMALL["hidden_size"]
    assert found["imported"][1]
    assert found["compute"] == ["float32", "bfloat16"]


def test_the_command_writes_what_the_library_does(installed, found):
    flags = [word for name, value in SAMPLED.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    written = installed.run(
        installed.parallax, "generate", "--checkpoint", str(installed.run_folder), "--prompt", "ROMEO", *flags
    )
    assert written == "ROMEO" + found["sampled"] == "ROMEO" + found["streamed"]
    assert len(set(found["batch"])) == 2


def test_the_command_serves(installed):
    program = (installed.parallax, "serve")
    with serving(installed.run_folder, "--capacity", "32", program=program, python=installed.python) as server:
        assert server.complete("ROMEO", max_tokens=4, temperature=0).usage.completion_tokens == 4


def test_the_command_trains_by_itself_and_through_launch(installed):
    (installed.work / "text.txt").write_text("To be, or not to be, that is the question. " * 40)
    small = ["--model.num-layers", "1", "--model.embed-dim", "16", "--model.mlp-dim", "16"]
    flags = ["--dataset", "text.txt", *small, "--batch-size", "4", "--seq-len", "16", "--steps", "3"]
    flags += ["--mode", "distributed"]  # as launch needs it: then both run the same programs
    installed.run(installed.parallax, "train", *flags, "--output-dir", "runs/alone")
    assert (installed.work / "runs" / "alone" / "checkpoints" / "3").is_dir()
    local = ["launch", "local", "--processes", "1", "--"]
    installed.run(installed.parallax, *local, *flags, "--output-dir", "runs/together")
    assert "step 3 of 3" in installed.errors


def test_the_command_says_its_own_name(installed):
    assert installed.run(installed.parallax, "convert", "--help").startswith("usage: parallax convert COMMAND")
    assert installed.run(installed.parallax, "train", "--help").startswith("usage: parallax train ")
    installed.run(installed.parallax, "trains", status=2)
    assert installed.errors.startswith("error: command 'trains' is not one of train, ")
