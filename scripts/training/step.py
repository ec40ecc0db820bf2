"""State and step, bound to all but a strategy: what train.py runs, plan.py compiles and benchmark.py times.

Invariant: a step bound here differs between strategies in its gradient function alone.
"""

import functools
from collections.abc import Callable

from parallax.config import OptimizerConfig, TrainConfig, TransformerConfig
from parallax.model.transformer import parameters
from parallax.training.balance import make_balance
from parallax.training.loss import make_loss
from parallax.training.optimizer import make_learning_rate, make_optimizer
from parallax.training.preference import PreferenceConfig, make_preference_loss
from parallax.training.state import TrainState, make_init, state_axes
from parallax.training.step import train_step


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
