"""A gathered array is the whole array on every device, and its gradient is the sum of all devices', in shards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from parallax import axes
from parallelism import gathers
from parallelism.gathers import ShardPlacement

MESHES = {"flat": ((8,), ("fsdp",)), "in three parts": ((2, 2, 2), ("fsdp.0", "fsdp.1", "fsdp.2"))}
ARRAYS = {
    "rows": ((64, 24), ("embed", "mlp")),
    "columns": ((24, 64), ("mlp", "embed")),
    "few rows each": ((8, 4, 16), ("embed", "heads", "head_dim")),
    "too small for tiles": ((8,), ("embed",)),
    "the last of three dims": ((4, 6, 16), ("heads", "head_dim", "embed")),
    "long rows, padded": ((64, 8200), ("embed", "vocab")),
    "longer rows, in pieces": ((64, 33000), ("embed", "vocab")),
    "a table": ((16500, 64), ("vocab", "embed")),
    "not split": ((6, 4), ("mlp", "heads")),
}


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("large", [2**28, 0], ids=["gathered at once", "gathered in pieces"])
def test_whole_forward_and_the_sum_in_shards_back(mesh, array, large, monkeypatch):
    monkeypatch.setattr(gathers, "LARGE", large)
    sizes, names = mesh
    shape, logical = array
    mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes))
    placement = ShardPlacement({"embed": names, "batch": names}, mesh.shape)
    spec = PartitionSpec(*(names if name == "embed" else None for name in logical))
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    # Of each device; sums of integers are exact.
    weights = rng.integers(-8, 8, (8, *shape), dtype=np.int8).astype(np.float32)

    def on_device(x, weights):
        x = jax.lax.pcast(x, () if "embed" in logical else names, to="varying")

        def objective(x):
            with axes.bound(placement):
                whole = placement.gather(x, logical)
            return jnp.sum(whole * weights[0]), whole

        (_, whole), gradient = jax.value_and_grad(objective, has_aux=True)(x)
        split = any(name == "embed" for name in logical)
        return whole[None], gradient if split else jax.lax.psum(gradient, names)

    rows = PartitionSpec(names)
    run = jax.shard_map(on_device, mesh=mesh, in_specs=(spec, rows), out_specs=(rows, spec))
    whole, gradient = jax.jit(run)(jax.device_put(x, NamedSharding(mesh, spec)), weights)
    np.testing.assert_array_equal(whole, np.broadcast_to(x, (8, *shape)))
    np.testing.assert_array_equal(gradient, weights.sum(axis=0))


def test_what_is_bound_inside_leaves_activations_alone():
    placement = ShardPlacement({"batch": ("data",)}, {"data": 8})
    x = jnp.ones((2, 3))
    assert placement.constrain(x, ("batch", None)) is x
    function = functools.partial(jnp.add, 1)
    assert placement.local(function, (("batch",),), ("batch",), checked=True) is function
