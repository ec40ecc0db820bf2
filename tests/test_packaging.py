"""Declared, locked and shipped packages agree with each other.

Invariant: only files are read and the wheel is built in a temporary folder, so no package index is asked.
"""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT.get("optional-dependencies", {})
BUILD = [*PYPROJECT["build-system"]["requires"], *PYPROJECT["dependency-groups"]["build"]]
# No lock holds torch: what of it fits depends on the machine.
DECLARED = {
    "requirements.lock": [*BUILD, *PROJECT["dependencies"]],
    **{
        f"requirements-{extra}.lock": [*BUILD, *PROJECT["dependencies"], *EXTRAS[extra]]
        for extra in EXTRAS
        if not any(line.startswith(("torch", "parallax-lm[parity]")) for line in EXTRAS[extra])
    },
}
CODE = ("parallax", "parallelism", "data", "scripts")
MACHINES = [
    {
        "sys_platform": platform,
        "platform_machine": machine,
        "python_full_version": f"{python}.0",
        "python_version": python,
    }
    for platform, machine in (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))
    for python in ("3.11", "3.12", "3.13")
]


def locked(lock):
    """The requirements of a lock file as (Requirement, number of hashes)."""
    lines = [
        line for line in (ROOT / lock).read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")
    ]
    entries = re.split(r"\n(?=\S)", "\n".join(lines).strip())
    return [(Requirement(entry.split("\\")[0].strip()), entry.count("--hash=sha256:")) for entry in entries]


def chosen(lock, machine):
    """Name -> the versions that pip would install on such a machine."""
    versions = {}
    for requirement, _ in locked(lock):
        if requirement.marker is None or requirement.marker.evaluate(machine):
            (pin,) = requirement.specifier
            assert pin.operator == "=="
            versions.setdefault(canonicalize_name(requirement.name), []).append(pin.version)
    return versions


def third_party(folders):
    """Import name -> one file that imports it, standard library and our own packages left out."""
    ours = {*sys.stdlib_module_names, *CODE, "tests"}
    found = {}
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            found.update({name.split(".")[0]: path for name in names})
    return {name: path for name, path in found.items() if name not in ours}


def test_one_lock_for_each_extra_without_torch():
    assert {path.name for path in ROOT.glob("requirements*.lock")} == set(DECLARED)


@pytest.mark.parametrize("lock", DECLARED)
def test_lock_is_hashed_and_names_no_host(lock):
    text = (ROOT / lock).read_text(encoding="utf-8")
    assert "://" not in text
    assert not re.search(r"^\s*-[-\w]*(index|find|trusted|e\b)", text, re.MULTILINE)
    assert len(text) < 600 * 1024
    assert [str(requirement) for requirement, hashes in locked(lock) if hashes == 0] == []


@pytest.mark.parametrize("lock", DECLARED)
@pytest.mark.parametrize(
    "machine", MACHINES, ids=lambda m: f"{m['sys_platform']}-{m['platform_machine']}-{m['python_version']}"
)
def test_lock_holds_what_is_declared(lock, machine):
    versions = chosen(lock, machine)
    assert [name for name, found in versions.items() if len(found) != 1] == []
    for requirement in map(Requirement, DECLARED[lock]):
        if requirement.marker is None or requirement.marker.evaluate(machine):
            assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)][0]), requirement
    assert versions["jax"][0].startswith("0.10." if machine["python_version"] == "3.11" else "0.12.")
    assert "torch" not in chosen("requirements.lock", machine)
    assert versions.items() >= chosen("requirements.lock", machine).items()  # .ci/venv adds one lock to the other


def test_locks_agree():
    """.ci/venv adds one lock to another in the same environment."""
    for machine in MACHINES:
        versions = {}
        for lock in DECLARED:
            for name, found in chosen(lock, machine).items():
                assert versions.setdefault(name, found) == found, (lock, name)


def test_every_import_is_declared():
    distributions = packages_distributions()

    def undeclared(folders, requirements):
        declared = {canonicalize_name(Requirement(line).name) for line in requirements}
        return {
            name: str(path.relative_to(ROOT))
            for name, path in third_party(folders).items()
            if declared.isdisjoint(map(canonicalize_name, distributions.get(name, [name])))
        }

    features = [line for extra, lines in EXTRAS.items() if extra != "dev" for line in lines]
    assert undeclared(CODE, [*PROJECT["dependencies"], *features]) == {}
    assert undeclared(["tests"], [*PROJECT["dependencies"], *features, *EXTRAS["dev"]]) == {}


def test_every_dependency_says_why():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    groups = [PROJECT["dependencies"], *EXTRAS.values(), *PYPROJECT["dependency-groups"].values()]
    for line in {line for group in groups for line in group}:
        assert re.search(rf'^ *"{re.escape(line)}", +# \S', text, re.MULTILINE), line


def test_wheel_holds_the_two_packages_with_the_scripts_inside_and_nothing_else(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {name for name in names if ".dist-info/" not in name}
    folders = {"data": "parallax/_command/data", "scripts": "parallax/_command/scripts"}
    assert shipped == {
        folders.get(package, package) + str(path.relative_to(ROOT)).removeprefix(package)
        for package in CODE
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
