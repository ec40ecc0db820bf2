"""Files as the safetensors library reads them."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from parallax.interop.hf_config import config_from_hf
from parallax.interop.reading import INDEX, TensorFiles, read_params
from parallax.interop.writing import write_params
from parallax.model.transformer import init_params
from scripts.common.placement import place_model
from tests.parallax.interop.folders import BFLOAT16, SMALL, write_folder

CONFIG = config_from_hf(SMALL)


@pytest.fixture
def read(tmp_path):
    """(tensors, parameters) of a folder, on the mesh that is asked for."""

    def read(mesh=""):
        tensors = write_folder(tmp_path / "hf")
        target = jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0)))
        if mesh:
            target = place_model(CONFIG, mesh, batch_size=8, seq_len=8).abstract().params
        return tensors, read_params(TensorFiles(tmp_path / "hf"), CONFIG, target)

    return read


@pytest.mark.parametrize(("mesh", "piece"), [("", 2**22), ("", 100), ("fsdp=2,tensor=4", 2**22)])
def test_what_was_read_is_written(tmp_path, read, mesh, piece):
    tensors, params = read(mesh)
    write_params(params, CONFIG, tmp_path, piece=piece)
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor)


def test_several_files_have_an_index_and_keep_to_the_limit(tmp_path, read):
    tensors, params = read()
    write_params(params, CONFIG, tmp_path, max_file_bytes=40_000)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    for file in sorted(set(index["weight_map"].values())):
        held = load_file(tmp_path / file)
        assert {name for name in tensors if index["weight_map"][name] == file} == held.keys()
        assert sum(tensor.nbytes for tensor in held.values()) <= 40_000 or len(held) == 1
    files = TensorFiles(tmp_path)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(files.read(name, (slice(None),) * tensor.ndim), tensor)


def test_bfloat16_is_rounded_once(tmp_path, read):
    _, params = read()
    params["final_norm"]["scale"] = params["final_norm"]["scale"] + np.float32(1 / 3)
    write_params(params, CONFIG, tmp_path, dtype="bfloat16")
    written = load_file(tmp_path / "model.safetensors")
    expected = np.asarray(params["final_norm"]["scale"]).astype(BFLOAT16)
    assert written["model.norm.weight"].dtype == BFLOAT16
    np.testing.assert_array_equal(written["model.norm.weight"].view(np.uint16), expected.view(np.uint16))
