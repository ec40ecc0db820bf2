"""A fake of the gcloud program, put on PATH in its place. It is not Google Cloud: it plays what a test writes down.

Its world is the folder $FAKE_GCLOUD: scenario.json (below), gcloud.jsonl (every command line it was given), node.json
and queued.json (what exists there, and so would bill; node-0.json and so on for the slices of a queued resource),
bucket/ (objects) and hosts/I/ (the home of worker I, counted over all slices, where a command given to `ssh` is really
run by bash, with the programs of fake_host.sh before those of this machine).

Keys of scenario.json, all of them optional:
  hosts            how many, of each slice
  accelerator      what a node says it is
  create           outcomes of creations in turn: ok, capacity, leftover (capacity, and a node remains), denied, slow
  queue            states of a queued resource in turn, as it is described
  refused          verb -> how many of its first calls fail for a reason that passes
Invariant: it needs Python's library alone, and few modules of that (not pathlib): its start is most of what a test
costs.
"""

import fcntl
import json
import os
import sys
import time
from os.path import exists

WORLD = os.environ["FAKE_GCLOUD"]
NO_CAPACITY = '{\n  "code": 8,\n  "message": "There is no more capacity in the zone \\"us-central1-a\\""\n}'


def main(args):
    home = os.environ["HOME"]  # of a host, or of whoever runs launch.py
    with open(f"{home if home.startswith(f'{WORLD}/hosts/') else WORLD}/gcloud.jsonl", "a") as calls:
        calls.write(json.dumps(args) + "\n")
    if args[0] == "alpha":
        args = args[1:]
    if args[0] == "storage":
        return {"cp": storage_cp, "ls": storage_ls}[args[1]](*args[2:])
    kind, verb, name = args[2:5]
    flags = dict(arg.lstrip("-").partition("=")[::2] for arg in args[5:])
    if count(f"refused-{verb}") < scenario().get("refused", {}).get(verb, 0):
        fail(verb, "the service is UNAVAILABLE", 255 if verb == "ssh" else 1)
    blink = f"{WORLD}/blink"  # how often a description will not be given
    if verb == "describe" and exists(blink) and int(read(blink)):
        write(blink, str(int(read(blink)) - 1))
        fail(verb, "Connection reset by peer")
    return {"tpu-vm": TPU_VM, "queued-resources": QUEUED}[kind][verb](name, flags)


def create(name, flags):
    outcomes = scenario().get("create", [])
    number = count("create")
    outcome = outcomes[number] if number < len(outcomes) else "ok"
    if exists(f"{WORLD}/node.json"):
        fail("create", "ALREADY_EXISTS: the node exists")
    if outcome in ("ok", "leftover", "slow"):
        write_nodes(flags, "READY" if outcome == "ok" else "CREATING")
    if outcome == "slow":
        time.sleep(600)
    if outcome in ("capacity", "leftover"):
        fail("create", NO_CAPACITY)
    if outcome == "denied":
        fail("create", "PERMISSION_DENIED: Permission 'tpu.nodes.create' denied")


def write_nodes(flags, state):
    world = scenario()
    hosts, slices = world.get("hosts", 1), int(flags.get("node-count", 0))
    facts = {
        "state": state,
        "health": "HEALTHY",
        "acceleratorType": world.get("accelerator", flags["accelerator-type"]),
        "networkEndpoints": [{"ipAddress": f"10.0.0.{i}"} for i in range(hosts)],
    }
    end_hosts(range(max(1, slices) * hosts))
    for number in range(slices) or [None]:
        write(f"{WORLD}/node.json" if number is None else f"{WORLD}/node-{number}.json", json.dumps(facts))
    for i in range(max(1, slices) * hosts):
        os.makedirs(f"{WORLD}/hosts/{i}")


def file_of(name):
    """Where a node is, and which of several slices it is."""
    number = name.rpartition("-")[2]
    return (f"{WORLD}/node-{number}.json", int(number)) if number.isdecimal() else (f"{WORLD}/node.json", 0)


def describe(name, flags):
    facts = node(name)
    print(json.dumps(facts))
    if "looks_left" in facts:
        left = facts.pop("looks_left") - 1
        facts |= {"looks_left": left} if left else {"state": "READY"}
        write(file_of(name)[0], json.dumps(facts))


def delete(name, flags):
    hosts = len(node(name)["networkEndpoints"])
    file, number = file_of(name)
    end_hosts(range(number * hosts, (number + 1) * hosts))
    os.unlink(file)


def create_queued(name, flags):
    if exists(f"{WORLD}/queued.json"):
        fail("create", "ALREADY_EXISTS: the queued resource exists")
    write(f"{WORLD}/queued.json", json.dumps(flags))


def describe_queued(name, flags):
    asked = json.loads(queued())
    states = scenario().get("queue", ["ACTIVE"])
    state = states[min(count("queue"), len(states) - 1)]
    if state == "ACTIVE" and not asked.get("granted"):
        write_nodes(asked, "READY")
        write(f"{WORLD}/queued.json", json.dumps({**asked, "granted": True}))
    print(json.dumps({"state": {"state": state}}))


def delete_queued(name, flags):
    asked = json.loads(queued())
    slices = range(int(asked.get("node-count", 0)))
    for each in [f"{name}-{number}" for number in slices] or [name]:
        if "force" in flags and exists(file_of(each)[0]):
            delete(each, flags)
    os.unlink(f"{WORLD}/queued.json")


def ssh(name, flags):
    facts = node(name)
    if facts["state"] != "READY":
        fail("ssh", f'This TPU has terminal state "{facts["state"]}", so it cannot be used anymore.')
    hosts = len(facts["networkEndpoints"])
    workers = range(hosts) if flags["worker"] == "all" else [int(flags["worker"])]
    statuses = [run_on(file_of(name)[1] * hosts + worker, flags["command"], facts) for worker in workers]
    raise SystemExit(next((status for status in statuses if status), 0))


def run_on(worker, command, facts):
    if worker in facts.get("unreachable", []):
        print("ERROR: (gcloud.compute.tpus.tpu-vm.ssh) exited with return code [255].", file=sys.stderr)
        return 255
    home = f"{WORLD}/hosts/{worker}"
    environment = {"HOME": home, "PATH": f"{WORLD}/host-bin:{os.environ['PATH']}", "FAKE_GCLOUD": WORLD}
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), sys.stdin.fileno())
    os.chdir(home)
    return os.spawnvpe(os.P_WAIT, "bash", ["bash", "-c", command], environment)


def end_hosts(workers):
    """The machines are switched off, and their disks are gone."""
    for worker in workers:
        home = f"{WORLD}/hosts/{worker}"
        if exists(f"{home}/unit.pid"):
            import contextlib
            import signal

            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(read(f"{home}/unit.pid")), signal.SIGKILL)
        if exists(home):
            import shutil

            shutil.rmtree(home, ignore_errors=True)


def storage_cp(source, destination, *flags):
    if destination not in ("-", place(destination)):
        os.makedirs(os.path.dirname(place(destination)), exist_ok=True)
    with (
        sys.stdin.buffer if source == "-" else open(place(source), "rb") as content,
        sys.stdout.buffer if destination == "-" else open(place(destination), "wb") as copy,
    ):
        copy.write(content.read())


def storage_ls(pattern):
    from pathlib import Path

    bucket = Path(WORLD, "bucket")
    found = sorted(bucket.glob(pattern.removeprefix("gs://")))
    if not found:
        print("ERROR: (gcloud.storage.ls) One or more URLs matched no objects.", file=sys.stderr)
        raise SystemExit(1)
    print(*(f"gs://{path.relative_to(bucket)}" for path in found), sep="\n")


def place(address):
    return address.replace("gs://", f"{WORLD}/bucket/")


def node(name):
    if not exists(file_of(name)[0]):
        fail("describe", "NOT_FOUND: Resource 'projects/p/locations/z/nodes/n' was not found")
    return json.loads(read(file_of(name)[0]))


def queued():
    if not exists(f"{WORLD}/queued.json"):
        fail("describe", "NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/n' was not found")
    return read(f"{WORLD}/queued.json")


def scenario():
    return json.loads(read(f"{WORLD}/scenario.json"))


def count(what):
    """How often this was asked before."""
    with open(f"{WORLD}/count-{what}", "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(".")
        return file.tell() - 1


def read(path):
    with open(path) as file:
        return file.read()


def write(path, text):
    with open(path, "w") as file:
        file.write(text)


def fail(verb, words, status=1):
    print(f"ERROR: (gcloud.compute.tpus.tpu-vm.{verb}) {words}", file=sys.stderr)
    raise SystemExit(status)


TPU_VM = {"create": create, "describe": describe, "delete": delete, "ssh": ssh}
QUEUED = {"create": create_queued, "describe": describe_queued, "delete": delete_queued}

if __name__ == "__main__":
    main(sys.argv[1:])
