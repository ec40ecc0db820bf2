"""The divergence sentinel: devices and hosts that must hold the same bits are asked whether they do.

A step keeps replicas equal only if they were equal before it. A bit that flips in one device's memory, or a host that
reads other data, shows in no metric at first, and in every checkpoint afterwards.

Before the first step processes are asked what else they must have alike: text, flags, packages.

Invariant: arrays are hashed where they are, and only 64 bits a leaf and device travel. Every process gets all of the
hashes, so all come to the same verdict.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

SALTS = (0x9E3779B9, 0x7F4A7C15)  # any two words that differ


class Divergence(RuntimeError):
    """What must be equal is not; one line names it, and who differs."""


class _Copies(NamedTuple):
    """One array to compare, and the groups of devices whose copies must be equal."""

    name: str
    leaf: Any
    groups: list[list[Any]]


def fingerprint(tree: Any) -> jax.Array:
    """Two hashes of the bits of each leaf: uint32 [leaves, 2], in the order of `jax.tree.leaves`; traceable.

    A leaf is read as 32-bit words. Each is combined with its position and scrambled, and all are added modulo
    2^32; that twice, differently. Why so:
    - Integers have one sum in any order, however the compiler arranges the addition.
    - Scrambling is one-to-one at each position: any change within one word shows, a flipped bit among them.
    - Scrambling is not linear: changes to several words hide each other with a chance of 2^-64. In a sum of
      words times odd factors, two flipped sign bits would always do so.

    Shape and dtype are not hashed. Leaves hold booleans, integers, real numbers or typed keys.
    """
    hashes = [_hash(leaf) for leaf in jax.tree.leaves(tree)]
    return jnp.stack(hashes) if hashes else jnp.zeros((0, len(SALTS)), jnp.uint32)


def device_fingerprints(mesh: Mesh, leaves: Iterable[jax.Array], digests: np.ndarray | None = None) -> np.ndarray:
    """What each device holds, hashed by itself: uint32 [devices, digests + leaves, 2], the same on every process.

    Rows follow `mesh.devices.flat`. It is one program with one all-gather: all processes call it together.

    Args:
      mesh: of all devices.
      leaves: arrays with a NamedSharding over `mesh`.
      digests: uint32 [digests, 2], which this process puts in front in the rows of its devices.
    """
    leaves = tuple(leaves)
    front = np.zeros((0, len(SALTS)), np.uint32) if digests is None else digests
    rows = jax.make_array_from_callback(
        (mesh.size, *front.shape), NamedSharding(mesh, _one_each(mesh)), lambda index: front[None]
    )
    specs = tuple(leaf.sharding.spec for leaf in leaves)  # pyright: ignore[reportAttributeAccessIssue]
    return np.asarray(_program(mesh, specs)(rows, leaves))


def check(step: int, trees: Iterable[Any], facts: Mapping[str, bytes] | None = None) -> None:
    """Compares facts over processes, and each array over the devices that hold the same part of it.

    All processes call it after the same step. Facts come first, then arrays in tree order; the first that differs
    is named. An array that is sharded over all devices has no second copy, so it is not looked at.

    Args:
      step: for the message.
      trees: pytrees of global arrays on one mesh of all devices, such as the state and the placed sample ids. Give
        them as the step holds them: an array made from one replica is the same everywhere.
      facts: what this process believes, by name, such as the bytes of the global batch's sample ids. The names are
        the same on all processes.

    Raises:
      Divergence: "params/embed: device 5 of process 2 differs from the other 7 replicas after step 40".
        Where the most frequent value is not more frequent than all others, every side is named.
      ValueError: replicated arrays are not on one mesh.
    """
    copies = [
        _Copies(jax.tree_util.keystr(path, simple=True, separator="/"), leaf, _replicas(leaf.sharding, leaf.shape))
        for tree in trees
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    if difference := _first_difference([copy for copy in copies if copy.groups], facts or {}):
        raise Divergence(f"{difference} after step {step}")


def _hash(leaf: jax.Array) -> jax.Array:
    words = _words(leaf)
    position, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for dim in reversed(range(words.ndim)):
        position += jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim) * np.uint32(stride % 2**32)
        stride *= words.shape[dim]
    keyed = words ^ _scramble(position)
    scrambled = [_scramble(keyed ^ np.uint32(salt)) for salt in SALTS]
    # One reduction of both, which compilers fuse with all of the above: the leaf is read once and never copied.
    zeros = [np.uint32(0) for _ in SALTS]
    sums = jax.lax.reduce(scrambled, zeros, lambda a, b: jax.tree.map(jnp.add, a, b), range(words.ndim))
    return jnp.stack(sums)


def _words(x: jax.Array) -> jax.Array:
    """The bits of each element in one uint32, or in two along a new last dim."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype.itemsize == 8:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    return x.astype(jnp.uint32)


def _scramble(x: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3 (Appleby): every bit of a word decides about every other, one-to-one."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _one_each(mesh: Mesh) -> PartitionSpec:
    """A leading dim of devices, in the order of `mesh.devices.flat`."""
    return PartitionSpec(mesh.axis_names)


@functools.cache
def _replicas(sharding: Sharding, shape: tuple[int, ...]) -> list[list[Any]]:
    """Groups of devices that hold the same part of such an array; none where each part is held once."""
    parts: dict[str, list[Any]] = {}  # by text, since slices have no hash before Python 3.12
    for device, index in sharding.devices_indices_map(shape).items():
        parts.setdefault(str(index), []).append(device)
    return [devices for devices in parts.values() if len(devices) > 1]


@functools.cache
def _program(mesh: Mesh, specs: tuple[PartitionSpec, ...]) -> jax.stages.Wrapped:
    def on_one_device(rows, leaves):
        return jnp.concatenate([rows, fingerprint(leaves)[None]], axis=1)

    each = _one_each(mesh)
    table = jax.shard_map(on_one_device, mesh=mesh, in_specs=(each, specs), out_specs=each)
    return jax.jit(table, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _first_difference(copies: Sequence[_Copies], facts: Mapping[str, bytes]) -> str:
    """The first thing whose copies differ, and whose; empty when none does."""
    mesh = _common_mesh(copies)
    digests = [np.frombuffer(hashlib.sha256(value).digest()[:8], np.uint32) for value in facts.values()]
    table = device_fingerprints(
        mesh, [copy.leaf for copy in copies], np.array(digests, np.uint32).reshape(-1, len(SALTS))
    )
    row_of = {device: row for row, device in enumerate(mesh.devices.flat)}
    one_a_process = {device.process_index: device for device in row_of}
    processes = [one_a_process[process] for process in sorted(one_a_process)]
    things = [(name, [processes]) for name in facts] + [(copy.name, copy.groups) for copy in copies]
    for column, (name, groups) in enumerate(things):
        for devices in groups:
            sides: dict[bytes, list[Any]] = {}
            for device in devices:
                sides.setdefault(table[row_of[device], column].tobytes(), []).append(device)
            if len(sides) > 1:
                return f"{name}: {_verdict(list(sides.values()), by_process=column < len(facts))}"
    return ""


def _common_mesh(copies: Sequence[_Copies]) -> Mesh:
    if not copies:
        return Mesh(np.array(jax.devices()), ("devices",))
    mesh: Any = getattr(copies[0].leaf.sharding, "mesh", None)
    for copy in copies:
        if mesh is None or getattr(copy.leaf.sharding, "mesh", None) != mesh:
            raise ValueError(f"{copy.name} is not on the mesh of {copies[0].name}; place both on one mesh")
    if len({device.process_index for device in mesh.devices.flat}) != jax.process_count():
        raise ValueError(f"{copies[0].name} is not on all {jax.process_count()} processes; give global arrays")
    return mesh


def _verdict(sides: list[list[Any]], by_process: bool) -> str:
    """Who differs from the majority, or which sides there are."""
    ranked = sorted(sides, key=len, reverse=True)
    if len(ranked[0]) == len(ranked[1]):
        return f"{enumerated([_who(side, by_process) for side in sides])} disagree without a majority"
    odd = [device for side in sides if side is not ranked[0] for device in side]
    verb, count = "differs" if len(odd) == 1 else "differ", len(ranked[0])
    return f"{_who(odd, by_process)} {verb} from the other {count} {'processes' if by_process else 'replicas'}"


def _who(devices: list[Any], by_process: bool) -> str:
    ids: dict[int, list[str]] = {}
    for device in devices:
        ids.setdefault(device.process_index, []).append(str(device.id))
    if by_process:
        return f"process{'es' if len(ids) > 1 else ''} {enumerated([str(process) for process in ids])}"
    return enumerated([f"device{'s' if len(of) > 1 else ''} {enumerated(of)} of process {p}" for p, of in ids.items()])


def enumerated(names: list[str], most: int = 8) -> str:
    """Some names in a sentence; a pod has too many for a line."""
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} more"]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def require_same(facts: Mapping[str, tuple[str, str]]) -> None:
    """Compares what the processes of a run have to have alike. All call it, with the same names.

    Args:
      facts: by name, what is compared, and words for it, or none where it says enough.

    Raises:
      ValueError: something differs; in every process alike, naming the first and who has what.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    text = json.dumps(facts).encode()
    digest = np.frombuffer(hashlib.sha256(text).digest(), np.uint8)
    if (multihost_utils.process_allgather(digest) == digest).all():
        return
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    everyone = [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
    for name in dict.fromkeys(name for one in everyone for name in one):
        sides: dict[str, list[int]] = {}
        for process, one in enumerate(everyone):
            sides.setdefault(one.get(name, ("",))[0], []).append(process)
        if len(sides) > 1:
            said = [_who_has(processes, *everyone[processes[0]].get(name, ("", ""))) for processes in sides.values()]
            rule = f"{name} must be the same in all processes of a run: {', '.join(said)}"
            raise ValueError(f"{rule}; give them the same files, flags and packages")


def _who_has(processes: list[int], value: str, words: str) -> str:
    noun, verb = ("processes", "have") if len(processes) > 1 else ("process", "has")
    return f"{noun} {enumerated([str(process) for process in processes])} {verb} {words or value or 'nothing'}"
