"""The hash of parameters changes with everything that is theirs and with nothing else."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from parallax.training.fingerprint import params_sha256


def tree():
    rng = np.random.default_rng(0)
    return {
        "blocks": {"gate": rng.normal(size=(2, 3)).astype(np.float32), "scale": np.ones(2, np.float32)},
        "count": np.asarray(7, np.int32),
        "table": jnp.asarray(rng.normal(size=4), jnp.bfloat16),
    }


def test_hash_is_over_path_shape_dtype_and_bytes():
    """Held fixed, since users compare the hashes of runs made months apart."""
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.asarray(1, np.int32)
    content = b"['a'] (2, 3) float32\n" + a.tobytes() + b"['b']['c'] () int32\n" + b.tobytes()
    assert params_sha256({"a": a, "b": {"c": b}}) == hashlib.sha256(content).hexdigest()


def test_every_bit_counts():
    leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, tree()))
    hashes = {params_sha256(tree())}
    bits = 0
    for index, leaf in enumerate(leaves):
        for bit in range(8 * leaf.nbytes):
            raw = bytearray(leaf.tobytes())
            raw[bit // 8] ^= 1 << bit % 8
            flipped = np.frombuffer(bytes(raw), leaf.dtype).reshape(leaf.shape)
            hashes.add(
                params_sha256(jax.tree.unflatten(structure, [*leaves[:index], flipped, *leaves[index + 1 :]]))
            )
            bits += 1
    assert len(hashes) == bits + 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": np.zeros(3, "f")}, {"b": np.zeros(3, "f")}),
        ({"a": {"b": np.zeros(3, "f")}}, {"a": np.zeros(3, "f")}),
        ({"a": np.zeros((2, 3), "f")}, {"a": np.zeros((3, 2), "f")}),
        ({"a": np.zeros((), "f")}, {"a": np.zeros(1, "f")}),
        ({"a": np.zeros(2, np.float32)}, {"a": np.zeros(2, np.int32)}),
        ({"a": np.zeros(2, np.float16)}, {"a": jnp.zeros(2, jnp.bfloat16)}),
        ({"a": np.zeros(1, "f"), "b": np.ones(1, "f")}, {"a": np.ones(1, "f"), "b": np.zeros(1, "f")}),
        ({"a": np.zeros(3, "f"), "b": np.zeros(1, "f")}, {"a": np.zeros(1, "f"), "b": np.zeros(3, "f")}),
        ({"a": np.zeros(2, "f")}, {"a": np.zeros(2, "f"), "b": np.zeros(0, "f")}),
        ({"a": np.asarray(0.0, "f")}, {"a": np.asarray(-0.0, "f")}),
    ],
    ids=["name", "nesting", "shape", "scalar", "dtype", "width", "swap", "lengths", "empty", "sign"],
)
def test_different_parameters_have_different_hashes(one, other):
    assert params_sha256(one) != params_sha256(other)


def test_neither_insertion_order_nor_layout_nor_place_counts():
    original = tree()
    expected = params_sha256(original)
    backwards = dict(reversed(original.items())) | {"blocks": dict(reversed(original["blocks"].items()))}
    assert list(backwards) != list(original)
    assert params_sha256(backwards) == expected
    columns = jax.tree.map(lambda leaf: np.array(leaf, order="F"), original)
    assert not columns["blocks"]["gate"].flags["C_CONTIGUOUS"]
    assert params_sha256(columns) == expected
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    split = {"blocks": NamedSharding(mesh, PartitionSpec("x"))}
    whole = NamedSharding(mesh, PartitionSpec())
    placed = {name: jax.device_put(leaf, split.get(name, whole)) for name, leaf in original.items()}
    assert params_sha256(placed) == expected
