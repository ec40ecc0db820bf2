"""Mixtures of experts of transformers compute the same here, and go back to it with the same bits.

Neither side adds losses of the router: transformers does so only where it is asked for router logits, and pools all
layers, where here each row of each layer has its own.
"""

import jax
import numpy as np
import pytest

from parallax.interop.folders import export_model, import_model
from parallax.model.transformer import TransformerLM
from parallax.run_folder import load_run
from tests.parallax.interop.models import make_model, random_rope, save
from tests.parallax.interop.test_llama_parity import LENGTH, greedy, greedy_of, load, logits_of

pytestmark = pytest.mark.external
FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")


def random_values(family, seed):
    """The arguments of a small config, every switch thrown at random; its windows are shorter than the texts."""
    rng = np.random.default_rng([seed, FAMILIES.index(family)])
    groups, head_dim, count = int(rng.integers(1, 4)), 2 * int(rng.integers(2, 9)), int(rng.integers(2, 9))
    heads = groups * int(rng.integers(1, 4))
    values = {
        "vocab_size": 300 + int(rng.integers(0, 20)),
        "hidden_size": heads * 4 * int(rng.integers(2, 6)),
        "intermediate_size": 4 * int(rng.integers(5, 22)),  # torch multiplies groups of whole 16 bytes alone
        "num_hidden_layers": int(rng.integers(1, 4)),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": 256,
        "rms_norm_eps": float(rng.choice([1e-5, 1e-6])),
        "tie_word_embeddings": bool(rng.integers(2)),
        "rope_parameters": random_rope(rng),
        "num_experts_per_tok": int(rng.integers(1, count + 1)),
        "num_local_experts" if family in ("mixtral", "gpt_oss") else "num_experts": count,
    }
    if family != "olmoe":
        values["head_dim"] = head_dim
    if family != "mixtral":
        values["attention_bias"] = bool(rng.integers(2))
    if family in ("qwen3_moe", "olmoe"):
        values["norm_topk_prob"] = bool(rng.integers(2))
    if family == "mixtral":
        values["sliding_window"] = [None, 5, 40][seed]
    if family == "qwen3_moe":
        values |= {"moe_intermediate_size": 4 * int(rng.integers(5, 22)), "use_sliding_window": False}
        # In the second model some layers have no experts, and in the third all but each other one.
        depth, own = values["num_hidden_layers"], [{}, {"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}]
        values |= {"num_hidden_layers": max(2, depth), **own[seed]} if seed else {}
    if family == "gpt_oss":
        values |= {"sliding_window": 7, "swiglu_limit": float(rng.choice([0.5, 7.0]))}
    return values


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_logits_continuations_and_the_way_back(family, seed, tmp_path):
    values = random_values(family, seed)
    dtype = ("float32", "bfloat16", "float16")[seed]
    theirs = make_model(family, values, seed, dtype, experts_implementation="eager")
    save(theirs, tmp_path / "hf", dtype, max_shard_size="50GB" if seed else "40KB")
    import_model(tmp_path / "hf", tmp_path / "run")
    run = load_run(tmp_path / "run")

    ids = np.random.default_rng(seed).integers(0, values["vocab_size"], (2, LENGTH)).astype(np.int32)
    expected = logits_of(theirs, ids)
    ours = jax.jit(lambda params, ids: TransformerLM.from_params(run.config, params)(ids)[0])(run.params, ids)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)

    prompts = ids[:, :20]
    np.testing.assert_array_equal(greedy(run, prompts), greedy_of(theirs, prompts))

    export_model(str(tmp_path / "run"), tmp_path / "back", max_file_bytes=10**9 if seed else 40_000)
    back = load(tmp_path / "back", experts_implementation="eager")
    states = theirs.state_dict(), back.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        np.testing.assert_array_equal(states[1][name].numpy(), tensor.numpy(), err_msg=name)
    np.testing.assert_array_equal(logits_of(back, ids), expected)
