"""The arrows and the house rules, read from the sources.

Invariant: the rules are stated once, here, for every file that exists; no file is named to be let off.
"""

import ast
import functools
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A package may import itself and these; a dotted name allows that module or folder alone.
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
MAX_LINES, MAX_DOOR_LINES, MAX_DOORS, MAX_FILES = 400, 90, 10, 16

MODULES = sorted(path for package in ARROWS for path in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def named(path):
    return str(path.relative_to(ROOT))


def dotted(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path):
    """Full names of everything that a file imports: at its top, in a function, or for types alone."""
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


def offenders(paths, wrong):
    """What `wrong` finds in each file, by the file's name; empty files aside."""
    found = {named(path): list(wrong(path)) for path in paths}
    return {name: what for name, what in found.items() if what}


def test_packages_import_along_the_arrows_alone():
    def wrong(path):
        package = path.relative_to(ROOT).parts[0]
        allowed = (package, *ARROWS[package])
        ours = [name for name in imports(path) if name.split(".")[0] in {*ARROWS, "tests"}]
        return [name for name in ours if not any(within(name, module) for module in allowed)]

    assert offenders(MODULES, wrong) == {}


def test_no_circle_of_imports():
    files = {dotted(path): path for path in MODULES}
    # `from a.b import c` imports module a.b.c where there is one, else a.b.
    needs = {
        name: {target if target in files else target.rpartition(".")[0] for target in imports(path)}
        & files.keys() - {name}
        for name, path in files.items()
    }
    while free := {name for name, needed in needs.items() if not needed}:
        needs = {name: needed - free for name, needed in needs.items() if name not in free}
    assert needs == {}


def test_every_module_says_its_purpose():
    assert (
        offenders(MODULES, lambda path: [] if not parsed(path).body or ast.get_docstring(parsed(path)) else [1]) == {}
    )


def test_parallax_itself_imports_nothing_before_it_is_asked():
    script = (
        "import sys, parallax\n"
        "print([name for name in sys.modules if name in ('jax', 'numpy') or name.startswith('parallax.')])\n"
        "print(hasattr(parallax, 'nothing'), parallax.load.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\nFalse parallax.loading\n", "")


def test_no_assert_outside_tests():
    """python -O drops them, and a user reads a ValueError better."""
    assert offenders(
        MODULES, lambda path: [node.lineno for node in ast.walk(parsed(path)) if isinstance(node, ast.Assert)]
    ) == {}  # fmt: skip


def test_no_flags_library():
    """absl flags are global and defined at import; tyro reads the config classes."""
    flags = ("absl.flags", "absl.app")
    assert offenders(MODULES, lambda path: [name for name in imports(path) if name.startswith(flags)]) == {}


def test_short_enough_to_read():
    lines = {named(path): len(path.read_text(encoding="utf-8").splitlines()) for path in [*MODULES, *TESTS]}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


def test_scripts_itself_holds_doors_alone():
    doors = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "scripts").glob("*.py")}
    assert len(doors) <= MAX_DOORS
    assert {name: count for name, count in doors.items() if count > MAX_DOOR_LINES} == {}


def test_folders_are_small_and_name_what_their_files_share():
    files = [
        path
        for package in ARROWS
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    counts = Counter(path.parent for path in files)
    assert {named(folder): count for folder, count in counts.items() if count > MAX_FILES} == {}
    repeated = [named(path) for path in files if path.stem.startswith(path.parent.name.rstrip("s") + "_")]
    assert repeated == []


def test_nothing_is_skipped():
    skips = {"skip", "skipif", "skipIf", "skipUnless", "importorskip", "xfail"}

    def wrong(path):
        used = [
            node.attr
            for node in ast.walk(parsed(path))
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("pytest.")
        ]
        return skips & {*used, *(name.split(".")[-1] for name in imports(path))}

    assert offenders(TESTS, wrong) == {}


def test_tests_mirror_modules():
    """tests/data/test_corpus.py tests data/corpus.py; test_corpus_ASPECT.py may share the work."""

    def wrong(path):
        name, home = path.stem.removeprefix("test_"), ROOT / path.relative_to(ROOT / "tests").parent
        stems = {module.stem for module in home.glob("*.py")}
        if path.name not in WHOLE_TREE and not any(name == stem or name.startswith(stem + "_") for stem in stems):
            yield name

    assert offenders([path for path in TESTS if path.name.startswith("test_")], wrong) == {}


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
