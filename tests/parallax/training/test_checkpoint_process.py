"""Checkpoints and the whole process: a kill or a full disk loses no trusted step, and a normal run is silent."""

import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallax.training.checkpoint import Checkpointer

ROOT = pathlib.Path(__file__).parents[3]


def run_python(script: str, *arguments, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


SAVE_FOR_EVER = """
    import os, sys, warnings
    import jax, jax.numpy as jnp, numpy as np
    import orbax.checkpoint  # once, before the forks: each child starts at once
    from parallax.training.checkpoint import Checkpointer

    def save_for_ever():
        checkpointer = Checkpointer(sys.argv[1], keep=1)
        shapes = jax.eval_shape(lambda: {"w": jnp.zeros(1 << 18, jnp.float32), "step": jnp.int32(0)})
        restored = checkpointer.restore(shapes)
        step = restored.step if restored else 0
        while True:
            step += 1
            state = {"w": jnp.full(1 << 18, step, jnp.float32), "step": jnp.int32(step)}
            checkpointer.save(step, state, {"progress": {"next_batch": step}})
            checkpointer.wait()
            os.write(1, f"trusted {step}\\n".encode())

    warnings.simplefilter("ignore")  # JAX warns of any fork; no backend exists yet here
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            save_for_ever()
        os.write(1, f"started {pid}\\n".encode())
        os.waitpid(pid, 0)
        os.write(1, b"killed 0\\n")
"""


def test_a_kill_at_any_moment_leaves_the_newest_trusted_step(tmp_path):
    shapes = {"w": jax.ShapeDtypeStruct((1 << 18,), jnp.float32), "step": jax.ShapeDtypeStruct((), jnp.int32)}
    moments = random.Random(0)
    reached = 0
    with run_python(SAVE_FOR_EVER, tmp_path, stdin=subprocess.PIPE) as server:
        for _ in range(5):
            server.stdin.write("go\n")
            server.stdin.flush()
            told = {}
            while "killed" not in told:
                word, number = server.stdout.readline().split()
                told[word] = int(number)
                if told.keys() == {"started", "trusted"}:
                    time.sleep(moments.uniform(0.0, 0.1))
                    os.kill(told["started"], signal.SIGKILL)
                    told["struck"] = 1
            notes: list[str] = []
            restored = Checkpointer(tmp_path, keep=1, is_writer=False, notify=notes.append).restore(shapes)
            assert restored.step >= told["trusted"] > reached
            np.testing.assert_array_equal(restored.state["w"], np.full(1 << 18, restored.step, np.float32))
            assert restored.documents["progress"]["next_batch"] == restored.state["step"] == restored.step
            assert all("manifest.json is missing" in note for note in notes)
            reached = restored.step
        server.stdin.close()


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
    process = run_python(QUIET, tmp_path)
    assert process.communicate() == ("", "")
    assert process.returncode == 0
    json.loads((tmp_path / "2" / "manifest.json").read_text())
