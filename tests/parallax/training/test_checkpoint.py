"""Checkpoints on a real disk: what was saved comes back to the bit, onto any devices, or is refused."""

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
    assert_same_bits(
        reader(tmp_path / "run" / "checkpoints")[0].restore(ABSTRACT, step=3).state, make_state(3)
    )


def test_nothing_saved_restores_nothing(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        checkpointer, lines = reader(folder)
        assert checkpointer.restore(ABSTRACT) is None
        assert (checkpointer.steps(), checkpointer.latest_step(), checkpointer.best_step()) == (
            [],
            None,
            None,
        )
        assert lines == []
        with pytest.raises(ValueError, match="has no checkpoint"):
            checkpointer.restore_params(ABSTRACT.params)
    assert not (tmp_path / "absent").exists()


def test_a_save_holds_the_values_of_its_moment_though_buffers_are_donated(tmp_path):
    # Large enough (2 x 16 MB a save) that the background write is still running when the buffers are reused.
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    advance = jax.jit(lambda x: x * 3 + 1, donate_argnums=0)
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    state = {
        "one": jnp.arange(2.0**22),
        "sharded": jax.device_put(np.arange(2**22, dtype=np.float32), sharding),
    }
    documents = {"progress": {"next_batch": 0}}
    checkpointer, _ = reader(tmp_path)
    expected = {}
    for step in range(3):
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
        (
            {"embed": np.zeros((8, 8), np.float32)},
            r"params/embed is float32\[16, 8\] .* float32\[8, 8\] here",
        ),
        ({"embed": np.zeros((16, 8), jnp.bfloat16)}, r"params/embed .* bfloat16\[16, 8\] here"),
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


def test_user_errors_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="keep=0 must be at least 1"):
        Checkpointer(tmp_path, keep=0)
    with pytest.raises(ValueError, match="is a file; name a folder"):
        reader(tmp_path / "file")[0].restore(ABSTRACT)
    with pytest.raises(ValueError, match=r"cannot be made: Not a directory; choose another folder") as error:
        reader(tmp_path / "file" / "below")[0].save(1, make_state(1), DOCUMENTS)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="not JSON compliant"):
        reader(tmp_path)[0].save(1, make_state(1), {"progress": {"loss": float("nan")}})
