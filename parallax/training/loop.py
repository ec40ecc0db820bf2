"""The training loop: batches in, steps taken, rows out; evaluation and checkpoints when due.

Invariant: what happens after a step depends on the number of that step alone, never on when the run was started, so a
resumed run does what the uninterrupted one would have done.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from parallax.config import TrainConfig
from parallax.training.state import TrainState

Row = dict[str, float | int]


class Diverged(RuntimeError):
    """Too many steps in a row were not finite.

    Args:
      last_finite: the last step before them. What was saved at it or later gave no finite step.
    """

    def __init__(self, message: str, last_finite: int):
        super().__init__(message)
        self.last_finite = last_finite


class Best(NamedTuple):
    """The lowest held-out loss of a checkpoint, and its step; 0 and no loss before there is one."""

    step: int = 0
    loss: float = math.inf


class Placement(Protocol):
    """What the loop asks of a strategy."""

    def put_batch(self, batch: dict[str, np.ndarray]) -> Any: ...

    def stop_requested(self) -> bool: ...


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
        self.current = ""
        """What time goes to now."""

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        start, self.current = time.perf_counter(), what
        try:
            yield
        finally:
            self.current = ""
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start


def train(
    state: TrainState,
    *,
    start: int,
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]],
    batches: Iterator[dict[str, np.ndarray]],
    placement: Placement,
    config: TrainConfig,
    evaluate: Callable[[TrainState], Row | None],
    save: Callable[[int, TrainState, float | None, Best], None],
    measured: Callable[[int, float], None] = lambda step, eval_loss: None,
    check: Callable[[int, TrainState, Any], None],
    observers: list[Observer],
    stopwatch: Stopwatch,
    evaluation_due: bool = False,
    best: Best = Best(),
    step_flops: float = 0.0,
    peak_flops: float | None = None,
) -> tuple[TrainState, int]:
    """Trains from step `start` to `config.steps`, or until a stop is requested.

    A checkpoint is due every `config.checkpoint_interval` steps, after the last step and at a stop. An evaluation that
    is better than the best checkpoint is saved too, if that one is at least an interval old.

    Args:
      batches: host batches from index `start` on.
      evaluate: state to `eval_loss`, the held-out loss in nats a token, and what else the row of it holds; None once a
        stop is requested: then the state is saved.
      save: called with (step, state, held-out loss of this step or None, the best checkpoint with this one among them).
      measured: called with (step, held-out loss) once the evaluation that was due of step `start` is made: that step is
        saved already.
      check: called with (step, state, placed batch) every `config.check_interval` steps and before each evaluation and
        save; raises where the state cannot be trusted.
      evaluation_due: whether the run was stopped before step `start` was evaluated: then that comes first.
      best: the best checkpoint up to `start`.
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
    stopping = False
    if evaluation_due:
        eval_loss = _evaluate(start, state, evaluate, observers, stopwatch)
        stopping = eval_loss is None
        if eval_loss is not None:
            best = Best(start, eval_loss) if eval_loss < best.loss else best
            with stopwatch.timing("checkpoint"):
                measured(start, eval_loss)
    while done < config.steps and not stopping:
        with stopwatch.timing("data"):
            batch = placement.put_batch(next(batches))
        with stopwatch.timing("compile" if done == start else "step"):
            state, metrics = step(state, batch)
            if done == start:
                jax.block_until_ready(metrics)
        done += 1
        final = done == config.steps
        stopping = not final and placement.stop_requested()
        logged = final or done == 1 or done % config.log_interval == 0
        evaluated = final or done % config.eval_interval == 0
        saved = final or stopping or done % config.checkpoint_interval == 0
        checked = evaluated or saved or done % config.check_interval == 0

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
        if evaluated and not stopping:
            eval_loss = _evaluate(done, state, evaluate, observers, stopwatch)
            stopping = eval_loss is None
            if eval_loss is not None and eval_loss < best.loss:
                saved = saved or done - best.step >= config.checkpoint_interval
                best = Best(done, eval_loss) if saved else best
        if saved or stopping:
            with stopwatch.timing("checkpoint"):
                save(done, state, eval_loss, best)
    return state, done


def _evaluate(
    step: int,
    state: TrainState,
    evaluate: Callable[[TrainState], Row | None],
    observers: list[Observer],
    stopwatch: Stopwatch,
) -> float | None:
    """The held-out loss, recorded; None if a stop was requested before it was known."""
    with stopwatch.timing("evaluation"):
        row = evaluate(state)
    if row is None:
        return None
    _record({"step": step, **row}, observers)
    return row["eval_loss"]


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
        bad_steps = int(numbers["bad_steps"])
        raise Diverged(
            f"{bad_steps} steps in a row up to step {step} had a loss or gradient that is not finite",
            last_finite=step - bad_steps,
        )
    return numbers


def _record(row: Row, observers: list[Observer]) -> None:
    for observer in observers:
        observer.row(row)
