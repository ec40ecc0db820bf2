"""`benchmark.py serve`: a real server, its clients, and generation without it."""

import dataclasses
import json

import numpy as np
import pytest

from scripts.benchmarks.serve import Clients, result


def test_speeds_are_compared_with_as_many_and_with_one():
    """By hand: answers of 10 tokens; four clients take twice the time of one, generation half of either."""
    seconds = {"serve × 1": 1.0, "generate × 1": 0.5, "serve × 4": 2.0, "generate × 4": 1.0}
    found = result(10, {name: [{"whole": each}] for name, each in seconds.items()})
    assert found["serve × 4"] == {"tokens/s": [20.0], "ratio": [1.0], "times those of one": [2.0]}
    assert found["generate × 4"] == {"tokens/s": [40.0], "ratio": [0.5], "times those of one": [2.0]}


def test_clients_ask_at_once_and_get_whole_answers(server):
    clients = Clients("three", server.address, server.model, np.full((3, 4), 7), 2)
    before = server.gauge("tokens_total")
    assert clients.ask(2)["whole"] > 0
    assert server.gauge("tokens_total") - before == 2 * 3 * (4 + 2)
    with pytest.raises(RuntimeError, match="three got no answer of 10000 tokens"):
        dataclasses.replace(clients, new_tokens=10_000).ask(1)


@pytest.mark.external
def test_from_command_to_report(call, tmp_path):
    sizes = "--model tiny --clients 2 --prompt-tokens 4 --new-tokens 4 --rounds 1 --seconds 0.01"
    status, _, err = call("serve", *sizes.split())
    assert status == 0, err
    found = json.loads((tmp_path / "benchmarks/serve.json").read_text())["results"]
    assert list(found) == ["serve × 1", "generate × 1", "serve × 2", "generate × 2"]
    assert all(each["tokens/s"][0] > 0 for each in found.values())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--model trial", "model 'trial' is not one of tiny"),
        ("--clients 1", "clients=1 must be at least 2"),
        ("--new-tokens 0", "new_tokens=0 must be positive"),
    ],
)
def test_bad_input_is_one_line(refuse, args, message):
    refuse(f"serve {args}", message)
