"""The floating-point operations of the matmuls that one execution of a compiled program performs.

Invariant: a matmul is counted as often as it runs, by the rule of XLA's own cost analysis: two operations for each
element of the result and each pair that is summed for it, zeros of padding and dilation left out. Elementwise work,
a few in a hundred of a Transformer's, is not counted, nor what is inside a kernel: one of Pallas, or cuDNN's attention.
"""

import math
import re

import numpy as np

from parallelism.planning.hlo import Op, Program, numbers

_MATMULS = re.compile(r"\bdot\b|gemm|matmul|convolution|\$conv|cublas|cudnn", re.IGNORECASE)
"""In the names of other opcodes and of libraries' calls: ragged-dot, scaled-dot, __cublas$gemm, __onednn$matmul."""
_GEMM = re.compile(r"__cublas\$(gemm|lt\$matmul)$")
"""In the names of cuBLAS's matmuls."""
_ATTENTION = re.compile(r"__cudnn\$fmha")
"""In the names of cuDNN's kernels for attention."""


def read_flops(hlo_text: str) -> int:
    """Operations of `compiled.as_text()` on one device.

    Raises ValueError if there is no entry computation, a loop with matmuls has no fixed length, or a matmul is written
    in a way that is not known here.
    """
    program = Program(hlo_text)

    def find(op: Op, computation: str, path: str) -> int | None:
        if op.opcode not in ("dot", "convolution"):
            target = re.search(r'custom_call_target="([^"]*)"', op.attributes)
            name = target[1] if target else op.opcode
            if _GEMM.match(name):
                return _of_gemm(op, _dims(program.operands(op, computation)[0].shape))
            if _MATMULS.search(name) and not _ATTENTION.match(name):
                raise ValueError(f"{name} is not counted; known matmuls are dot and convolution, and those of cuBLAS")
            return None
        shapes = [_dims(operand.shape) for operand in program.operands(op, computation)]
        if len(shapes) != 2:
            raise ValueError(f"{op.opcode} {op.name} must have two operands, not {len(shapes)}")
        return (_of_dot if op.opcode == "dot" else _of_convolution)(op, *shapes)

    return sum(count * flops for flops, count in program.find_all(find, float))


def _dims(shape: str) -> list[int]:
    """Of f32[2,3]{1,0}: 2 and 3."""
    return numbers(re.findall(r"\[([\d,]*)\]", shape)[0])


def _attribute(op: Op, name: str) -> str:
    return (re.findall(rf"\b{name}=(\S+?)(?:,\s|$)", op.attributes) or [""])[0]


def _of_dot(op: Op, left: list[int], right: list[int]) -> int:
    contracting = _attribute(op, "lhs_contracting_dims")
    if not contracting:
        raise ValueError(f"dot {op.name} does not say which dims it sums over: {op.attributes[:80]}")
    summed = [left[dim] for dim in numbers(contracting)]
    return 2 * math.prod(_dims(op.shape)) * math.prod(summed)


def _of_gemm(op: Op, left: list[int]) -> int:
    """A call of cuBLAS, whose result comes first and before its workspace."""
    contracting = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', op.attributes)
    if contracting is None:
        raise ValueError(f"custom-call {op.name} does not say which dims it sums over: {op.attributes[:80]}")
    return 2 * math.prod(_dims(op.shape)) * math.prod(left[dim] for dim in numbers(contracting[1]))


def _of_convolution(op: Op, left: list[int], right: list[int]) -> int:
    """A TPU writes a matmul as a convolution, with batch dims as dims of space."""
    inputs, rest = _attribute(op, "dim_labels").split("_")
    kernel, result = rest.split("->")
    out = _dims(op.shape)
    flops = 2 * out[result.index("b")] * out[result.index("f")] * right[kernel.index("i")]
    found = re.search(r"window=\{(.*?)\}", op.attributes)
    window = dict(part.split("=") for part in found[1].split()) if found else {}
    for place, label in enumerate(label for label in sorted(result) if label.isdigit()):

        def part(name: str, default: str, place: int = place) -> str:
            return window[name].split("x")[place] if name in window else default

        flops *= _pairs(
            size=left[inputs.index(label)],
            taps=right[kernel.index(label)],
            results=out[result.index(label)],
            stride=int(part("stride", "1")),
            low=int(part("pad", "0_0").split("_")[0]),
            spread=int(part("lhs_dilate", "1")),
            reach=int(part("rhs_dilate", "1")),
        )
    groups = numbers(_attribute(op, "batch_group_count") or "1")[0]
    return flops // groups


def _pairs(*, size: int, taps: int, results: int, stride: int, low: int, spread: int, reach: int) -> int:
    """How many (result, tap) along one dim of space fall on an element and not on padding or into a gap."""
    at = np.arange(results)[:, None] * stride + np.arange(taps)[None] * reach - low
    return int(np.count_nonzero((at >= 0) & (at < (size - 1) * spread + 1) & (at % spread == 0)))
