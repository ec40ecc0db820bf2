"""Tasks of lm_eval score the same by evaluate.py, by a server, and by lm_eval's own backend on the exported model."""

import functools
import json
import random
from unittest.mock import Mock

import pytest
import yaml

import parallax
from parallax.interop.folders import export_model, import_model
from scripts import evaluate
from scripts.evaluation import harness
from scripts.evaluation.harness import HarnessModel
from tests.parallax.interop.folders import SMALL, write_folder
from tests.parallax.serving.server import serving

pytestmark = [pytest.mark.external, pytest.mark.filterwarnings("ignore")]  # of lm_eval and what it imports
LENGTH = 96
"""Tokens at a time: a server needs room for one more."""
SHORT = 5
"""Of the texts, the first, which are short."""
WORDS = ["to", "be", "or", "not", "that", "is", "the", "question", "suffer", "slings", "and", "arrows", "αβγ", "🙂"]
CHATML = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TASKS = {
    "choosing": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}} :",
        "doc_to_choice": ["is", "arrows and slings", "question", "🙂"],
        "doc_to_target": "{{label}}",
        "num_fewshot": 2,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "reading": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "going-on": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["E", "\n"], "max_gen_toks": 20, "do_sample": False, "repetition_penalty": 1.3},
        "metric_list": [{"metric": "exact_match"}],
    },
}
"""Of each kind one, as lm_eval's YAML has it."""


@pytest.fixture(autouse=True, scope="module")
def tasks_are_listed_once():
    """To list its own tasks lm_eval reads thousands of files, which takes seconds."""
    from lm_eval import tasks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "TaskManager", functools.cache(tasks.TaskManager))
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a random Llama as a run and exported, and with tasks."""
    folder, random_words = tmp_path_factory.mktemp("harness"), random.Random(0)
    write_folder(folder / "hf", SMALL | {"bos_token_id": 0, "eos_token_id": 1})
    (folder / "hf" / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "chat_template": CHATML})
    )
    import_model(folder / "hf", folder / "run")
    export_model(str(folder / "run"), folder / "exported")
    (folder / "tasks").mkdir()
    texts = [" ".join(random_words.choices(WORDS, k=1 + number if number < SHORT else 60)) for number in range(10)]
    lines = [json.dumps({"text": text, "label": number % 4}) + "\n" for number, text in enumerate(texts)]
    (folder / "texts.jsonl").write_text("".join(lines))
    for name, task in TASKS.items():
        data = {"data_files": {"test": str(folder / "texts.jsonl")}}
        common = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
        (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(common | {"fewshot_split": "test"} | task))
    return folder


def scores(place, model, chat=False, names=tuple(TASKS), **options):
    """What each question of each task got, and the results."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(place / "tasks"), include_defaults=False)
    found = simple_evaluate(model, tasks=list(names), task_manager=tasks, apply_chat_template=chat, **options)
    answers = {
        name: [sample["resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for name, samples in found["samples"].items()
    }
    return answers, found["results"]


def check_same(ours, theirs):
    assert ours.keys() == theirs.keys() == TASKS.keys()
    assert ours["going-on"] == theirs["going-on"]
    assert len(set(map(str, ours["going-on"]))) > 3
    for name in ("choosing", "reading"):
        for one, other in zip(ours[name], theirs[name], strict=True):
            for mine, its in zip(flat(one), flat(other), strict=True):
                assert mine == pytest.approx(its, abs=1e-4, rel=1e-6)  # sums of up to 500 float32 log-probabilities


def check_results(ours, theirs):
    for task, name in [("choosing", "acc"), ("choosing", "acc_norm"), ("reading", "bits_per_byte")]:
        assert ours[task][f"{name},none"] == pytest.approx(theirs[task][f"{name},none"], rel=1e-5)


def flat(values):
    return [x for value in values for x in flat(value)] if isinstance(values, list | tuple) else [values]


@pytest.fixture(scope="module")
def theirs(place):
    import torch

    torch.set_num_threads(1)  # in matrices of this size more of them wait for one another
    arguments = f"pretrained={place / 'exported'},max_length={LENGTH}"
    return {chat: scores(place, "hf", chat, model_args=arguments, device="cpu") for chat in (False, True)}


@pytest.mark.parametrize("chat", [False, True])
def test_as_their_own_backend(chat, place, theirs):
    answers, results = scores(place, HarnessModel(parallax.load(place / "run"), max_length=LENGTH, batch_size=4), chat)
    check_same(answers, theirs[chat][0])
    check_results(results, theirs[chat][1])


def test_as_their_own_backend_by_a_server(place, theirs):
    with serving(place / "run", "--capacity", "128") as server:

        def asked(kind, tasks, chat=False, limit=None, **more):
            path = "chat/completions" if chat else "completions"
            arguments = {"model": server.model, "base_url": f"{server.address}/v1/{path}", **more}
            return scores(place, f"local-{kind}", chat, tasks, limit=limit, model_args=arguments)[0]

        of_model = {"tokenizer": str(place / "exported"), "add_bos_token": True}
        # They lessen the length by one, and to score by another one.
        scored = asked("completions", ["choosing", "reading"], max_length=LENGTH + 2, **of_model)
        check_same(scored | asked("completions", ["going-on"], max_length=LENGTH + 1, **of_model), theirs[False][0])
        chats = asked("chat-completions", ["going-on"], chat=True, limit=SHORT)
        assert chats["going-on"] == theirs[True][0]["going-on"][:SHORT]


@pytest.mark.parametrize("model", ["run", "hf"])
def test_evaluate_py(model, place, theirs, call):
    given = "--tasks", "choosing,rea?ing,going-on", "--task-dir", place / "tasks", "--json", place / f"{model}.json"
    status, out, err = call(
        evaluate, "--checkpoint", place / model, *given, "--window", LENGTH, "--mesh", "data=4,tensor=2"
    )
    assert status == 0, err
    found = json.loads((place / f"{model}.json").read_text())
    check_results(found["results"], theirs[False][1])
    assert "|choosing" in out


def test_data_that_cannot_be_had_takes_one_line(place, refuses, monkeypatch):
    monkeypatch.setattr(harness.lm_eval, "simple_evaluate", Mock(side_effect=ConnectionError("Couldn't reach 'it'")))
    given = ["--checkpoint", place / "run", "--tasks", "reading", "--task-dir", place / "tasks"]
    refuses(evaluate, given, "--tasks reading", "Couldn't reach 'it'", "try again")
