"""Checkpoints and the whole process: a full disk loses no trusted step, and a normal run is silent."""

import json
import pathlib
import resource
import signal
import subprocess
import sys

import jax.numpy as jnp
import pytest

from parallax.training.checkpoint import Checkpointer

ROOT = pathlib.Path(__file__).parents[3]


@pytest.fixture
def small_files_only():
    """No file of this process may grow beyond 100 kB: a write beyond that fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_write_that_fails_is_an_exception_and_the_last_step_stays(tmp_path, small_files_only):
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(1, {"w": jnp.ones(1000)}, {})
    checkpointer.wait()
    small_files_only()
    checkpointer.save(2, {"w": jnp.arange(1e6)}, {})
    with pytest.raises(OSError, match="could not be saved") as error:
        checkpointer.close()
    message = str(error.value)
    assert message.startswith(f"checkpoint 2 could not be saved in {tmp_path}: ")
    assert "\n" not in message
    assert checkpointer.steps() == [1]


QUIET = """
import sys, warnings
warnings.simplefilter("error")
import jax, jax.numpy as jnp
assert "orbax.checkpoint" not in sys.modules
from parallax.training.checkpoint import Checkpointer
assert "orbax.checkpoint" not in sys.modules
state = {"params": {"w": jnp.ones((8, 8))}, "step": jnp.int32(1)}
shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
checkpointer = Checkpointer(sys.argv[1], keep=1)
for step in (1, 2):
    checkpointer.save(step, state, {"config": {}}, eval_loss=1.0)
checkpointer.restore(shapes)
checkpointer.restore_params(shapes["params"])
checkpointer.close()
"""


def test_normal_operation_is_silent_and_orbax_is_imported_late(tmp_path):
    command = [sys.executable, "-c", QUIET, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    json.loads((tmp_path / "2" / "manifest.json").read_text())
