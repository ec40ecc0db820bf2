"""Checkpoints on a real disk: what was saved comes back to the bit, onto any devices, or is refused."""

import json
import pathlib
import resource
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from parallax.training.checkpoint import Checkpointer
from tests.parallax.training.checkpoints import (
    ABSTRACT,
    DOCUMENTS,
    abstract,
    assert_same_bits,
    make_state,
    reader,
    saved,
)


def test_restores_the_bits_the_structure_and_the_documents(tmp_path):
    saved(tmp_path / "run" / "checkpoints", [3, 12])
    restored = reader(tmp_path / "run" / "checkpoints")[0].restore(ABSTRACT)
    assert restored.step == 12
    assert restored.documents == DOCUMENTS
    assert_same_bits(restored.state, make_state(12))
    assert_same_bits(reader(tmp_path / "run" / "checkpoints")[0].restore(ABSTRACT, step=3).state, make_state(3))


def test_nothing_saved_restores_nothing(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        checkpointer, lines = reader(folder)
        assert checkpointer.restore(ABSTRACT) is None
        assert (checkpointer.steps(), checkpointer.latest_step(), checkpointer.best_step()) == ([], None, None)
        assert lines == []
        with pytest.raises(ValueError, match="has no checkpoint"):
            checkpointer.restore_params(ABSTRACT.params)
    assert not (tmp_path / "absent").exists()


def test_a_save_holds_the_values_of_its_moment_though_buffers_are_donated(tmp_path):
    # Large enough (2 x 16 MB a save) that the background write is still running when the buffers are reused.
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    advance = jax.jit(lambda x: x * 3 + 1, donate_argnums=0)
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    state = {"one": jnp.arange(2.0**22), "sharded": jax.device_put(np.arange(2**22, dtype=np.float32), sharding)}
    documents = {"progress": {"next_batch": 0}}
    checkpointer, _ = reader(tmp_path)
    expected = {}
    for step in range(2):
        expected[step] = jax.tree.map(np.array, state)
        documents["progress"]["next_batch"] = step
        checkpointer.save(step, state, documents)
        documents["progress"]["next_batch"] = -1
        for _ in range(3):
            state = jax.tree.map(advance, state)
    checkpointer.wait()
    for step, values in expected.items():
        restored = checkpointer.restore(abstract(values), step=step)
        assert_same_bits(restored.state, values)
        assert restored.documents["progress"]["next_batch"] == step
    checkpointer.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed": np.zeros((8, 8), np.float32)}, r"params/embed is float32\[16, 8\] .* float32\[8, 8\] here"),
        ({"layers": {}}, r"params/layers/scale is float32\[8\] .* absent here"),
        ({"more": np.zeros(3, np.float32)}, r"params/more is absent in checkpoint 10 but float32\[3\] here"),
    ],
)
def test_another_shape_of_model_is_refused(tmp_path, change, message):
    saved(tmp_path, [10])
    params = abstract(make_state(0).params | change)
    with pytest.raises(ValueError, match=message):
        reader(tmp_path)[0].restore_params(params)
    with pytest.raises(ValueError, match=message):
        reader(tmp_path)[0].restore(ABSTRACT.replace(params=params))


def test_a_state_keeps_its_dtypes_and_parameters_alone_take_those_asked_for(tmp_path):
    saved(tmp_path, [10])
    params = make_state(10).params  # of two dtypes
    for dtype in (jnp.float32, jnp.bfloat16):
        asked = jax.tree.map(lambda x, dtype=dtype: jax.ShapeDtypeStruct(x.shape, dtype), params)
        given = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params)
        assert_same_bits(reader(tmp_path)[0].restore_params(asked)[1], given)
        assert_same_bits(reader(tmp_path)[0].restore_params(asked, as_saved=True)[1], params)
        with pytest.raises(ValueError, match=r"params/.* in checkpoint 10 but .* here; use the config"):
            reader(tmp_path)[0].restore(ABSTRACT.replace(params=asked))


def test_user_errors_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="keep=0 must be at least 1"):
        Checkpointer(tmp_path, keep=0)
    with pytest.raises(ValueError, match="is a file; name a folder"):
        reader(tmp_path / "file")[0].restore(ABSTRACT)
    with pytest.raises(ValueError, match="not JSON compliant"):
        reader(tmp_path)[0].save(1, make_state(1), {"progress": {"loss": float("nan")}})


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


def test_a_folder_that_cannot_be_made_fails_the_save(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"^checkpoint 1 could not be saved in .*/file/below: .*Not a directory") as error:
        reader(tmp_path / "file" / "below")[0].save(1, make_state(1), DOCUMENTS)
    assert "\n" not in str(error.value)


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
