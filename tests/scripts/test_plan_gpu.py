"""plan.py with XLA's compiler for GPUs: what it plans compiles, has the estimated size, and is rehearsed here."""

import dataclasses
import json
import os
import shlex

import jax
import pytest

from parallax.config import PRESETS
from parallax.model.cost import StepCost
from parallelism.mesh_shape import parse_mesh
from parallelism.planning.compiler import topology_devices
from parallelism.planning.gpus import cards, gpus
from parallelism.planning.planner import Choice, compile_choice, estimate
from parallelism.strategy import Layout
from scripts.planning.flags import Flags
from scripts.planning.plan import make_build
from tests.scripts.runs import run_script

pytestmark = pytest.mark.external


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plan")


@pytest.fixture(scope="module", autouse=True)
def as_by_default():
    """With the compiler's own settings, and without a cache: what was compiled for no device cannot be read back."""
    os.environ["XLA_FLAGS"] = ""  # which is read when the first device starts
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


def planned(folder, *flags):
    """A plan, and the output."""
    done = run_script("plan.py", *flags, "--output", "plan.json", cwd=folder, env={"XDG_CACHE_HOME": str(folder)})
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "plan.json").read_text())["rows"], done.stdout


@pytest.fixture(scope="module")
def small(folder):
    return planned(folder, "--topology", "h100-8", "--config", "small", "--batch-size", "64", "--compile", "2")


def test_pmap_and_a_mesh_are_compiled_with_cudnn_and_fit(small):
    rows = [row for row in small[0] if row["source"] == "compiled"]
    assert len({row["layout"] for row in rows} - {"pmap"}) == len(rows) - 1 == 1
    assert all(row["fits"] and row["error"] == "" for row in rows)
    assert {row["attention"] for row in rows if row["axes"].get("sequence", 1) == 1} == {"cudnn"}
    assert "decided here" in small[1]


def test_the_printed_command_is_rehearsed_on_simulated_devices(folder, small):
    line = small[1].splitlines()[-1]
    assert line.startswith("JAX_NUM_CPU_DEVICES=8 python scripts/train.py")
    assert "\nXLA_CLIENT_MEM_FRACTION=0.9 python scripts/train.py" in small[1]
    text = folder / "text.txt"
    text.write_text("To be, or not to be: that is the question.\n" * 400)
    flags = [*shlex.split(line)[3:], "--dataset", str(text)]
    ended = run_script("train.py", *flags, env={"JAX_NUM_CPU_DEVICES": "8"}, cwd=folder)
    assert ended.returncode == 0, ended.stderr


def compiled_row(topology, mesh, *, config="small", batch_size=64, seq_len=512, remat="full", cache):
    """The estimate with the compiler's report."""
    machine, model = gpus(topology), PRESETS[config]
    flags = Flags(topology=topology, config=config, batch_size=batch_size, seq_len=seq_len, model=model)
    build = make_build(flags, remat, 1, "cudnn", tiled=machine.tiled)
    layout = Layout(strategy="mesh" if mesh else "pmap", mesh=mesh, batch_size=batch_size, seq_len=seq_len)
    choice = Choice(layout, parse_mesh(mesh, machine.devices) if mesh else {"data": machine.devices}, remat, "bfloat16")
    report = compile_choice(choice, build, machine, topology_devices(machine), cache)
    return estimate(choice, build, machine, report)


@pytest.mark.parametrize(
    ("topology", "mesh", "levels"),
    [
        ("h100-16", "data=2,fsdp=8", {"data": "400 Gb/s a GPU", "fsdp": "NVLink 4"}),
        ("h100-16", "fsdp=16", {"fsdp": "400 Gb/s a GPU"}),
        ("h100-16", "data=8,tensor=2", {"data": "400 Gb/s a GPU", "tensor": "NVLink 4"}),
        ("gb200-8", "fsdp=8", {"fsdp": "NVLink 5"}),
    ],
)
def test_collectives_go_by_the_link_that_joins_their_devices(topology, mesh, levels, tmp_path):
    """NVLink in a host, or in a domain of several, and the network between."""
    report = compiled_row(topology, mesh, cache=tmp_path).report
    large = [each for each in report.traffic if each.wire_bytes > 1e6]
    assert {axis for each in large for axis in each.axes} == set(levels)
    for each in large:
        if len(each.axes) == 1:
            assert each.level == levels[each.axes[0]], each
    if "fsdp" in levels:
        assert {"all-gather", "reduce-scatter"} <= {each.kind for each in large}


@pytest.mark.parametrize("card", sorted(cards().keys() - {"h100", "gb200", "l4"}))
def test_other_cards_are_compiled_for_and_their_memory_estimated(card, tmp_path):
    """Those three are compiled for above and below."""
    row = compiled_row(f"{card}-1", "", batch_size=32, cache=tmp_path)
    assert row.fits(gpus(f"{card}-1").device_memory)
    assert row.estimated_bytes == pytest.approx(row.peak_bytes, rel=0.1)
    assert row.flops > row.report.flops > 0  # the kernel's are counted beside


@pytest.mark.parametrize(("mesh", "remat"), [("fsdp=8", "none"), ("fsdp=4,tensor=2", "dots")])
def test_the_memory_of_a_large_step_is_estimated_within_a_tenth(mesh, remat, tmp_path):
    """That of steps which recompute everything is above."""
    sizes = {"config": "llama-1b", "batch_size": 64, "seq_len": 2048}
    row = compiled_row("h100-8", mesh, **sizes, remat=remat, cache=tmp_path)
    assert row.estimated_bytes == pytest.approx(row.peak_bytes, rel=0.1)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")  # by jax 0.12
@pytest.mark.parametrize(
    ("topology", "mesh", "config", "seq_len"),
    [
        ("h100-64", "fsdp=16,expert=4", "mixtral-8x7b", 4096),
        ("h100-64", "fsdp=8,expert=8", "qwen3-30b-a3b", 4096),
        ("l4-1", "", "nano-moe", 256),
    ],
)
def test_experts_are_computed_in_kernels(topology, mesh, config, seq_len, tmp_path):
    """By the compiler itself each would be multiplied by all rows of a device, up to 60 times what is needed."""
    row = compiled_row(topology, mesh, config=config, seq_len=seq_len, cache=tmp_path)
    model = dataclasses.replace(PRESETS[config], remat="full", attention="cudnn")
    cost, devices = StepCost(model, batch_size=64, seq_len=seq_len), gpus(topology).devices
    of_experts = cost.expert_flops() / devices
    assert row.report.flops == pytest.approx(cost.product_flops(row.choice.sizes) / devices - of_experts, rel=0.03)
    assert row.flops == row.report.flops + of_experts + cost.kernel_flops() / devices
    assert row.estimated_bytes == pytest.approx(row.peak_bytes, rel=0.1, abs=2**26)  # 64 MiB, of small steps


def test_what_is_too_large_for_the_card_is_compiled_and_said_not_to_fit(folder):
    """One row, so that no microbatches make it smaller: 21 GiB of the 20 that a program may have."""
    flags = ("--topology", "l4-1", "--config", "llama-1b", "--batch-size", "1", "--seq-len", "4096", "--remat", "dots")
    done = run_script("plan.py", *flags, "--compile", "1", cwd=folder, env={"XDG_CACHE_HOME": str(folder)})
    assert done.returncode == 1, done.stderr
    assert "No layout that was compiled fits" in done.stdout
