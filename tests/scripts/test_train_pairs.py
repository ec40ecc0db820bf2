"""train.py on pairs of answers: it begins at the reference, prefers what was chosen, and can be gone on with."""

import json
import math
import shutil

import jax
import numpy as np
import pytest

from data.preparing.chats import ChatForm
from data.preparing.preparation import Preparation, Settings
from data.preparing.sources import find_sources
from parallax.run_folder import load_run
from parallax.tokenizers.chat_template import plain_template
from parallax.tokenizers.plain import ByteTokenizer
from scripts import train
from scripts.training.flags import read_flags
from scripts.training.job import prepare_job
from scripts.training.references import refer
from tests.scripts.runs import SMALL
from tests.scripts.untrained import one_layer, write_untrained

FLAGS = [
    *("--batch-size", "8", "--seq-len", "64", "--log-interval", "1"),
    *("--eval-interval", "6", "--learning-rate", "1e-2"),
]


@pytest.fixture
def pairs(tmp_path):
    """A store of pairs, of which the right answer is preferred."""
    rows = [{"prompt": f"{a}+1?", "chosen": str(a + 1), "rejected": "no"} for a in range(80)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    form = ChatForm.of(plain_template(ByteTokenizer()), "pairs")
    settings = Settings(field="", chat=form, held_out=0.2)
    found = find_sources([str(tmp_path / "pairs.jsonl")])
    Preparation(tmp_path / "pairs.store", found, settings, "byte").run(ByteTokenizer())
    (tmp_path / "text.txt").write_text("User: 1+1?\nAssistant: 2\n" * 100)
    return tmp_path


def test_a_run_prefers_what_was_chosen_and_is_gone_on_with(call, pairs):
    write_untrained(pairs / "base", ByteTokenizer(), one_layer(257, embed_dim=32), step=2, deviation=0.3)
    command = ["--dataset", "pairs.store", "--init-from", "base", "--lora.rank", "2", *FLAGS, "--steps", "12"]
    status, _, err = call(train, *command, "--checkpoint-interval", "6", "--output-dir", "tuned")
    assert status == 0, err
    rows = [json.loads(line) for line in (pairs / "tuned/metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[0]["reward_margin"] == pytest.approx(0, abs=1e-4)
    assert rows[-1]["reward_margin"] > 0.1
    assert rows[-1]["reward_accuracy"] > 0.9

    shutil.copytree(pairs / "tuned", pairs / "again")
    shutil.rmtree(pairs / "again/checkpoints/12")
    status, _, err = call(train, "--resume", "--output-dir", "again")
    assert status == 0, err
    jax.tree.map(np.testing.assert_array_equal, load_run("again").params, load_run("tuned").params)

    references = pairs / "again/references.npz"
    references.write_bytes(references.read_bytes()[:-30])
    shutil.rmtree(pairs / "again/checkpoints/12")
    status, _, err = call(train, "--resume", "--output-dir", "again")
    assert (status, "references.npz cannot be read" in err) == (2, True)


def test_what_holds_no_pair_is_refused(refuses, pairs):
    tokenizer = ["--tokenizer", "byte", *SMALL]
    refuses(train, ["--dataset", "pairs.store", *SMALL, "--seq-len", "16"], "seq_len=16", "training side shows none")
    refuses(train, ["--dataset", "text.txt", "--held-out", "pairs.store", *tokenizer], "must both have pairs")


def test_exact_reduction_has_the_same_references_on_every_layout(monkeypatch, pairs):
    monkeypatch.chdir(pairs)
    found = []
    for layout in ([], ["--mesh", "data=2,fsdp=4"]):
        given = ["--dataset", "pairs.store", *SMALL, *FLAGS, "--reduction", "exact", *layout]
        job = prepare_job(read_flags([*given, "--steps", "2"]))
        found.append(refer(job, job.strategy.init(), 0))
    jax.tree.map(np.testing.assert_array_equal, *found)
