"""A small compiled step, and a stand-in for all that the loop talks to that writes down what happens."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from parallax.training.loop import Stopwatch, train
from parallax.training.state import TrainState

TIMING = {"tokens_per_second", "step_time", "mfu"}
"""Fields of a row that differ between two runs of the same curve."""
TOKENS = 12


@functools.partial(jax.jit, donate_argnums=0)
def small_step(state, batch):
    """Params follow from every batch so far, so that a lost or repeated batch shows in all later rows."""
    w = 0.5 * state.params["w"] + batch["x"]
    finite = jnp.isfinite(batch["x"])
    bad_steps = jnp.where(finite, 0, state.bad_steps + 1)
    metrics = {"loss": jnp.sin(w), "tokens": jnp.int32(TOKENS), "bad_steps": bad_steps}
    params = {"w": jnp.where(finite, w, state.params["w"])}
    return TrainState(step=state.step + 1, params=params, opt_state=(), bad_steps=bad_steps), metrics


def fresh_state():
    zero = jnp.zeros((), jnp.int32)
    return TrainState(step=zero, params={"w": jnp.float32(1)}, opt_state=(), bad_steps=zero + 0)


class Harness:
    """Placement, observer, evaluation and storage in one, which writes down what happens in order."""

    def __init__(self, stop_at=None, bad=(), clock=None, differs_at=None, cut_at=None):
        self.events, self.saved, self.best, self.dispatched = [], {}, {}, 0
        self.measured = {}
        self._stop_at, self._bad, self._clock = stop_at, bad, clock
        self._differs_at, self._cut_at = differs_at, cut_at
        self.stopwatch = Stopwatch()

    def _takes(self, seconds):
        if self._clock is not None:
            self._clock.now += seconds

    def batches(self, start):
        for k in itertools.count(start):
            self._takes(0.25)
            yield self._batch(k)

    def _batch(self, k):
        return {"x": np.float32(np.nan if k in self._bad else np.sin(3.0 * k))}

    def put_batch(self, batch):
        return jax.device_put(batch)

    def stop_requested(self):
        return self._stop_at is not None and self.dispatched >= self._stop_at

    def take_step(self, state, batch):
        self._takes(1.0 if self.dispatched else 100.0)
        self.dispatched += 1
        return small_step(state, batch)

    def step(self, step, metrics):
        self.events.append(("step", step, metrics))

    def row(self, row):
        self.events.append(("row", row["step"], row))

    def evaluate(self, state):
        if int(state.step) == self._cut_at:
            return None
        self._takes(30.0)
        self.events.append(("evaluate", int(state.step), None))
        return {"eval_loss": float(state.params["w"]) + 1}

    def save(self, step, state, eval_loss, best):
        self._takes(7.0)
        self.saved[step], self.best[step] = jax.tree.map(np.array, state), best
        self.events.append(("save", step, eval_loss))

    def check(self, step, state, batch):
        self._takes(0.5)
        assert int(state.step) == step
        np.testing.assert_array_equal(batch["x"], self._batch(step - 1)["x"])
        self.events.append(("check", step, None))
        if step == self._differs_at:
            raise RuntimeError("replicas differ")

    def train(self, config, start=0, state=None, observers=None, **keywords):
        return train(
            fresh_state() if state is None else jax.tree.map(jnp.array, state),
            start=start,
            step=self.take_step,
            batches=self.batches(start),
            placement=self,
            config=config,
            evaluate=self.evaluate,
            save=self.save,
            measured=self.measured.__setitem__,
            check=self.check,
            observers=[self] if observers is None else observers,
            stopwatch=self.stopwatch,
            **keywords,
        )

    def of(self, kind):
        return [step for what, step, _ in self.events if what == kind]

    @property
    def rows(self):
        return [row for what, _, row in self.events if what == "row"]

    @property
    def logged(self):
        return [row["step"] for row in self.rows if "loss" in row]
