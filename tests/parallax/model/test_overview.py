"""The table names every parameter with its shape, count and axes, for a model of any size."""

import jax
import pytest

from parallax.config import PRESETS, TransformerConfig
from parallax.model.overview import parameter_overview
from parallax.model.transformer import init_params, param_axes

SWITCHED = TransformerConfig(qk_norm=True, attention_bias=True, tie_embeddings=False, num_kv_heads=2)


@pytest.mark.parametrize("config", [*PRESETS.values(), SWITCHED], ids=[*PRESETS, "switched"])
def test_every_parameter_has_a_row_and_the_total_is_stated(config):
    abstract = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    axes = jax.tree.leaves(param_axes(config), is_leaf=lambda leaf: isinstance(leaf, jax.sharding.PartitionSpec))
    lines = parameter_overview(config).splitlines()
    rows = {cells[0]: cells[1:] for cells in ([c.strip() for c in line.split("|")[1:-1]] for line in lines) if cells}
    header = rows.pop("Name")
    assert len(rows) == len(leaves)
    for (path, leaf), names in zip(leaves, axes, strict=True):
        row = dict(zip(header, rows["/".join(key.key for key in path)], strict=True))
        assert row["Shape"] == str(leaf.shape)
        assert row["Dtype"] == "float32"
        assert row["Size"].replace(",", "") == str(leaf.size)
        assert all(str(name) in row["Sharding"] for name in names)
    assert f"Total: {config.num_params():,}" in lines[-1]
