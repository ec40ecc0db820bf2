"""plan.py with the real TPU compiler: what it plans compiles, has the size that was estimated, and runs here."""

import json
import os
import re
import shlex

import jax
import numpy as np
import pytest

from parallax.config import PRESETS
from parallelism.mesh_shape import network_dims, parse_mesh
from parallelism.planning.compiler import topology_devices
from parallelism.planning.hardware import accelerator
from parallelism.planning.hlo_collectives import crossed_axes, read_collectives
from parallelism.planning.hlo_flops import read_flops
from parallelism.planning.planner import Choice, compile_choice, estimate, held_bytes, tiled_size
from parallelism.rules import load_rules
from parallelism.strategies import get_strategy
from parallelism.strategy import Layout
from scripts.planning.flags import Flags
from scripts.planning.plan import make_build
from tests.scripts.runs import run_script

pytestmark = pytest.mark.external


def run_plan(folder, *flags):
    return run_script("plan.py", *flags, cwd=folder, env={"XDG_CACHE_HOME": str(folder)})


TINY = ("tiny", "--compile", "2", "--remat", "dots")


def planned(folder, config, *flags):
    """A plan of 64 × 128 tokens on a v3-8, and the output: the compiler takes longer over more."""
    flags = ("--topology", "v3-8", "--config", config, "--batch-size", "64", *flags)
    done = run_plan(folder, *flags, "--output", f"{config}.json")
    assert done.returncode == 0, done.stderr
    return json.loads((folder / f"{config}.json").read_text()), done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plan")


@pytest.fixture(scope="module")
def small(folder):
    return planned(folder, "small", "--compile", "7")[0]


def test_pmap_and_six_meshes_are_compiled_and_fit(small):
    rows = [row for row in small["rows"] if row["source"] == "compiled"]
    assert "pmap" in {row["layout"] for row in rows}
    assert len({row["layout"] for row in rows} - {"pmap"}) >= 6
    assert all(row["fits"] and row["error"] == "" for row in rows)


@pytest.fixture(scope="module")
def tiny(folder):
    return planned(folder, *TINY)


def test_the_analytic_memory_is_within_15_percent_of_the_compilers(small, tiny):
    """Of SMALL, and of TINY, where shards of parameters fill half of their tiles and less."""
    for row in small["rows"] + tiny[0]["rows"]:
        if row["source"] == "compiled":
            assert row["estimated_peak_bytes"] == pytest.approx(row["peak_bytes"], rel=0.15), row["layout"]


def test_the_printed_command_runs_on_simulated_devices(folder, tiny, flags_of_tests):
    command = next(line for line in tiny[1].splitlines() if line.startswith("python scripts/train.py"))
    text = folder / "text.txt"
    text.write_text("To be, or not to be: that is the question.\n" * 200)
    flags = [*shlex.split(command)[2:], "--steps", "1", "--dataset", str(text), "--output-dir", "run"]
    ended = run_script("train.py", *flags, env={"JAX_NUM_CPU_DEVICES": "8", "XLA_FLAGS": flags_of_tests}, cwd=folder)
    assert ended.returncode == 0, ended.stderr
    assert json.loads((folder / "run" / "summary.json").read_text())["step"] == 1


@pytest.mark.parametrize(
    ("name", "dims"), [("v5litepod-16", [4, 4]), ("v3-8", [2, 2, 2]), ("v4-16", [2, 2, 2]), ("v6e-8", [2, 4])]
)
def test_devices_say_what_network_they_are_on(name, dims):
    """`--mesh auto` asks them."""
    assert [dim for dim in network_dims(topology_devices(accelerator(name))) if dim > 1] == dims


def test_a_second_plan_compiles_nothing(folder, tiny):
    cache = folder / "parallax" / "plans"
    before = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert planned(folder, *TINY)[0] == tiny[0]
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == before


@pytest.fixture(scope="module", autouse=True)
def flags_of_tests():
    """Those by which programs for this machine compile faster, while all others here are compiled as by default.

    And without a cache: what was compiled for no device cannot be read back.
    """
    flags, os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"], ""  # which is read when the first device starts
    jax.config.update("jax_enable_compilation_cache", False)
    yield flags
    jax.config.update("jax_enable_compilation_cache", True)


def place(flags, choice):
    build = make_build(flags, "none", choice.layout.accumulate, "xla")
    return build, get_strategy(
        choice.layout, build.init_state, build.axes, topology_devices(accelerator(flags.topology))
    )


def lower(flags, choice):
    build, strategy = place(flags, choice)
    return build, strategy, strategy.lower(build.make_step(strategy.gradients), build.batch)


def choice_of(flags, mesh, sizes, remat="none", microbatches=1):
    layout = Layout(
        strategy="mesh" if mesh else "pmap",
        mesh=mesh,
        accumulate=microbatches,
        batch_size=flags.batch_size,
        seq_len=flags.seq_len,
    )
    return Choice(layout, sizes, remat, flags.dtype)


def compiled_row(flags, choice, attention, cache):
    """The estimate with the compiler's report."""
    sliced = accelerator(flags.topology)
    build = make_build(flags, choice.remat, choice.layout.accumulate, attention)
    report = compile_choice(choice, build, sliced, topology_devices(sliced), cache)
    return estimate(choice, build, sliced, report)


def test_operations_agree_with_the_compilers_own_count_of_two_layers_without_a_loop():
    """Without one, since it counts the body of a loop once."""
    model = PRESETS["small"].replace(num_layers=2, layer_loop="unroll")
    flags = Flags(topology="v3-8", batch_size=16, model=model)
    build, _, lowered = lower(flags, choice_of(flags, "", {"data": 8}))
    counted = lowered.compile().cost_analysis()["flops"]
    assert build.cost.product_flops({}) / 8 == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize(
    ("topology", "mesh", "sizes", "remat"),
    [
        ("v5litepod-256", "data=8,fsdp=16,tensor=2", {"data": 8, "fsdp": 16, "tensor": 2}, "dots"),
        ("v5p-512", "", {"data": 256}, "full"),
    ],
)
def test_the_memory_of_a_small_step_is_estimated_without_what_the_chip_keeps(topology, mesh, sizes, remat, tmp_path):
    """By the same model where a chip keeps a third of it and more, and on v5p, which keeps none."""
    flags = Flags(topology=topology, batch_size=2048, model=PRESETS["small"])
    row = compiled_row(flags, choice_of(flags, mesh, sizes, remat), "splash", tmp_path)
    assert row.estimated_bytes == pytest.approx(row.peak_bytes, rel=0.15)


@pytest.mark.parametrize(
    ("mesh", "microbatches", "remat"), [("fsdp=2,tensor=4", 8, "full"), ("data=2,tensor=4", 1, "dots")]
)
def test_few_mebibytes_are_estimated_too_and_tiles_and_recomputed_operations(mesh, microbatches, remat, tmp_path):
    """Layouts of TINY that err most: casts of shards for all microbatches, heads that fill a quarter of their tiles."""
    flags = Flags(topology="v3-8", batch_size=64, model=PRESETS["tiny"])
    choice = choice_of(flags, mesh, parse_mesh(mesh, 8), remat, microbatches)
    row = compiled_row(flags, choice, "xla", tmp_path)
    assert row.estimated_bytes == pytest.approx(row.peak_bytes, rel=0.15)
    build, rules = make_build(flags, remat, microbatches, "xla"), load_rules(choice.layout.rules)
    state = held_bytes(build.state, build.axes, rules, choice.sizes, tiled_size)
    batch = sum(ids.size * ids.dtype.itemsize for ids in jax.tree.leaves(build.batch)) // 2
    assert state + batch == pytest.approx(row.report.state_bytes, rel=0.01)
    assert row.report.flops == pytest.approx(build.cost.product_flops(choice.sizes) / 8, rel=0.01)


def test_pmap_spans_every_host_of_a_slice():
    flags = Flags(topology="v5e-16", batch_size=32, model=PRESETS["tiny"])
    build, strategy, lowered = lower(flags, choice_of(flags, "", {"data": 16}))
    assert len({device.process_index for device in strategy.devices}) == 4
    text = lowered.compile().as_text()
    assert read_flops(text) == pytest.approx(build.cost.product_flops({}) / 16, rel=0.01)
    reduced = [each for each in read_collectives(text) if each.kind == "all-reduce"]
    assert {len(group) for each in reduced for group in each.groups} == {16}


@pytest.mark.parametrize(
    ("mesh", "sizes"),
    [("", {"data": 8}), ("fsdp=2x2x2", {"fsdp": 8}), ("data=2,fsdp=2,tensor=2", {"data": 2, "fsdp": 2, "tensor": 2})],
)
def test_bytes_of_parameters_and_optimizer_are_those_of_the_arrays(mesh, sizes):
    flags = Flags(topology="v3-8", batch_size=16, model=PRESETS["tiny"])
    choice = choice_of(flags, mesh, sizes)
    build, strategy = place(flags, choice)
    held = sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(strategy.abstract())
    )
    assert held_bytes(build.state, build.axes, load_rules(choice.layout.rules), sizes) == held


def test_both_uses_of_a_tied_table_send_one_gradient_in_bfloat16():
    """Although each device adds up the rows that it looked up in float32."""
    model, sizes = PRESETS["tiny"].replace(vocab_size=2**17, num_layers=1), {"data": 8, "tensor": 2}
    flags = Flags(topology="v5e-16", batch_size=16, model=model)
    _, _, lowered = lower(flags, choice_of(flags, "data=8,tensor=2", sizes))
    sums = [each for each in read_collectives(lowered.compile().as_text()) if crossed_axes(each, sizes) == ("data",)]
    shard = 2 * 2**17 * model.embed_dim // 2
    assert shard <= sum(each.bytes * each.count for each in sums) < 1.1 * shard


def test_fsdp_over_the_network_scatters_gradients_and_reduces_none_whole():
    """Left to itself this compiler all-reduces whole gradients."""
    flags = Flags(topology="v5e-16", batch_size=16, model=PRESETS["small"].replace(num_layers=2))
    _, _, lowered = lower(flags, choice_of(flags, "fsdp=4x4", {"fsdp": 16}))
    text = lowered.compile().as_text()
    assert "reduce-scatter" in text
    reduced = re.findall(r"= \(?(?:bf16|f32)\[([\d,]*)\]\S* all-reduce", text)
    sizes = [int(np.prod([int(n) for n in dims.split(",") if n])) for dims in reduced]
    assert max(sizes, default=0) < flags.model.embed_dim * flags.model.mlp_dim / 16


def test_a_layout_that_does_not_fit_says_by_how_much(tmp_path):
    flags = ("--topology", "v3-8", "--config", "base", "--batch-size", "4096", "--seq-len", "1024")
    only = ("--remat", "none", "--compile", "1")
    done = run_plan(tmp_path, *flags, *only)
    rows = json.loads((tmp_path / "plans" / "v3-8-base-4096x1024.json").read_text())["rows"]
    assert done.returncode == 1
    assert "No layout that was compiled fits" in done.stdout
    assert all(row["fits"] is not True for row in rows)
