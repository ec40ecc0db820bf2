"""launch.py local, with a program in the place of train.py that says what it was passed and ends as it is asked to."""

import functools
import json
import re

import pytest

from scripts import launch as launch_script
from scripts.launching.local import local, newest_checkpoint
from tests.scripts.cases import read_cases

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
def launch_local(tmp_path, monkeypatch, launch):
    """Exit status, (prefix, arguments, environment) of each process, lines of standard error."""
    (tmp_path / "program.py").write_text(TRAIN)
    (tmp_path / "work").mkdir()
    program = functools.partial(local, train=tmp_path / "program.py", pause=0)
    monkeypatch.setitem(launch_script.COMMANDS, "local", program)

    def run(*args, **environ):
        monkeypatch.chdir(tmp_path / "work")
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        status, out, err = launch("local", *args)
        given = [(line[:4], *json.loads(line[4:])) for line in out]
        return status, sorted(given, key=lambda process: process[0]), err

    run.folder = tmp_path / "work"
    return run


def cluster(args):
    """What train.py knows of the cluster, and the other flags."""
    *flags, coordinator, address, size, count, number, index = args
    assert (coordinator, size, number) == ("--coordinator", "--num-processes", "--process-id")
    assert re.fullmatch(r"127\.0\.0\.1:\d+", address)
    return flags, address, count, index


def test_the_newest_checkpoint_is_one_with_a_manifest(tmp_path):
    assert newest_checkpoint(None) is newest_checkpoint(str(tmp_path / "absent")) is None
    for name in ("5/manifest.json", "40/manifest.json", "90/state", "200.damaged/manifest.json"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_checkpoint(str(tmp_path)) == 40


def logs(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.log"))


def test_each_process_gets_the_flags_and_its_place_in_one_cluster(launch_local):
    flags = ["--steps", "5", "--model.head-dim", "8", "--", "--odd=a b"]
    status, given, err = launch_local("--processes", "3", "--devices", "2", "--", *flags, **FOREIGN)
    assert (status, err) == (0, [])
    assert [prefix for prefix, _, _ in given] == ["[0] ", "[1] ", "[2] "]
    places = [cluster(args) for _, args, _ in given]
    assert places == [(flags, places[0][1], "3", str(index)) for index in range(3)]


def test_the_environment_is_overridden_where_it_speaks_of_devices_or_clusters(launch_local):
    _, given, _ = launch_local("--processes", "2", "--devices", "3", "--", KEPT="as it is", **FOREIGN)
    for _, _, env in given:
        assert env["JAX_PLATFORMS"] == "cpu"
        assert env["JAX_NUM_CPU_DEVICES"] == "3"
        assert env["XLA_FLAGS"].split() == ["--xla_a=1", "--xla_b='2", "3'"]
        assert env["PYTHONUNBUFFERED"] == "1"
        assert env["KEPT"] == "as it is"
        assert not {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"} & set(env)


@pytest.mark.parametrize("given", [[], ["--resume"]])
def test_a_restart_goes_on_in_the_run_on_another_port(given, launch_local):
    flags = ["--output-dir", "runs/x/", *given, "--ends", "-9,3,0"]
    status, reports, err = launch_local("--processes", "1", "--restarts", "2", "--", *flags)
    assert status == 0
    assert [line for line in err if "restart" in line] == ["restart 1 of 2", "restart 2 of 2"]
    found, addresses, _, _ = zip(*(cluster(args) for _, args, _ in reports), strict=True)
    resumed = flags if given else [*flags, "--resume"]
    assert found == (flags, resumed, resumed)
    assert len(set(addresses)) == 3
    assert logs(launch_local.folder) == [f"runs/x.logs/attempt-{k}/process-0.log" for k in (1, 2, 3)]


@pytest.mark.parametrize(("ends", "status"), [("3,-9", 137), ("-6,3", 3), ("3,1", 1)])
def test_the_status_says_how_it_ended(ends, status, launch_local):
    flags = ["--output_dir=x", "--ends", ends]
    found, _, err = launch_local("--processes", "3", "--restarts", str(ends.count(",")), "--", *flags)
    assert found == status
    assert re.match(
        r"process 2 (exited with status|was killed by SIG).*; ending the other 2; its output: x\.logs/", err[0]
    )
    assert (err[-1] == "no restart is left of 1") == (ends in ("3,-9", "-6,3"))


def test_logs_of_a_run_without_a_folder_have_a_name_of_their_own(launch_local):
    launch_local("--processes", "1", "--")
    (log,) = logs(launch_local.folder)
    assert re.fullmatch(r"runs/local-\d{8}-\d{6}\.logs/attempt-1/process-0\.log", log)


def test_logs_go_where_they_are_told(launch_local):
    for _ in range(2):
        assert launch_local("--processes", "1", "--log-dir", "a/b", "--", "--output-dir", "x")[0] == 0
    assert logs(launch_local.folder) == [f"a/b/attempt-{k}/process-0.log" for k in (1, 2)]


BAD = """
'' | '' | local | see launch.py --help
remote | 'remote' | local | see launch.py --help
local --processes 2 | -- | is missing | try launch.py local
local --steps 3 | --steps | --help
local --processes 0 -- | processes=0 | at least 1 | try --processes 2
local --processes 65 -- | processes=65 | at most 64 | try --processes 2
local --devices 0 -- | devices=0 | at least 1 | try --devices 1
local --restarts -1 -- | restarts=-1 | at least 0 | try --restarts 0
local --processes many -- | --processes | many | --help
local --hosts 2 -- | --hosts | --help
local --restarts 2 -- | --restarts 2 | add --output-dir
local --restarts 2 -- --output-dir | add --output-dir
local -- --coordinator here:1 | --coordinator | leave it out
local -- --process_id=1 | --process-id | leave it out
local -- --num-processes 2 | --num-processes | leave it out
local -- --local-device-ids 0 | --local-device-ids | leave it out
local --log-dir file -- | file | try another --log-dir
"""


@pytest.mark.parametrize(("args", "words"), read_cases(BAD))
def test_bad_input_is_one_line_and_starts_nothing(args, words, tmp_path, refuses):
    (tmp_path / "file").touch()
    refuses(launch_script, args, *words)


def test_help_lists_the_commands_and_their_flags(launch):
    status, out, _ = launch("--help")
    assert status == 0
    assert all(any(line.startswith(f"  {name} ") for line in out) for name in launch_script.COMMANDS)
    status, out, _ = launch("local", "--help")
    assert status == 0
    for flag in ("--processes", "--devices", "--restarts", "--log-dir", "launch.py local"):
        assert flag in "\n".join(out)
