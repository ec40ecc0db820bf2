"""Compiled programs are kept between starts, and no more of them than asked; so are large buffers in a process."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.common import jax_process
from scripts.common.jax_process import expect_no_gpu, remove_oldest

ROOT = Path(__file__).resolve().parents[3]
COMPILE = """
import sys; sys.path.insert(0, sys.argv[1])
import jax, numpy as np
from scripts.common.jax_process import keep_compiled_programs
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
keep_compiled_programs()
jax.jit(lambda x: x @ x.T)(np.eye(8))
print(sum("cache_hits" in name for name in events))
"""


def compile_once(folder, **settings):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    asked = {"XDG_CACHE_HOME": str(folder), "JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(ROOT)],
        env=inherited | asked | settings,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return int(done.stdout), done.stderr


def test_a_second_start_finds_what_the_first_compiled(tmp_path):
    assert compile_once(tmp_path)[0] == 0
    assert any((tmp_path / "parallax" / "compiled").iterdir())
    hits, said = compile_once(tmp_path)
    assert hits > 0
    assert said == ""


@pytest.mark.parametrize("setting", ["JAX_COMPILATION_CACHE_DIR=own", "JAX_ENABLE_COMPILATION_CACHE=false"])
def test_what_the_user_set_stands(tmp_path, setting):
    name, _, value = setting.partition("=")
    own = tmp_path / "own"
    compile_once(tmp_path, **{name: str(own) if value == "own" else value})
    assert not (tmp_path / "parallax").exists()
    assert own.exists() == (value == "own")


def test_a_folder_that_cannot_be_written_costs_a_compilation(tmp_path):
    (tmp_path / "parallax").touch()
    assert compile_once(tmp_path)[0] == 0


def test_the_oldest_programs_go(tmp_path):
    for age, name in enumerate(("new", "old", "oldest")):
        (tmp_path / name).write_bytes(bytes(10))
        os.utime(tmp_path / name, (1000 - age, 1000))
    remove_oldest(tmp_path, 30)
    assert len(list(tmp_path.iterdir())) == 3
    remove_oldest(tmp_path, 19)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    remove_oldest(tmp_path / "none", 0)


FAULTS = """
import resource
import numpy as np
from scripts.common.jax_process import keep_large_buffers
keep_large_buffers()
def touch():
    for _ in range(20):
        np.ones(2**22)  # 32 MiB, far above the size that malloc maps on its own
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_a_second_round_of_large_temporaries_faults_no_pages_in():
    done = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000  # one round without it: 20 × 8192 pages


@pytest.mark.parametrize("there", [False, True])
def test_a_plugin_for_gpus_complains_only_where_there_is_one(there, tmp_path, monkeypatch, caplog):
    """As JAX logs it: with the plugin's traceback."""
    log = logging.getLogger("jax._src.xla_bridge")
    monkeypatch.setattr(log, "filters", [])
    monkeypatch.setattr(jax_process, "GPUS", (str(tmp_path if there else tmp_path / "none"),))
    expect_no_gpu()
    for plugin in ("jax_plugins.xla_cuda13", "jax_plugins.other"):
        log.error("Jax plugin configuration error: Exception when calling %s.initialize()", plugin)
    log.error("something else")
    assert len(caplog.records) == (3 if there else 2)
