"""Parallax as a contender: its own step, loop and pipeline, as train.py puts them together.

Invariant: nothing here computes; whatever is measured is the code that users run.
"""

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from data.pipeline import training_batches
from parallax.model.transformer import Params
from parallax.training.loop import Row, Stopwatch, train
from scripts.allocator import keep_large_buffers
from scripts.benchmark_settings import CHECKED_STEPS, SEED, read_setting, samples, training_flags
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


def write_weights(path: str, params: Params) -> None:
    """The parameters as an .npz file, named by their paths, as `blocks.attention.query`."""
    np.savez(path, **flat(params))


def flat(params: Params) -> dict[str, np.ndarray]:
    """Parameters by their paths."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
