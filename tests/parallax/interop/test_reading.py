"""Parameters from files: as they were written, wherever they are placed, and nothing but what is needed."""

import json
import math

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from parallax.config import TransformerConfig
from parallax.interop.hf_config import config_from_hf
from parallax.interop.reading import HEAD, INDEX, SINGLE, TensorFiles, check_tensors, read_params
from parallax.model.transformer import init_params
from scripts.common.placement import place_model
from tests.parallax.interop.folders import BFLOAT16, SMALL, random_tensors, write_folder

CONFIG = config_from_hf(SMALL)


def abstract(config=CONFIG):
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)
    return True


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16], ids=str)
@pytest.mark.parametrize("files", [1, 3])
def test_tensors_become_parameters(tmp_path, dtype, files):
    tensors = write_folder(tmp_path, tensors=random_tensors(SMALL, dtype=dtype), files=files)
    params = read_params(TensorFiles(tmp_path), CONFIG, abstract())
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), abstract()
    )
    params = jax.device_get(params)

    def tensor(name):
        return np.asarray(tensors[name], np.float32)

    D, H, K = CONFIG.embed_dim, CONFIG.num_heads, CONFIG.head_dim
    for layer in range(CONFIG.num_layers):
        prefix, block = (f"model.layers.{layer}.", jax.tree.map(lambda leaf, at=layer: leaf[at], params["blocks"]))
        query = tensor(prefix + "self_attn.q_proj.weight").T.reshape(D, H, K)
        np.testing.assert_array_equal(block["attention"]["query"], query)
        out = tensor(prefix + "self_attn.o_proj.weight").T.reshape(H, K, D)
        np.testing.assert_array_equal(block["attention"]["out"], out)
        np.testing.assert_array_equal(block["mlp"]["down"], tensor(prefix + "mlp.down_proj.weight").T)
        np.testing.assert_array_equal(block["mlp_norm"]["scale"], tensor(prefix + "post_attention_layernorm.weight"))
    table = np.asarray(params["output"]["table"])
    np.testing.assert_array_equal(table[:301], tensor("lm_head.weight"))
    np.testing.assert_array_equal(table[301:], 0)  # padding


@pytest.mark.parametrize(
    ("mesh", "piece"), [("data=8", 2**22), ("fsdp=8", 2**22), ("data=2,fsdp=2,tensor=2", 50)], ids=str
)
def test_a_mesh_is_filled_shard_by_shard(tmp_path, mesh, piece):
    write_folder(tmp_path)
    whole = read_params(TensorFiles(tmp_path), CONFIG, abstract())
    target = place_model(CONFIG, mesh, batch_size=8, seq_len=8).abstract().params
    files = Counting(tmp_path)
    params = read_params(files, CONFIG, target, piece)
    assert same(params, whole)
    jax.tree.map(lambda leaf, wanted: _require(leaf.sharding == wanted.sharding), params, target)
    # A vector may be whole on several groups of devices; all else is read once, whoever shares or repeats it.
    parameters = sum(math.prod(files.shape(name)) for name in files.names)
    assert parameters <= files.elements <= 1.1 * parameters
    a_row = CONFIG.num_heads * CONFIG.head_dim * CONFIG.head_dim
    assert files.largest <= max(piece, a_row)


def _require(holds):
    assert holds


class Counting(TensorFiles):
    """Files that note how much is read of them."""

    elements = largest = 0

    def read(self, name, bounds):
        block = super().read(name, bounds)
        self.elements += block.size
        self.largest = max(self.largest, block.size)
        return block


def test_old_frequencies_and_a_second_copy_of_a_tied_table_are_no_parameters(tmp_path):
    values = {**SMALL, "tie_word_embeddings": True}
    tensors = random_tensors(values)
    more = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
        "lm_head.weight": tensors["model.embed_tokens.weight"].copy(),
    }
    write_folder(tmp_path, values, tensors | more)
    config = config_from_hf(values)
    params = read_params(TensorFiles(tmp_path), config, abstract(config))
    assert "output" not in params
    more["lm_head.weight"][300, 47] += 1
    write_folder(tmp_path, values, tensors | more)
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight.*; set tie"):
        read_params(TensorFiles(tmp_path), config, abstract(config))


TIED = {**SMALL, "tie_word_embeddings": True}
TABLE = "model.embed_tokens.weight"
ALONE = {
    "the head": lambda tensors: {HEAD if name == TABLE else name: tensor for name, tensor in tensors.items()},
    "no head": lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items()},
    "no head, old": lambda tensors: (
        ALONE["no head"](tensors)
        | {"rotary_emb.inv_freq": np.ones(4, np.float32), "layers.0.self_attn.rotary_emb.inv_freq": np.ones(4)}
    ),
}
"""Names under which a tied model is also saved: by safetensors' save_model, and as a LlamaModel."""


@pytest.mark.parametrize("names", ALONE)
@pytest.mark.parametrize("files", [1, 3])
def test_a_tied_model_is_read_under_every_set_of_names(tmp_path, names, files):
    tensors = write_folder(tmp_path / "usual", TIED)
    write_folder(tmp_path / "other", TIED, ALONE[names](tensors), files)
    config = config_from_hf(TIED)
    usual, other = (
        read_params(TensorFiles(tmp_path / name), config, abstract(config), 100) for name in ("usual", "other")
    )
    assert same(other, usual)
    np.testing.assert_array_equal(np.asarray(other["embedding"]["table"])[:301], tensors[TABLE])


def test_the_single_file_comes_before_an_index_and_the_files_before_what_the_index_says_of_them(tmp_path):
    tensors = write_folder(tmp_path, files=3)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"].pop("model.norm.weight")
    index["weight_map"]["model.layers.0.attention.bias"] = "model-00001-of-00003.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    whole = read_params(TensorFiles(tmp_path), CONFIG, abstract())
    np.testing.assert_array_equal(whole["final_norm"]["scale"], tensors["model.norm.weight"])
    index["weight_map"]["model.norm.weight"] = "model-00004-of-00003.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    save_file(tensors, tmp_path / SINGLE)
    assert same(read_params(TensorFiles(tmp_path), CONFIG, abstract()), whole)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adapter_model.safetensors", "an adapter; import it with --base RUN, the run of its model"),
        ("pytorch_model.bin", "pickled weights; load the model with transformers and save it"),
        ("pytorch_model-00001-of-00002.bin", "pickled weights;"),
        ("consolidated.00.safetensors", "weights under the names of their first authors;"),
        ("model.fp16.safetensors", "another edition of the weights; rename it"),
        ("llama.Q4_K_M.gguf", "weights for llama.cpp;"),
    ],
)
def test_other_files_are_called_what_they_are(tmp_path, refused, name, words):
    (tmp_path / name).touch()
    with refused(f"holds neither {SINGLE} nor {INDEX} but {name}, which is {words}"):
        TensorFiles(tmp_path)


def test_other_names_are_called_what_they_are(tmp_path, refused):
    write_folder(tmp_path, tensors={"tok_embeddings.weight": np.ones((3, 4), np.float32)})
    with refused("tensors such as tok_embeddings.weight and none such as model.embed_tokens.weight", "save_pretrained"):
        check_tensors(TensorFiles(tmp_path), CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "tensor model.norm.weight is missing in"),
        (lambda t: t.pop("lm_head.weight"), "restore it, or set tie_word_embeddings to true in config.json if"),
        (
            lambda t: t.update({"model.layers.0.mlp.experts.weight": np.ones(3, np.float32)}),
            "tensor model.layers.0.mlp.experts.weight of",
        ),
        (
            lambda t: t.update({"model.layers.3.input_layernorm.weight": np.ones(48, np.float32)}),
            "tensor model.layers.3.input_layernorm.weight of",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.ones(47, np.float32)}),
            "tensor model.norm.weight has shape [47] and must have [48] by config.json;",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.ones(48, np.int8)}),
            "tensor model.norm.weight has dtype I8, which is not one of F32, F16, BF16;",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, change, message, refused):
    tensors = random_tensors(SMALL)
    change(tensors)
    write_folder(tmp_path, tensors=tensors)
    with refused(message, "; "):
        check_tensors(TensorFiles(tmp_path), CONFIG)


def test_every_parameter_of_any_config_is_a_tensor():
    from parallax.interop.llama import tensors
    from tests.configs import random_config

    for config in (TransformerConfig(), *map(random_config, range(8))):
        leaves = jax.tree_util.tree_flatten_with_path(abstract(config))[0]
        found = {tuple(key.key for key in path): leaf.shape for path, leaf in leaves}
        wanted = {}
        for entry in tensors(config):
            shape = (config.table_rows, *entry.shape[1:]) if entry.path[-1] == "table" else entry.shape
            wanted[entry.path] = (len(entry.numbers), *shape) if entry.is_stacked else shape
        assert found == wanted


FIRST = "model-00001-of-00002.safetensors"


def _drop_file(folder):
    (folder / FIRST).unlink()


def _cut_file(folder):
    content = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes(content[: len(content) // 2])


def _append(folder):
    (folder / FIRST).write_bytes((folder / FIRST).read_bytes() + b"more")


def _add_to_file(folder):
    """A second copy of a tensor, in the other file."""
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    (other,) = set(names.values()) - {names["model.norm.weight"]}
    held = load_file(folder / other)
    save_file({**held, "model.norm.weight": next(iter(held.values()))}, folder / other)


def _name_twice(folder):
    """A tensor under its name in a model and under that in one without a head."""
    save_file({**load_file(folder / FIRST), "norm.weight": np.ones(48, np.float32)}, folder / FIRST)


def _reindex(change):
    def damage(folder):
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop_file, f"{FIRST} is not a whole safetensors file"),
        (_cut_file, f"{FIRST} is not a whole safetensors file"),
        (_reindex(lambda names: names.update(more=5)), "has more in 5, which must be a safetensors file"),
        (
            _reindex(lambda names: names.update(more=f"../{FIRST}")),
            f"has more in '../{FIRST}', which must be a safetensors file beside it",
        ),
        (_add_to_file, "tensor model.norm.weight is in"),
        (_name_twice, "tensor model.norm.weight is in"),
        (_append, f"{FIRST} is not a whole safetensors file"),
        (lambda folder: (folder / INDEX).write_text("{}"), f"{INDEX} must hold a weight_map"),
        (lambda folder: (folder / INDEX).unlink(), "holds neither model.safetensors nor"),
    ],
)
def test_damage_is_named(tmp_path, damage, message, refused):
    write_folder(tmp_path, files=2)
    damage(tmp_path)
    with refused(message, "; "):
        TensorFiles(tmp_path)
