"""MaxText configs: what is taken over, what is named, what is refused."""

import pytest

from scripts.planning.maxtext import read_maxtext

SIZES = """
base_emb_dim: 512
base_num_query_heads: 8
base_num_kv_heads: 4
base_num_decoder_layers: 6
base_mlp_dim: 2048
head_dim: 64
vocab_size: 8192
"""


@pytest.fixture
def config(tmp_path):
    """Writes a file beside the others and gives its path."""

    def config(text, name="mine.yml"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return str(path)

    return config


def test_sizes_batch_length_parallelisms_and_remat_are_taken_over(config):
    text = "per_device_batch_size: 4.0\nmax_target_length: 1024\nici_fsdp_parallelism: 16\nici_tensor_parallelism: 4\n"
    found = read_maxtext(config(f"{SIZES}{text}dcn_data_parallelism: 2\nremat_policy: minimal\nuse_qk_norm: true\n"))
    model = found.model
    assert (model.embed_dim, model.num_heads, model.num_kv_heads, model.head_dim) == (512, 8, 4, 64)
    assert (model.num_layers, model.mlp_dim, model.vocab_size) == (6, 2048, 8192)
    assert (model.qk_norm, model.tie_embeddings) == (True, False)
    assert (found.per_device, found.seq_len, found.dtype, found.remat) == (4.0, 1024, "bfloat16", "dots")
    assert found.layout(128) == {"fsdp": 16, "tensor": 4, "data": 2}
    assert found.notes == []


def test_words_count_more_than_the_model_and_that_more_than_the_file_and_its_base(config):
    config(f"{SIZES}rope_max_timescale: 500_000\nper_device_batch_size: 2.0\n", "base.yml")
    config("base_emb_dim: 1024\nbase_mlp_dim: 4096\nhead_dim: 128\n", "models/llama-x.yml")
    path = config("base_config: base.yml\nmodel_name: llama-x\nmax_target_length: 256\n")
    found = read_maxtext(path, ["max_target_length=512", "ici_fsdp_parallelism=8"])
    assert (found.seq_len, found.per_device, found.model.rope_theta) == (512, 2.0, 500_000)
    assert (found.model.embed_dim, found.model.head_dim, found.model.num_layers) == (1024, 128, 6)
    assert read_maxtext(path, ["base_emb_dim=256"]).model.embed_dim == 256
    assert read_maxtext(path, ["rope_max_timescale=7"]).model.rope_theta == 7
    assert found.layout(8) == {"fsdp": 8}
    with pytest.raises(ValueError, match="are for 8 devices and the topology has 16; set one of them to -1"):
        found.layout(16)


def test_what_is_left_goes_to_the_axis_of_minus_one(config):
    found = read_maxtext(config(f"{SIZES}ici_fsdp_parallelism: -1\nici_context_parallelism: 2\n"))
    assert found.layout(64) == {"fsdp": 32, "sequence": 2}
    assert read_maxtext(config(SIZES)).layout(64) == {"fsdp": 64}  # as its base.yml says


def test_a_model_that_a_word_names_replaces_the_sizes_of_base_yml(config):
    """base.yml has sizes of its own, and gives what is left to data across slices and to fsdp within them."""
    text = f"{SIZES}model_name: default\ndcn_data_parallelism: -1\nici_fsdp_parallelism: -1\nsteps: 10\n"
    path = config(text, "base.yml")
    config("base_emb_dim: 1024\nmtp: x\n", "models/llama-x.yml")
    found = read_maxtext(path, ["model_name=llama-x", "profiler=xplane"])
    assert (found.model.embed_dim, found.model.mlp_dim) == (1024, 2048)
    assert found.layout(64) == {"fsdp": 64}
    assert found.layout(64, slices=2) == {"fsdp": 32, "data.dcn": 2}
    assert found.notes == ["fields that change no plan, or have no counterpart: profiler, mtp"]
    with pytest.raises(ValueError, match=r"dcn parallelisms data=2 .* are for 2 slices and the topology has 4; try"):
        read_maxtext(path, ["dcn_data_parallelism=2"]).layout(64, slices=4)
    with pytest.raises(ValueError, match="tensor crosses slices"):
        read_maxtext(path, ["dcn_data_parallelism=1", "dcn_tensor_parallelism=2"]).layout(64, slices=2)


def test_experts_are_taken_over(config):
    text = "num_experts: 8\nnum_experts_per_tok: 2\nbase_moe_mlp_dim: 256\ndecoder_block: mixtral\n"
    found = read_maxtext(config(f"{SIZES}{text}ici_expert_parallelism: 4\ncapacity_factor: 1.25\n"))
    experts = found.model.experts
    assert (experts.num_experts, experts.experts_per_token, experts.mlp_dim) == (8, 2, 256)
    assert found.parallelisms["expert"] == 4
    assert found.notes == ["capacity_factor=1.25 has no counterpart; no token is dropped here"]
    assert read_maxtext(config(f"{SIZES}num_experts: 1\n")).model.experts.num_experts == 0


def test_what_has_no_counterpart_is_named(config):
    text = "remat_policy: save_dot_except_mlp\nweight_dtype: bfloat16\nsteps: 10\nprofiler: xplane\n"
    remat, weights, fields = read_maxtext(config(SIZES + text)).notes
    assert "remat_policy=save_dot_except_mlp" in remat
    assert "weight_dtype=bfloat16" in weights
    assert fields.endswith("steps, profiler")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("decoder_block: gemma\n", "decoder_block=gemma has no counterpart here"),
        ("mlp_activations: [gelu, linear]\n", "mlp_activations=.* has no counterpart; try"),
        ("quantization: int8\n", "quantization=int8 has no counterpart; try"),
        ("mlp_activations: 5\n", "mlp_activations=5 has no counterpart; try"),
        ("attention_type: mla\n", "attention_type=mla has no counterpart; try"),
        ("mtp_num_layers: 1\n", "mtp_num_layers=1 has no counterpart; try"),
        ("per_device_batch_size: .inf\n", "per_device_batch_size=inf in the MaxText config must be a number; mend it"),
        ("ici_fsdp_parallelism: -2\n", "ici_fsdp_parallelism=-2 in the MaxText config must be at least 1, or -1"),
        ("ici_fsdp_parallelism: -1\nici_data_parallelism: -1\n", "take all twice; leave one -1"),
        ("5: 3\n", "must hold fields"),
        ("global_parameter_scale: 8\n", "global_parameter_scale=8 is not read; give"),
        ("ici_pipeline_parallelism: 4\n", "ici_pipeline_parallelism=4 has no counterpart here; try"),
        ("base_emb_dim: wide\n", "base_emb_dim='wide' in the MaxText config must be a whole number; mend it"),
        ("dtype: float16\n", "dtype=float16 in the MaxText config has no counterpart here; try bfloat16"),
        ("base_num_kv_heads: 3\n", "num_kv_heads=3 must divide num_heads=8; try 2"),
        ("- a\n- b\n", "is no YAML|must hold fields"),
        ("a: [1\n", "is no YAML .*; mend it"),
    ],
)
def test_what_changes_the_model_is_refused(config, text, message):
    with pytest.raises(ValueError, match=message):
        read_maxtext(config(SIZES + text))


def test_a_model_whose_file_is_not_there_is_refused(config):
    with pytest.raises(ValueError, match=r"model_name=llama3-8b names a file .*; put llama3-8b.yml there, or give"):
        read_maxtext(config(f"{SIZES}model_name: llama3-8b\n"))
    with pytest.raises(ValueError, match="must be a key=value; try"):
        read_maxtext(config(SIZES), ["nonsense"])
    with pytest.raises(ValueError, match=r"is no YAML .*; mend it"):
        read_maxtext(config(SIZES), ["mlp_activations=['silu"])
