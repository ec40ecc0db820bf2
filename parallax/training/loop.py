"""The training loop: batches in, steps taken, rows out; evaluation and checkpoints when due.

Invariant: what happens after a step depends on the number of that step alone, never on when the run was started, so a
resumed run does what the uninterrupted one would have done.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import jax
import numpy as np

from parallax.config import TrainConfig
from parallax.training.state import TrainState

Row = dict[str, float | int]


class Diverged(RuntimeError):
    """Too many steps in a row were not finite."""


class Placement(Protocol):
    """What the loop asks of a strategy."""

    def put_batch(self, batch: dict[str, np.ndarray]) -> Any: ...

    def stop_requested(self, step: int) -> bool: ...


class Observer(Protocol):
    """Whoever wants to know: files, progress bar, profiler."""

    def step(self, step: int, metrics: Row) -> None:
        """A step is done; metrics are host numbers."""
        ...

    def row(self, row: Row) -> None:
        """A row for the record: a logged step, or an evaluation."""
        ...


class Stopwatch:
    """Seconds of wall time by what they went to."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start


def train(
    state: TrainState,
    *,
    start: int,
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]],
    batches: Iterator[dict[str, np.ndarray]],
    placement: Placement,
    config: TrainConfig,
    evaluate: Callable[[TrainState], Row],
    save: Callable[[int, TrainState, float | None], None],
    check: Callable[[int, TrainState, Any], None],
    observers: list[Observer],
    stopwatch: Stopwatch,
    step_flops: float = 0.0,
    peak_flops: float | None = None,
) -> tuple[TrainState, int]:
    """Trains from step `start` to `config.steps`, or until a stop is requested.

    Args:
      batches: host batches from index `start` on.
      evaluate: state to `eval_loss`, the held-out loss in nats a token, and what else the row of it holds.
      save: called with (step, state, held-out loss of this step or None).
      check: called with (step, state, placed batch) every `config.check_interval` steps and before each save; raises
        where the state cannot be trusted.
      step_flops, peak_flops: for the model FLOPs utilisation, of the whole batch and of all devices together.

    Returns:
      The last state and the number of its step.

    Raises:
      Diverged: `config.max_bad_steps` steps in a row were not finite.
      Exception: whatever `check` raises; nothing is saved after it.
    """
    meter = _Meter(stopwatch, step_flops, peak_flops)
    pending: tuple[int, dict[str, jax.Array]] | None = None  # dispatched, not yet read: the host runs a step ahead
    done = start
    while done < config.steps:
        with stopwatch.timing("data"):
            batch = placement.put_batch(next(batches))
        with stopwatch.timing("compile" if done == start else "step"):
            state, metrics = step(state, batch)
            if done == start:
                jax.block_until_ready(metrics)
        done += 1
        final = done == config.steps
        stopping = not final and placement.stop_requested(done)
        logged = final or done == 1 or done % config.log_interval == 0
        evaluated = final or done % config.eval_interval == 0
        saved = evaluated or stopping or done % config.checkpoint_interval == 0
        checked = saved or done % config.check_interval == 0

        row: Row | None = None
        with stopwatch.timing("step"):
            if pending is not None:
                _observe(*pending, config, observers)
            pending = (done, metrics)
            if logged or checked:  # what waits for the step reads it first: it may have diverged
                row = _observe(*pending, config, observers)
                pending = None
        if row is not None and logged:
            _record(meter.row(done, row), observers)
        if checked:
            with stopwatch.timing("check"):
                check(done, state, batch)
        eval_loss: float | None = None
        if evaluated:
            with stopwatch.timing("evaluation"):
                measured = evaluate(state)
            eval_loss = measured["eval_loss"]
            _record({"step": done, **measured}, observers)
        if saved:
            with stopwatch.timing("checkpoint"):
                save(done, state, eval_loss)
        if stopping:
            break
    return state, done


class _Meter:
    """Speed since the last logged row, from the time that steps and data took."""

    def __init__(self, stopwatch: Stopwatch, step_flops: float, peak_flops: float | None):
        self._stopwatch, self._step_flops, self._peak_flops = stopwatch, step_flops, peak_flops
        self._spent, self._step = 0.0, None

    def row(self, step: int, metrics: Row) -> Row:
        """The metrics of a step with speed beside them; without it for the first, which compiled."""
        spent = self._stopwatch.seconds.get("step", 0.0) + self._stopwatch.seconds.get("data", 0.0)
        row = {"step": step} | {name: value for name, value in metrics.items() if name != "tokens"}
        if self._step is not None:
            step_time = (spent - self._spent) / (step - self._step)
            row |= {"tokens_per_second": metrics["tokens"] / step_time, "step_time": step_time}
            if self._peak_flops:
                row["mfu"] = self._step_flops / step_time / self._peak_flops
        self._spent, self._step = spent, step
        return row


def _observe(step: int, metrics: dict[str, jax.Array], config: TrainConfig, observers: list[Observer]) -> Row:
    """Reads a step's metrics, waiting for it to finish."""
    numbers: Row = {name: value.item() for name, value in jax.device_get(metrics).items()}
    for observer in observers:
        observer.step(step, numbers)
    if numbers["bad_steps"] >= config.max_bad_steps:
        raise Diverged(
            f"{numbers['bad_steps']} steps in a row up to step {step} had a loss or gradient that is not finite; "
            f"try a smaller --learning-rate, or resume from the last checkpoint with --dtype float32"
        )
    return numbers


def _record(row: Row, observers: list[Observer]) -> None:
    for observer in observers:
        observer.row(row)
