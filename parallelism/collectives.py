"""The collectives that one execution of a compiled program performs, read from its optimized HLO text.

Invariant: a collective is counted exactly as often as it runs. Where the text does not tell how often, reading raises;
only of a conditional's branches, one of which runs, the one that sends the most is counted.
"""

import dataclasses
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_PASSES = {"all-gather": 1, "all-reduce": 2, "all-to-all": 1, "collective-permute": 1, "reduce-scatter": 1}
_SAME_VALUE = ("bitcast", "convert", "copy", "copy-done", "copy-start", "opt-barrier", "reshape")
_HEADER = re.compile(r"(?:(ENTRY) )?%?([\w.-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*?)\)(?:, (.*))?$")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction, with all that it does in one execution of the program."""

    kind: str
    """all-gather, all-reduce, all-to-all, collective-permute or reduce-scatter, asynchronous or not."""
    count: int
    """How often it runs: the product of the trip counts of the loops around it."""
    bytes: int
    """What a device holds on the larger side each time, all arrays together, layout aside: the result of an
    all-gather, the operand of a reduce-scatter, either side of the others."""
    groups: tuple[tuple[int, ...], ...]
    """Devices that exchange data, by position in `mesh.devices.flat`; of a permute, its (source, target) pairs."""
    name: str
    """JAX's path to the operation that asked for it, or "" where the compiler kept none."""


def read_collectives(hlo_text: str) -> list[Collective]:
    """The collectives in `compiled.as_text()`, one for each instruction that runs.

    Raises:
      ValueError: there is no entry computation, a loop with collectives has no fixed length, or a collective or its
        groups are written in a way that is not known here.
    """
    return list(_Program(hlo_text).collectives("ENTRY", ""))


def summarize(collectives: Sequence[Collective]) -> dict[str, tuple[int, int]]:
    """Kind to how many run and the bytes of all of them, in one execution of the program."""
    return {
        kind: (sum(each.count for each in alike), sum(each.count * each.bytes for each in alike))
        for kind in sorted({each.kind for each in collectives})
        if (alike := [each for each in collectives if each.kind == kind])
    }


def wire_bytes(collective: Collective) -> float:
    """Bytes that a device sends each time, by the algorithms that send the least; groups of one send nothing."""
    size = max(map(len, collective.groups))
    kept = 0 if collective.kind == "collective-permute" else collective.bytes / size
    return _PASSES[collective.kind] * (collective.bytes - kept)


def crossed_axes(collective: Collective, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which the devices of a group differ, in a program over a mesh with this `mesh.shape`."""
    places = [np.unravel_index(group, tuple(mesh_shape.values())) for group in collective.groups]
    return tuple(axis for i, axis in enumerate(mesh_shape) if any(np.ptp(place[i]) for place in places))


class _Op(NamedTuple):
    root: str
    name: str
    shape: str
    opcode: str
    operands: str
    attributes: str

    def arguments(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.operands)

    def called(self, keys: str) -> list[str]:
        """The computations under these attributes, as in "condition=%a" or "branch_computations={%a, %b}"."""
        found = re.findall(rf"\b(?:{keys})=\{{?((?:%[\w.-]+(?:, )?)+)", self.attributes)
        return re.findall(r"%([\w.-]+)", " ".join(found))


class _Frame(NamedTuple):
    """A computation by name, where it is called, with what its parameters give there (see `_Program._value`)."""

    name: str
    parameter: Callable[[int], Any]


class _Program:
    """Computations, walked as they run."""

    def __init__(self, text: str):
        self._computations: dict[str, dict[str, _Op]] = {}
        ops: dict[str, _Op] = {}
        for line in text.splitlines():
            if header := _HEADER.match(line):
                ops = self._computations[header[1] or str(header[2])] = {}
            elif found := _INSTRUCTION.match(line):
                ops[found[2]] = _Op(*found.groups(""))
        if "ENTRY" not in self._computations:
            raise ValueError("the text must hold an ENTRY computation; pass compiled.as_text()")
        counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", text.split("\n", 1)[0])
        self._devices = math.prod(map(int, counts))

    def collectives(self, computation: str, name: str) -> Iterator[Collective]:
        """All that runs when the computation runs once; `name` goes to those that have none of their own."""
        ops = self._computations[computation].values()
        # A TPU's compiler may spread an asynchronous collective over fusions and repeat it in each; one starts it.
        starts = any("AsyncCollectiveStart" in op.attributes for op in ops)
        for op in ops:
            path = (re.findall(r'op_name="([^"]*)"', op.attributes) or [name])[0]
            kind = op.opcode.removesuffix("-start")
            if kind in _PASSES:
                if starts or "chain_id=" not in op.attributes:
                    yield self._collective(op, kind, computation, path)
            elif op.opcode == "while":
                yield from self._loop(op, computation, path)
            elif op.opcode == "conditional":
                names = op.called("branch_computations|true_computation|false_computation")
                branches = [list(self.collectives(called, path)) for called in names]
                yield from max(branches, key=lambda each: sum(one.count * wire_bytes(one) for one in each))
            elif not op.opcode.endswith(("-update", "-done")):
                if re.search("replica_groups=|source_target_pairs=|megascale_transfer", op.attributes):
                    raise ValueError(f"{kind} is not counted; known collectives are {', '.join(_PASSES)}")
                for called in op.called("calls|to_apply|called_computations"):
                    yield from self.collectives(called, path)

    def _collective(self, op: _Op, kind: str, computation: str, path: str) -> Collective:
        # The bits and the dims of each array: 16 and 4,8 of bf16[4,8]{1,0}; pred names no bits and takes 8.
        arrays = re.findall(r"[a-z]+(\d*)\w*\[([^\]]*)\]", op.shape)
        operands = len(op.arguments())
        if op.opcode.endswith("-start") and len(arrays) > operands:
            arrays = arrays[operands : 2 * operands]  # operands, results, what the device keeps to itself
        size = sum(-(-math.prod(_numbers(dims)) * int(bits or 8) // 8) for bits, dims in arrays)
        groups = _groups(op.attributes, self._devices)
        if kind == "reduce-scatter":
            size *= len(groups[0])
        elif kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # written as an all-reduce and a slice, fused, which a TPU runs as one
        return Collective(kind, 1, size, groups, path)

    def _loop(self, op: _Op, computation: str, path: str) -> Iterator[Collective]:
        for key, extra in (("body", 0), ("condition", 1)):
            inside = list(self.collectives(op.called(key)[0], path))
            trips = self._trips(op, computation, path) + extra if inside else 0
            yield from (dataclasses.replace(each, count=each.count * trips) for each in inside)

    def _trips(self, op: _Op, computation: str, path: str) -> int:
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', op.attributes):
            return int(known[1])
        # A TPU's compiler drops the count: run the loop, its integers alone.
        condition, body = (op.called(key)[0] for key in ("condition", "body"))
        start = self._value(_Frame(computation, lambda _: None), op.arguments()[0])
        state = [_element(start, index) for index in range(op.shape.count("["))]
        for trips in range(100_000):
            frames = [_Frame(name, lambda _, state=state: state.__getitem__) for name in (condition, body)]
            goes_on, following = map(self._result, frames)
            if goes_on is None:
                break
            if not goes_on:
                return trips
            state = [_element(following, index) for index in range(len(state))]
        raise ValueError(f"loop {path or op.name} with collectives needs a fixed length; use jax.lax.scan")

    def _result(self, frame: _Frame) -> Any:
        return next(self._value(frame, op.name) for op in self._computations[frame.name].values() if op.root)

    def _value(self, frame: _Frame, name: str) -> Any:
        """What an instruction gives: an integer, a tuple as a function of the index, or None: only a run knows."""
        op = self._computations[frame.name][name]
        given = op.arguments()
        if op.opcode in _SAME_VALUE:
            return self._value(frame, given[0])
        if op.opcode == "parameter":
            return frame.parameter(int(op.operands))
        if op.opcode == "tuple":
            return lambda index: self._value(frame, given[index])
        if op.opcode == "get-tuple-element":
            return _element(self._value(frame, given[0]), _numbers(op.attributes)[0])
        if not re.match(r"(pred|[su]\d+)\[\]", op.shape):
            return None
        if op.opcode == "constant":
            return int({"true": "1", "false": "0"}.get(op.operands, op.operands))
        if op.opcode in ("fusion", "call"):
            called = op.called("calls|to_apply")[0]
            return self._result(_Frame(called, lambda index: self._value(frame, given[index])))
        if op.opcode not in ("add", "subtract", "compare"):
            return None
        function = (re.findall(r"direction=(\w+)", op.attributes) or [op.opcode[:3]])[0].lower()
        numbers = [self._value(frame, argument) for argument in given]
        known = all(isinstance(number, int) for number in numbers)
        return int(getattr(operator, function)(*numbers)) if known else None


def _element(whole: Any, index: int) -> Any:
    return whole(index) if callable(whole) else None


def _groups(attributes: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """From each of XLA's notations: lists, iota, mesh axes. No list means one group of all devices."""
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}", attributes):
        listed = re.findall(r"\{([\d,]*)\}", found[1])
        return tuple(tuple(_numbers(group)) for group in listed) or (tuple(range(devices)),)
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        groups = _ids(found[2]).reshape(_numbers(found[1]))
    elif found := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", attributes):
        groups = _mesh_groups(found[1], found[2], found[3])
    else:
        raise ValueError(f"the groups of a collective are in no known notation: {attributes[:80]}")
    return tuple(map(tuple, groups.tolist()))


def _ids(text: str) -> np.ndarray:
    """Device ids, flat: "3,0,1,2" as listed; "[2,4]T(1,0)" is 0 to 7 in two rows, transposed."""
    if not text.startswith("["):
        return np.array(_numbers(text))
    dims, _, order = text.partition("T")
    ids = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return ids.transpose(_numbers(order) or range(ids.ndim)).ravel()


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


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
