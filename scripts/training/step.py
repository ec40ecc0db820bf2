"""State and step, bound to all but a strategy: what train.py runs, plan.py compiles, and `TimedRun` times.

Invariant: a step bound here differs between strategies in its gradient function alone.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from parallax.config import OptimizerConfig, TrainConfig, TransformerConfig
from parallax.model.transformer import parameters
from parallax.training.balance import make_balance
from parallax.training.loop import Observer, Stopwatch, train
from parallax.training.loss import make_loss
from parallax.training.optimizer import make_learning_rate, make_optimizer
from parallax.training.preference import PreferenceConfig, make_preference_loss
from parallax.training.state import TrainState, make_init, state_axes
from parallax.training.step import train_step
from parallelism.strategy import Strategy


def bind_state(
    model: TransformerConfig, train: TrainConfig, learning: OptimizerConfig
) -> tuple[Callable[[], TrainState], TrainState]:
    """What makes the first state, and the tree of that state with a PartitionSpec of logical names for each array."""
    init_state = make_init(model, make_optimizer(learning, parameters(model)), train.seed)
    return init_state, state_axes(model, init_state)


def bind_step(
    model: TransformerConfig,
    train: TrainConfig,
    learning: OptimizerConfig,
    gradients: Callable,
    preference: PreferenceConfig | None = None,
) -> Callable:
    """The step, (state, batch) -> (state, metrics), with a strategy's gradient function; of pairs with a preference.

    Raises ValueError if the warm-up is longer than the run.
    """
    return functools.partial(
        train_step,
        loss_fn=make_loss(model, train) if preference is None else make_preference_loss(model, preference),
        optimizer=make_optimizer(learning, parameters(model)),
        learning_rate=make_learning_rate(learning, train.steps),
        gradients=gradients,
        seed=train.seed,
        balance=make_balance(model),
    )


class TimedRun:
    """The step in train.py's loop, which is timed: nothing is evaluated, recorded or saved.

    Args:
      strategy, step: as `scripts.training.job.build` gives them.
      batches: those of the pipeline, from the first on, with the rows of this process.

    Attributes:
      state: after the steps that are done.
    """

    def __init__(self, strategy: Strategy, step: Callable, config: TrainConfig, batches: Iterator[dict[str, Any]]):
        self.state, self._done = strategy.init(), 0
        self._strategy, self._step = strategy, strategy.compile(step)
        self._config, self._batches = config, batches

    def advance(self, steps: int, observers: Sequence[Observer] = ()) -> float:
        """Takes so many more steps. Returns the seconds until the last one's state is there."""
        start = time.perf_counter()
        self.state, self._done = train(
            self.state,
            start=self._done,
            step=self._step,
            batches=self._batches,
            placement=self._strategy,
            config=dataclasses.replace(self._config, steps=self._done + steps),
            evaluate=lambda _: {"eval_loss": 0.0},
            save=lambda *_: None,
            check=lambda *_: None,
            observers=list(observers),
            stopwatch=Stopwatch(),
        )
        jax.block_until_ready(self.state)
        return time.perf_counter() - start
