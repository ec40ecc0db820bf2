"""How .ci/venv makes, keeps and remakes an environment, with a stand-in for Python that installs nothing.

Invariant: an environment whose installation did not end is never used.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE, DEV = "requirements.lock", "requirements-dev.lock"

# Knows the calls that .ci/venv makes, notes them, and fails as pip does where a file `broken` stands.
STAND_IN = """#!/bin/sh
case "$*" in
  *"import glob"*) exec "{python}" "$@" ;;
  *"-m venv "*) mkdir -p "$3/bin" "$3/lib" && cp "$0" "$3/bin/python" && echo create >>calls ;;
  *"-m pip "*" -e .") echo folder >>calls ;;
  *"-m pip "*) shift $(($# - 1)); echo "$1" >>calls; [ ! -e broken ] || {{ echo "ERROR: no route" >&2; exit 1; }} ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder that holds what .ci/venv reads. Call it with a lock: (status, what Python was asked for, stderr)."""
    folder = tmp_path / "a checkout"
    shutil.copytree(ROOT / ".ci", folder / ".ci")
    for name in ("pyproject.toml", CORE, DEV):
        (folder / name).write_text(f"{name}\njax==1\n")
    stand_in = folder / "python-stand-in"
    stand_in.write_text(STAND_IN.format(python=sys.executable))
    stand_in.chmod(0o755)

    def run(lock, python=stand_in):
        calls = folder / "calls"
        calls.write_text("")
        command = [str(folder / ".ci/venv"), str(python), lock, "true"]
        environment = {**os.environ, "PYTHONPATH": "/nowhere"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
        return done.returncode, calls.read_text().split(), done.stderr

    run.folder = folder
    return run


def test_an_environment_is_made_once_and_added_to(checkout):
    assert checkout(CORE)[:2] == (0, ["create", CORE, "folder"])
    assert checkout(CORE) == (0, [], "")
    assert checkout(DEV)[:2] == (0, [DEV, "folder"])
    assert checkout(DEV) == (0, [], "")
    assert checkout(CORE) == (0, [], "")


def test_the_larger_lock_serves_for_the_smaller(checkout):
    assert checkout(DEV)[:2] == (0, ["create", DEV, "folder"])
    assert checkout(CORE) == (0, [], "")


def test_an_interrupted_installation_is_made_again(checkout):
    assert checkout(CORE)[0] == 0
    (checkout.folder / "broken").touch()
    status, calls, errors = checkout(DEV)
    assert (status, calls) == (2, [DEV])
    assert "ERROR: no route" in errors
    (checkout.folder / "broken").unlink()
    assert checkout(CORE)[:2] == (0, ["create", CORE, "folder"])


def test_only_what_changed_is_installed(checkout):
    checkout(DEV)
    (checkout.folder / "pyproject.toml").write_text("another")
    assert checkout(DEV)[:2] == (0, ["folder"])
    (checkout.folder / DEV).write_text("jax==2")
    assert checkout(CORE) == (0, [], "")
    assert checkout(DEV)[:2] == (0, ["create", DEV, "folder"])


def test_a_moved_folder_is_installed_again(checkout):
    checkout(CORE)
    moved = checkout.folder.with_name("moved")
    checkout.folder.rename(moved)
    done = subprocess.run(
        [moved / ".ci/venv", moved / "python-stand-in", CORE, "true"], capture_output=True, check=True
    )
    assert b"Creating" in done.stderr


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "is not a command here"),
        ("exit 1", "does not start"),
        ("printf '2.7 2.7.18\\nx y\\n'", "Python must be 3.11, 3.12 or 3.13, and PYTHON="),
        ("printf '3.10 3.10.13\\nx y\\n'", "is 3.10.13; try PYTHON=python3.12"),
        ("printf '3.14 3.14.0\\nx y\\n'", "is 3.14.0; try PYTHON=python3.12"),
    ],
)
def test_an_unfit_python_is_named_in_one_line(checkout, script, message):
    python = checkout.folder / "unfit"
    if script is not None:
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
    status, calls, errors = checkout(CORE, python)
    assert (status, calls) == (2, [])
    assert errors.count("\n") == 1
    assert message in errors
    assert not list(checkout.folder.glob(".venv*"))


def test_a_python_without_venv_is_named_in_one_line(checkout):
    python = checkout.folder / "python-stand-in"
    python.write_text(python.read_text().replace("case ", 'case "$*" in *ensurepip*) exit 1 ;; esac\ncase ', 1))
    status, calls, errors = checkout(CORE)
    assert (status, calls, errors.count("\n")) == (2, [], 1)
    assert "has none; on Debian: apt-get install" in errors
