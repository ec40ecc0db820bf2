"""One bit, on one device, is seen and named; legal differences are not."""

import json
import pathlib
import socket
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from parallelism.sentinel import Divergence, check, device_fingerprints, fingerprint

ROOT = pathlib.Path(__file__).parents[2]
DTYPES = ["float64", "float32", "bfloat16", "float8_e4m3fn", "int32", "int16", "uint8"]


def make_mesh(**sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def place(mesh, value, *spec, altered=()):
    """A global array, the first element of whose shard is one higher on the devices that are altered."""
    value = np.asarray(value)
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    shards = []
    for device, index in sharding.devices_indices_map(value.shape).items():
        shard = np.array(value[index])
        if device.id in altered:
            shard.flat[0] += 1
        shards.append(jax.device_put(shard, device))
    return jax.make_array_from_single_device_arrays(value.shape, sharding, shards)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def message(trees, facts=None):
    with pytest.raises(Divergence) as caught:
        check(40, trees, facts)
    return str(caught.value)


@pytest.fixture(scope="module")
def hashed():
    compiled = jax.jit(fingerprint)
    return lambda *leaves: np.asarray(compiled(leaves))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_flipped_bit_shows(hashed, dtype):
    random = np.random.default_rng(0)
    width = 8 * jnp.dtype(dtype).itemsize
    bits = random.integers(0, 2**width, (7, 3, 5), f"uint{width}")
    value = bits.view(jnp.dtype(dtype))
    with jax.enable_x64(width == 64):
        expected = hashed(value)
        for bit in range(width):
            for position in random.integers(0, bits.size, 3):
                changed = bits.copy()
                changed.flat[position] ^= changed.dtype.type(1 << bit)
                assert (hashed(changed.view(value.dtype)) != expected).all(), (bit, position)


def test_every_flipped_boolean_key_and_scalar_shows(hashed):
    flags = np.zeros(9, bool)
    seen = {hashed(flags).tobytes()}
    for position in range(9):
        flags[position] = True
        seen.add(hashed(flags).tobytes())
    assert len(seen) == 10
    keys = jax.random.split(jax.random.key(0), 2)
    assert (hashed(keys) != hashed(keys[::-1])).all()
    assert (hashed(np.int32(3)) != hashed(np.int32(-3))).all()


def test_changes_that_a_sum_would_hide_show(hashed):
    value = np.ones((64, 64), np.float32)
    expected = hashed(value)
    assert (hashed(-value) != expected).all()  # as many sign bits as can be
    assert (hashed(2 * value) != expected).all()
    value[[3, 40], [5, 6]] *= -1
    assert (hashed(value) != expected).all()
    value = normal(4, 6)
    swapped = value.copy()
    swapped[[0, 3], [1, 2]] = value[[3, 0], [2, 1]]
    assert (hashed(swapped) != hashed(value)).all()
    assert (hashed(value.T) != hashed(value)).all()


def test_leaves_are_hashed_by_themselves_in_tree_order(hashed):
    a, b = normal(5), normal(3, 4, seed=1)
    np.testing.assert_array_equal(jax.jit(fingerprint)({"b": b, "a": a}), np.concatenate([hashed(a), hashed(b)]))
    assert fingerprint({}).shape == (0, 2)


def test_large_leaves_are_hashed_without_a_copy():
    leaf = jax.ShapeDtypeStruct((1000, 1000), jnp.bfloat16)
    memory = jax.jit(fingerprint).lower([leaf]).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 100_000


def test_a_device_hashes_what_it_holds_however_its_replicas_are_laid_out(hashed):
    value = normal(8, 6)
    halves = [hashed(value[:4])[0], hashed(value[4:])[0]]
    for sizes in [{"data": 4, "fsdp": 2}, {"fsdp": 2, "data": 4}, {"data": 2, "fsdp": 2, "tensor": 2}]:
        mesh = make_mesh(**sizes)
        table = device_fingerprints(mesh, [place(mesh, value, "fsdp")])
        along = np.moveaxis(table.reshape(*mesh.devices.shape, 2), mesh.axis_names.index("fsdp"), 0)
        for half, rows in zip(halves, along, strict=True):
            assert (rows == half).all()
    mesh = make_mesh(data=8)
    assert (device_fingerprints(mesh, [place(mesh, value)]) == hashed(value)[0]).all()


@pytest.mark.parametrize("device", [0, 5])
def test_a_replica_that_differs_is_named(device):
    mesh = Mesh(np.array(jax.devices()[::-1]), ("data",))  # rows need not follow ids
    blocks = {"query": place(mesh, normal(4, 6), altered=[device])}
    found = message([{"params": {"blocks": blocks, "embed": place(mesh, normal(3))}}])
    who = f"device {device} of process 0 differs from the other 7 replicas after step 40"
    assert found == f"params/blocks/query: {who}"


def test_several_that_differ_are_named():
    mesh = make_mesh(data=8)
    w = place(mesh, np.int32(0), altered=[1, 6])
    assert message([{"w": w}]).startswith("w: devices 1 and 6 of process 0 differ from the other 6 replicas ")
    w = place(make_mesh(data=2, fsdp=4), normal(8), "fsdp", altered=[6])
    rest = "disagree without a majority after step 40"
    assert message([{"w": w}]) == f"w: device 2 of process 0 and device 6 of process 0 {rest}"


def test_a_sharded_leaf_is_compared_with_the_peers_of_each_shard():
    mesh = make_mesh(data=4, fsdp=2)
    good = place(mesh, normal(8, 6), None, "fsdp")
    whole = place(mesh, normal(8, 8), "fsdp", "data")
    ids = place(mesh, np.arange(8, dtype=np.int32), "data")
    check(40, [{"good": good, "whole": whole}, {"sample_ids": ids}])
    bad = place(mesh, normal(8, 6), None, "fsdp", altered=[5])
    found = message([{"bad": bad, "good": good}])
    assert found == "bad: device 5 of process 0 differs from the other 3 replicas after step 40"
    bad_ids = place(mesh, np.arange(8, dtype=np.int32), "data", altered=[2])
    assert message([{"good": good}, {"sample_ids": bad_ids}]).startswith("sample_ids: device")


def test_what_has_no_second_copy_is_not_compared():
    check(40, [[place(make_mesh(fsdp=8), normal(8), "fsdp", altered=[3]), jnp.ones(3)]], {"corpus": b"text"})


def test_the_first_of_two_leaves_is_named():
    mesh = make_mesh(data=8)
    good, bad, worse = (place(mesh, normal(4), altered=altered) for altered in ([], [7], [1, 2]))
    assert message([{"c": worse, "a": good, "b": bad}]).startswith("b: device 7 ")
    assert message([{"z": worse}, {"a": bad}]).startswith("z: devices 1 and 2 ")


def test_one_program_serves_all_checks():
    mesh, compiled = make_mesh(data=8), []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    for seed in range(3):
        state = {"w": place(mesh, normal(4, seed=seed)), "step": place(mesh, np.int32(seed))}
        before = len(compiled)
        check(seed, [state], {"sample ids": bytes([seed])})
    assert 0 < before == len(compiled)


def test_arrays_on_two_meshes_are_refused():
    with pytest.raises(ValueError, match="b is not on the mesh of a; place both on one mesh"):
        check(40, [{"a": place(make_mesh(data=8), normal(4)), "b": place(make_mesh(fsdp=8), normal(4))}])


CHILD = """
    import json, sys, jax
    port, processes, process = map(int, sys.argv[1:])
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, process, initialization_timeout=60,
        heartbeat_timeout_seconds=10, shutdown_timeout_seconds=5)
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from parallelism.sentinel import check
    mesh = Mesh(np.array(jax.devices()), ("data",))
    odd = [device for device in jax.devices() if device.process_index == 1]
    found = [device.id for device in odd]

    def place(altered):
        shards = [jax.device_put(np.arange(6) + (d in altered), d) for d in jax.local_devices()]
        return jax.make_array_from_single_device_arrays((6,), NamedSharding(mesh, PartitionSpec()), shards)

    def report(call, *arguments):
        try:
            call(*arguments)
            found.append("equal")
        except (RuntimeError, ValueError) as error:
            found.append(f"{type(error).__name__}: {error}")

    ids = {"sample ids": b"012"}
    report(check, 1, [{"w": place([])}], ids)
    report(check, 2, [{"w": place(odd[1:])}], ids)
    report(check, 3, [{"w": place(odd)}], ids)
    report(check, 4, [{"w": place(odd)}], {"sample ids": b"01%d" % (process == 1)})
    mesh = Mesh(np.array(jax.local_devices()), ("data",))
    report(check, 5, [{"w": place([])}])
    print(json.dumps(found), flush=True)
    jax.distributed.shutdown()
"""


def test_a_host_that_differs_is_named_on_all():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    command = [sys.executable, "-c", textwrap.dedent(CHILD), port, "3"]

    def run(process):
        return subprocess.run([*command, str(process)], cwd=ROOT, text=True, capture_output=True, timeout=60)

    with ThreadPoolExecutor(3) as pool:
        ended = list(pool.map(run, range(3)))
    assert [end.returncode for end in ended] == [0] * 3, [end.stderr for end in ended]
    (a, b, *found), *others = [json.loads(end.stdout.splitlines()[-1]) for end in ended]
    assert others == [[a, b, *found]] * 2
    device = f"w: device {b} of process 1 differs from the other 5 replicas"
    assert found == [
        "equal",
        f"Divergence: {device} after step 2",
        f"Divergence: w: devices {a} and {b} of process 1 differ from the other 4 replicas after step 3",
        "Divergence: sample ids: process 1 differs from the other 2 processes after step 4",
        "ValueError: w is not on all 3 processes; give global arrays",
    ]
