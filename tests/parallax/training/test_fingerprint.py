"""The hash of parameters changes with everything that is theirs and with nothing else."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
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
