"""launch.py local as a user runs it, in a checkout whose train.py only says what it was told and ends as it is told."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import launch
from scripts.launching import local

ROOT = Path(__file__).parents[2]
# What the last process does in each attempt, from the file that counts them; the others wait for their end.
TRAIN = """
import json, os, sys, time
from pathlib import Path
args = sys.argv[1:]
print(json.dumps([args, dict(os.environ)]))
if "--ends" in args:
    last = args[-1] == str(int(args[args.index("--num-processes") + 1]) - 1)
    if last:
        ends, state = args[args.index("--ends") + 1].split(","), Path("state")
        attempt = int(state.read_text()) if state.exists() else 0
        state.write_text(str(attempt + 1))
        end = int(ends[attempt])
        os.kill(os.getpid(), -end) if end < 0 else sys.exit(end)
    time.sleep(600)
"""
FOREIGN = {
    "JAX_PLATFORMS": "tpu",
    "JAX_NUM_CPU_DEVICES": "64",
    "XLA_FLAGS": "--xla_a=1 --xla_force_host_platform_device_count=64 --xla_b='2 3'",
    "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1",
    "JAX_NUM_PROCESSES": "99",
    "JAX_PROCESS_ID": "98",
}


@pytest.fixture
def launch_local(tmp_path):
    checkout, workplace = tmp_path / "checkout", tmp_path / "workplace"
    workplace.mkdir()
    for name in (
        "scripts/launch.py",
        "scripts/common/command_line.py",
        "scripts/launching/supervisor.py",
        "scripts/launching/local.py",
        "scripts/launching/child.py",
        "parallelism/exit_status.py",
        "scripts/launching/restarts.py",
    ):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    (checkout / "scripts" / "train.py").write_text(TRAIN)

    def run(*args, **environ):
        done = subprocess.run(
            [sys.executable, checkout / "scripts" / "launch.py", "local", *args],
            cwd=workplace,
            env=os.environ | environ,
            capture_output=True,
            text=True,
            timeout=60,
        )
        told = [(line[:4], *json.loads(line[4:])) for line in done.stdout.splitlines()]
        return done.returncode, sorted(told, key=lambda process: process[0]), done.stderr.splitlines()

    run.folder = workplace
    return run


def cluster(args):
    """What train.py was told of the cluster, and the other flags."""
    *flags, coordinator, address, size, count, number, index = args
    assert (coordinator, size, number) == ("--coordinator", "--num-processes", "--process-id")
    assert re.fullmatch(r"127\.0\.0\.1:\d+", address)
    return flags, address, count, index


def logs(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.log"))


def test_each_process_gets_the_flags_and_its_place_in_one_cluster(launch_local):
    flags = ["--steps", "5", "--model.head-dim", "8", "--", "--odd=a b"]
    status, told, err = launch_local("--processes", "3", "--devices", "2", "--", *flags, **FOREIGN)
    assert (status, err) == (0, [])
    assert [prefix for prefix, _, _ in told] == ["[0] ", "[1] ", "[2] "]
    places = [cluster(args) for _, args, _ in told]
    assert places == [(flags, places[0][1], "3", str(index)) for index in range(3)]


def test_the_environment_is_overridden_where_it_speaks_of_devices_or_clusters(launch_local):
    _, told, _ = launch_local("--processes", "2", "--devices", "3", "--", KEPT="as it is", **FOREIGN)
    for _, _, env in told:
        assert env["JAX_PLATFORMS"] == "cpu"
        assert env["JAX_NUM_CPU_DEVICES"] == "3"
        assert env["XLA_FLAGS"].split() == ["--xla_a=1", "--xla_b='2", "3'"]
        assert env["PYTHONUNBUFFERED"] == "1"
        assert env["KEPT"] == "as it is"
        assert not {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"} & set(env)


@pytest.mark.parametrize("given", [[], ["--resume"]])
def test_a_restart_goes_on_in_the_run_on_another_port(given, launch_local):
    flags = ["--output-dir", "runs/x/", *given, "--ends", "-9,3,0"]
    status, told, err = launch_local("--processes", "1", "--restarts", "2", "--", *flags)
    assert status == 0
    assert [line for line in err if "restart" in line] == ["restart 1 of 2", "restart 2 of 2"]
    found, addresses, _, _ = zip(*(cluster(args) for _, args, _ in told), strict=True)
    resumed = flags if given else [*flags, "--resume"]
    assert found == (flags, resumed, resumed)
    assert len(set(addresses)) == 3
    assert logs(launch_local.folder) == [f"runs/x.logs/attempt-{k}/process-0.log" for k in (1, 2, 3)]


@pytest.mark.parametrize(("ends", "status"), [("1", 1), ("3,-9", 137), ("-6,3", 3), ("3,1", 1)])
def test_the_status_says_how_it_ended(ends, status, launch_local):
    flags = ["--output_dir=x", "--ends", ends]
    found, _, err = launch_local("--processes", "3", "--restarts", str(ends.count(",")), "--", *flags)
    assert found == status
    assert re.match(
        r"process 2 (exited with status|was killed by SIG).*; ending the other 2; its output: x\.logs/",
        err[0],
    )
    assert (err[-1] == "no restart is left of 1") == (ends in ("3,-9", "-6,3"))


def test_bad_input_leaves_nothing(launch_local):
    status, _, err = launch_local(
        "--processes", "1", "--restarts", "3", "--", "--output-dir", "runs/x", "--ends", "2"
    )
    assert (status, err) == (2, ["process 0 exited with status 2"])
    assert [path.name for path in launch_local.folder.iterdir()] == ["state"]


def test_logs_of_a_run_without_a_folder_have_a_name_of_their_own(launch_local):
    launch_local("--processes", "1", "--")
    (log,) = logs(launch_local.folder)
    assert re.fullmatch(r"runs/local-\d{8}-\d{6}\.logs/attempt-1/process-0\.log", log)


def test_logs_go_where_they_are_told(launch_local):
    for _ in range(2):
        assert launch_local("--processes", "1", "--log-dir", "a/b", "--", "--output-dir", "x")[0] == 0
    assert logs(launch_local.folder) == [f"a/b/attempt-{k}/process-0.log" for k in (1, 2)]


def test_every_attempt_has_another_port(monkeypatch):
    commands = local.local_commands(local.LocalFlags(processes=1), [])
    ports = itertools.chain([7, 7, 7, 8], itertools.repeat(9))
    monkeypatch.setattr(local, "free_port", lambda: next(ports))
    addresses = [cluster(commands(attempt)[0].argv[2:])[1] for attempt in (1, 2, 3)]
    assert addresses == ["127.0.0.1:7", "127.0.0.1:8", "127.0.0.1:9"]


# Arguments of launch.py, and what its one line must say: the value and the remedy.
BAD = {
    "no command": ([], ["''", "local", "see launch.py --help"]),
    "unknown command": (["remote"], ["'remote'", "local", "see launch.py --help"]),
    "no marker": (["local", "--processes", "2"], ["--", "is missing", "try launch.py local"]),
    "flags without a marker": (["local", "--steps", "3"], ["--steps", "--help"]),
    "no processes": (["local", "--processes", "0", "--"], ["processes=0", "at least 1", "try --processes 2"]),
    "no devices": (["local", "--devices", "0", "--"], ["devices=0", "at least 1", "try --devices 1"]),
    "negative restarts": (
        ["local", "--restarts", "-1", "--"],
        ["restarts=-1", "at least 0", "try --restarts 0"],
    ),
    "not a number": (["local", "--processes", "many", "--"], ["--processes", "many", "--help"]),
    "unknown flag": (["local", "--hosts", "2", "--"], ["--hosts", "--help"]),
    "restarts of no run": (["local", "--restarts", "2", "--"], ["--restarts 2", "add --output-dir"]),
    "restarts of an unnamed run": (["local", "--restarts", "2", "--", "--output-dir"], ["add --output-dir"]),
    "own coordinator": (["local", "--", "--coordinator", "here:1"], ["--coordinator", "leave it out"]),
    "own number": (["local", "--", "--process_id=1"], ["--process-id", "leave it out"]),
    "own count": (["local", "--", "--num-processes", "2"], ["--num-processes", "leave it out"]),
    "log folder in a file": (["local", "--log-dir", "file", "--"], ["file", "try another --log-dir"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_starts_nothing(name, tmp_path, monkeypatch, capfd):
    args, expected = BAD[name]
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["launch.py", *args])
    with pytest.raises(SystemExit) as exit:
        launch.main()
    out, err = capfd.readouterr()
    assert (exit.value.code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "; " in err, "no remedy"
    for words in expected:
        assert words in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_help_lists_the_commands_and_their_flags(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["launch.py", "--help"])
    assert launch.main() == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in launch.COMMANDS)
    monkeypatch.setattr(sys, "argv", ["launch.py", "local", "--help"])
    with pytest.raises(SystemExit) as exit:
        launch.main()
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert all(
        flag in text for flag in ("--processes", "--devices", "--restarts", "--log-dir", "launch.py local")
    )
