"""torch and transformers as contenders: they do the same work, or are missed by name."""

import contextlib
import importlib.util
import shutil

import pytest

from scripts.benchmarks.rounds import Worker
from scripts.benchmarks.train import check_work


@pytest.mark.parametrize(("command", "contender"), [("train", "torch"), ("decode", "transformers")])
def test_a_missing_package_is_named_with_its_remedy(refuse, monkeypatch, command, contender):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    remedy = 'pip install -e ".[bench]"'
    refuse(command, f"contender {contender} needs torch, which is not installed; {remedy}")


def test_torch_compiled_needs_a_compiler(refuse, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: None)
    refuse("train --contenders single,torch-compiled", "contender torch-compiled needs the C++ compiler g++")


@pytest.mark.external
@pytest.mark.parametrize("contender", ["torch", "torch-compiled", "transformers"])
def test_torch_does_the_same_work(tmp_path, contender):
    """Losses over four steps: the first shows the model, the others gradients, clipping, decay and AdamW."""
    spec = {"setting": "trial-2x16", "weights": str(tmp_path / "weights")}
    with (
        contextlib.closing(Worker("single", "train-parallax", strategy="single", **spec)) as ours,
        contextlib.closing(Worker(contender, "train-torch", model=contender, **spec)) as theirs,
    ):
        check_work([ours, theirs])
        assert theirs.facts["losses"] == pytest.approx(ours.facts["losses"], rel=1e-5)


@pytest.mark.external
def test_transformers_writes_the_same_tokens(tmp_path):
    spec = {"model": "trial", "batch_size": 3, "prompt_tokens": 8, "new_tokens": 5}
    spec |= {"weights": str(tmp_path / "weights")}
    with (
        contextlib.closing(Worker("parallax", "decode-parallax", **spec)) as ours,
        contextlib.closing(Worker("transformers", "decode-transformers", **spec)) as theirs,
    ):
        assert ours.facts["tokens"] == theirs.facts["tokens"]
