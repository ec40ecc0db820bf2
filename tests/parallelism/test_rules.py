"""A spec follows its rules to the letter, or is refused with a remedy that works."""

import itertools
import re

import numpy as np
import pytest
from jax.sharding import PartitionSpec

from parallax.axes import LOGICAL_AXES
from parallelism.rules import MESH_AXES, RULE_SETS, check_activations, check_rules, partition_spec

RULES = {"batch": ("data", "fsdp"), "embed": ("fsdp",), "mlp": ("data",)}
MESHES = [{"data": d, "fsdp": f} for d, f in itertools.product((1, 2, 3, 4), repeat=2)]


@pytest.mark.parametrize("name", RULE_SETS)
def test_rule_sets_use_known_names(name):
    assert check_rules(RULE_SETS[name]) is RULE_SETS[name]
    assert set(RULE_SETS[name]) <= LOGICAL_AXES


@pytest.mark.parametrize(
    ("rules", "wrong", "known"),
    [({"embedding": ("fsdp",)}, "embedding", "embed"), ({"embed": ("fsdp", "model")}, "model", MESH_AXES[0])],
)
def test_unknown_names_are_refused_with_those_that_are_known(rules, wrong, known):
    with pytest.raises(ValueError, match=f"{wrong!r} names no .* axis; known are .*{known}") as caught:
        check_rules(rules)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "shape", "mesh", "expected"),
    [
        (("batch", "length"), (8, 3), {"data": 2, "fsdp": 4}, (("data", "fsdp"), None)),
        (("batch", "length"), (8, 3), {"data": 1, "fsdp": 4}, ("fsdp", None)),
        (("batch", "length"), (7, 3), {"data": 1, "fsdp": 1}, (None, None)),
        (("vocab", "embed"), (11, 8), {"data": 2, "fsdp": 4}, (None, "fsdp")),
        (("layers", "embed", "mlp"), (3, 8, 6), {"data": 2, "fsdp": 4}, (None, "fsdp", "data")),
        ((None, None), (5, 5), {"data": 2, "fsdp": 4}, (None, None)),
        ((), (), {"data": 2, "fsdp": 4}, ()),
    ],
)
def test_specs_of_a_few_arrays(names, shape, mesh, expected):
    assert partition_spec(names, shape, RULES, mesh) == PartitionSpec(*expected)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_dim_is_cut_as_its_rule_says_or_refused_with_a_remedy_that_works(mesh):
    """Every size of a dim that two mesh axes split, and of one that a single axis splits."""
    for name, size in itertools.product(("batch", "embed"), range(1, 26)):
        pieces = np.prod([mesh[axis] for axis in RULES[name]])
        if size % pieces == 0:
            (entry,) = partition_spec((name,), (size,), RULES, mesh)
            cut = entry if isinstance(entry, tuple) else (entry,) if entry else ()
            assert cut == tuple(axis for axis in RULES[name] if mesh[axis] > 1)
            continue
        with pytest.raises(ValueError, match=f"{name}={size} must be divisible by") as caught:
            partition_spec((name,), (size,), RULES, mesh)
        message = str(caught.value)
        assert "\n" not in message
        larger = int(re.search(rf"{name}=(\d+)$", message)[1])
        assert size < larger < size + pieces
        partition_spec((name,), (larger,), RULES, mesh)
        other = re.search(r"try a mesh with (\w+)=(\d+) or", message)
        if other:
            partition_spec((name,), (size,), RULES, mesh | {other[1]: int(other[2])})
        assert other or name == "batch", "an axis that splits a dim alone can always be smaller"


def test_one_mesh_axis_for_two_dims_of_an_array_is_refused():
    with pytest.raises(ValueError, match="'fsdp' cannot split both 'batch' and 'embed' of one array; remove"):
        partition_spec(("batch", "embed"), (8, 8), RULES, {"data": 2, "fsdp": 4})


def test_rules_collide_only_over_axes_that_split():
    """On a mesh without that axis the same rules are good."""
    spec = partition_spec(("batch", "embed"), (8, 8), RULES, {"data": 8, "fsdp": 1})
    assert spec == PartitionSpec("data", None)
    assert partition_spec(("batch", "embed"), (8, 8), RULES, {"data": 8}) == spec


def test_the_same_dim_twice_is_refused():
    with pytest.raises(ValueError, match="cannot split both"):
        partition_spec(("embed", "embed"), (8, 8), RULES, {"data": 2, "fsdp": 4})


def test_names_must_be_as_many_as_dims():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        partition_spec(("embed",), (8, 8), RULES, {"fsdp": 4})


def test_tokens_and_features_of_an_activation_are_split_by_different_axes():
    rules = {"batch": ("data", "fsdp"), "length": ("sequence",), "act_mlp": ("tensor", "fsdp")}
    check_activations(rules, {"data": 4, "tensor": 2})
    with pytest.raises(ValueError, match="'fsdp' cannot split both 'batch' and 'act_mlp' of one array; remove"):
        check_activations(rules, {"data": 4, "fsdp": 2})
    with pytest.raises(ValueError, match="'data' cannot split both 'batch' and 'length' of one array"):
        check_activations({"batch": ("data",), "length": ("data",)}, {"data": 8})
