"""convert.py: folders in and out, used and trained on, and what it refuses with nothing left behind."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from parallax.run_folder import load_run
from parallax.tokenizers.hugging_face import HuggingFaceTokenizer
from parallax.tokenizers.plain import CharTokenizer
from parallax.tokenizers.registry import train_tokenizer
from scripts import convert, generate, train
from tests.parallax.interop.folders import BFLOAT16, random_tensors, write_folder
from tests.parallax.interop.folders import SMALL as LLAMA
from tests.parallax.interop.tokenizers import TEXT, byte_level
from tests.scripts.cases import read_cases
from tests.scripts.untrained import one_layer, write_untrained

SMALL = LLAMA | {"num_hidden_layers": 2}
TRAIN = [
    *("--dataset", "text.txt", "--init-from", "run", "--batch-size", "16", "--seq-len", "16"),
    *("--steps", "4", "--learning-rate", "1e-3", "--output-dir"),
]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hugging Face folder of a small llama, made once."""
    folder = tmp_path_factory.mktemp("hub") / "hf"
    write_folder(folder, SMALL, files=2)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    return folder


@pytest.fixture(autouse=True)
def files(hub, tmp_path):
    """`hf` and `text.txt` beside each other."""
    shutil.copytree(hub, tmp_path / "hf")
    (tmp_path / "text.txt").write_text(TEXT)


@pytest.fixture
def converted(call):
    """Converts, which must succeed; gives the lines of standard error."""

    def converted(*args):
        status, out, err = call(convert, *args)
        assert (status, out) == (0, ""), err
        return err.splitlines()

    return converted


def tensors_of(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_in_and_out_again(converted, tmp_path):
    assert len(converted("import", "hf", "run")) == 1
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoints", "config.json", "tokenizer.json"}
    run = load_run("run")
    assert (run.step, run.config.vocab_size, run.tokenizer.end_ids) == (0, 301, (1, 2, 0))
    assert run.settings["imported"] == {"folder": "hf", "model_type": "llama"}
    converted("export", "run", "back")
    before, after = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)
    given, found = (json.loads((tmp_path / name / "tokenizer.json").read_text()) for name in ("hf", "back"))
    assert found == given
    values = json.loads((tmp_path / "back/config.json").read_text())
    assert (values["bos_token_id"], values["eos_token_id"]) == (0, [1, 2, 0])
    settings = json.loads((tmp_path / "back/tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"]) == ("<|begin_of_text|>", "<|end_of_text|>")
    converted("import", "back", "again")


@pytest.mark.parametrize(("flags", "held"), [((), "bfloat16"), (("--param-dtype", "float32"), "float32")], ids=str)
def test_a_model_comes_in_as_it_is_or_as_asked_for(converted, tmp_path, flags, held):
    tensors = random_tensors(SMALL, dtype=BFLOAT16)
    write_folder(tmp_path / "narrow", SMALL, tensors)
    converted("import", "narrow", "run", *flags)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(load_run("run").params)} == {held}
    for dtype in ("float32", "bfloat16"):
        converted("export", "run", f"back-{dtype}", "--dtype", dtype)
        for name, tensor in tensors_of(tmp_path / f"back-{dtype}").items():
            assert tensor.dtype == dtype
            np.testing.assert_array_equal(tensor, tensors[name].astype(dtype))


def test_what_no_architecture_computes_is_refused_before_parameters_are_read(converted, refuses, tmp_path):
    converted("import", "hf", "run")
    settings = json.loads((tmp_path / "run/config.json").read_text())
    settings["model"]["logit_softcap"] = 30.0
    (tmp_path / "run/config.json").write_text(json.dumps(settings))
    shutil.rmtree(tmp_path / "run/checkpoints")
    refuses(convert, ["export", "run", "back"], "logit_softcap=30.0 is in no architecture of transformers")


def test_a_mesh_reads_and_writes_the_same(converted, tmp_path):
    converted("import", "hf", "run", "--mesh", "fsdp=2,tensor=4")
    converted("export", "run", "back", "--mesh", "fsdp=8", "--max-file-gb", "4e-5")
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    after = tensors_of(tmp_path / "back")
    for name, tensor in tensors_of(tmp_path / "hf").items():
        np.testing.assert_array_equal(after[name], tensor)


@pytest.mark.parametrize(("greedy", "drawn"), [(65, 9), (2, 1)])
def test_generate_continues_a_prompt_until_an_end(call, converted, tmp_path, greedy, drawn):
    """The tables are made so that one id comes after any other; 2 is an end that is not the first."""
    tensors = random_tensors(SMALL)
    for name in tensors:
        if "o_proj" in name or "down_proj" in name:
            tensors[name][:] = 0
    tensors["model.embed_tokens.weight"][:] = 1
    tensors["model.norm.weight"][:] = 1
    tensors["lm_head.weight"][:] = np.arange(301)[:, None] == greedy
    write_folder(tmp_path / "made", SMALL, tensors)
    converted("import", "made", "run")
    flags = ("--prompt", "To be", "--max-tokens", "9", "--temperature", "0")
    _, _, err = call(generate, "--checkpoint", "run", *flags)
    assert err.splitlines()[1].startswith(f"speed     {drawn} tokens in")


def test_an_imported_model_trains_on_and_goes_back(call, converted, tmp_path):
    converted("import", "hf", "run")
    assert call(train, *TRAIN, "alone")[0] == 0
    alone, first = load_run("alone"), load_run("run")
    for name, layout in (("pmap", ("--strategy", "pmap")), ("mesh", ("--mesh", "fsdp=4,tensor=2"))):
        status, _, err = call(train, *TRAIN, name, *layout)
        assert status == 0, err
        assert "\nmodel     run: " in err
        assert "from      step 0 of run" in err.splitlines()
        trained = load_run(name)
        # The same batches from the same parameters: what rounding leaves of four steps at this rate.
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), alone.params, trained.params)
        # What the model learned at 128 tokens is not lost in 4 steps at 16.
        assert [run.settings["trained_length"] for run in (trained, alone)] == [128, 128]
    up = trained.params["blocks"]["mlp"]["up"]
    assert np.abs(up - first.params["blocks"]["mlp"]["up"]).max() > 1e-4
    assert trained.tokenizer.to_json() == first.tokenizer.to_json()
    converted("export", "mesh", "back")
    exported = tensors_of(tmp_path / "back")["model.layers.1.mlp.up_proj.weight"]
    np.testing.assert_array_equal(exported.T, up[1])
    status, _, err = call(train, "--resume", "--output-dir", "mesh", "--steps", "5", "--strategy", "single")
    assert status == 0, err
    assert "\nresume    from step 4" in err
    assert load_run("mesh").settings["trained_length"] == 128


@pytest.mark.parametrize(
    ("files", "spec"), [(1, "char"), (2, "char"), (1, "byte"), (2, "bpe:300"), (1, "bpe:257"), (0, None)]
)
def test_any_run_goes_out_and_comes_back_as_it_was(converted, tmp_path, files, spec):
    """Of each tokenizer, that of an imported model too; rows of the tables that stand for no token go nowhere."""
    tokenizer = train_tokenizer(spec, [TEXT] * files) if spec else HuggingFaceTokenizer(byte_level()[0], 301, [1, 2])
    config = dataclasses.replace(one_layer(tokenizer.vocab_size), qk_norm=True, sliding_window=7)
    write_untrained(tmp_path / "mine", tokenizer, config, step=3)
    converted("export", "mine", "out")
    converted("import", "out", "again")
    mine, again = load_run("mine"), load_run("again")
    assert again.tokenizer.to_json() == mine.tokenizer.to_json()
    np.testing.assert_array_equal(again.tokenizer.encode(TEXT), mine.tokenizer.encode(TEXT))
    assert dataclasses.replace(again.config, max_seq_len=mine.config.max_seq_len) == mine.config
    for run in (mine, again):
        for name in ("embedding", "output"):
            run.params[name]["table"] = run.params[name]["table"][: tokenizer.vocab_size]
    jax.tree.map(np.testing.assert_array_equal, mine.params, again.params)


def test_what_the_model_begins_with_goes_along(converted, tmp_path):
    """Where the tokenizer puts nothing before a text, as that of SmolLM and Qwen."""
    (tmp_path / "hf/config.json").write_text(json.dumps(SMALL | {"bos_token_id": 0}))
    (tmp_path / "hf/tokenizer.json").write_text(json.dumps(byte_level(begin=None)[0]))
    converted("import", "hf", "run")
    converted("export", "run", "back")
    assert load_run("run").tokenizer.encode("").tolist() == [0]
    assert json.loads((tmp_path / "back/config.json").read_text())["bos_token_id"] == 0


def test_a_run_goes_out_in_bfloat16(converted, train_small, tmp_path):
    assert train_small("--steps", "1", "--output-dir", "mine")[0] == 0
    converted("export", "mine", "hf-mine", "--dtype", "bfloat16")
    assert tensors_of(tmp_path / "hf-mine")["model.norm.weight"].dtype.name == "bfloat16"


BAD = """
import nowhere run | nowhere must be a Hugging Face folder and is none;
import hf hf | folder hf exists already; choose another
import hf gs://bucket/run | folder gs://bucket/run must be local
import hf run --mesh fsdp=3 | fsdp=3
export hf new/folder/out | hf/config.json must hold an object with a model config
import hf text.txt/run | text.txt/run cannot be written (Not a directory); choose
export nowhere out | run folder nowhere has no readable config.json
export hf out --max-file-gb 0 | --max-file-gb 0.0 must be positive; try 5
export hf out --dtype int8 | int8
convert hf out | command 'convert' is not one of import, export; see
import hf | --help
"""


@pytest.mark.parametrize(("args", "words"), read_cases(BAD))
def test_bad_input_is_one_line_and_leaves_nothing(refuses, args, words):
    refuses(convert, args, *words)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2'"),
        ({"num_hidden_layers": 3}, "tensor model.layers.2.input_layernorm.weight is"),
        ({"vocab_size": 200}, "tokenizer.json: its id 299 must be from 0 to 199"),
        ({"eos_token_id": [[1]]}, "eos_token_id=[[1], 2, 0] of hf must be one id"),
        ({"bos_token_id": [0]}, "bos_token_id=[0] of hf must be one id"),
        ({"eos_token_id": 999}, "tokenizer.json: its id 999 must be"),
    ],
)
def test_a_folder_that_cannot_be_imported_is_refused(refuses, tmp_path, changes, message):
    (tmp_path / "hf/config.json").write_text(json.dumps({**SMALL, **changes}))
    refuses(convert, ["import", "hf", "run"], message)


def test_a_folder_without_a_file_is_refused(refuses, tmp_path):
    for name, message in (
        ("tokenizer.json", "hf holds no tokenizer.json; load"),
        ("config.json", "config.json must be a JSON file (No such file"),
    ):
        (tmp_path / "hf" / name).unlink()
        refuses(convert, ["import", "hf", "run"], message)
    (tmp_path / "hf/adapter_config.json").write_text("{}")
    refuses(convert, ["import", "hf", "run"], "it holds adapters alone, so give --base RUN")


BAD_TRAINING = """
--init-from nowhere --output-dir x | run folder nowhere has no readable config.json
--init-from run --config nano | --config nano does not go with --init-from
--init-from run --tokenizer byte | --tokenizer byte does not go with --init-from
--init-from run --seq-len 999 | seq_len=999 must not exceed max_seq_len=128
--init-from run --model.mlp-dim 64 --seq-len 16 --output-dir x | params/blocks
--resume --output-dir run | run was imported and has no training to resume; try --init-from
"""


@pytest.mark.parametrize(("args", "words"), read_cases(BAD_TRAINING))
def test_bad_input_to_train(converted, refuses, args, words):
    converted("import", "hf", "run")
    refuses(train, ["--dataset", "text.txt", *args], *words)


def test_help_answers(call):
    status, out, _ = call(convert, "--help")
    assert status == 0
    assert "import HF_FOLDER RUN" in out


def test_what_is_exported_names_the_length_of_its_training(converted, tmp_path):
    """128 tokens, of 256 that the model takes."""
    write_untrained(tmp_path / "mine", CharTokenizer("abc"), one_layer(3), step=1)
    for flags, length in (((), 128), (("--context", "extend"), 256)):
        converted("export", "mine", f"hf-{length}", *flags)
        assert json.loads((tmp_path / f"hf-{length}/config.json").read_text())["max_position_embeddings"] == length
