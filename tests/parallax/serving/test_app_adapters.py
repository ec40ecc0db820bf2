"""Adapters beside their base in one server: each answers by its own name as the merged model would."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from parallax.inference.generate import Generator
from parallax.interop.folders import import_adapters
from parallax.interop.peft import write_adapters
from parallax.layer_config import LayerSpec, LoraConfig
from parallax.model.adapters import take_adapters
from parallax.model.transformer import init_params
from parallax.run_folder import load_adapters, load_run
from parallax.text import make_request
from parallax.tokenizers.chat_template import plain_template, write_chat_template
from tests.parallax.serving.server import LETTERS, serving, write_run
from tests.scripts.untrained import one_layer

PROMPT = "Hello there"
generator = functools.cache(Generator)  # compiles once for all models


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base of two kinds of layers, and adapters that change what it says."""
    folder = tmp_path_factory.mktemp("adapters")
    pattern = (LayerSpec(sliding_window=8), LayerSpec())
    config = dataclasses.replace(one_layer(LETTERS.vocab_size), num_layers=2, pattern=pattern)
    base = write_run(folder / "base", config=config)
    config = dataclasses.replace(config, lora=LoraConfig(rank=2, targets=("query", "down")))
    shapes = take_adapters(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
    rng = np.random.default_rng(0)
    (folder / "peft").mkdir()
    write_adapters(jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape), shapes), config, folder / "peft")
    import_adapters(folder / "peft", base, folder / "tuned")
    write_chat_template(plain_template(LETTERS), folder / "tuned")
    return folder


def greedy(run):
    run = load_run(run)
    request = make_request(run.tokenizer, [PROMPT], max_tokens=12, temperature=0.0)
    return run.tokenizer.decode(generator(run.config).generate(run.params, request)[0])


def test_a_base_and_its_adapters_answer_by_their_names(folders):
    with serving(folders / "base", "--adapters", str(folders / "tuned"), "--capacity", "32") as server:
        expected = {name: greedy(folders / name) for name in ("base", "tuned")}
        assert expected["base"] != expected["tuned"]
        assert [card.id for card in server.openai.models.list()] == ["base", "tuned"]
        for name, text in expected.items():
            fields = {"model": name, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
            answer = server.http.post("/v1/completions", json=fields).json()
            assert (answer["model"], answer["choices"][0]["text"]) == (name, text)
            assert server.http.get(f"/v1/models/{name}").json()["id"] == name
        wrong = server.http.post("/v1/completions", json={"model": "other", "prompt": PROMPT})
        assert wrong.status_code == 404
        assert "those that are, are 'base', 'tuned'" in wrong.json()["error"]["message"]
        assert server.gauge("answers_total") == 2
        assert "/v1/chat/completions" in server.http.get("/openapi.json").json()["paths"], "the adapters chat"


def test_adapters_share_the_arrays_of_their_base_and_need_it(folders, tmp_path):
    base = load_run(folders / "base").prepared()
    tuned = load_adapters(folders / "tuned", base)
    assert tuned.params["embedding"] is base.params["embedding"]
    other = load_run(write_run(tmp_path / "other", config=dataclasses.replace(base.config, mlp_dim=32)))
    with pytest.raises(ValueError, match="give their own base"):
        load_adapters(folders / "tuned", other)
    with pytest.raises(ValueError, match="must hold adapters"):
        load_adapters(folders / "base", base)
