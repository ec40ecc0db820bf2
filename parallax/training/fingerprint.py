"""One hash for all parameters of a model.

Invariant: two models have the same hash exactly when every parameter has the same path, shape, dtype and bits.
"""

import hashlib
from typing import Any

import jax
import numpy as np


def params_sha256(params: Any) -> str:
    """sha256 in hexadecimal over the leaves of a tree of fully addressable arrays, in the order of their paths."""
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in sorted(leaves, key=lambda item: jax.tree_util.keystr(item[0])):
        array = np.asarray(jax.device_get(leaf), order="C")  # ascontiguousarray would make a scalar [1]
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype.name}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
