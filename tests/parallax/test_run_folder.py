"""A run folder read back, and folders that are none refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallax import filling
from parallax.config import TransformerConfig, config_to_dict
from parallax.model.transformer import init_params
from parallax.run_folder import context_length, load_run, trained_length
from parallax.tokenizers.plain import ByteTokenizer
from parallax.tokenizers.registry import save_tokenizer
from parallax.training.checkpoint import Checkpointer

CONFIG = TransformerConfig(
    vocab_size=257, embed_dim=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8
)


def params(number):
    abstract = jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0)))
    return jax.tree.map(lambda leaf: jax.numpy.full(leaf.shape, number, leaf.dtype), abstract)


@pytest.fixture
def folder(tmp_path):
    """A run without checkpoints."""
    (tmp_path / "config.json").write_text(json.dumps({"model": config_to_dict(CONFIG), "train": {"steps": 20}}))
    save_tokenizer(ByteTokenizer(), tmp_path / "tokenizer.json")
    return tmp_path


def test_the_best_checkpoint_or_the_one_asked_for_is_read_and_nothing_changed(folder):
    checkpoints = Checkpointer(folder / "checkpoints", keep=3)
    for step, eval_loss in ((10, 2.0), (20, 1.0), (30, 3.0)):
        checkpoints.save(step, {"params": params(step), "other": np.zeros(3)}, {"progress": {}}, eval_loss)
    checkpoints.close()

    def contents():
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    before = contents()
    for asked, step in ((None, 20), (30, 30)):
        run = load_run(folder, asked)
        assert (run.config, run.tokenizer, run.step) == (CONFIG, ByteTokenizer(), step)
        assert run.settings["train"] == {"steps": 20}
        jax.tree.map(np.testing.assert_array_equal, run.params, params(step))
    assert contents() == before
    with pytest.raises(ValueError, match=r"checkpoint 15 is asked for, but .* has steps 10, 20, 30; name another"):
        load_run(folder, 15)


@pytest.mark.parametrize("saved", ["float32", "bfloat16"])
@pytest.mark.parametrize("asked", [None, "float32", "bfloat16"])
def test_parameters_are_made_in_the_dtype_in_which_they_are_held(folder, monkeypatch, saved, asked):
    rng, made = np.random.default_rng(0), []
    drawn = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), saved), params(0))
    checkpoints = Checkpointer(folder / "checkpoints", keep=1)
    checkpoints.save(1, {"params": drawn}, {"progress": {}})
    checkpoints.close()
    fill_shard = filling._fill_shard
    monkeypatch.setattr(filling, "_fill_shard", lambda *args: made.append(str(args[1])) or fill_shard(*args))
    run = load_run(folder, param_dtype=asked)
    held = asked or saved
    assert set(made) == {held}, "no array of another dtype was on a device"
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype(held)), run.params, drawn)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(run.prepared().params)} == {held}


def test_a_dtype_that_holds_no_parameters_is_refused(folder, refused):
    with refused("param_dtype='int8' is not one of float32, bfloat16; try bfloat16"):
        load_run(folder, param_dtype="int8")


@pytest.mark.parametrize(
    ("settings", "model", "trained", "context"),
    [
        ({"trained_length": 512, "train": {"seq_len": 64}}, {}, 512, 512),
        ({"train": {"seq_len": 64}}, {}, 64, 64),  # written before the length was
        ({"train": {"seq_len": 999}}, {"max_seq_len": 300}, 300, 300),
        ({"train": {}}, {}, 8192, 8192),
        ({"imported": {}}, {"max_seq_len": 4096}, 4096, 4096),
        ({"train": {"seq_len": 64}}, {"sliding_window": 48}, 64, 8192),
        ({"train": {"seq_len": 64}}, {"sliding_window": 64}, 64, 64),
    ],
)
def test_a_run_says_how_many_tokens_its_model_reads(settings, model, trained, context):
    settings |= {"model": config_to_dict(CONFIG.replace(**model))}
    assert (trained_length(settings), context_length(settings)) == (trained, context)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", None, "has no readable config.json (No such file or directory); give the folder that"),
        ("config.json", "{", "config.json must be JSON"),
        ("config.json", "[]", "config.json must hold an object with a model config; give the folder that"),
        ("config.json", '{"model": {"depth": 3}}', "unknown field depth; known are"),
        ("config.json", '{"model": {"vocab_size": 99}}', "vocab_size=99 in"),
        ("tokenizer.json", None, "tokenizer.json must be readable (No such file or directory); check the path"),
        ("tokenizer.json", "{}", "must be one that training wrote"),
        ("notes", "", "has no checkpoint; name another"),
    ],
)
def test_a_folder_that_is_no_run_is_refused(folder, name, text, message, refused):
    (folder / name).unlink(missing_ok=True)
    if text is not None:
        (folder / name).write_text(text)
    with refused(message, "; "):
        load_run(folder)
