"""The arrows and the house rules, read from the sources.

Invariant: the rules are stated once, here, for every file that exists; no file is named to be let off.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A package may import itself and these; a dotted name allows that module alone.
ARROWS = {
    "parallax": (),
    "parallelism": ("parallax.axes",),
    "data": ("parallax.storage", "parallax.tokenizers"),
    "scripts": ("parallax", "parallelism", "data"),
}
# These tests look at the whole tree.
WHOLE_TREE = {
    "test_architecture.py",
    "test_packaging.py",
    "test_library.py",
    "test_environment.py",
    "test_terraform.py",
}
MAX_LINES = 260

MODULES = sorted(path for package in ARROWS for path in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def named(path):
    return str(path.relative_to(ROOT))


def dotted(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path):
    """Full names of everything that a file imports, at its top or later."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def within(name, module):
    return name == module or name.startswith(module + ".")


each_module = pytest.mark.parametrize("path", MODULES, ids=named)
each_test = pytest.mark.parametrize("path", TESTS, ids=named)


@each_module
def test_arrows(path):
    package = path.relative_to(ROOT).parts[0]
    ours = [name for name in imports(path) if name.split(".")[0] in {*ARROWS, "tests"}]
    assert [
        name for name in ours if not any(within(name, module) for module in (package, *ARROWS[package]))
    ] == []


@each_module
def test_docstring(path):
    assert ast.get_docstring(parsed(path)) or not path.read_text(encoding="utf-8").strip()


def test_parallax_itself_imports_nothing_before_it_is_asked():
    script = (
        "import sys, parallax\n"
        "print([name for name in sys.modules if name in ('jax', 'numpy') or name.startswith('parallax.')])\n"
        "print(hasattr(parallax, 'nothing'), parallax.load.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\nFalse parallax.loading\n", "")


@each_module
def test_no_assert(path):
    """python -O drops them, and a user reads a ValueError better."""
    assert [node.lineno for node in ast.walk(parsed(path)) if isinstance(node, ast.Assert)] == []


@each_module
def test_no_flags_library(path):
    """absl flags are global and defined at import; tyro reads the config classes."""
    assert [name for name in imports(path) if within(name, "absl.flags") or within(name, "absl.app")] == []


@pytest.mark.parametrize("path", [*MODULES, *TESTS], ids=named)
def test_short_enough_to_read(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@each_test
def test_nothing_is_skipped(path):
    skips = {"skip", "skipif", "skipIf", "skipUnless", "importorskip", "xfail"}
    used = [
        node.attr
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("pytest.")
    ]
    assert skips.isdisjoint([*used, *(name.split(".")[-1] for name in imports(path))])


@pytest.mark.parametrize("path", [path for path in TESTS if path.name.startswith("test_")], ids=named)
def test_tests_mirror_modules(path):
    """tests/parallax/model/test_cache.py tests parallax/model/cache.py; test_cache_ASPECT.py may share the work."""
    folder, name = path.relative_to(ROOT / "tests").parent, path.stem.removeprefix("test_")
    home = ROOT / folder
    stems = {module.stem for module in home.glob("*.py")}
    assert path.name in WHOLE_TREE or any(name == stem or name.startswith(stem + "_") for stem in stems)


def test_nothing_runs_at_import():
    """Importing prints nothing, reads no command line, starts no device and needs no more than requirements.lock."""
    script = (
        "import importlib, sys\n"
        "from jax._src import xla_bridge\n"
        "for name in sys.argv[1].split():\n"
        "    importlib.import_module(name)\n"
        "    if xla_bridge.backends_are_initialized():\n"
        "        sys.exit(f'importing {name} starts a device')\n"
    )
    names = " ".join(map(dotted, MODULES))
    done = subprocess.run([sys.executable, "-c", script, names], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
