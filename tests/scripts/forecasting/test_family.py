import dataclasses

import pytest

from parallax.config import PRESETS
from scripts.forecasting.family import at_share, below, flops_of, size_of, with_mup

NANO, LLAMA = PRESETS["nano"], PRESETS["llama-1b"]
LARGE = (LLAMA, PRESETS["gemma3-4b"], PRESETS["qwen3-30b-a3b"], PRESETS["gpt-oss-20b"])


@pytest.mark.parametrize("target", LARGE)
def test_the_target_is_a_member_of_its_family(target):
    assert at_share(target, 1.0) == target


@pytest.mark.parametrize("target", LARGE)
def test_smaller_members_keep_the_shape(target):
    small = at_share(target, 0.25)
    assert small.head_dim == target.head_dim
    assert small.num_heads % small.num_kv_heads == 0
    assert small.embed_dim / small.num_heads == pytest.approx(target.embed_dim / target.num_heads, rel=0.01)
    assert small.num_layers / target.num_layers == pytest.approx(0.25, abs=0.05)
    assert (small.pattern, small.experts.num_experts) == (target.pattern, target.experts.num_experts)


def test_a_target_of_uneven_sizes_is_a_member_too():
    uneven = dataclasses.replace(NANO, mlp_dim=100)
    assert at_share(uneven, 1.0) == uneven


def test_sizes_below_differ_and_ascend():
    sizes = below(LLAMA, 4, 0.5)
    assert [config.embed_dim for config in sizes] == sorted({config.embed_dim for config in sizes})
    assert sizes[-1].embed_dim == 1024
    with pytest.raises(ValueError, match="must differ, and 4 do; choose a larger"):
        below(NANO, 6, 1.0)


def test_counts_leave_the_tables_out():
    assert size_of(NANO) == NANO.num_params() - 72 * 128
    untied = dataclasses.replace(NANO, tie_embeddings=False)
    assert size_of(untied) == size_of(NANO)
    assert flops_of(NANO, 128) > 6 * size_of(NANO)


def test_mup_has_another_member_as_its_base():
    small = at_share(LLAMA, 0.125)
    own = with_mup(LLAMA, small).parametrization
    assert (own.kind, own.base_width, own.base_depth) == ("mup", small.embed_dim, small.num_layers)
