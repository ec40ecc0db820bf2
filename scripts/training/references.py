"""What a reference has for the answers of pairs, computed once and kept in the run folder.

Invariant: the reference is what the run began with, or the base beside its adapters, and the same for all of the run.
"""

import functools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data.pipeline import Rows, evaluation_batches
from data.samples import Batch, Samples
from parallax.model.adapters import take_base, without_adapters
from parallax.training.preference import REFERENCES, make_log_probs
from parallax.training.state import TrainState
from parallelism.hosts import fetch
from scripts.training.job import Job, say, settle_model

FILE = "references.npz"
SIDES = ("training", "held_out")


class Referred:
    """Samples of pairs, each batch with the log-probabilities of its rows under the reference."""

    def __init__(self, samples: Samples, found_N2: np.ndarray):
        self._samples, self._found_N2, self.seq_len = samples, found_N2, samples.seq_len

    def draw(self, batch_size: int, seed: int, k: int) -> np.ndarray:
        return self._samples.draw(batch_size, seed, k)

    def all_ids(self, most: int | None = None) -> np.ndarray:
        return self._samples.all_ids(most)

    def gather(self, sample_ids: np.ndarray) -> Batch:
        found_B2 = np.where((sample_ids >= 0)[:, None], self._found_N2[sample_ids], 0)
        columns = dict(zip(REFERENCES, found_B2.astype(np.float32).T.copy(), strict=True))
        return self._samples.gather(sample_ids) | columns


Found = dict[str, np.ndarray]
"""By side, the log-probabilities [N, 2] of all its pairs."""


def refer(job: Job, state: TrainState, start: int) -> Found:
    """What the reference has, from the run folder if the run goes on from a step; raises ValueError if it is not."""
    return _read(job) if start else _compute(job, state)


def keep(found: Found, folder: Path) -> None:
    """Writes what `refer` computed into the run folder. Raises OSError if it cannot."""
    with (folder / FILE).open("wb") as file:
        np.savez(file, **found)  # pyright: ignore[reportArgumentType]


def _read(job: Job) -> Found:
    path = job.folder / FILE
    try:
        with path.open("rb") as file, np.load(file) as held:
            return {side: held[side] for side in SIDES}
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read ({error}); bring it back, or begin another run") from None


def _compute(job: Job, state: TrainState) -> Found:
    say("reference computing what it has for all pairs")
    config = without_adapters(settle_model(job.flags, job.strategy))
    of_pairs = make_log_probs(config, length_normalized=job.flags.dpo.length_normalized)
    base, size = take_base(job.strategy.canonical(state).params), job.flags.train.batch_size

    def evaluate(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        return of_pairs(params, batch, None)[:2]

    if job.flags.train.reduction == "exact":  # all of a batch on one device, so that it has the same bits everywhere
        base, compute, rows = jax.device_put(fetch(base), jax.local_devices()[0]), jax.jit(evaluate), None
    else:
        compute, rows = job.strategy.compile_evaluation(evaluate), job.strategy.rows(size)
    return {side: _of_side(getattr(job, side), functools.partial(compute, base), size, rows) for side in SIDES}


def _of_side(samples: Samples, compute: Callable[[Batch], Any], size: int, rows: Rows | None) -> np.ndarray:
    parts = []
    for batch in evaluation_batches(samples, batch_size=size, rows=rows):
        parts.append(np.stack(jax.device_get(compute(batch)), axis=1))
    return np.concatenate(parts)[: len(samples.all_ids())]
