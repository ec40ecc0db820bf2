"""Signals in a real process, and several real processes over loopback: how they meet, share a batch, and end."""

import contextlib
import json
import signal
import subprocess
import threading

import pytest

from parallelism.hosts import STOPPING, StopRequest, watch_notice
from tests.parallelism.processes import HANG_SECONDS, free_port, pair, started

STEPS = """
    import sys
    from parallelism.hosts import StopRequest

    for run in range(2):
        stop = StopRequest()
        stop.listen()
        for step in range(1, 1000):
            print("begin", step, flush=True)
            sys.stdin.readline()  # the step takes until the parent says so
            print("end", step, flush=True)
            if stop():
                print("saved", step, flush=True)
                break
"""
TOGETHER = """
    from parallelism import mesh_shape
    from tests.parallelism.conftest import Tiny
    def main():
        join(cluster)
        found, tiny = {"said": agree(f"by {number}")}, Tiny(num_kv_heads=2)
        mesh_shape._own_memory = lambda devices: 2**12 if number else 2**40
        found["auto"] = tiny.strategy("mesh", "auto").describe().partition(" (")[0]
        for mesh in ("data=4", "tensor=2,data=2", "sequence=4", "fsdp=2,tensor=2"):
            strategy = tiny.strategy("mesh", mesh, seq_len=8)
            rows, batch = strategy.rows(16), tiny.batch(0, length=8)
            placed = strategy.put_batch({name: x[rows] for name, x in batch.items()})
            same = all(np.array_equal(x, batch[name]) for name, x in fetch(placed).items())
            found[mesh] = [rows.tolist(), same, strategy.is_writer]
        print(json.dumps(found))
        require_same({"jax": ("1.0", ""), "the text": ("abc", "a play")})
        facts = {"jax": ("1.0", ""), "the text": (f"sha-{number}", f"play {number}")}
        with errors_in_one_line():
            require_same(facts)

    raise SystemExit(run_process(main))
"""
DETECTED = """
    import jax
    from parallelism.hosts import Cluster, agree, join, run_process

    def main():
        join(Cluster())
        print(jax.process_count(), agree(f"by {jax.process_index()}"), flush=True)
        return 0

    raise SystemExit(run_process(main))
"""
UNDETECTED = """
    import json, os
    from parallelism import hosts
    from parallelism.hosts import Cluster, join

    def said(cluster=Cluster(), **environment):
        os.environ.update(environment)
        try:
            join(cluster)
            return "alone"
        except ValueError as error:
            return str(error)
        finally:
            for name in environment:
                del os.environ[name]

    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    found = [
        said(),
        said(**pod),
        said(OMPI_COMM_WORLD_SIZE="1"),
        said(Cluster(num_processes=1), OMPI_COMM_WORLD_SIZE="4"),
        said(OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_RANK="2"),
        said(PMI_SIZE="2"),
        said(JOB_COMPLETION_INDEX="3", **pod),
        said(Cluster(local_device_ids=(0,))),
    ]
    hosts._on_tpu = lambda: True
    print(json.dumps([*found, said(TPU_SKIP_MDS_QUERY="1")]))
"""
ALONE = """
    import sys
    import jax
    from parallelism.hosts import run_process

    jax.distributed.initialize("127.0.0.1:" + sys.argv[1], 1, 0)

    def main():
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: the device is gone")

    raise SystemExit(run_process(main))
"""
FAILING = """
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


STOPPED = """
    import hashlib, os
    from parallelism.hosts import leave_together
    from parallelism.hosts import StopRequest

    def end():
        print("ended", flush=True)
        leave_together()
        os._exit(0)

    def main():
        join(cluster)
        stop = StopRequest()
        stop.listen(end)
        print("begin", flush=True)
        if number == 0:
            HANG
        multihost_utils.sync_global_devices("the step, which process 0 is still to compile")

    raise SystemExit(run_process(main))
"""


def end_step(child):
    child.stdin.write("\n")
    child.stdin.flush()


def ends_within(child, seconds):
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(seconds)
    return child.poll() is not None


@pytest.mark.parametrize(
    ("numbers", "first"), [([signal.SIGTERM] * 3, signal.SIGINT), ([signal.SIGINT], signal.SIGTERM)]
)
def test_a_signal_stops_after_the_step_it_fell_into_and_a_second_interrupt_at_once(numbers, first):
    """One run in a process stops, the next is interrupted; a step is one line of standard input long."""
    with started(STEPS) as child:
        assert child.stdout.readline() == "begin 1\n"
        end_step(child)
        assert child.stdout.readline() + child.stdout.readline() == "end 1\nbegin 2\n"
        for number in numbers:
            child.send_signal(number)
        assert child.stderr.readline() == STOPPING
        end_step(child)
        assert [child.stdout.readline() for _ in range(3)] == ["end 2\n", "saved 2\n", "begin 1\n"]
        child.send_signal(first)
        assert child.stderr.readline() == STOPPING
        assert not ends_within(child, 0.3), "the first one waits for the step"
        child.send_signal(signal.SIGINT)
        out, error = child.communicate(timeout=60)
        assert (child.returncode, out) == (-signal.SIGINT, "")
        assert error.rstrip().endswith("KeyboardInterrupt")


STUCK = """
    import hashlib, os, threading
    from parallelism.hosts import run_process
    from parallelism.hosts import StopRequest

    def main():
        stop = StopRequest()
        stop.listen(AT_ONCE)
        print("begin", flush=True)
        HANG
        return 0

    raise SystemExit(run_process(main))
"""
HANG = "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"  # minutes in C, in which no handler runs


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_call_that_no_handler_interrupts_can_be_ended(number):
    with started(STUCK.replace("HANG", HANG).replace("AT_ONCE", "lambda: os._exit(7)")) as child:
        assert child.stdout.readline() == "begin\n"
        child.send_signal(number)
        assert ends_within(child, 10)
        assert child.returncode == 7


def test_a_second_interrupt_ends_a_run_without_a_traceback():
    waiting = STUCK.replace("HANG", "threading.Event().wait()").replace("AT_ONCE", "")
    with started(waiting) as child:
        assert child.stdout.readline() == "begin\n"
        child.send_signal(signal.SIGINT)
        assert child.stderr.readline() == STOPPING
        child.send_signal(signal.SIGINT)
        assert child.communicate(timeout=60) == ("", "interrupted\n")
        assert child.returncode == 130


def test_nothing_is_requested_and_no_handler_installed_until_asked():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    stop = StopRequest()
    assert not any(stop() for _ in range(5))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_run_that_has_left_the_others_waits_for_none(monkeypatch):
    """The thread that looks for a notice ends, and so does a question that is asked meanwhile."""
    monkeypatch.setattr("parallelism.hosts._client", lambda: None)
    stop = StopRequest()
    watch_notice(threading.Event(), pytest.fail)
    stop._together = lambda asked: True
    assert stop()


@pytest.fixture(scope="module")
def together():
    """What two processes wrote that agreed on all but one thing."""
    with pair(TOGETHER) as processes:
        ended = [process.communicate(timeout=HANG_SECONDS) for process in processes]
    return [(process.returncode, *written) for process, written in zip(processes, ended, strict=True)]


def test_two_processes_are_one_run(together):
    """The agreement, one mesh for both though process 1 has less memory than a state takes, and which rows of a batch
    each holds. tests/scripts trains in several processes."""
    for number, (_, out, err) in enumerate(together):
        half, writes = list(range(8 * number, 8 * number + 8)), number == 0
        assert json.loads((out.splitlines() or [err])[-1]) == {
            "said": "by 0",
            "auto": "mesh: 4 cpu devices of 2 processes as fsdp=4",
            "data=4": [half, True, writes],
            "tensor=2,data=2": [half, True, writes],
            "sequence=4": [list(range(16)), True, writes],  # both hold pieces of all rows
            "fsdp=2,tensor=2": [half, True, writes],
        }


def test_what_must_be_the_same_and_is_not_is_refused_by_all_with_both_sides(together):
    line = (
        "error: the text must be the same in all processes of a run: process 0 has play 0, process 1 has play 1; "
        "give them the same files, flags and packages\n"
    )
    assert [(status, err) for status, _, err in together] == [(2, line)] * 2


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        ("KeyError('a bug')", 1, "KeyError: 'a bug'"),
        ("ValueError('UNKNOWN: Gloo all-reduce failed: closed')", 4, "process 1 lost a peer: UNKNOWN: Gloo"),
    ],
    ids=["its own fault", "as jaxlib reports a lost peer"],
)
def test_a_process_that_fails_ends_at_once_and_takes_no_peer_for_granted(error, status, words):
    with pair(FAILING.replace("ERROR", error)) as processes:
        out, err = processes[1].communicate(timeout=HANG_SECONDS)
        assert processes[1].returncode == status
        assert "met" in out
        assert words in err


def test_a_stop_before_any_step_ends_all_processes_though_one_is_in_a_call_that_nothing_interrupts():
    with pair(STOPPED.replace("HANG", HANG)) as processes:
        assert [process.stdout.readline() for process in processes] == ["begin\n"] * 2
        processes[1].send_signal(signal.SIGTERM)
        ended = [process.communicate(timeout=HANG_SECONDS) for process in processes]
    assert [(process.returncode, out) for process, (out, _) in zip(processes, ended, strict=True)] == [
        (0, "ended\n")
    ] * 2


LAUNCHERS = {
    "Open MPI": {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": "0",
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    },
    "SLURM": {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "1",
    },
}
"""The variables of one task of two."""


def test_tasks_of_launchers_that_jax_knows_are_one_run():
    """Each task joins by the variables of its own launcher, and so can the first of one meet the second of another."""
    port = free_port()
    with contextlib.ExitStack() as stack:
        tasks = [
            stack.enter_context(started(DETECTED, JAX_COORDINATOR_PORT=port, **variables))
            for variables in LAUNCHERS.values()
        ]
        ended = [task.communicate(timeout=HANG_SECONDS) for task in tasks]
    assert [out.splitlines()[-1:] for out, _ in ended] == [["2 by 0"]] * 2, ended


def test_tasks_that_jax_knows_no_cluster_of_do_not_train_alone_in_silence():
    with started(UNDETECTED) as process:
        out, err = process.communicate(timeout=HANG_SECONDS)
    *alone, open_mpi, other_mpi, pod, ids, tpu = json.loads(out)
    assert alone == ["alone"] * 4
    assert open_mpi.startswith("OMPI_COMM_WORLD_SIZE=4 tasks were started, and JAX finds no cluster of them; ")
    assert (
        "--coordinator HOST:PORT --num-processes 4 --process-id $OMPI_COMM_WORLD_RANK, or --num-processes 1" in open_mpi
    )
    assert "--process-id $PMI_RANK" in other_mpi
    assert "pip install 'jax[k8s]', or --num-processes 1" in pod
    assert ids == "--local-device-ids is for several processes and this one runs alone; leave it out"
    assert tpu == "alone"
    assert "no other host of this TPU is known" in err


def test_a_cluster_of_one_process_has_no_peer_to_lose():
    with started(ALONE, free_port()) as process:
        _, err = process.communicate(timeout=HANG_SECONDS)
    assert (process.returncode, err) == (5, "error: the run lost a device: UNAVAILABLE: the device is gone\n")
