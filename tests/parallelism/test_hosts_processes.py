"""Several real processes over loopback: how they meet, speak with one voice, share a batch, and end."""

import contextlib
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HANG_SECONDS = 120
START = """
    import os, sys
    sys.path.insert(0, os.getcwd())
    from parallelism.hosts import Cluster, agree, fetch, fix_cpu_rounding, join, run_process
    number = int(sys.argv[2])
    fix_cpu_rounding()
    cluster = Cluster(coordinator="127.0.0.1:" + sys.argv[1], num_processes=2, process_id=number)
"""
TOGETHER = """
    import jax, numpy as np
    from tests.parallelism.conftest import Tiny
    from tests.parallelism.test_reduction_exact import train
    from parallax.training.fingerprint import params_sha256

    def main():
        join(cluster)
        print("said", agree(f"by {number}"))
        tiny = Tiny(num_kv_heads=2)
        for mesh in ("data=4", "tensor=2,data=2", "sequence=4", "fsdp=2,tensor=2"):
            strategy = tiny.strategy("mesh", mesh, seq_len=8)
            rows, batch = strategy.rows(16), tiny.batch(0, length=8)
            placed = strategy.put_batch({name: x[rows] for name, x in batch.items()})
            same = all(np.array_equal(x, batch[name]) for name, x in fetch(placed).items())
            print("rows", mesh, rows.tolist(), same, strategy.is_writer)
        for name, mesh in (("pmap", ""), ("mesh", "fsdp=4")):
            strategy = tiny.strategy(name, mesh, reduction="exact")
            take, state = strategy.compile(tiny.step(strategy)), strategy.init()
            batch = tiny.batch(0)
            state, _ = take(state, strategy.put_batch({k: x[strategy.rows(16)] for k, x in batch.items()}))
            print("hash", params_sha256(fetch(strategy.canonical(state).params)))
        return 0

    raise SystemExit(run_process(main))
"""
ALONE = """
    import jax
    from tests.parallelism.conftest import Tiny
    from tests.parallelism.test_reduction_exact import train
    from parallax.training.fingerprint import params_sha256
    print("hash", params_sha256(train(Tiny(num_kv_heads=2), "single", "", 1, batch_size=16, steps=1)[1]))
"""
FAILING = """
    import jax, numpy as np
    from scripts.common.command_line import errors_in_one_line
    from jax.experimental import multihost_utils

    def main():
        join(cluster)
        print("met", flush=True)
        if number == 1:
            with errors_in_one_line():
                raise ERROR
        multihost_utils.sync_global_devices("never")
        return 0

    raise SystemExit(run_process(main))
"""


def start(script, port, number, devices=2):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(START) + textwrap.dedent(script), str(port), str(number)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def pair(script, port):
    processes = [start(script, port, number) for number in (0, 1)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_two_processes_are_one_run(port):
    """What is agreed on, which rows each holds, and a step that has the bits of a single device."""
    with pair(TOGETHER, port) as processes:
        said = []
        for process in processes:
            out, err = process.communicate(timeout=HANG_SECONDS)
            assert process.returncode == 0, err
            said.append([line for line in out.splitlines() if line.startswith(("said", "rows", "hash"))])
    lower, upper, every = (list(range(*bounds)) for bounds in ((0, 8), (8, 16), (0, 16)))
    for number, half in enumerate((lower, upper)):
        writes = number == 0
        assert said[number][0] == "said by 0"
        assert said[number][1:5] == [
            f"rows data=4 {half} True {writes}",
            f"rows tensor=2,data=2 {half} True {writes}",
            f"rows sequence=4 {every} True {writes}",  # both hold pieces of all rows
            f"rows fsdp=2,tensor=2 {half} True {writes}",
        ]
    alone = start(ALONE, port, 0, devices=1)
    out, err = alone.communicate(timeout=HANG_SECONDS)
    assert alone.returncode == 0, err
    assert {line for lines in said for line in lines[5:]} == {out.strip()}
    assert len(said[0][5:]) == 2


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        ("KeyError('a bug')", 1, "KeyError: 'a bug'"),
        ("ValueError('UNKNOWN: Gloo all-reduce failed: closed')", 4, "process 1 lost a peer: UNKNOWN: Gloo"),
    ],
    ids=["its own fault", "as jaxlib reports a lost peer"],
)
def test_a_process_that_fails_ends_at_once_and_takes_no_peer_for_granted(port, error, status, words):
    with pair(FAILING.replace("ERROR", error), port) as processes:
        out, err = processes[1].communicate(timeout=HANG_SECONDS)
        assert processes[1].returncode == status
        assert "met" in out
        assert words in err
