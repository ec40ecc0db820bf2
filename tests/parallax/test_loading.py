"""A model loaded from a run or a Hugging Face folder: its texts, its scores, its refusals."""

import dataclasses
import itertools
import json
import shutil

import jax
import numpy as np
import pytest

import parallax
from parallax.interop.folders import import_model
from parallax.loading import Model
from parallax.model.transformer import TransformerLM
from parallax.run_folder import load_run
from parallax.tokenizers.chat_template import PLAIN, ChatTemplate, write_chat_template
from parallelism.placement import on_mesh
from scripts import generate
from tests.parallax.interop.folders import BFLOAT16, SMALL, random_tensors, write_folder
from tests.parallax.serving.server import LETTERS, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "small")


@pytest.fixture(scope="module")
def model(run):
    return parallax.load(run)


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    folder = tmp_path_factory.mktemp("downloaded") / "model"
    write_folder(folder, SMALL | {"num_hidden_layers": 1})
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"seed": 3},
        {"temperature": 1.3, "top_k": 9, "top_p": 0.8, "min_p": 0.01, "repetition_penalty": 1.4, "seed": 5},
        {"temperature": 1.0, "stop": ("ab", "\n", "Z"), "seed": 1},
    ],
    ids=["greedy", "defaults", "all filters", "stops"],
)
def test_texts_are_those_of_generate(run, model, options, monkeypatch, capsysbinary):
    flags = ["--max-tokens", "40"]
    for name, value in options.items():
        for one in value if isinstance(value, tuple) else (value,):
            flags += [f"--{name.replace('_', '-')}", str(one).replace("\n", r"\n")]
    monkeypatch.setattr("sys.argv", ["generate.py", "--checkpoint", str(run), "--prompt", "Hello", *flags])
    assert generate.main() == 0
    written = capsysbinary.readouterr().out.decode().removeprefix("Hello")
    assert model.generate("Hello", max_tokens=40, **options) == written
    pieces = list(model.stream("Hello", max_tokens=40, **options))
    assert "".join(pieces) == written
    assert "" not in pieces


def test_prompts_of_a_batch_are_continued_as_each_alone(model):
    prompts = ["Hello", "a", "To be"]
    texts = model.generate(prompts, max_tokens=40, seed=4)
    assert texts == [model.generate(p, max_tokens=40, seed=4 + i) for i, p in enumerate(prompts)]


@pytest.mark.parametrize("length", [2, 33, 200])
def test_score_is_the_log_softmax_of_the_model(model, length):
    text = "".join(itertools.islice(itertools.cycle("Say what É é?\n".replace("É", "")), length))
    score, ids = model.score(text), LETTERS.encode(text)

    @jax.jit
    def log_probs(params):
        logits = TransformerLM.from_params(model.config, params)(ids[None])[0][0]
        return jax.nn.log_softmax(logits[:, : model.config.vocab_size])

    expected = np.asarray(log_probs(model.params))[np.arange(length - 1), ids[1:]]
    np.testing.assert_array_equal(score.token_ids, ids[1:])
    assert score.log_probs.dtype == np.float32
    np.testing.assert_allclose(score.log_probs, expected, atol=1e-5)  # attention by blocks rounds otherwise
    assert len(model.score(text[:1]).log_probs) == 0


def test_a_hugging_face_folder_is_the_run_that_it_becomes(hugging_face, tmp_path):
    import_model(hugging_face, tmp_path / "run")
    direct, imported = parallax.load(hugging_face), load_run(tmp_path / "run")
    assert (direct.config, direct.tokenizer.to_json()) == (imported.config, imported.tokenizer.to_json())
    jax.tree.map(np.testing.assert_array_equal, direct.params, imported.prepared().params)


def test_a_model_has_the_chat_template_of_its_folder(run, model, tmp_path):
    shutil.copytree(run, tmp_path / "chat")
    write_chat_template(ChatTemplate(PLAIN, {"eos_token": "!"}), tmp_path / "chat")
    template = parallax.load(tmp_path / "chat").chat_template
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Say"}]
    assert template.render(messages, add_generation_prompt=True) == "User: Hello\nAssistant: Say!\nAssistant:"
    assert model.chat_template is None


def test_an_imported_model_keeps_the_dtype_of_its_files(tmp_path):
    """Whose values float32 holds exactly, so that nothing else changes."""
    values = SMALL | {"num_hidden_layers": 2}
    tensors = {name: tensor.astype(BFLOAT16) for name, tensor in random_tensors(values).items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    for name in ("layers.0.self_attn.k_proj", "layers.1.self_attn.k_proj", "layers.1.self_attn.q_proj"):
        tensors[f"model.{name}.weight"] = tensors[f"model.{name}.weight"].astype(np.float16)
    write_folder(tmp_path / "hf", values, tensors)
    kept = parallax.load(tmp_path / "hf")
    block = kept.params["blocks"][0]
    assert kept.params["final_norm"]["scale"].dtype == np.float32
    assert block["attention"]["query"].dtype == np.float32, "layers of two dtypes"
    assert block["attention"]["key"].dtype == np.float16
    assert block["mlp"]["up"].dtype == kept.params["embedding"]["table"].dtype == BFLOAT16
    import_model(tmp_path / "hf", tmp_path / "run")
    jax.tree.map(assert_same, parallax.load(tmp_path / "run").params, kept.params)
    wide = parallax.load(tmp_path / "hf", param_dtype="float32")
    jax.tree.map(lambda x, y: assert_same(x, np.asarray(y).astype(np.float32)), wide.params, kept.params)
    import_model(tmp_path / "hf", tmp_path / "wide", param_dtype="float32")
    jax.tree.map(assert_same, parallax.load(tmp_path / "wide").params, wide.params)
    for options in ({"temperature": 0.0}, {"seed": 3}):
        texts = {model.generate("To be", max_tokens=20, **options) for model in (kept, wide)}
        assert len(texts) == 1
    narrow = parallax.load(tmp_path / "run", param_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow.params)} == {BFLOAT16}


def assert_same(left, right):
    assert left.dtype == right.dtype
    np.testing.assert_array_equal(left, right)


def test_a_mesh_and_a_dtype_leave_the_text(run, model):
    spread = parallax.load(run, mesh=on_mesh("fsdp=8"))
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(spread.params))
    assert spread.generate("Hello", max_tokens=20, seed=2) == model.generate("Hello", max_tokens=20, seed=2)
    text = "to be or not to be"
    np.testing.assert_allclose(spread.score(text).log_probs, model.score(text).log_probs, atol=1e-5)
    rounded = parallax.load(run, dtype="bfloat16").score(text).log_probs
    np.testing.assert_allclose(rounded, model.score(text).log_probs, atol=0.1)


def test_numbers_of_numpy_and_no_stop_are_taken(model):
    given = {"max_tokens": np.int64(5), "seed": np.uint32(3), "top_k": np.int32(9), "top_p": np.float32(0.5)}
    text = model.generate("Hello", max_tokens=5, seed=3, top_k=9, top_p=0.5)
    assert model.generate("Hello", stop=None, **given) == text == "".join(model.stream("Hello", stop=None, **given))


def test_what_cannot_be_meant_is_refused(model, hugging_face, tmp_path, refused):
    with refused("temperature=-1", "must", "try 0.8"):
        model.stream("Hello", temperature=-1)
    with refused("text of 258 tokens", "max_seq_len + 1 = 257", "score it in parts"):
        model.score("a" * 258)
    with refused("step=3", "has none", "leave it out"):
        parallax.load(hugging_face, step=3)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with refused("model_type='mamba'", "is not one of"):
        parallax.load(tmp_path)
    with refused("no readable config.json"):
        parallax.load(tmp_path / "nothing")
    with refused("dtype='float16'", "is not one of"):
        parallax.load(hugging_face, dtype="float16")
    with refused("param_dtype='float16'", "is not one of", "try bfloat16"):
        parallax.load(hugging_face, param_dtype="float16")
    with refused("step='3' must be a whole number"):
        parallax.load(hugging_face, step="3")
    for given in (3, None, b"Hello", ["Hello", 3]):
        with refused("must be a text" if given else "prompt is empty"):
            model.generate(given)
    with refused("['Hello'] must be a text"):
        model.stream(["Hello"])
    with refused("None must be a text"):
        model.score(None)
    for name, value in (("max_tokens", 2.5), ("max_tokens", "2"), ("seed", None), ("seed", 1.5), ("top_k", 1.5)):
        with refused(f"{name}={value!r} must be a whole number"):
            model.generate("Hello", **{name: value})
    for value in (None, "hot", "0.5"):
        with refused(f"temperature={value} must be in"):
            model.generate("Hello", temperature=value)
    with pytest.raises(TypeError, match="temprature"):
        model.generate("Hello", temprature=1)


def test_a_text_goes_on_beyond_the_length_of_training(model, refused):
    """128 tokens, of 256 that the model takes."""
    assert model.context_length == 128
    first = model.generate("Hello", max_tokens=123, seed=2)
    slid = model.generate("Hello", max_tokens=300, seed=2)
    assert (len(first), len(slid), slid[:123]) == (123, 300, first)
    assert "".join(model.stream("Hello", max_tokens=300, seed=2)) == slid
    assert model.generate("Hello", max_tokens=300, seed=2, context="crop") == first
    extended = model.generate("Hello", max_tokens=140, seed=2, context="extend")
    assert (len(extended), extended[:123]) == (140, first)
    assert extended[123:] != slid[123:140]
    with refused("max_seq_len=256", "try max_tokens 251"):
        model.generate("Hello", max_tokens=252, context="extend")


def test_a_text_is_scored_up_to_a_length_of_any_size(run, model):
    loaded = load_run(run)
    short = Model(dataclasses.replace(loaded, config=loaded.config.replace(max_seq_len=150)))
    text = "To be or not to be" * 8
    np.testing.assert_allclose(short.score(text).log_probs, model.score(text).log_probs, atol=1e-5)
