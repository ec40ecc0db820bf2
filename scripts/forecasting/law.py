"""The loss of a finished run as a law of its size and its tokens, fitted to runs of a ladder.

Invariant: a fit depends on the runs and the seed alone, not on their order, so that it can be had again to the bit.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import least_squares, nnls

HUBER = 1e-3
"""From this residual of the log of the loss on its weight falls, as in the paper: a run gone wrong does not bend it."""
REPEATS = 15.39
"""R*: after so many repetitions of its data a run has had all but 1/e of what they can give (arXiv:2305.16264)."""
EXPONENTS = (0.1, 0.2, 0.35, 0.5, 0.75, 1.1)
"""Where the search for α and β begins."""
BOUNDS = (0.02, 3.0)
"""Between which α and β are sought."""
PARAMETERS = 5
DIVERGED = 0.05, 10.0
"""A run's loss is at least so much above the law, in its log, and by so many times the median deviation of all."""


@dataclasses.dataclass(frozen=True)
class Point:
    """A finished run."""

    params: float
    """N, without the embedding tables."""
    tokens: float
    """D, those that it learned from."""
    loss: float
    """Of held-out text, in nats a token."""
    unique: float = 0.0
    """How many of its tokens are different ones; 0 stands for all."""

    @property
    def worth(self) -> float:
        """D' = U + U R* (1 - exp(-(D/U - 1) / R*)), so many new tokens are worth as much (arXiv:2305.16264, eq. 5)."""
        return worth(self.tokens, self.unique)


def worth(tokens: float, unique: float) -> float:
    """`Point.worth` of tokens of which so many are different ones."""
    if not unique or tokens <= unique:
        return tokens
    return float(unique * (1 - REPEATS * np.expm1(-(tokens / unique - 1) / REPEATS)))


@dataclasses.dataclass(frozen=True)
class Law:
    """L(N, D) = E + A/N^α + B/D^β in nats a token (Hoffmann et al. 2022, arXiv:2203.15556, eq. 10)."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, params: float, tokens: float) -> float:
        return float(self.E + self.A * params**-self.alpha + self.B * tokens**-self.beta)

    @property
    def size_exponent(self) -> float:
        """The best size grows as FLOPs to this power, the best number of tokens as FLOPs to the rest of 1 (eq. 4)."""
        return self.beta / (self.alpha + self.beta)


def fit(points: Sequence[Point], start: Law | None = None) -> Law:
    """The law with the least Huber loss of log L: approach 3 of the paper, summed and minimised to convergence.

    Besiroglu et al. 2024 (arXiv:2404.10102) found that averaging the loss stopped the paper's own search too early.
    For given exponents the law is linear in E, A and B: the search begins where these fit best.

    Args:
      start: where to begin, instead of a grid of exponents.

    Raises:
      ValueError: fewer runs than the law has parameters, or all of one size, or of one number of tokens.
    """
    data = np.array(sorted((p.params, p.worth, p.loss) for p in points), np.float64).reshape(-1, 3)
    check(data)
    log_n, log_d, log_loss = np.log(data).T
    # Sizes and tokens as multiples of their means: else A and α could hardly be told apart.
    centre_n, centre_d = log_n.mean(), log_d.mean()
    x, y = log_n - centre_n, log_d - centre_d

    def terms(v: np.ndarray) -> np.ndarray:
        e, a, b, alpha, beta = v
        return np.exp(np.stack([np.full_like(x, e), a - alpha * x, b - beta * y]))

    def residuals(v: np.ndarray) -> np.ndarray:
        return np.log(terms(v).sum(axis=0)) - log_loss

    def jacobian(v: np.ndarray) -> np.ndarray:
        parts = terms(v)
        e, a, b = parts / parts.sum(axis=0)
        return np.stack([e, a, b, -a * x, -b * y], axis=1)

    if start is None:
        begins = _beginnings(x, y, data[:, 2])
    else:
        whole = (start.E, start.A * np.exp(-start.alpha * centre_n), start.B * np.exp(-start.beta * centre_d))
        begins = [np.array([*np.log(whole), start.alpha, start.beta])]
    low, high = (np.array([*3 * [limit], own, own]) for limit, own in zip((-12.0, 12.0), BOUNDS, strict=True))
    exactness = 1e-12 if start is None else 1e-8
    how: Any = {"jac": jacobian, "bounds": (low, high), "loss": "huber", "f_scale": HUBER, "max_nfev": 500}
    how |= dict.fromkeys(("xtol", "ftol", "gtol"), exactness)
    found = [least_squares(residuals, np.clip(v, low + 1e-6, high - 1e-6), **how) for v in begins]
    e, a, b, alpha, beta = min(found, key=lambda result: result.cost).x
    return Law(*map(float, (np.exp(e), np.exp(a + alpha * centre_n), np.exp(b + beta * centre_d), alpha, beta)))


def find_diverged(points: Sequence[Point]) -> list[int]:
    """Positions of runs that learned badly and ended all the same: far above the law, which they hardly bend.

    Raises ValueError as `fit`.
    """
    law = fit(points)
    above = np.array([np.log(p.loss / law.loss(p.params, p.worth)) for p in points])
    least, times = DIVERGED
    return np.flatnonzero(above > max(least, times * float(np.median(np.abs(above))))).tolist()


def check(data: np.ndarray) -> None:
    """Raises ValueError unless [n, 3] sizes, tokens and losses can tell the parameters of a law."""
    if len(data) <= PARAMETERS:
        raise ValueError(f"a fit of {len(data)} runs needs at least {PARAMETERS + 1}; run more members of the ladder")
    for column, what in enumerate(("sizes", "numbers of tokens")):
        if len(different := np.unique(data[:, column])) < 3:
            raise ValueError(f"a fit of {len(different)} {what} needs at least 3; design a ladder with more")


def _beginnings(x: np.ndarray, y: np.ndarray, losses: np.ndarray) -> list[np.ndarray]:
    """The four pairs of exponents of the grid that fit best, each with its best E, A, B, in logs."""
    tried = []
    for alpha in EXPONENTS:
        for beta in EXPONENTS:
            columns = np.stack([np.ones_like(x), np.exp(-alpha * x), np.exp(-beta * y)], axis=1)
            best, miss = nnls(columns / losses[:, None], np.ones_like(losses))
            tried.append((miss, np.array([*np.log(np.maximum(best, 1e-5)), alpha, beta])))
    return [v for _, v in sorted(tried, key=lambda each: each[0])[:4]]


@dataclasses.dataclass(frozen=True)
class Fit:
    """A law, what runs leave open of it, and how far they are from it."""

    law: Law
    laws: tuple[Law, ...]
    """As other draws of the same runs might have given it."""
    residuals: np.ndarray
    """[n] log of the loss less that of the law, in the order of sizes, tokens and losses."""
    points: tuple[Point, ...]
    """In that order."""

    noises: tuple[float, ...]
    """Standard deviation of the log of a run's loss about each of `laws`."""

    @property
    def noise(self) -> float:
        """The same about the law."""
        return float(np.sqrt(np.sum(self.residuals**2) / (len(self.residuals) - PARAMETERS)))

    def interval(self, params: float, tokens: float, level: float = 0.8, seed: int = 0) -> tuple[float, float]:
        """Where a new run's loss falls with this probability: the law is uncertain, and a run deviates from it."""
        losses = np.log([law.loss(params, tokens) for law in self.laws])
        drawn = np.random.default_rng(seed).normal(0, self.noises, (16, len(losses)))
        low, high = np.quantile(losses + drawn, [(1 - level) / 2, (1 + level) / 2])
        return float(np.exp(low)), float(np.exp(high))


def fit_many(points: Sequence[Point], draws: int = 200, seed: int = 0) -> Fit:
    """The law of all runs, and those of so many bootstrap draws over runs, among which those of other seeds count.

    A draw gives each run the deviation from the law of a run that is drawn, and is fitted again. Runs themselves are
    not drawn: a ladder has few, and without some of them a law has no answer. Deviations are scaled up to their
    deviation with n - 5 degrees of freedom, which is itself uncertain and drawn from its χ² distribution: without
    this, 80% intervals held 65% of new runs for ladders of 15.
    Raises ValueError as `fit`.
    """
    points = tuple(sorted(points, key=lambda p: (p.params, p.worth, p.loss)))
    law, count = fit(points), len(points)
    expected = np.array([law.loss(p.params, p.worth) for p in points])
    residuals = np.log([p.loss for p in points]) - np.log(expected)
    random, freedom = np.random.default_rng(seed), count - PARAMETERS
    variance = np.sum(residuals**2) / random.chisquare(freedom, draws)
    own = residuals - residuals.mean()
    unit = own / max(float(np.sqrt(np.mean(own**2))), 1e-12)
    laws = []
    for noise in np.sqrt(variance):
        drawn = expected * np.exp(noise * random.choice(unit, count))
        moved = [dataclasses.replace(p, loss=float(loss)) for p, loss in zip(points, drawn, strict=True)]
        laws.append(fit(moved, start=law))
    return Fit(law, tuple(laws), residuals, points, tuple(map(float, np.sqrt(variance))))
