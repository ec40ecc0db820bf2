"""Arrays in pieces: the same bits from any way they were stored to any place, also by the library's own defaults."""

import concurrent.futures

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from parallax.training import checkpoint_arrays, checkpoint_hashes
from parallax.training.checkpoint_arrays import array_handler, read_arrays
from tests.parallax.training.checkpoints import abstract, assert_same_bits, flip_a_bit

TREE = {
    "blocks": {"up": np.arange(6 * 8 * 32, dtype=np.float32).reshape(6, 8, 32)},
    "table": np.arange(64 * 8).reshape(64, 8).astype(jnp.bfloat16),
    "count": np.int32(3),
}


def shardings():
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    specs = {
        "whole": {1: PartitionSpec(), 2: PartitionSpec(), 3: PartitionSpec()},
        "rows": {2: PartitionSpec("b"), 3: PartitionSpec("a", "b")},
        "columns": {2: PartitionSpec(None, "b"), 3: PartitionSpec(None, None, ("a", "b"))},
        "both": {2: PartitionSpec("b", "a"), 3: PartitionSpec("a", None, "b")},
    }
    return {
        name: lambda leaf, of=of: NamedSharding(mesh, of.get(np.ndim(leaf), PartitionSpec()))
        for name, of in specs.items()
    }


@pytest.mark.parametrize(
    ("source", "piece"),  # less than a row of a layer, some rows, all
    [("whole", 64), ("rows", 500), ("columns", 64), ("both", 500), ("both", 2**20)],
)
def test_pieces_make_the_array_anywhere(tmp_path, monkeypatch, source, piece):
    monkeypatch.setattr(checkpoint_hashes, "PIECE_BYTES", piece)
    ways = shardings()
    save(array_handler(), tmp_path / "saved", jax.tree.map(lambda x: jax.device_put(x, ways[source](x)), TREE))
    for way in ways.values():
        restored = read_arrays(tmp_path / "saved", abstract(TREE, way))
        assert_same_bits(restored, TREE)
        for leaf, given in zip(jax.tree.leaves(restored), jax.tree.leaves(TREE), strict=True):
            assert leaf.sharding.is_equivalent_to(way(given), leaf.ndim)


def test_what_was_stored_with_compression_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_arrays, "PIECE_BYTES", 64)
    ways = shardings()
    tree = jax.tree.map(lambda x: jax.device_put(x, ways["both"](x)), TREE)
    save(ocp.PyTreeCheckpointHandler(), tmp_path / "saved", tree)
    for way in ways.values():
        assert_same_bits(read_arrays(tmp_path / "saved", abstract(TREE, way)), TREE)


class Uncopied(np.ndarray):
    def tobytes(self, order="C"):
        raise AssertionError("a second copy")


def test_a_value_that_nothing_is_compared_with_is_not_copied(tmp_path):
    save(ocp.PyTreeCheckpointHandler(), tmp_path / "saved", jax.tree.map(jnp.asarray, TREE))
    array = checkpoint_arrays.StoredArray(tmp_path / "saved", "table", ocp.type_handlers.get_ts_context())
    value: concurrent.futures.Future[np.ndarray] = concurrent.futures.Future()
    value.set_result(TREE["table"].view(Uncopied))
    assert array._whole(value, "0.0") is value.result()


def test_no_more_than_asked_for_is_read_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_hashes, "PIECE_BYTES", 512)
    save(array_handler(), tmp_path / "saved", jax.tree.map(jnp.asarray, TREE))
    hashes = checkpoint_hashes.read_hashes(epath.Path(tmp_path / "saved"))["blocks.up"]
    array = checkpoint_arrays.StoredArray(tmp_path / "saved", "blocks.up", ocp.type_handlers.get_ts_context(), hashes)
    pieces = list(array.pieces((slice(2, 5), slice(0, 8), slice(4, 20))))
    assert len(pieces) == 6
    assert {piece.nbytes for _, piece in pieces} == {4 * 16 * 4}
    assert [at for at, _ in pieces[:3]] == [[0, 0, 0], [0, 4, 0], [1, 0, 0]]


@pytest.mark.parametrize("source", ["whole", "both"])
@pytest.mark.parametrize(("name", "other"), [("up", "table"), ("table", "up")])
def test_a_flipped_bit_is_found_by_who_reads_that_array(tmp_path, monkeypatch, source, name, other):
    monkeypatch.setattr(checkpoint_hashes, "PIECE_BYTES", 4096)
    ways = shardings()
    # Values of 1 kB and less stand in the index, which has sums of its own.
    values = {"up": np.tile(TREE["blocks"]["up"], 32), "table": np.tile(TREE["table"], 32)}
    tree = jax.tree.map(lambda x: jax.device_put(x, ways[source](x)), values)
    save(array_handler(), tmp_path / "saved", tree)
    flip_a_bit(tmp_path / "saved", np.asarray(tree[name].addressable_shards[0].data).tobytes()[:64])
    for way in (ways["whole"], ways["columns"]):
        with pytest.raises(checkpoint_hashes.DamageError, match=f"^{name} has other contents than were saved$"):
            read_arrays(tmp_path / "saved", abstract({name: values[name]}, way))
        assert_same_bits(read_arrays(tmp_path / "saved", abstract({other: values[other]}, way)), {other: values[other]})


def save(handler, folder, tree):
    checkpointer = ocp.Checkpointer(handler)
    checkpointer.save(folder, args=ocp.args.PyTreeSave(tree))
    checkpointer.close()
