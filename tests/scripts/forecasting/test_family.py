import dataclasses

import pytest

from parallax.config import GEMMA3_4B_CONFIG, GPT_OSS_20B_CONFIG, LLAMA_1B_CONFIG, NANO_CONFIG, QWEN3_30B_A3B_CONFIG
from scripts.forecasting.family import at_share, below, flops_of, size_of, with_mup

LARGE = (LLAMA_1B_CONFIG, GEMMA3_4B_CONFIG, QWEN3_30B_A3B_CONFIG, GPT_OSS_20B_CONFIG)


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
    uneven = dataclasses.replace(NANO_CONFIG, mlp_dim=100)
    assert at_share(uneven, 1.0) == uneven


def test_sizes_below_differ_and_ascend():
    sizes = below(LLAMA_1B_CONFIG, 4, 0.5)
    assert [config.embed_dim for config in sizes] == sorted({config.embed_dim for config in sizes})
    assert sizes[-1].embed_dim == 1024
    with pytest.raises(ValueError, match="must differ, and 4 do; choose a larger"):
        below(NANO_CONFIG, 6, 1.0)


def test_counts_leave_the_tables_out():
    assert size_of(NANO_CONFIG) == NANO_CONFIG.num_params() - 72 * 128
    untied = dataclasses.replace(NANO_CONFIG, tie_embeddings=False)
    assert size_of(untied) == size_of(NANO_CONFIG)
    assert flops_of(NANO_CONFIG, 128) > 6 * size_of(NANO_CONFIG)


def test_mup_has_another_member_as_its_base():
    small = at_share(LLAMA_1B_CONFIG, 0.125)
    own = with_mup(LLAMA_1B_CONFIG, small).parametrization
    assert (own.kind, own.base_width, own.base_depth) == ("mup", small.embed_dim, small.num_layers)
