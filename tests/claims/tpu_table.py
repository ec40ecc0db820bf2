"""Compiles the training step for TPUs that are not here, and writes what their compiler says.

    python tests/claims/tpu_table.py --output docs/evidence/tpu.md

It needs libtpu (`pip install -e ".[plan]"`) and no TPU. Reports of programs that were compiled before are found in the
cache of plan.py, so it can be stopped and started.
"""

import argparse
import dataclasses
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import jax
import matplotlib.figure
from rich.progress import track

from parallax.config import PRESETS
from parallelism.planning.compiler import Traffic, topology_devices
from parallelism.planning.hardware import GIB, Accelerator, accelerator
from parallelism.planning.planner import Build, Choice, Row, compile_choice, estimate, mesh_text, name_of
from parallelism.strategy import Layout
from scripts.planning.flags import Flags
from scripts.planning.plan import make_build, plan_cache


@dataclasses.dataclass(frozen=True)
class Case:
    """A model on a slice under a layout; `sizes` are of mesh axes, or empty for pmap."""

    config: str
    slice_name: str
    sizes: dict[str, int]
    batch_size: int
    seq_len: int = 2048
    remat: str = "full"
    attention: str = "splash"


SMALL: list[dict[str, int]] = [
    *({}, {"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 4}),
    *({"data": 4, "tensor": 2}, {"data": 4, "sequence": 2}, {"fsdp": 4, "tensor": 2}),
]
CASES = [
    *(Case("small", "v3-8", sizes, 256, 128, "none", "xla") for sizes in SMALL),
    Case("small", "v3-32", {"data": 32}, 512, 512, "full", "xla"),
    Case("base", "v3-32", {"fsdp": 32}, 256, 1024, "full", "xla"),
    Case("base", "v4-64", {"fsdp": 32}, 256, 1024, "dots"),
    Case("llama-1b", "v5litepod-256", {"fsdp": 256}, 1024),
    Case("llama-1b", "v5litepod-256", {"data": 16, "fsdp": 16}, 1024),
    Case("llama-1b", "v6e-256", {"fsdp": 256}, 1024),
    Case("llama-1b", "v5p-128", {"fsdp": 64}, 256),
    Case("llama-8b", "v5litepod-256", {"fsdp": 256}, 256),
    Case("llama-8b", "v5p-512", {"fsdp": 256}, 512),
]
SCALING = [Case("llama-1b", f"v5p-{2 * chips}", {"fsdp": chips}, 4 * chips) for chips in (8, 16, 32, 64, 128, 256, 512)]


def build_of(case: Case) -> Build:
    model = PRESETS[case.config]
    flags = Flags(config=case.config, batch_size=case.batch_size, seq_len=case.seq_len, model=model)
    return make_build(flags, case.remat, 1, case.attention)


def row_of(case: Case, sliced: Accelerator) -> Row:
    mesh = mesh_text(case.sizes, sliced) if case.sizes else ""
    layout = Layout(strategy="mesh" if mesh else "pmap", mesh=mesh, batch_size=case.batch_size, seq_len=case.seq_len)
    choice = Choice(layout, case.sizes or {"data": sliced.devices}, case.remat, "bfloat16")
    build = build_of(case)
    report = compile_choice(choice, build, sliced, topology_devices(sliced), plan_cache())
    return estimate(choice, build, sliced, report)


def line_of(case: Case, row: Row, sliced: Accelerator) -> str:
    if row.report is None or not row.report.fits:
        memory = f"does not fit: {row.report.error if row.report else ''}"
    else:
        memory = f"{row.peak_bytes / GIB:.2f}"
    sent = ", ".join(f"{each.kind} {each.wire_bytes / 1e9:.2f}" for each in kinds(row))
    estimated = build_of(case).cost
    counted = (estimated.product_flops(row.choice.sizes) + estimated.kernel_flops()) / sliced.devices
    cells = (
        *(case.config, case.slice_name, f"`{name_of(row.choice)}`", f"{case.batch_size} × {case.seq_len}"),
        *(f"{case.remat}, {case.attention}", memory, f"{row.estimated_bytes / GIB:.2f}"),
        *(f"{row.flops / 1e12:.2f}", f"{counted / 1e12:.2f}", sent, row.bound, f"{row.seconds * 1e3:.0f}"),
    )
    return f"| {' | '.join(cells)} |"


def kinds(row: Row) -> list[Traffic]:
    """Traffic by kind, all axes together, without what is under a megabyte."""
    sums: dict[str, float] = {}
    for each in traffic(row):
        sums[each.kind] = sums.get(each.kind, 0.0) + each.wire_bytes
    return [Traffic(kind, (), 1, size) for kind, size in sums.items() if size > 1e6]


def traffic(row: Row) -> tuple[Traffic, ...]:
    return row.report.traffic if row.report else ()


def plot(rows: list[tuple[Case, Row]], path: Path) -> None:
    """Memory and bytes sent against chips, with as many tokens on each chip."""
    figure = matplotlib.figure.Figure((7, 3), layout="constrained")
    memory, sent = figure.subplots(1, 2)
    chips = [accelerator(case.slice_name).chips for case, _ in rows]
    memory.plot(chips, [row.peak_bytes / GIB for _, row in rows], "o-", label="compiler")
    memory.plot(chips, [row.estimated_bytes / GIB for _, row in rows], "x:", label="estimate")
    memory.set(title="HBM a chip, GiB", xscale="log", xlabel="chips", ylim=(0, None))
    memory.legend()
    for kind in ("all-gather", "reduce-scatter", "all-reduce"):
        amounts = [sum(each.wire_bytes for each in traffic(row) if each.kind == kind) for _, row in rows]
        sent.plot(chips, [amount / 1e9 for amount in amounts], "o-", label=kind)
    sent.set(title="sent by a chip in a step, GB", xscale="log", xlabel="chips", ylim=(0, None))
    sent.legend()
    for axes in (memory, sent):
        axes.set_xticks(chips, map(str, chips), minor=False)
        axes.minorticks_off()
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/evidence/tpu.md"))
    output = parser.parse_args().output
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    rows = {}
    for case in track([*CASES, *SCALING], "compiling"):
        sliced = accelerator(case.slice_name)
        rows[id(case)] = case, row_of(case, sliced), sliced
    picture = output.with_suffix(".png")
    plot([rows[id(case)][:2] for case in SCALING], picture)
    lines = [line_of(*rows[id(case)]) for case in CASES]
    output.write_text(
        PAGE.format(lines="\n".join(lines), picture=picture.name, libtpu=version("libtpu"), jax=version("jax"))
    )
    return 0


PAGE = """# What a step takes on a TPU

**Nothing here has ever run on a TPU.** The step of `train.py` was compiled for each slice by libtpu {libtpu}, the
compiler that a TPU uses, on a machine without one, with jax {jax}. Memory, operations and bytes are that compiler's;
"estimate" is the analytic model of `parallax/model/cost.py`, by which `plan.py` ranks what it does not compile. Times
are estimates: the largest of what arithmetic, memory and links need at their peak rates. AdamW, bfloat16 compute,
float32 parameters.

```
python tests/claims/tpu_table.py --output docs/evidence/tpu.md
```

| model | slice | layout | tokens | remat, attention | HBM GiB | estimate | TFLOP | estimate | GB sent | binds | ms |
| --- | --- | --- | --- | --- | ---: | ---: | ---: | ---: | --- | --- | ---: |
{lines}

All of it is a device's share: of a v2 or v3 chip, which shows as two devices, half. Operations are those of
matmuls, loops and recomputation counted; the kernel's, which the compiler does not see into, are added by the
estimate. Bytes are sent by the algorithms that send the least, (n-1)/n of an array for a gather or scatter among n.

HBM is arguments and the most that is in use beside them at once, by the compiler's schedule: `peak_memory_in_bytes`,
which counts the memory on a chip too (CMEM of v4, VMEM of v5e and v6e), or what is laid out in main memory alone where
that is less.

## From 8 to 512 chips

llama-1b on v5p, fsdp over all chips, 4 × 2048 tokens on each: state is shared by more, what is sent stays.

![memory and bytes sent against chips]({picture})
"""


if __name__ == "__main__":
    raise SystemExit(main())
