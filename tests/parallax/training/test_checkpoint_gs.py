"""Checkpoints on gs://, in an emulator of Google's storage: the same promises as on a disk.

The emulator (tests/google_storage.py) is not Google: what these tests show, they show of our calls alone.
"""

import jax
import numpy as np
import pytest
import tensorstore

from parallax.storage import open_folder
from parallax.training import checkpoint_hashes
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

pytestmark = [
    pytest.mark.external,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # gcsfs says so of large uploads
]


@pytest.fixture
def folder(bucket, request):
    return open_folder(f"{bucket}/{request.node.name}/checkpoints")


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def files(folder):
    """Every file below, by its relative name."""
    found = {}
    for entry in folder.iterdir():
        below = files(entry) if entry.is_dir() else {"": entry}
        found |= {f"{entry.name}/{name}".rstrip("/"): file for name, file in below.items()}
    return found


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def test_restores_the_bits_and_keeps_the_newest_and_the_best(folder):
    assert reader(folder)[0].restore(ABSTRACT) is None
    assert saved(folder, range(1, 6), keep=2, losses={1: 2.0, 2: 1.0, 4: 1.5}) == []
    checkpointer, lines = reader(folder)
    assert names(folder) == ["2", "4", "5"]
    assert (checkpointer.steps(), checkpointer.best_step()) == ([2, 4, 5], 2)
    restored = checkpointer.restore(ABSTRACT)
    assert (restored.step, restored.documents) == (5, DOCUMENTS)
    assert_same_bits(restored.state, make_state(5))
    assert_same_bits(checkpointer.restore_params(ABSTRACT.params)[1], make_state(2).params)
    assert lines == []


def test_restores_onto_any_sharding(folder, monkeypatch):
    monkeypatch.setattr(checkpoint_hashes, "PIECE_BYTES", 64)  # some rows at a time
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def shard(leaf):
        spec = jax.sharding.PartitionSpec(*[None] * (leaf.ndim - 1), "data") if leaf.ndim > 1 else ()
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    state = make_state(1)
    checkpointer = Checkpointer(folder, keep=1)
    checkpointer.save(1, jax.tree.map(lambda leaf: jax.device_put(leaf, shard(leaf)), state), DOCUMENTS)
    assert_same_bits(checkpointer.restore(ABSTRACT).state, state)
    restored = checkpointer.restore(abstract(state, shard)).state
    assert_same_bits(restored, state)
    assert restored.params["embed"].sharding.spec == jax.sharding.PartitionSpec(None, "data")
    checkpointer.close()


def test_a_flipped_byte_is_named_and_the_one_before_is_used(folder):
    saved(folder, [10, 20])
    for count, start in enumerate(("state/d/", "state/_METADATA", "manifest.json", "commit_success.txt")):
        stored = files(folder / "20")
        name = next(name for name in stored if name.startswith(start))
        flip_a_byte(folder / "20" / name)
        checkpointer, lines = reader(folder)
        restored = checkpointer.restore(ABSTRACT)
        assert restored.step == 10
        assert_same_bits(restored.state, make_state(10))
        aside = f"20.damaged-{count}" if count else "20.damaged"
        assert len(lines) == 1
        assert lines[0].startswith(f"checkpoint 20 is damaged: {name} ")
        assert lines[0].endswith(f"; it is now {aside}")
        assert files(folder / aside).keys() == stored.keys()
        assert not (folder / "20").exists()
        assert checkpointer.save(20, make_state(20), DOCUMENTS)  # the run comes by that step again
        checkpointer.close()
    assert reader(folder)[0].restore(ABSTRACT).step == 20


def test_what_a_killed_save_left_is_never_read_and_goes(folder):
    saved(folder, [10, 20])
    whole = {name: file.read_bytes() for name, file in files(folder / "20").items()}
    for name, content in whole.items():
        if name not in ("commit_success.txt", "manifest.json"):
            (folder / "30" / name).write_bytes(content)
    assert reader(folder)[0].restore_params(ABSTRACT.params)[0] == 20
    assert reader(folder, is_writer=False)[0].steps() == [10, 20]
    assert (folder / "30").exists()
    checkpointer, lines = reader(folder)
    assert checkpointer.restore(ABSTRACT).step == 20
    assert (names(folder), lines) == (["10", "20"], [])
    # After the commit and before the manifest: it is whole, perhaps, but nothing says so.
    (folder / "20" / "manifest.json").unlink()
    assert checkpointer.restore(ABSTRACT).step == 10
    assert names(folder) == ["10", "20.damaged"]


MIB = 2**20


@pytest.fixture
def read_bytes(monkeypatch):
    """Bytes that gcsfs and TensorStore have read since the last call."""
    import gcsfs  # here, since the tests are collected where it is not installed

    read, found = gcsfs.GCSFileSystem._cat_file_sequential, []

    async def counted(self, *args, **keywords):
        content = await read(self, *args, **keywords)
        found.append(len(content))
        return content

    monkeypatch.setattr(gcsfs.GCSFileSystem, "_cat_file_sequential", counted)
    before = [0]

    def read_bytes():
        (metric,) = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/gcs/bytes_read")
        total = sum(found) + sum(value["value"] for value in metric["values"])
        since, before[0] = total - before[0], total
        return since

    read_bytes()
    return read_bytes


def test_a_save_reads_nothing_back_and_a_restore_reads_once_what_it_gives(folder, read_bytes):
    params = {"w": np.arange(MIB, dtype=np.float32).reshape(4, 512, 512)}
    state = {"params": params, "moments": jax.tree.map(lambda x: -x, (params, params))}
    checkpointer = Checkpointer(folder, keep=1)
    checkpointer.save(1, state, DOCUMENTS)
    checkpointer.wait()
    assert read_bytes() < MIB
    assert_same_bits(checkpointer.restore(abstract(state)).state, state)
    assert 12 * MIB <= read_bytes() < 13 * MIB
    assert_same_bits(checkpointer.restore_params(abstract(params))[1], params)
    assert 4 * MIB <= read_bytes() < 5 * MIB
    checkpointer.close()


# A save that cannot begin leaves tasks of Orbax behind, whose event loop is gone.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_bucket_that_is_not_there_is_an_error_and_is_not_made(bucket):
    checkpointer, _ = reader("gs://no-such-bucket/checkpoints")

    def save():
        checkpointer.save(1, make_state(1), DOCUMENTS)
        checkpointer.wait()

    for _ in range(2):  # had the first made it, the second would do
        with pytest.raises(OSError, match="checkpoint 1 could not be saved in gs://no-such-bucket/checkpoints"):
            save()
    checkpointer.close()


def test_a_listing_is_never_an_old_one(folder):
    checkpointer, _ = reader(folder)
    assert checkpointer.steps() == []
    saved(folder, [10])
    assert checkpointer.steps() == [10]
