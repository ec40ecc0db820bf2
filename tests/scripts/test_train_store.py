"""train.py on a store: the same curve on every layout and when it is resumed, and what it refuses."""

import json
import shutil

import numpy as np
import pytest

from data.pipeline import evaluation_batches, training_batches
from data.preparing.preparation import Preparation, Settings
from data.preparing.sources import find_sources
from data.stores.store import open_store
from parallax.tokenizers.plain import ByteTokenizer
from scripts import evaluate, prepare, train
from scripts.training import attempt
from tests.data.small_stores import texts, write_jsonl
from tests.scripts.runs import SHORT, SMALL

FLAGS = ["--dataset", "web.store", *SMALL, *SHORT]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store, made once."""
    folder = tmp_path_factory.mktemp("made")
    path = write_jsonl(folder / "a.jsonl", texts(80))
    Preparation(folder / "web.store", find_sources([str(path)]), Settings(held_out=0.2), "byte").run(ByteTokenizer())
    return folder / "web.store"


@pytest.fixture(autouse=True)
def store(made, tmp_path):
    return open_store(shutil.copytree(made, tmp_path / "web.store"))


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row.get("loss", 0.0), row.get("eval_loss", 0.0)) for row in rows]


def test_one_curve_on_another_layout_and_when_resumed(call, refuses, tmp_path, store, monkeypatch):
    bounds, learned = [], {}

    def recorded(samples, *, start, **keywords):
        for k, batch in enumerate(training_batches(samples, start=start, **keywords), start=start):
            learned[k + 1] = batch
            yield batch

    def watched(*args, most_tokens, **keywords):
        bounds.append(most_tokens)
        return evaluation_batches(*args, most_tokens=most_tokens, **keywords)

    monkeypatch.setattr(attempt, "evaluation_batches", watched)
    monkeypatch.setattr(attempt, "training_batches", recorded)
    status, _, err = call(train, *FLAGS, "--checkpoint-interval", "6", "--output-dir", "alone")
    assert status == 0, err
    assert f"dataset store web.store: 80 documents, {store.manifest['tokens']:,} tokens" in err
    assert json.loads((tmp_path / "alone/config.json").read_text())["corpus"]["sha256"] == store.content_sha256
    assert bounds == [6 * 6 * 16 * 16 // 100] * 2  # 2% of the time of 6 steps of 16 × 16 tokens
    shutil.copytree(tmp_path / "alone", tmp_path / "other")
    shutil.rmtree(tmp_path / "other/checkpoints/12")
    status, _, err = call(train, "--resume", "--strategy", "pmap", "--output-dir", "other")
    assert status == 0, err
    assert "\nresume    from step 6" in err
    for one, two in zip(losses(tmp_path / "alone"), losses(tmp_path / "other"), strict=True):
        assert one == pytest.approx(two, abs=1e-5)
    status, _, err = call(
        train, "--resume", "--strategy", "mesh", "--mesh", "data=8", "--steps", "15", "--output-dir", "other"
    )
    assert status == 0, err
    check_seen(call, refuses, store, learned)


def check_seen(call, refuses, store, learned):
    """What a run of three layouts says of its steps and its documents, beside the batches that it learned from."""
    documents = [document for document, _ in store.train.documents()]
    owners = np.repeat(np.arange(len(documents)), [document.tokens for document in documents])
    tokens, truth = store.train.read(0, len(store.train)), set()
    for step in range(1, 16):
        for row, sample_id in enumerate(learned[step]["sample_ids"].tolist()):
            shown = slice(sample_id * 16, sample_id * 16 + 17)
            window = tokens[shown]
            np.testing.assert_array_equal(learned[step]["inputs"][row][: len(window) - 1], window[:-1])
            truth |= {(step, f"{documents[place].path}:{documents[place].line}") for place in owners[shown].tolist()}
    for step in range(1, 16):
        _, out, _ = call(prepare, "--seen", "other", "--step", str(step))
        assert {int(line.split()[1]) for line in out.splitlines()} == set(range(16))
        assert {(step, line.split()[2]) for line in out.splitlines()} == {pair for pair in truth if pair[0] == step}
    for document in documents[::2]:
        place = f"{document.path}:{document.line}"
        _, out, _ = call(prepare, "--seen", "other", "--document", place)
        steps = [int(step) for step in out.partition(" tokens: steps ")[2].split(", ") if step]
        assert steps == sorted(step for step, shown in truth if shown == place)
    held, _ = next(store.held_out.documents())
    _, out, _ = call(prepare, "--seen", "other", "--document", f"{held.path}:{held.line}")
    assert out.endswith("tokens: held out\n")
    refuses(prepare, ["--seen", "other", "--step", "16"], "--step 16 must not exceed the 15 steps of other")
    refuses(prepare, ["--seen", "other", "--document", "a.jsonl"], "--document a.jsonl must be FILE:LINE")
    refuses(prepare, ["--seen", "other", "--document", "a.jsonl:1"], "no document of web.store is from a.jsonl:1")


def test_a_mixture_says_what_it_took_of_each_source(call, tmp_path, store):
    path = write_jsonl(tmp_path / "code.jsonl", texts(40, seed=2))
    found = find_sources([str(path)])
    Preparation(tmp_path / "code.store", found, Settings(held_out=0.3), "byte").run(ByteTokenizer())
    flags = ["--dataset", "web.store:0.75,code.store:0.25", *SMALL, *SHORT, "--eval-tokens", "200"]
    status, _, err = call(train, *flags, "--output-dir", "run")
    assert status == 0, err
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    (half, last) = (row for row in rows if "eval_loss" in row)
    assert (last["weight/web"], last["weight/code"]) == (0.75, 0.25)
    assert last["tokens/web"] + last["tokens/code"] == 2 * (half["tokens/web"] + half["tokens/code"]) == 12 * 16 * 16
    assert min(last["eval_loss/web"], last["eval_loss/code"]) <= last["eval_loss"]
    assert last["eval_loss"] <= max(last["eval_loss/web"], last["eval_loss/code"])
    sources = json.loads((tmp_path / "run/summary.json").read_text())["sources"]
    assert sources["code"] == {"weight": 0.25, "tokens": last["tokens/code"], "epochs": last["epochs/code"]}
    assert last["epochs/web"] == pytest.approx(last["tokens/web"] / (len(store.train) - 1), abs=1e-5)
    results = []
    for dataset in (flags[1], "code.store"):
        status, out, err = call(evaluate, "--checkpoint", "run", "--dataset", dataset, "--held-out", "--json", "a")
        assert status == 0, err
        results.append((out.splitlines(), json.loads((tmp_path / "a").read_text())))
    (lines, both), (_, alone) = results
    assert [line.split(" ")[0] for line in lines] == ["web:", "code:", "perplexity"]
    assert both["sources"]["code"] == {name: alone[name] for name in both["sources"]["code"]}
    for name in ("nats", "tokens", "bytes"):
        assert both[name] == pytest.approx(sum(source[name] for source in both["sources"].values()))
    assert "sources" not in alone


def test_packed_documents_and_a_store_that_is_held_out(call, refuses, tmp_path, store):
    path = write_jsonl(tmp_path / "b.jsonl", texts(30, seed=2))
    found = find_sources([str(path)])
    books = Preparation(tmp_path / "books.store", found, Settings(held_out=1.0), "byte").run(ByteTokenizer())
    flags = [*FLAGS, "--packing", "best-fit", "--held-out", "books.store", "--eval-tokens", "9999999"]
    flags += ["--seq-len", "96", "--steps", "6"]
    for name, layout in (("alone", ()), ("both", ("--strategy", "pmap"))):
        status, _, err = call(train, *flags, *layout, "--output-dir", name)
        assert status == 0, err
        assert "held out  store books.store" in err
    for one, two in zip(losses(tmp_path / "alone"), losses(tmp_path / "both"), strict=True):
        assert one == pytest.approx(two, abs=1e-5)
    _, out, _ = call(prepare, "--seen", "both", "--step", "3")
    pieces = [line.split()[1] for line in out.splitlines()]
    assert len(pieces) > len(set(pieces)) == 16  # rows with several documents
    status, _, err = call(evaluate, "--checkpoint", "alone", "--dataset", "books.store", "--held-out", "--json", "a")
    assert status == 0, err
    result = json.loads((tmp_path / "a").read_text())
    assert result["tokens"] == books.manifest["tokens"] - 30
    assert result["bytes"] == books.manifest["bytes"] - 30
    refuses(train, ["--resume", "--output-dir", "both", "--packing", "none"], "--packing none differs from best-fit")
    shutil.copytree(store.folder, tmp_path / "books.store", dirs_exist_ok=True)
    refuses(train, ["--resume", "--output-dir", "both", "--steps", "7"], "is not the text that both was trained on")


def test_refusals(refuses, call, tmp_path):
    refuses(train, [*FLAGS, "--tokenizer", "char"], "--tokenizer char does not go with a store")
    refuses(train, [*FLAGS, "--eval-tokens", "0"], "--eval-tokens 0 must be at least 1")
    refuses(train, [*FLAGS, "--seq-len", "4000"], "held-out side of web.store has", "--held-out")
    assert call(train, *FLAGS, "--steps", "1", "--output-dir", "run")[0] == 0
    path = write_jsonl(tmp_path / "b.jsonl", texts(80, seed=2))
    shutil.rmtree(tmp_path / "web.store")
    status, _, err = call(
        prepare, path, "--output", "web.store", "--tokenizer", "byte", "--held-out", "0.2", "--workers", "1"
    )
    assert status == 0, err
    refuses(train, ["--resume", "--output-dir", "run", "--steps", "2"], "is not the text that run was trained on")
    (tmp_path / "web.store/manifest.json").unlink()
    refuses(train, FLAGS, "store web.store must hold a manifest.json and holds none; prepare it again")
