"""The figures of a `Calibration`, from runs whose step times are known.

Invariant: few figures for many runs. A generation has two of its own, and one with few runs stays near the mean of all:
the priors below are as strong as a run or two.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from scipy.optimize import least_squares

from parallelism.planning.step_time import SIZE_CLASSES, Calibration, Work

NOISE = 0.07
"""Standard deviation of the logarithm of a published time around a formula of this kind."""
EFFICIENCY, EFFICIENCY_SPREAD = math.log(0.75), 0.12
"""Mean of all generations before any run is seen, and by how much one differs from the mean, as logarithms."""
OVERLAP, OVERLAP_SPREAD = 1.0, 1.0
"""The same of log(overlap / (1 − overlap))."""
CLASS_SPREAD = 0.1
KERNEL, KERNEL_SPREAD = math.log(0.6), 0.2
EXPERTS, EXPERTS_SPREAD = math.log(0.8), 0.2
MANY_EXPERTS, MANY_EXPERTS_SPREAD = math.log(0.5), 0.5


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that somebody published."""

    generation: str
    family: str
    """Runs of one model on one generation are much alike."""
    work: Work
    seconds: float
    """Of a step."""


def fit(runs: Sequence[Run]) -> Calibration:
    """The most probable figures. Errors are left 0, see `leave_out`."""
    generations = sorted({run.generation for run in runs})
    others = [name for name in SIZE_CLASSES if name != "middle"]
    count = len(generations)

    def calibration(x: np.ndarray) -> Calibration:
        mean, kernel, few, many = x[:4]
        reached, hidden = x[4 : 4 + count], x[4 + count : 4 + 2 * count]
        names = ["", *generations]
        return Calibration(
            efficiency=dict(zip(names, np.minimum(1.0, np.exp([mean, *(mean + reached)])).tolist(), strict=True)),
            overlap=dict(zip(names, (1 / (1 + np.exp(-OVERLAP - np.array([0.0, *hidden])))).tolist(), strict=True)),
            size_class={"middle": 1.0, **dict(zip(others, np.exp(x[4 + 2 * count :]).tolist(), strict=True))},
            kernel=math.exp(kernel),
            experts={"few": math.exp(few), "many": math.exp(many)},
            error=0.0,
            error_unseen=0.0,
        )

    center = np.array([EFFICIENCY, KERNEL, EXPERTS, MANY_EXPERTS] + [0.0] * (2 * count + len(others)))
    spread = [
        0.3,
        KERNEL_SPREAD,
        EXPERTS_SPREAD,
        MANY_EXPERTS_SPREAD,
        *[EFFICIENCY_SPREAD] * count,
        *[OVERLAP_SPREAD] * count,
        *[CLASS_SPREAD] * len(others),
    ]

    def residuals(x: np.ndarray) -> np.ndarray:
        found = calibration(x)
        errors = [math.log(found.seconds(run.work, run.generation) / run.seconds) / NOISE for run in runs]
        return np.array([*errors, *((x - center) / np.array(spread))])

    # A run that the formula does not describe weighs less than its square.
    return calibration(least_squares(residuals, center, loss="soft_l1", f_scale=2.0).x)


def leave_out(runs: Sequence[Run], like: Callable[[Run], Hashable] = id) -> list[float]:
    """Of each run the seconds expected by a fit without it, and without those that `like` gives the same key."""
    fits = {key: fit([run for run in runs if like(run) != key]) for key in {like(run) for run in runs}}
    return [fits[like(run)].seconds(run.work, run.generation) for run in runs]


def calibrate(runs: Sequence[Run]) -> Calibration:
    """The figures, with the errors that they have in runs of other models and of other generations."""
    seen = _error(runs, leave_out(runs, lambda run: (run.generation, run.family)))
    unseen = _error(runs, leave_out(runs, lambda run: run.generation))
    return dataclasses.replace(fit(runs), error=seen, error_unseen=max(seen, unseen))


def _error(runs: Sequence[Run], expected: Sequence[float]) -> float:
    """The e that nine of ten keep: expected is from published / (1 + e) to published × (1 + e)."""
    logs = [abs(math.log(seconds / run.seconds)) for run, seconds in zip(runs, expected, strict=True)]
    return math.exp(float(np.quantile(logs, 0.9))) - 1
