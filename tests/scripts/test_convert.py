"""convert.py: folders in and out, used and trained on, and what it refuses with nothing left behind."""

import json
import shutil
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from parallax.run_folder import load_run
from scripts import convert, generate, train
from tests.parallax.interop.folders import SMALL, random_tensors, write_folder
from tests.parallax.interop.tokenizers import TEXT

TRAIN = [
    *("--dataset", "text.txt", "--init-from", "run", "--batch-size", "16", "--seq-len", "16"),
    *("--steps", "4", "--learning-rate", "1e-3", "--output-dir"),
]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hugging Face folder of a small llama, made once."""
    folder = tmp_path_factory.mktemp("hub") / "hf"
    write_folder(folder, files=2)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    return folder


@pytest.fixture
def call(hub, tmp_path, monkeypatch, capsys):
    """Calls a script's main beside `hf` and `text.txt`: (exit status, standard output, lines of standard error)."""
    shutil.copytree(hub, tmp_path / "hf")
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)

    def call(script, *args):
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, args)])
        try:
            status = script.main()
        except SystemExit as exit:
            status = exit.code
        out, err = capsys.readouterr()
        return status, out, err.splitlines()

    return call


def tensors_of(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_in_and_out_again(call, tmp_path):
    status, out, err = call(convert, "import", "hf", "run")
    assert (status, out, len(err)) == (0, "", 1)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoints",
        "config.json",
        "tokenizer.json",
    ]
    run = load_run("run")
    assert (run.step, run.config.vocab_size, run.tokenizer.end_ids) == (0, 301, (1, 2, 0))
    assert run.settings["imported"] == {"folder": "hf", "model_type": "llama"}
    assert call(convert, "export", "run", "back")[0] == 0
    before, after = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)
    assert json.loads((tmp_path / "back/tokenizer.json").read_text()) == json.loads(
        (tmp_path / "hf/tokenizer.json").read_text()
    )
    values = json.loads((tmp_path / "back/config.json").read_text())
    assert (values["bos_token_id"], values["eos_token_id"]) == (0, [1, 2, 0])
    settings = json.loads((tmp_path / "back/tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"]) == ("<|begin_of_text|>", "<|end_of_text|>")
    assert call(convert, "export", "back", "again")[0] == 2
    status, _, err = call(convert, "import", "back", "again")
    assert status == 0, err


def test_what_no_architecture_computes_is_refused_before_parameters_are_read(call, tmp_path):
    assert call(convert, "import", "hf", "run")[0] == 0
    settings = json.loads((tmp_path / "run/config.json").read_text())
    settings["model"]["logit_softcap"] = 30.0
    (tmp_path / "run/config.json").write_text(json.dumps(settings))
    shutil.rmtree(tmp_path / "run/checkpoints")
    status, _, err = call(convert, "export", "run", "back")
    assert (status, len(err)) == (2, 1), err
    assert "logit_softcap=30.0 has no place" in err[0]
    assert not (tmp_path / "back").exists()


def test_a_mesh_reads_and_writes_the_same(call, tmp_path):
    assert call(convert, "import", "hf", "run", "--mesh", "fsdp=2,tensor=4")[0] == 0
    assert call(convert, "export", "run", "back", "--mesh", "fsdp=8", "--max-file-gb", "4e-5")[0] == 0
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    after = tensors_of(tmp_path / "back")
    for name, tensor in tensors_of(tmp_path / "hf").items():
        np.testing.assert_array_equal(after[name], tensor)


def test_generate_continues_a_prompt_until_an_end(call, monkeypatch, tmp_path):
    """The tables are made so that the id after any other is 2, an end that is not the first."""
    tensors = random_tensors(SMALL)
    for name in tensors:
        if "o_proj" in name or "down_proj" in name:
            tensors[name][:] = 0
    tensors["model.embed_tokens.weight"][:] = 1
    tensors["model.norm.weight"][:] = 1
    tensors["lm_head.weight"][:] = np.arange(301)[:, None] == 65
    write_folder(tmp_path / "hf2", tensors=tensors)
    assert call(convert, "import", "hf2", "run")[0] == 0
    flags = ("--checkpoint", "run", "--prompt", "To be", "--max-tokens", "9", "--temperature", "0")
    monkeypatch.setattr(sys, "stdout", _Bytes())
    assert call(generate, *flags)[2][1].startswith("speed     9 tokens in")
    tensors["lm_head.weight"][:] = np.arange(301)[:, None] == 2
    write_folder(tmp_path / "hf3", tensors=tensors)
    assert call(convert, "import", "hf3", "run3")[0] == 0
    assert call(generate, "--checkpoint", "run3", *flags[2:])[2][1].startswith("speed     1 tokens in")


class _Bytes:
    """A standard output that takes text as bytes, as generate.py writes it."""

    def __init__(self):
        self.buffer = self

    def write(self, content):
        return len(content)

    def flush(self):
        pass

    def isatty(self):
        return False


@pytest.mark.parametrize("layout", [("--strategy", "pmap"), ("--mesh", "fsdp=4,tensor=2")])
def test_an_imported_model_trains_on_and_goes_back(call, tmp_path, layout):
    assert call(convert, "import", "hf", "run")[0] == 0
    assert call(train, *TRAIN, "alone")[0] == 0
    status, _, err = call(train, *TRAIN, "trained", *layout)
    assert status == 0, err
    assert any(line.startswith("model     run: ") for line in err)
    assert "from      step 0 of run" in err
    alone, trained = load_run("alone"), load_run("trained")
    # The same batches from the same parameters: what rounding leaves of four steps at this rate.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), alone.params, trained.params)
    first = load_run("run").params["blocks"]["mlp"]["up"]
    assert np.abs(trained.params["blocks"]["mlp"]["up"] - first).max() > 1e-4
    assert trained.tokenizer.to_json() == load_run("run").tokenizer.to_json()
    assert call(convert, "export", "trained", "back")[0] == 0
    np.testing.assert_array_equal(
        tensors_of(tmp_path / "back")["model.layers.1.mlp.up_proj.weight"].T,
        trained.params["blocks"]["mlp"]["up"][1],
    )
    status, _, err = call(train, "--resume", "--output-dir", "trained", "--steps", "6", *layout)
    assert status == 0, err
    assert any(line.startswith("resume    from step 4") for line in err)


def test_any_run_goes_out(call, tmp_path):
    """One that was trained here, with its own tokenizer."""
    flags = ("--model.num-layers", "1", "--model.embed-dim", "32", "--steps", "1", "--output-dir", "mine")
    assert call(train, "--dataset", "text.txt", "--batch-size", "8", "--seq-len", "8", *flags)[0] == 0
    assert call(convert, "export", "mine", "hf-mine", "--dtype", "bfloat16")[0] == 0
    assert call(convert, "import", "hf-mine", "again")[0] == 2  # characters spell no other text
    assert tensors_of(tmp_path / "hf-mine")["model.norm.weight"].dtype.name == "bfloat16"


def _without(name):
    return lambda hf: (hf / name).unlink()


def _config(**changes):
    def change(hf):
        (hf / "config.json").write_text(json.dumps({**SMALL, **changes}))

    return change


@pytest.mark.parametrize(
    ("change", "args", "message"),
    [
        (None, ("import", "nowhere", "run"), "nowhere must be a Hugging Face folder and is none;"),
        (None, ("import", "hf", "hf"), "folder hf exists already; choose another"),
        (None, ("import", "hf", "gs://bucket/run"), "folder gs://bucket/run must be local"),
        (None, ("import", "hf", "run", "--mesh", "fsdp=3"), "fsdp=3"),
        (_without("config.json"), ("import", "hf", "run"), "config.json must be a JSON file (No such file"),
        (_without("tokenizer.json"), ("import", "hf", "run"), "hf holds no tokenizer.json; load"),
        (_config(model_type="gpt2"), ("import", "hf", "run"), "model_type='gpt2'"),
        (
            _config(num_hidden_layers=4),
            ("import", "hf", "run"),
            "tensor model.layers.3.input_layernorm.weight is",
        ),
        (
            _config(vocab_size=200),
            ("import", "hf", "run"),
            "tokenizer.json: its id 299 must be from 0 to 199",
        ),
        (
            _config(eos_token_id=[[1]]),
            ("import", "hf", "run"),
            "eos_token_id=[[1], 2, 0] of hf must be one id",
        ),
        (None, ("export", "hf", "new/folder/out"), "hf/config.json must hold an object with a model config"),
        (None, ("import", "hf", "text.txt/run"), "text.txt/run cannot be written (Not a directory); choose"),
        (_config(eos_token_id=999), ("import", "hf", "run"), "tokenizer.json: its id 999 must be"),
        (None, ("export", "nowhere", "out"), "run folder nowhere has no readable config.json"),
        (None, ("export", "hf", "out", "--max-file-gb", "0"), "--max-file-gb 0.0 must be positive; try 5"),
        (None, ("export", "hf", "out", "--dtype", "int8"), "int8"),
        (None, ("convert", "hf", "out"), "command 'convert' is not one of import, export; see"),
        (None, ("import", "hf"), "--help"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(call, tmp_path, change, args, message):
    if change is not None:
        change(tmp_path / "hf")
    before = sorted(tmp_path.iterdir())
    status, out, err = call(convert, *args)
    assert (status, out, len(err)) == (2, "", 1), err
    assert err[0].startswith("error: ")
    assert message in err[0]
    assert "; " in err[0], "no remedy"
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--init-from", "nowhere", "--output-dir", "x"), "run folder nowhere has no readable config.json"),
        (("--init-from", "run", "--config", "nano"), "--config nano does not go with --init-from"),
        (("--init-from", "run", "--tokenizer", "byte"), "--tokenizer byte does not go with --init-from"),
        (("--init-from", "run", "--seq-len", "999"), "seq_len=999 must not exceed max_seq_len=128"),
        (
            ("--init-from", "run", "--model.mlp-dim", "64", "--seq-len", "16", "--output-dir", "x"),
            "params/blocks",
        ),
        (
            ("--resume", "--output-dir", "run"),
            "run was imported and has no training to resume; try --init-from",
        ),
    ],
)
def test_bad_input_to_train(call, args, message):
    assert call(convert, "import", "hf", "run")[0] == 0
    status, _, err = call(train, "--dataset", "text.txt", *args)
    errors = [line for line in err if line.startswith("error: ")]
    assert (status, len(errors)) == (2, 1), err
    assert message in errors[0]


def test_help_answers(call):
    status, out, _ = call(convert, "--help")
    assert status == 0
    assert "import HF_FOLDER RUN" in out
