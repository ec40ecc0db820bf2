"""Every choice of layout for a run, estimated, the best of them compiled.

Invariant: the step that is compiled is the one that train.py runs, and nothing of it is computed.
"""

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import track

from parallax.config import TrainConfig
from parallax.layers.attention import BY_BLOCKS
from parallax.model.cost import StepCost
from parallax.storage import cache_folder
from parallelism.mesh_shape import is_legal, parse_mesh
from parallelism.planning.compiler import topology_devices
from parallelism.planning.hardware import machine
from parallelism.planning.planner import (
    Build,
    Choice,
    Row,
    choose_to_compile,
    compile_choice,
    estimate,
    legal_meshes,
    mesh_text,
    name_of,
    rank,
)
from parallelism.rules import MESH_AXES, Rules, load_rules, split_by
from parallelism.strategy import Layout
from scripts.planning.flags import Flags
from scripts.planning.maxtext import MaxText
from scripts.planning.report import describe, environment, plan_table, plan_to_json, run_command
from scripts.training.choices import choose_attention
from scripts.training.step import bind_state, bind_step

REMATS = ("none", "dots", "full")


class Plan:
    """The choices that there are, and what is known of each."""

    def __init__(self, flags: Flags, maxtext: MaxText | None = None):
        self._flags = flags
        self._maxtext = maxtext
        self._slice = machine(flags.topology)
        self._builds: dict[tuple[str, int, str], Build] = {}
        TrainConfig(batch_size=flags.batch_size, seq_len=flags.seq_len)  # checks both

    def run(self) -> int:
        console, flags, sliced = Console(stderr=True), self._flags, self._slice
        own = self._own_layout()
        devices = topology_devices(sliced)
        # Programs for devices that are not here cannot be read back.
        jax.config.update("jax_enable_compilation_cache", False)
        memory = sliced.device_memory
        rows = rank([self._row(choice) for choice in self._choices()], memory)
        if not rows:
            raise ValueError(
                f"batch_size={flags.batch_size} can be shared by no layout of {sliced.devices} devices; "
                f"try --batch-size {sliced.devices * math.ceil(flags.batch_size / sliced.devices)}"
            )
        chosen = choose_to_compile(rows, memory, len(rows) if flags.exhaustive else flags.compile)
        compiled: list[Row] = []
        for rows_of_layout in track(chosen, f"compiling for {flags.topology}", console=console):
            compiled += self._compile(rows_of_layout, devices)
        names = {name_of(row.choice) for row in compiled}
        left: dict[str, Row] = {}
        for row in rows:
            if name_of(row.choice) not in names:
                left.setdefault(name_of(row.choice), row)
        shown = rank(compiled, memory) + list(left.values())
        status = self._show(console, shown, len(rows))
        if own and self._maxtext:
            print("\n".join([f"MaxText's own layout: {describe(own, sliced)}", *self._maxtext.notes]))
        return status

    def _own_layout(self) -> Row | None:
        """That of the MaxText config, estimated, where one is given. Raises ValueError if it suits not the topology."""
        if self._maxtext is None:
            return None
        flags, sizes = self._flags, self._maxtext.layout(self._slice.devices)
        sizes = {axis: sizes.get(axis, 1) for axis in MESH_AXES}
        layout = Layout(
            strategy="mesh",
            mesh=mesh_text(sizes, self._slice),
            accumulate=self._maxtext.accumulate,
            batch_size=flags.batch_size,
            seq_len=flags.seq_len,
        )
        return self._row(Choice(layout, sizes, self._maxtext.remat, flags.dtype))

    def _compile(self, rows: list[Row], devices: list[Any]) -> list[Row]:
        """Of one layout the first that fits, after those that did not; all of them with --exhaustive."""
        found: list[Row] = []
        for row in rows:
            if found and not self._flags.exhaustive and row.estimated_bytes >= found[-1].estimated_bytes:
                continue
            choice, build = row.choice, self._build(row.choice)
            found.append(self._row(choice, compile_choice(choice, build, self._slice, devices, plan_cache())))
            if found[-1].fits(self._slice.device_memory) and not self._flags.exhaustive:
                break
        return found

    def _choices(self) -> list[Choice]:
        flags, devices = self._flags, self._slice.devices
        rules = load_rules(flags.rules)
        found = []
        for microbatches in (2**power for power in range(flags.batch_size.bit_length())):
            build = self._build_of("none", microbatches, "xla")
            shapes = jax.eval_shape(build.init_state)
            layout = Layout(
                strategy="mesh",
                rules=flags.rules,
                accumulate=microbatches,
                batch_size=flags.batch_size,
                seq_len=flags.seq_len,
            )
            fits = functools.partial(is_legal, rules=rules, shapes=shapes, state_axes=build.axes, layout=layout)
            laid = [
                (dataclasses.replace(layout, mesh=mesh_text(sizes, self._slice)), sizes)
                for sizes in legal_meshes(devices, fits, self._slice.slices)
                if flags.model.attention not in BY_BLOCKS or length_parts(sizes, rules) == 1
            ]
            if flags.batch_size % (devices * microbatches) == 0:
                pmap = dataclasses.replace(layout, strategy="pmap", rules="default")
                laid.insert(0, (pmap, parse_mesh("", devices, slices=self._slice.slices)))
            if not laid:  # more microbatches have fewer rows
                break
            remats = REMATS if flags.remat == "any" else (flags.remat,)
            found += [Choice(each, sizes, remat, flags.dtype) for each, sizes in laid for remat in remats]
        return found

    def _build(self, choice: Choice) -> Build:
        flags = self._flags
        parts = length_parts(choice.sizes, load_rules(choice.layout.rules))
        model = choose_attention(flags.model, flags.seq_len, parts, self._slice.attention)
        return self._build_of(choice.remat, choice.layout.accumulate, model.attention)

    def _build_of(self, remat: str, microbatches: int, attention: str) -> Build:
        key = remat, microbatches, attention
        if key not in self._builds:
            self._builds[key] = make_build(self._flags, remat, microbatches, attention)
        return self._builds[key]

    def _row(self, choice: Choice, report: Any = None) -> Row:
        return estimate(choice, self._build(choice), self._slice, report)

    def _show(self, console: Console, rows: list[Row], ranked: int) -> int:
        flags, sliced = self._flags, self._slice
        fitting = [row for row in rows if row.report and row.fits(sliced.device_memory)]
        Console(width=None if sys.stdout.isatty() else 200).print(plan_table(rows, sliced, flags, ranked))
        name = f"{flags.topology}-{flags.name}-{flags.batch_size}x{flags.seq_len}.json"
        path = Path(flags.output or Path("plans") / name)
        commands = {name_of(row.choice): run_command(row.choice, flags) for row in rows}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(plan_to_json(rows, sliced, flags, commands), indent=1) + "\n")
        except OSError as error:
            raise ValueError(f"--output {path} cannot be written: {error.strerror}; choose another") from None
        console.print(f"The plan is also in {path}.", highlight=False)
        vocabulary = f"Planned for a vocabulary of {flags.model.vocab_size:,}; train.py takes its tokenizer's."
        console.print(vocabulary, highlight=False)
        if not fitting:
            print("No layout that was compiled fits; try a smaller --batch-size, or a larger machine.")
            return 1
        print("The best that fits, on the slice, and rehearsed here without computing anything:")
        best = run_command(fitting[0].choice, flags)
        print(f"{environment(sliced)}{best}\nJAX_NUM_CPU_DEVICES={sliced.devices} {best} --lower-only")
        return 0


def length_parts(sizes: Mapping[str, int], rules: Rules) -> int:
    """How many devices share a sequence."""
    return math.prod(split_by("length", rules, sizes).values())


def plan_cache() -> Path:
    """Where reports of compiled programs are kept."""
    return cache_folder() / "plans"


_bind_state = functools.cache(bind_state)
"""Of one model: how a step computes changes nothing of its state."""


def make_build(flags: Flags, remat: str, microbatches: int, attention: str) -> Build:
    """The step of train.py, with everything bound but a strategy's gradient function."""
    config = dataclasses.replace(flags.model, remat=remat, dtype=flags.dtype, attention=attention)
    train = TrainConfig(batch_size=flags.batch_size, seq_len=flags.seq_len)
    init_state, axes = _bind_state(flags.model, train, flags.optimizer)
    make_step = functools.partial(bind_step, config, train, flags.optimizer)
    cost = StepCost(config=config, batch_size=flags.batch_size, seq_len=flags.seq_len, microbatches=microbatches)
    tokens = jax.ShapeDtypeStruct((flags.batch_size, flags.seq_len), np.int32)
    batch = {"inputs": tokens, "targets": tokens}
    return Build(init_state, axes, make_step, batch, cost, attention)
