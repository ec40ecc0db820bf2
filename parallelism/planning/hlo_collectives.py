"""The collectives that one execution of a compiled program performs, read from its optimized HLO text.

Invariant: a collective is counted exactly as often as it runs (`hlo.py`), and none is passed over: what is not known
is found by its name, as not counted.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from parallelism.planning.hlo import SAME_VALUE, Op, Program, numbers

RAGGED = "ragged-all-to-all"
"""Sends a part of its buffer that only a run knows; all of it is counted."""
_PASSES = {"all-gather": 1, "all-reduce": 2, "all-to-all": 1, RAGGED: 1, "collective-permute": 1, "reduce-scatter": 1}
_BETWEEN_TWO = ("collective-permute", "send")
"""From one device to another: a send says its pairs as a permute does, and its bytes are received once."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction, with all that it does in one execution of the program."""

    kind: str
    """all-gather, all-reduce, all-to-all, ragged-all-to-all, collective-permute, reduce-scatter or send, asynchronous
    or not; or the name of what communicates in a way that is not counted."""
    count: int
    """How often it runs: the product of the trip counts of the loops around it."""
    bytes: int
    """What a device holds on the larger side each time, all arrays together, layout aside: the result of an
    all-gather, the operand of a reduce-scatter, either side of the others."""
    groups: tuple[tuple[int, ...], ...]
    """Devices that exchange data, by position in `mesh.devices.flat`; of a permute, its (source, target) pairs; none of
    what is not counted."""
    name: str
    """JAX's path to the operation that asked for it, or "" where the compiler kept none."""


def read_collectives(hlo_text: str) -> list[Collective]:
    """The collectives in `compiled.as_text()`, one for each instruction that runs.

    Raises ValueError if there is no entry computation, a loop with collectives has no fixed length, or the groups of a
    collective are written in a way that is not known here.
    """
    program = Program(hlo_text)
    started: dict[str, bool] = {}

    def find(op: Op, computation: str, path: str) -> Collective | None:
        kind = op.opcode.removesuffix("-start")
        if kind in _PASSES:
            # A TPU's compiler may spread an asynchronous collective over fusions and repeat it in each; one starts it.
            if chain := re.search(r'chain_id="?([\w.-]+)', op.attributes):
                ops = program.computations[computation].values()
                starts = any("AsyncCollectiveStart" in each.attributes for each in ops)
                started[chain[1]] = starts or started.get(chain[1], False)
                if not starts:
                    return None
            return _collective(program, op, kind, computation, path)
        if kind == "send" and (between := _between_slices(program, op, path)):
            return between
        if kind == "send" and "source_target_pairs=" in op.attributes:
            return _collective(program, op, kind, computation, path)
        named = re.search("replica_groups=|source_target_pairs=|megascale_transfer", op.attributes)
        if named and not op.opcode.startswith("recv") and not op.opcode.endswith(("-update", "-done")):
            target = re.search(r'custom_call_target="([^"]*)"', op.attributes)
            return Collective(target[1] if target else kind, 1, 0, (), path)
        return None

    found = program.find_all(find, wire_bytes)
    for chain, starts in started.items():
        if not starts:
            raise ValueError(f"the collectives with chain_id {chain} are started in no way that is known")
    return [dataclasses.replace(each, count=count) for each, count in found]


def wire_bytes(collective: Collective) -> float:
    """Bytes that a device sends each time, by the algorithms that send the least; groups of one send nothing.

    0 of what is not counted.
    """
    size = max(map(len, collective.groups), default=1)
    kept = 0 if collective.kind in _BETWEEN_TWO else collective.bytes / size
    return _PASSES.get(collective.kind, 1) * (collective.bytes - kept)


def crossed_axes(collective: Collective, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which the devices of a group differ, in a program over a mesh with this `mesh.shape`."""
    places = [np.unravel_index(group, tuple(mesh_shape.values())) for group in collective.groups]
    return tuple(axis for i, axis in enumerate(mesh_shape) if any(np.ptp(place[i]) for place in places))


def _collective(program: Program, op: Op, kind: str, computation: str, path: str) -> Collective:
    arrays, operands = _array_bytes(op.shape), len(op.arguments())
    if kind == "send":
        arrays = arrays[:1]  # what it sends, a context, a token
    elif op.opcode.endswith("-start") and len(arrays) > operands:
        arrays = arrays[operands : 2 * operands]  # operands, results, what the device keeps to itself
    size = sum(arrays)
    groups = _groups(op.attributes, program.devices)
    if kind == "reduce-scatter":
        size *= len(groups[0])
    elif kind == "all-reduce" and computation in program.fused and _is_sliced(program.computations[computation], op):
        kind = "reduce-scatter"  # written as an all-reduce and a slice, fused, which a TPU runs as one
    return Collective(kind, 1, size, groups, path)


def _array_bytes(shape: str) -> list[int]:
    """Of each array of a shape: its bits and dims are 16 and 4,8 of bf16[4,8]{1,0}; pred names no bits and takes 8."""
    arrays = re.findall(r"[a-z]+(\d*)\w*\[([^\]]*)\]", shape)
    return [-(-math.prod(numbers(dims)) * int(bits or 8) // 8) for bits, dims in arrays]


def _between_slices(program: Program, op: Op, path: str) -> Collective | None:
    """A collective of each device with those in its place in other slices, which a TPU's hosts carry out.

    The program is that of one slice. It sends what a device has, and says which of which devices meet: in slices 1 and
    2 each of devices 0 to 3 is "{1,2}x{0:3}". Devices of several slices are counted slice by slice.
    """
    named = re.search(r'megascale_transfer_type="(\w+)"', op.attributes)
    target = re.search(r'megascale_target="\{([\d,:]+)\}x\{([\d,:]+)\}"', op.attributes)
    kind = named[1].lower().replace("_", "-") if named else ""
    if kind not in _PASSES or target is None:
        return None
    slices, places = len(_ranges(target[1])), _ranges(target[2])
    groups = tuple(tuple(number * program.devices + place for number in range(slices)) for place in places)
    sent = _array_bytes(op.shape)[0]
    return Collective(kind, 1, sent * slices if kind == "all-gather" else sent, groups, path)


def _ranges(text: str) -> list[int]:
    """0, 1, 2, 3 and 8 of "0:3,8"."""
    ends = [[int(end) for end in part.split(":")] for part in text.split(",")]
    return [number for first, *last in ends for number in range(first, (last or [first])[0] + 1)]


def _is_sliced(ops: Mapping[str, Op], op: Op) -> bool:
    """Whether a part of its result, or of each of them, is all that is used."""
    users = [each for each in ops.values() if op.name in each.arguments()]
    passing = (*SAME_VALUE, "get-tuple-element")
    return bool(users) and all(
        each.opcode == "dynamic-slice" or (each.opcode in passing and _is_sliced(ops, each)) for each in users
    )


def _groups(attributes: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """From each of XLA's notations: lists, iota, mesh axes. No list means one group of all devices."""
    if found := re.search(r'(?:replica_groups|source_target_pairs)="?\{((?:\{[\d,]*\},?)*)\}', attributes):
        listed = re.findall(r"\{([\d,]*)\}", found[1])
        return tuple(tuple(numbers(group)) for group in listed) or (tuple(range(devices)),)
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        groups = _ids(found[2]).reshape(numbers(found[1]))
    elif found := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", attributes):
        groups = _mesh_groups(found[1], found[2], found[3])
    else:
        raise ValueError(f"the groups of a collective are in no known notation: {attributes[:80]}")
    return tuple(map(tuple, groups.tolist()))


def _ids(text: str) -> np.ndarray:
    """Device ids, flat: "3,0,1,2" as listed; "[2,4]T(1,0)" is 0 to 7 in two rows, transposed."""
    if not text.startswith("["):
        return np.array(numbers(text))
    dims, _, order = text.partition("T")
    ids = np.arange(math.prod(numbers(dims))).reshape(numbers(dims))
    return ids.transpose(numbers(order) or range(ids.ndim)).ravel()


def _mesh_groups(mesh: str, ids: str | None, axes: str) -> np.ndarray:
    """As in "'a'=2,'b'=4", None, "'a','b':(2)2": along a, and along the inner half of b, the 2 after a first 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'?([^',=]+)'?=(\d+)", mesh)}
    outer = dict(zip(sizes, np.indices(tuple(sizes.values())).reshape(len(sizes), -1), strict=True))
    inner = []
    for name, before, size in re.findall(r"'?([^',:]+)'?(?::\((\d+)\)(\d+))?(?:,|$)", axes):
        count = int(size or sizes[name])
        stride = sizes[name] // (int(before or 1) * count)
        inner.append(outer[name] // stride % count)
        outer[name] = outer[name] - inner[-1] * stride
    order = np.lexsort([*outer.values(), *inner][::-1])  # its last key sorts first
    groups = len(set(zip(*outer.values(), strict=True)))
    return (_ids(ids) if ids else np.arange(len(order)))[order].reshape(groups, -1)
