"""Parallax as a contender: its own step, loop and pipeline, as train.py puts them together.

Invariant: nothing here computes; whatever is measured is the code that users run.
"""

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from data.pipeline import training_batches
from parallax.inference.generate import Generator
from parallax.inference.request import Request
from parallax.inference.sampling import SamplingSettings
from parallax.model.stack import prepare
from parallax.model.transformer import Params, init_params
from parallax.training.loop import Row, Stopwatch, train
from scripts.allocator import keep_large_buffers
from scripts.benchmark_settings import (
    CHECKED_STEPS,
    MODELS,
    SEED,
    prompts,
    read_setting,
    samples,
    training_flags,
)
from scripts.benchmark_worker import Measure
from scripts.job import build


class Losses:
    """An observer that keeps the loss of each step."""

    def __init__(self):
        self.values: list[float] = []

    def step(self, step: int, metrics: Row) -> None:
        self.values.append(float(metrics["loss"]))

    def row(self, row: Row) -> None:
        pass


def training(setting: str, strategy: str, weights: str, **flags: Any) -> tuple[dict[str, Any], Measure]:
    """Trains by `{"units": steps}`; writes the first weights to the file `weights`, for the others to begin with.

    A step is one turn of train.py's loop: the batch from the pipeline, the step, its metrics read a step behind.
    """
    keep_large_buffers()
    shape = read_setting(setting)
    settings = training_flags(shape, strategy, **flags)
    placement, step, _ = build(settings)
    state, done = placement.init(), 0
    write_weights(weights, placement.canonical(state).params)
    compiled = placement.compile(step)
    batches = training_batches(
        samples(shape), batch_size=shape.batch_size, seed=SEED, rows=placement.rows(shape.batch_size)
    )

    def advance(steps: int, observers: list) -> float:
        nonlocal state, done
        start = time.perf_counter()
        state, done = train(
            state,
            start=done,
            step=compiled,
            batches=batches,
            placement=placement,
            config=dataclasses.replace(settings.train, steps=done + steps),
            evaluate=lambda _: 0.0,
            save=lambda *_: None,
            check=lambda *_: None,
            observers=observers,
            stopwatch=Stopwatch(),
        )
        jax.block_until_ready(state)
        return time.perf_counter() - start

    params = sum(leaf.size for leaf in jax.tree.leaves(placement.canonical(state).params))
    losses = Losses()
    ready = advance(CHECKED_STEPS, [losses])
    facts = {"params": params, "losses": losses.values, "first_steps_seconds": ready}
    return facts, lambda request: {"seconds": advance(request["units"], [])}


def pipeline(setting: str) -> tuple[dict[str, Any], Measure]:
    """Makes batches by `{"units": batches}`, as training does, for nobody."""
    shape = read_setting(setting)
    batches = training_batches(samples(shape), batch_size=shape.batch_size, seed=SEED)
    next(batches)

    def measure(request: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        for _ in range(request["units"]):
            next(batches)
        return {"seconds": time.perf_counter() - start}

    return {}, measure


def decoding(
    model: str, batch_size: int, prompt_tokens: int, new_tokens: int, weights: str
) -> tuple[dict[str, Any], Measure]:
    """Greedy generation; each of `{"units": requests}` is streamed up to its first token, then asked for whole."""
    keep_large_buffers()
    config = MODELS[model]
    params = jax.jit(lambda: init_params(config, jax.random.key(SEED)))()
    write_weights(weights, params)
    params = prepare(config, params)
    generator = Generator(config)
    request = Request(
        prompts=list(prompts(config, batch_size, prompt_tokens)),
        settings=SamplingSettings.create(batch_size, temperature=0.0),
        seeds=list(range(batch_size)),
        max_tokens=new_tokens,
    )

    def measure(asked: dict[str, Any]) -> dict[str, Any]:
        first = whole = 0.0
        for _ in range(asked["units"]):
            start = time.perf_counter()
            next(generator.stream(params, request))
            middle = time.perf_counter()
            generator.generate(params, request)
            first, whole = first + middle - start, whole + time.perf_counter() - middle
        return {"seconds": first + whole, "first": first / asked["units"], "whole": whole / asked["units"]}

    return {"tokens": [row.tolist() for row in generator.generate(params, request)]}, measure


def compiled_step(setting: str, num_layers: int, remat: str) -> tuple[dict[str, Any], Measure]:
    """One step of a model of that depth: how long it compiles, what it holds, and `{"units": steps}` of it."""
    keep_large_buffers()
    shape = read_setting(setting)
    flags = training_flags(shape, "single")
    model = dataclasses.replace(
        flags.model,
        num_layers=num_layers,
        remat=remat,  # pyright: ignore[reportArgumentType]: checked by the config
    )
    placement, step, _ = build(dataclasses.replace(flags, model=model))
    batch = samples(shape).gather(np.arange(shape.batch_size))
    start = time.perf_counter()
    lowered = placement.lower(step, batch)
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    state, placed = placement.init(), placement.put_batch(batch)

    def measure(request: dict[str, Any]) -> dict[str, Any]:
        nonlocal state
        start = time.perf_counter()
        for _ in range(request["units"]):
            state, metrics = compiled(state, placed)
            jax.block_until_ready(metrics)
        return {"seconds": time.perf_counter() - start}

    memory = compiled.memory_analysis()
    facts = {"trace_seconds": traced - start, "compile_seconds": done - traced}
    if memory is not None:  # a backend may not say
        facts |= {"state_bytes": memory.argument_size_in_bytes, "temporary_bytes": memory.temp_size_in_bytes}
    return facts, measure


def write_weights(path: str, params: Params) -> None:
    """The parameters as an .npz file, named by their paths, as `blocks.attention.query`."""
    np.savez(path, **flat(params))  # pyright: ignore[reportArgumentType]: no parameter is called allow_pickle


def flat(params: Params) -> dict[str, np.ndarray]:
    """Parameters by their paths."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
