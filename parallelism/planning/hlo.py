"""A compiled program's optimized HLO text, walked as the program runs.

Invariant: what is found is counted exactly as often as it runs. Where the text does not tell how often, or is not in a
notation that is known here, reading raises; only of a conditional's branches, one of which runs, the heaviest is taken.
"""

import math
import operator
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

SAME_VALUE = ("bitcast", "convert", "copy", "copy-done", "copy-start", "opt-barrier", "reshape")
"""Instructions that give what they get."""
_CALLS = "calls|to_apply|called_computations|select|scatter"
_HEADER = re.compile(r"(?:(ENTRY) )?%?([\w.-]+)(?: \(.*\) -> .*)? \{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*?)\)(?:, (.*))?$")

Found = TypeVar("Found")


class Op(NamedTuple):
    """One instruction, in parts of its text."""

    root: str
    name: str
    shape: str
    opcode: str
    operands: str
    attributes: str

    def arguments(self) -> list[str]:
        """Names of the operands, each printed with or without its shape in front, and with % or without."""
        plain = re.sub(r"/\*.*?\*/", "", self.operands)
        while (inner := re.sub(r"[\[({][^\[\](){}]*[\])}]", "", plain)) != plain:  # commas of shapes
            plain = inner
        return [part.split()[-1].removeprefix("%") for part in plain.split(",") if part.strip()]

    def called(self, keys: str) -> list[str]:
        """The computations under these attributes, as in "condition=%a" or "branch_computations={%a, %b}"."""
        found = re.findall(rf"(?<![\w-])(?:{keys})=(\{{[^{{}}]*\}}|%?[\w.-]+)", self.attributes)
        return re.findall(r"[\w.-]+", " ".join(found))


class _Frame(NamedTuple):
    """A computation by name, where it is called, with what its parameters give there (see `Program._value`)."""

    name: str
    parameter: Callable[[int], Any]


class Program:
    """Computations by name, "ENTRY" the outermost, each with its instructions by name.

    Args:
      text: `compiled.as_text()`.

    Raises:
      ValueError: there is no entry computation, or a line of a computation is no instruction.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Op]] = {}
        ops: dict[str, Op] | None = None  # of the computation that the line is in
        text = re.sub(r"=\{\n(.*)\n\}", r"={\1}", text)  # a kernel's metadata are printed on lines of their own
        for line in text.splitlines():
            if header := _HEADER.match(line):
                ops = self.computations[header[1] or str(header[2])] = {}
            elif line.startswith("}"):
                ops = None
            elif ops is not None and line.strip():
                found = _INSTRUCTION.match(line)
                if found is None:
                    raise ValueError(f"a line of the program is no instruction that is known: {line.strip()[:80]}")
                ops[found[2]] = Op(*found.groups(""))
        if "ENTRY" not in self.computations:
            raise ValueError("the text must hold an ENTRY computation; pass compiled.as_text()")
        self.fused = {
            name
            for ops in self.computations.values()
            for op in ops.values()
            if op.opcode == "fusion"
            for name in op.called("calls")
        }
        """Computations that are one instruction of a device."""
        self._reached: set[str] = set()
        counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", text.split("\n", 1)[0])
        self.devices = math.prod(map(int, counts))

    def find_all(
        self, find: Callable[[Op, str, str], Found | None], weigh: Callable[[Found], float]
    ) -> list[tuple[Found, int]]:
        """All that `find` finds when the program runs, and how often it runs; see `walk`.

        Raises:
          ValueError: also where something is found in a computation that no instruction calls in a way that is known.
        """
        found = list(self.walk(find, weigh))
        for name in self.computations.keys() - self._reached:
            if any(find(op, name, "") is not None for op in self.computations[name].values()):
                raise ValueError(f"computation {name} is called in no way that is known, and holds what is counted")
        return found

    def operands(self, op: Op, computation: str) -> list[Op]:
        """The instructions whose results an instruction takes. Raises ValueError if one is not there."""
        ops = self.computations[computation]
        for name in op.arguments():
            if name not in ops:
                raise ValueError(f"operand {name} of {op.opcode} {op.name} is no instruction of {computation}")
        return [ops[name] for name in op.arguments()]

    def walk(
        self,
        find: Callable[[Op, str, str], Found | None],
        weigh: Callable[[Found], float],
        computation: str = "ENTRY",
        path: str = "",
    ) -> Iterator[tuple[Found, int]]:
        """All that `find` finds when the computation runs once, and how often it runs.

        Args:
          find: from (instruction, its computation, JAX's path to it or to what calls it) to what is wanted of it, or
            None; then the computations that it calls are walked.
          weigh: tells which branch of a conditional is the heaviest.

        Raises:
          ValueError: a loop with something that is found has no fixed length.
        """
        if computation not in self.computations:
            raise ValueError(f"computation {computation} is called and is not in the text")
        self._reached.add(computation)
        for op in self.computations[computation].values():
            inner = (re.findall(r'op_name="([^"]*)"', op.attributes) or [path])[0]
            found = find(op, computation, inner)
            if found is not None:
                yield found, 1
            elif op.opcode == "while":
                for key, extra in (("body", 0), ("condition", 1)):
                    inside = list(self.walk(find, weigh, _only(op, key), inner))
                    trips = self._trips(op, computation, inner) + extra if inside else 0
                    yield from ((each, count * trips) for each, count in inside)
            elif op.opcode == "conditional":
                names = op.called("branch_computations|true_computation|false_computation")
                branches = [list(self.walk(find, weigh, name, inner)) for name in names]
                yield from max(
                    branches, key=lambda found: sum(count * weigh(each) for each, count in found), default=()
                )
            elif not op.opcode.endswith(("-update", "-done")):
                for called in op.called(_CALLS):
                    yield from self.walk(find, weigh, called, inner)

    def _trips(self, op: Op, computation: str, path: str) -> int:
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', op.attributes):
            return int(known[1])
        # A TPU's compiler drops the count: run the loop, its integers alone.
        condition, body = (_only(op, key) for key in ("condition", "body"))
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
        raise ValueError(
            f"loop {path or op.name} needs a fixed length for its contents to be counted; use jax.lax.scan"
        )

    def _result(self, frame: _Frame) -> Any:
        return next(self._value(frame, op.name) for op in self.computations[frame.name].values() if op.root)

    def _value(self, frame: _Frame, name: str) -> Any:
        """What an instruction gives: an integer, a tuple as a function of the index, or None: only a run knows."""
        op = self.computations[frame.name][name]
        given = op.arguments()
        if op.opcode in SAME_VALUE:
            return self._value(frame, given[0])
        if op.opcode == "parameter":
            return frame.parameter(int(op.operands))
        if op.opcode == "tuple":
            return lambda index: self._value(frame, given[index])
        if op.opcode == "get-tuple-element":
            return _element(self._value(frame, given[0]), numbers(op.attributes)[0])
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
        values = [self._value(frame, argument) for argument in given]
        known = all(isinstance(value, int) for value in values)
        return int(getattr(operator, function)(*values)) if known else None


def _only(op: Op, key: str) -> str:
    names = op.called(key)
    if len(names) != 1:
        raise ValueError(f"{op.opcode} {op.name} must name one {key}, not {', '.join(names) or 'none'}")
    return names[0]


def _element(whole: Any, index: int) -> Any:
    return whole(index) if callable(whole) else None


def numbers(text: str) -> list[int]:
    """Every number in a text."""
    return [int(number) for number in re.findall(r"\d+", text)]
