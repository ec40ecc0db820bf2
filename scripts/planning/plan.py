"""Every choice of layout for a run, estimated, the best of them compiled.

Invariant: the step that is compiled is the one that train.py runs, and nothing of it is computed.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Mapping
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
from parallelism.rules import MESH_AXES, Rules, crosses_slices, in_parts, load_rules, split_by
from parallelism.strategy import Layout
from scripts.common.command_line import writing
from scripts.common.tables import show_table
from scripts.planning.flags import Flags
from scripts.planning.maxtext import MaxText
from scripts.planning.report import commands as commands_of
from scripts.planning.report import describe, plan_file, plan_table, plan_to_json
from scripts.planning.search import MAX, MOST, UNIT, corrected, largest, resized
from scripts.training.choices import choose_attention
from scripts.training.flags import check_length
from scripts.training.step import bind_state, bind_step

REMATS = ("none", "dots", "full")


class Plan:
    """The choices that there are, and what is known of each."""

    def __init__(self, flags: Flags, maxtext: MaxText | None = None):
        self._flags = flags
        self._maxtext = maxtext
        self._slice = machine(flags.topology)
        self._builds: dict[tuple[Any, ...], Build] = {}
        given: Any = {what: getattr(flags, what) for what in ("batch_size", "seq_len") if what != flags.sought}
        train = TrainConfig(**given)  # checks them
        if flags.sought != "seq_len":
            check_length(train.seq_len, flags.model)

    def run(self) -> int:
        """Shows the plan. The exit status: 0 where something fits, else 1."""
        console, own = Console(stderr=True), self._own_layout()
        flags = self._flags
        path = plan_file(flags, f"{flags.topology}-{flags.name}-{flags.batch_size}x{flags.seq_len}.json")
        rows, ranked = self.rows(console)
        status = self._show(console, path, rows, ranked)
        if own and self._maxtext:
            print("\n".join([f"MaxText's own layout: {describe(own, self._slice)}", *self._maxtext.notes]))
        return status

    def rows(self, console: Console) -> tuple[list[Row], int]:
        """Those that were compiled, best first, then the best of each other layout; and how many were ranked."""
        flags, sliced = self._flags, self._slice
        devices = topology_devices(sliced)
        # Programs for devices that are not here cannot be read back.
        jax.config.update("jax_enable_compilation_cache", False)
        memory = sliced.device_memory
        choices = self._choices()
        if flags.sought:
            choices = [self._largest(choice) for choice in choices if self._can_grow(choice)]
            if not choices:
                most = flags.model.max_seq_len
                raise ValueError(f"seq_len=max with max_seq_len={most} leaves no {UNIT} tokens; give a --seq-len")
        rows = rank([self._row(choice) for choice in choices], memory)
        if not rows:
            batch_size, _ = self._first_sizes()
            raise ValueError(
                f"batch_size={batch_size} can be shared by no layout of {sliced.devices} devices; "
                f"try --batch-size {sliced.devices * math.ceil(batch_size / sliced.devices)}"
            )
        chosen = choose_to_compile(rows, memory, len(rows) if flags.exhaustive else flags.compile)
        compiled: list[Row] = []
        for rows_of_layout in track(chosen, f"compiling for {flags.topology}", console=console):
            compiled += (self._compile_largest if flags.sought else self._compile)(rows_of_layout, devices)
        names = {name_of(row.choice) for row in compiled}
        left: dict[str, Row] = {}
        for row in rows:
            if name_of(row.choice) not in names:
                left.setdefault(name_of(row.choice), row)
        return rank(compiled, memory) + list(left.values()), len(rows)

    def best(self, console: Console) -> Row | None:
        """The best that was compiled and fits; None where none does."""
        rows, _ = self.rows(console)
        return next(self._fitting(rows), None)

    def _fitting(self, rows: list[Row]) -> Iterator[Row]:
        return (row for row in rows if row.report and row.fits(self._slice.device_memory))

    def _own_layout(self) -> Row | None:
        """That of the MaxText config, estimated, where one is given. Raises ValueError if it suits not the topology."""
        if self._maxtext is None:
            return None
        batch_size, seq_len = self._first_sizes()
        sizes = dict.fromkeys(MESH_AXES, 1) | self._maxtext.layout(self._slice.devices, self._slice.slices)
        sizes = dict(sorted(sizes.items(), key=lambda item: not crosses_slices(item[0])))
        layout = Layout(
            strategy="mesh",
            mesh=mesh_text(sizes, self._slice),
            accumulate=self._maxtext.accumulate,
            batch_size=batch_size,
            seq_len=seq_len,
        )
        return self._row(Choice(layout, sizes, self._maxtext.remat, self._flags.dtype))

    def _compile(self, rows: list[Row], devices: list[Any]) -> list[Row]:
        """Of one layout the first that fits, after those that did not; all of them with --exhaustive."""
        found: list[Row] = []
        for row in rows:
            if found and not self._flags.exhaustive and row.estimated_bytes >= found[-1].estimated_bytes:
                continue
            found.append(self._compiled(row.choice, devices))
            if found[-1].fits(self._slice.device_memory) and not self._flags.exhaustive:
                break
        return found

    def _compiled(self, choice: Choice, devices: list[Any]) -> Row:
        report = compile_choice(choice, self._build(choice), self._slice, devices, plan_cache())
        return self._row(choice, report)

    def _can_grow(self, choice: Choice) -> bool:
        """Whether the least size is allowed: a layout that cuts sequences may need longer ones than the model has."""
        unit, most = self._unit_and_most(choice)
        return unit <= most

    def _largest(self, choice: Choice) -> Choice:
        """By the estimate, and at least the least that is possible, about which it may err."""
        what, (unit, most) = self._flags.sought or "batch_size", self._unit_and_most(choice)
        memory = self._slice.device_memory
        size = largest(unit, most, lambda size: self._row(resized(choice, what, size)).needed_bytes <= memory)
        return resized(choice, what, max(unit, size))

    def _compile_largest(self, rows: list[Row], devices: list[Any]) -> list[Row]:
        """Of one layout the largest that fits, with the rematerialisation that is best by the estimates."""
        what, choice, memory = self._flags.sought or "batch_size", rows[0].choice, self._slice.device_memory
        tried = list(
            corrected(
                getattr(choice.layout, what),
                *self._unit_and_most(choice),
                lambda size: self._compiled(resized(choice, what, size), devices),
                memory,
            )
        )
        fitting = [row for row in tried if row.fits(memory)]
        return [max(fitting, key=lambda row: row.tokens)] if fitting else tried[-1:]

    def _unit_and_most(self, choice: Choice) -> tuple[int, int]:
        """By how much the size that is sought grows, and how large it may be."""
        rules = in_parts(load_rules(choice.layout.rules), list(choice.sizes))
        if self._flags.sought == "batch_size":
            parts = choice.layout.accumulate * math.prod(split_by("batch", rules, choice.sizes).values())
            return parts, MOST * parts
        return UNIT * length_parts(choice.sizes, rules), self._flags.model.max_seq_len

    def _first_sizes(self) -> tuple[int, int]:
        """Rows and tokens with which meshes are asked for: of what is sought, so many as suit every mesh."""
        flags, devices = self._flags, self._slice.devices
        batch_size = devices if flags.batch_size == MAX else flags.batch_size
        return batch_size, UNIT * devices if flags.seq_len == MAX else flags.seq_len

    def _choices(self) -> list[Choice]:
        flags, devices = self._flags, self._slice.devices
        rules, (batch_size, seq_len) = load_rules(flags.rules), self._first_sizes()
        found = []
        powers = range(1 if flags.batch_size == MAX else batch_size.bit_length())
        for microbatches in (2**power for power in powers):
            build = self._build_of("none", microbatches, "xla", batch_size, seq_len)
            layout = Layout(
                strategy="mesh", rules=flags.rules, accumulate=microbatches, batch_size=batch_size, seq_len=seq_len
            )
            fits = functools.partial(is_legal, rules=rules, shapes=build.state, state_axes=build.axes, layout=layout)
            laid = [
                (dataclasses.replace(layout, mesh=mesh_text(sizes, self._slice)), sizes)
                for sizes in legal_meshes(devices, fits, self._slice.slices)
                if flags.model.attention not in BY_BLOCKS or length_parts(sizes, rules) == 1
            ]
            if batch_size % (devices * microbatches) == 0:
                pmap = dataclasses.replace(layout, strategy="pmap", rules="default")
                laid.insert(0, (pmap, parse_mesh("", devices, slices=self._slice.slices)))
            if not laid:  # more microbatches have fewer rows
                break
            remats = REMATS if flags.remat == "any" else (flags.remat,)
            found += [Choice(each, sizes, remat, flags.dtype) for each, sizes in laid for remat in remats]
        return found

    def _build(self, choice: Choice) -> Build:
        model, layout = dataclasses.replace(self._flags.model, dtype=choice.dtype), choice.layout
        parts = length_parts(choice.sizes, load_rules(layout.rules))
        model = choose_attention(model, layout.seq_len, parts, self._slice.attention)
        return self._build_of(choice.remat, layout.accumulate, model.attention, layout.batch_size, layout.seq_len)

    def _build_of(self, remat: str, microbatches: int, attention: str, batch_size: int, seq_len: int) -> Build:
        key = remat, microbatches, attention, batch_size, seq_len
        if key not in self._builds:
            sized = dataclasses.replace(self._flags, batch_size=batch_size, seq_len=seq_len)
            self._builds[key] = make_build(sized, remat, microbatches, attention, tiled=self._slice.tiled)
        return self._builds[key]

    def _row(self, choice: Choice, report: Any = None) -> Row:
        return estimate(choice, self._build(choice), self._slice, report)

    def _show(self, console: Console, path: Path, rows: list[Row], ranked: int) -> int:
        flags, sliced = self._flags, self._slice
        best = next(self._fitting(rows), None)
        show_table(plan_table(rows, sliced, flags, ranked))
        with writing(f"--output {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(plan_to_json(rows, sliced, flags), indent=1) + "\n")
        console.print(f"The plan is also in {path}.", highlight=False)
        vocabulary = f"Planned for a vocabulary of {flags.model.vocab_size:,}; train.py takes its tokenizer's."
        console.print(vocabulary, highlight=False)
        if best is None:
            print("No layout that was compiled fits; try a smaller --batch-size, or a larger machine.")
            return 1
        print(f"The best that fits, on {sliced.name}, and rehearsed here without computing anything:")
        print("\n".join(commands_of(best, sliced, flags)))
        return 0


def length_parts(sizes: Mapping[str, int], rules: Rules) -> int:
    """How many devices share a sequence."""
    return math.prod(split_by("length", rules, sizes).values())


def plan_cache() -> Path:
    """Where reports of compiled programs are kept."""
    return cache_folder() / "plans"


_bind_state = functools.cache(bind_state)
"""Of one model: its state is the same however a step computes and whatever its sizes."""


def make_build(flags: Flags, remat: str, microbatches: int, attention: str, *, tiled: bool = True) -> Build:
    """The step of train.py, with everything bound but a strategy's gradient function, for a memory in tiles or not."""
    config = dataclasses.replace(flags.model, remat=remat, dtype=flags.dtype, attention=attention)
    sizes: Any = {"batch_size": flags.batch_size, "seq_len": flags.seq_len}
    train = TrainConfig(**sizes)
    init_state, axes = _bind_state(flags.model, TrainConfig(), flags.optimizer)
    make_step = functools.partial(bind_step, config, train, flags.optimizer)
    cost = StepCost(config=config, **sizes, microbatches=microbatches, tiled=tiled)
    tokens = jax.ShapeDtypeStruct(tuple(sizes.values()), np.int32)
    batch = {"inputs": tokens, "targets": tokens}
    return Build(init_state, axes, make_step, batch, cost, attention)
