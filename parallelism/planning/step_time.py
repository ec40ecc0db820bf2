"""How long a step takes: a bound at the peaks of a device, and what to expect of it.

Invariant: `expected` is a formula whose every figure was fitted to published runs or is a public rate. Its interval is
as wide as the formula was wrong about nine of ten of the runs that it had not seen.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path

FITTED = Path(__file__).with_name("calibration.json")
SIZE_CLASSES = {"narrow": 0, "middle": 6144, "wide": 12288}
"""By the width of the residual stream, from this many numbers on."""

MANY = 64
"""Experts to choose from. Of so many each has few tokens, and more time goes into sorting and moving these."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What a device does in a step, in seconds at its peaks."""

    matmuls: float
    """Outside kernels."""
    kernels: float
    elementwise: float
    """Between the matmuls: what is read and written there, by the rate of the memory."""
    update: float
    """State, read and written once."""
    in_layer: float
    """Collectives that the next matmul waits for."""
    beside: float
    """Collectives that matmuls can hide."""
    embed_dim: int
    """Which decides on the size class."""
    host: float = 0.0
    """What goes to the memory of the host and back, the longer of the two ways, beside all else."""
    experts: float = 0.0
    """Matmuls inside experts, of which each has a part of the tokens."""
    num_experts: int = 0

    @property
    def size_class(self) -> str:
        return [name for name, least in SIZE_CLASSES.items() if self.embed_dim >= least][-1]

    @property
    def experts_class(self) -> str:
        return "many" if self.num_experts >= MANY else "few"


@dataclasses.dataclass(frozen=True)
class Expected:
    """Seconds of a step, and an interval that should hold nine of ten."""

    seconds: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What programs reach of the peaks, fitted to published runs; see docs/planning.md."""

    efficiency: Mapping[str, float]
    """Of the peak in matmuls of the middle size class, by generation; of one without runs the mean, under ""."""
    overlap: Mapping[str, float]
    """Share of the collectives beside matmuls that they hide, likewise."""
    size_class: Mapping[str, float]
    """Efficiency of each class over that of the middle one, in all generations alike."""
    kernel: float
    """Efficiency of the attention kernel over that of matmuls, likewise."""
    experts: Mapping[str, float]
    """And of the matmuls inside experts, where these are few and where they are many."""
    error: float
    """Nine of ten are from published / (1 + this) to published × (1 + this), by a fit without runs of the model."""
    error_unseen: float
    """The same by a fit without runs of the generation."""

    def seconds(self, work: Work, generation: str) -> float:
        """What to expect of a step."""
        reached = self.efficiency.get(generation, self.efficiency[""])
        hidden = self.overlap.get(generation, self.overlap[""])
        matmuls = (
            work.matmuls / self.size_class[work.size_class]
            + work.kernels / self.kernel
            + work.experts / self.experts[work.experts_class]
        )
        computing = max(matmuls / reached + work.elementwise, work.host)
        exposed = max((1 - hidden) * work.beside, work.beside - computing)
        return computing + work.in_layer + exposed + work.update

    def expected(self, work: Work, generation: str, least: float = 0.0) -> Expected:
        """The same with its interval, and no less than a step can take."""
        seconds = max(least, self.seconds(work, generation))
        error = self.error if generation in self.efficiency else self.error_unseen
        return Expected(seconds, seconds / (1 + error), seconds * (1 + error))


@functools.cache
def calibration() -> Calibration:
    """The one that comes with the project, written by `tests/claims/published_steps.py`."""
    return Calibration(**json.loads(FITTED.read_text("utf-8")))
