"""Command lines for gcloud, and what its answers are taken for. That gcloud takes them is not shown here."""

import re
import sys
from pathlib import Path

import pytest

from parallelism.planning.hardware import ALIASES, GENERATIONS, accelerator
from scripts.launching.gcloud import RENTED_AS, RUNTIMES, GcloudError, Tpu, copy, find_node, find_queued, run

HOME = {"name": "t1", "zone": "us-central1-a"}
PROGRAM = """#!{python}
import sys
sys.stdout.write({out!r})
sys.stderr.write({err!r})
sys.exit({status})
"""


@pytest.fixture
def gcloud(tmp_path, monkeypatch):
    """Puts a gcloud on PATH that gives one answer."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def answer(out="", err="", status=0):
        path = tmp_path / "gcloud"
        path.write_text(PROGRAM.format(python=sys.executable, out=out, err=err, status=status))
        path.chmod(0o755)

    return answer


def flags(argv):
    return dict(arg.partition("=")[::2] for arg in argv if arg.startswith("--"))


@pytest.mark.parametrize(
    ("accelerator", "runtime"),
    [
        ("v3-32", "tpu-ubuntu2204-base"),
        ("v4-8", "tpu-ubuntu2204-base"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5e-16", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-256", "v2-alpha-tpuv6e"),
    ],
)
def test_the_runtime_follows_the_generation(accelerator, runtime):
    assert flags(Tpu(**HOME, accelerator=accelerator).create())["--version"] == runtime
    given = Tpu(**HOME, accelerator=accelerator, runtime="other", queued=True).create()
    assert flags(given)["--runtime-version"] == "other"


def test_a_node_is_asked_for_by_its_own_words():
    assert Tpu(**HOME).create() == [
        *("gcloud", "compute", "tpus", "tpu-vm", "create", "t1", "--zone=us-central1-a"),
        *("--version=tpu-ubuntu2204-base", "--accelerator-type=v3-8", "--internal-ips", "--quiet"),
    ]


def test_a_queued_resource_names_its_node():
    tpu = Tpu(**HOME, queued=True, spot=True, service_account="a", network="n", subnetwork="s", project="p")
    argv = tpu.create()
    assert argv[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "t1"]
    assert flags(argv) == {
        "--zone": "us-central1-a",
        "--node-id": "t1",
        "--runtime-version": "tpu-ubuntu2204-base",
        "--accelerator-type": "v3-8",
        "--service-account": "a",
        "--network": "n",
        "--subnetwork": "s",
        "--internal-ips": "",
        "--spot": "",
        "--quiet": "",
        "--project": "p",
    }
    assert flags(tpu.delete_queued()).keys() == {"--zone", "--force", "--quiet", "--project"}


def test_what_can_be_planned_can_be_launched_by_gclouds_name_for_it():
    for name in {*RUNTIMES, *ALIASES.values()}:
        asked = flags(Tpu(**HOME, accelerator=f"{name}-8").create())["--accelerator-type"]
        assert asked == f"{RENTED_AS.get(name, name)}-8"
        assert GENERATIONS[ALIASES.get(name, name)] is accelerator(asked).generation


def test_a_reservation_and_flex_start_are_asked_for_by_the_commands_that_know_them():
    assert "--reserved" in Tpu(**HOME, reservation="any").create()
    mine = Tpu(**HOME, reservation="mine", queued=True).create()
    assert (mine[:2], flags(mine)["--reservation"]) == (["gcloud", "alpha"], "mine")
    flex = Tpu(**HOME, flex_start_hours=1.5, queued=True).create()
    assert flex[:5] == ["gcloud", "alpha", "compute", "tpus", "queued-resources"]
    assert flags(flex)["--provisioning-model"] == "flex-start"
    assert flags(flex)["--max-run-duration"] == "5400s"


@pytest.mark.parametrize(
    ("tier", "words"),
    [
        ({"reservation": "mine"}, "--reservation mine .*; add --queued"),
        ({"flex_start_hours": 6.0}, "--flex-start-hours 6 .*; add --queued"),
        ({"flex_start_hours": 200.0, "queued": True}, "at most 168.*; try --flex-start-hours 6"),
        ({"flex_start_hours": 6.0, "queued": True, "spot": True}, "--spot and --flex-start-hours 6 .*; leave one out"),
    ],
)
def test_tiers_that_do_not_exist_are_refused(tier, words):
    with pytest.raises(ValueError, match=words):
        Tpu(**HOME, **tier)


def test_all_hosts_are_called_through_a_tunnel_unless_they_have_addresses():
    argv = Tpu(**HOME).ssh("echo 'a b'")
    assert argv[:4] == ["gcloud", "alpha", "compute", "tpus"]  # tunnels are not in the stable command
    assert {"--worker=all", "--command=echo 'a b'", "--tunnel-through-iap"} <= set(argv)
    public = Tpu(**HOME, external_ips=True)
    assert "--internal-ips" not in public.create()
    assert public.ssh("true", worker="3") == [
        *("gcloud", "compute", "tpus", "tpu-vm", "ssh", "t1", "--zone=us-central1-a"),
        *("--worker=3", "--command=true", "--quiet"),
    ]


@pytest.mark.parametrize(
    "changes", [{"name": "T1"}, {"name": "-x"}, {"zone": "us"}, {"accelerator": "v3"}, {"accelerator": "v9-8"}]
)
def test_values_that_google_cloud_does_not_know_are_refused(changes):
    (value,) = changes.values()
    with pytest.raises(ValueError, match=rf"{value} must be .*; try "):
        Tpu(**HOME | changes)


def test_answers_are_read(gcloud):
    gcloud('{"state": "READY", "acceleratorType": "projects/p/v3-32", "networkEndpoints": [{}, {}, {}, {}]}')
    node = find_node(Tpu(**HOME))
    assert (node.ready, node.lost, node.accelerator, node.hosts) == (True, False, "v3-32", 4)
    gcloud('{"state": "PREEMPTED"}')
    assert find_node(Tpu(**HOME)).lost
    gcloud('{"state": {"state": "ACTIVE"}}')
    assert find_queued(Tpu(**HOME)) == "ACTIVE"


def test_only_not_found_means_that_there_is_nothing(gcloud):
    gcloud(err="ERROR: (gcloud.x) NOT_FOUND: Resource was not found", status=1)
    assert find_node(Tpu(**HOME)) is None
    for answer in ({"err": "ERROR: (gcloud.x) no network", "status": 1}, {"out": "[1"}, {"out": "null"}):
        gcloud(**answer)
        with pytest.raises(GcloudError):
            find_node(Tpu(**HOME))


@pytest.mark.parametrize(
    ("words", "may_pass"),
    [
        ('{"code": 8, "message": "There is no more capacity in the zone \\"z\\""}', True),
        ('{"code": 13, "message": "an internal error has occurred"}', True),
        ('{"code": 10, "message": "aborted while in state PREEMPTED"}', True),
        ('{"code": 8, "message": "Quota limit \'TPUV3s\' has been exceeded. Limit: 0"}', False),
        ("PERMISSION_DENIED: Permission 'tpu.nodes.create' denied", False),
        ("INVALID_ARGUMENT: CloudTpu received an invalid AcceleratorType", False),
    ],
)
def test_what_may_pass(words, may_pass, gcloud):
    gcloud(err=f"ERROR: (gcloud.compute.tpus.tpu-vm.create) {words}\n", status=1)
    with pytest.raises(GcloudError) as caught:
        run(Tpu(**HOME).create())
    assert caught.value.may_pass == may_pass
    assert "\n" not in str(caught.value)


def test_a_command_that_fails_on_a_host_is_told_from_a_host_that_cannot_be_reached(gcloud):
    for answer, unreachable in (
        ({"err": "pip: ERROR: no such package", "status": 1}, False),
        ({"err": "ssh: connect to host 10.0.0.2 port 22: timed out", "status": 255}, True),
        ({"err": "ERROR: (gcloud.alpha.compute.tpus.tpu-vm.ssh) no tunnel", "status": 1}, True),
    ):
        gcloud("said before\n", **answer)
        with pytest.raises(GcloudError) as caught:
            run(copy("a", "b"))
        assert (caught.value.unreachable, caught.value.out) == (unreachable, "said before\n")


def test_one_that_does_not_end_is_killed_and_what_it_said_is_kept(tmp_path):
    path = tmp_path / "gcloud"
    path.write_text("#!/bin/sh\necho parallax 0 running\nexec sleep 600\n")
    path.chmod(0o755)
    with pytest.raises(GcloudError, match="no answer within 2 s") as caught:
        run([str(path)], seconds=2)
    assert caught.value.unreachable
    assert caught.value.may_pass
    assert caught.value.out == "parallax 0 running\n"


def test_terraform_starts_the_same_runtimes():
    text = (Path(__file__).parents[3] / "terraform" / "tpu.tf").read_text()
    assert dict(re.findall(r'(\w+) += \{ default = "([^"]+)"', text)) == RUNTIMES
