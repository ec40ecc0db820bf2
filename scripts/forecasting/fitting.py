"""ladder.py fit: the law of a ladder's finished runs, and what speaks against it.

Invariant: the fit follows from the runs alone; a run that failed or diverged is named and left out.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from parallax.storage import write_json
from scripts.common.command_line import parse, writing
from scripts.common.tables import show_numbers
from scripts.forecasting.flags import FitFlags
from scripts.forecasting.ladder import Ladder, Result, point_of, read_ladder, require_names, result_of
from scripts.forecasting.law import BOUNDS, Fit, find_diverged, fit_many

DESCRIPTION = "Fit L(N, D) = E + A/N^a + B/D^b to the finished runs of a ladder."
FIT_FILE = "fit.json"
ASKED = "--without names it"
FAR = 30.0
"""Beyond so many times the FLOPs of the largest run a law is a guess."""
FEW = 5.0
"""Tokens a parameter, below which a run is far from what its size can learn."""
EPOCHS = 4.0
"""Up to so many a repeated token is nearly worth a new one (arXiv:2305.16264)."""
LEAST_E = 1e-3
"""In nats a token; no text is known so well."""
BENT = 2.5
"""Standard errors by which the mean residual of the largest runs may differ from that of the others."""


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A ladder's fit, with its runs as they ended."""

    ladder: Ladder
    fit: Fit
    results: tuple[Result, ...]
    """Of all members."""

    @property
    def finished(self) -> list[Result]:
        return [result for result in self.results if result.loss is not None]

    @property
    def left_out(self) -> dict[str, str | None]:
        """Names of the others, and why; None of those that are not finished."""
        return {result.member.name: result.failure for result in self.results if result.loss is None}


def fit_ladder(ladder: Ladder, without: Sequence[str] = ()) -> Fitted:
    """The fit of all runs but those of these names.

    Raises ValueError for a name that no run has, or if too few runs are finished, and have learned.
    """
    require_names(ladder, "--without", without)
    results = [result_of(ladder, member) for member in ladder.members]
    for place, result in enumerate(results):
        if result.member.name in without:
            results[place] = dataclasses.replace(result, loss=None, failure=ASKED)
    finished = [place for place, result in enumerate(results) if result.loss is not None]
    points = [point_of(ladder, results[place]) for place in finished]
    for number in find_diverged(points):
        reason = f"it diverged, to a loss of {points[number].loss:.4f} far above the law of the others"
        place = finished[number]
        results[place] = dataclasses.replace(results[place], loss=None, failure=reason)
    points = [point_of(ladder, result) for result in results if result.loss is not None]
    return Fitted(ladder, fit_many(points), tuple(results))


def fit(args: Sequence[str]) -> int:
    """Shows the fit and writes fit.json. Exit status 0."""
    flags = parse(FitFlags, description=DESCRIPTION, args=args)
    fitted = fit_ladder(read_ladder(flags.ladder), flags.without)
    show(fitted)
    with writing(str(fitted.ladder.folder), "copy the ladder"):
        write_json(fitted.ladder.folder / FIT_FILE, fit_to_json(fitted))
    return 0


def show(fitted: Fitted) -> None:
    """The law with its intervals, the runs with their residuals, and the warnings."""
    law, laws = fitted.fit.law, fitted.fit.laws
    rows = []
    for result in fitted.finished:
        point = point_of(fitted.ladder, result)
        expected = law.loss(point.params, point.worth)
        row = [result.member.name, f"{point.params:,.0f}", f"{point.tokens:,.0f}", f"{point.loss:.4f}"]
        rows.append([*row, f"{expected:.4f}", f"{100 * np.log(point.loss / expected):+.2f}%"])
    title = f"{fitted.ladder.folder}: {len(fitted.finished)} of {len(fitted.results)} runs"
    show_numbers(title, ("run", "parameters", "tokens", "loss", "law", "residual"), rows)
    for name in ("E", "A", "B", "alpha", "beta", "size_exponent"):
        low, high = np.quantile([getattr(each, name) for each in laws], [0.1, 0.9])
        print(f"{name:13} {getattr(law, name):10.4g}   80%: {low:.4g} to {high:.4g}")
    print(f"runs deviate from the law by {fitted.fit.noise:.2%}")
    for line in warnings(fitted):
        print(f"warning: {line}")


def warnings(fitted: Fitted) -> Iterator[str]:
    """What makes the law doubtful."""
    ladder, fit = fitted.ladder, fitted.fit
    for result in fitted.results:
        if result.failure and result.failure != ASKED:
            yield f"{result.member.name} failed and is left out: {result.failure}"
        elif result.loss is None and not result.failure:
            yield f"{result.member.name} is not finished; go on with ladder.py run {ladder.folder}"
    points = [(result.member.name, point_of(ladder, result)) for result in fitted.finished]
    if few := [name for name, point in points if point.tokens < FEW * point.params]:
        yield f"under-trained, with fewer than {FEW:g} tokens a parameter: {', '.join(few)}"
    if many := [name for name, point in points if point.tokens > EPOCHS * point.unique]:
        yield f"repeat their data more than {EPOCHS:g} times: {', '.join(many)}; the law counts what that is worth"
    for name in ("alpha", "beta"):
        if not 1.01 * BOUNDS[0] < getattr(fit.law, name) < 0.99 * BOUNDS[1]:
            what = "sizes" if name == "alpha" else "numbers of tokens"
            yield f"{name} is {getattr(fit.law, name):.3g}, the end of its bounds: the {what} do not tell it"
    if fit.law.E < LEAST_E:
        yield f"E is {fit.law.E:.3g}: the runs do not tell where their losses end"
    if bend := _bend(fit):
        yield f"residuals bend: the largest third is {bend:+.2%} off the law, the rest not; a forecast errs that way"


def _bend(fit: Fit) -> float | None:
    """The mean residual of the third with the most FLOPs less that of the others, where noise does not explain it."""
    order = np.argsort([point.params * point.worth for point in fit.points], kind="stable")
    third = max(2, len(order) // 3)
    top, rest = fit.residuals[order[-third:]], fit.residuals[order[:-third]]
    difference = float(top.mean() - rest.mean())
    error = fit.noise * (1 / len(top) + 1 / len(rest)) ** 0.5
    return difference if abs(difference) > BENT * error else None


def far_beyond(fitted: Fitted, flops: float) -> str | None:
    """A warning where a run of so many FLOPs is too far from the runs of the ladder."""
    largest = max(result.member.flops for result in fitted.finished)
    if flops <= FAR * largest:
        return None
    return (
        f"{flops:.3g} FLOPs are {flops / largest:.0f} times those of the largest run; beyond {FAR:g} a law is a guess"
    )


def fit_to_json(fitted: Fitted) -> dict:
    """The law, its bootstrap draws and the runs that it stands on."""
    return {
        "ladder_sha256": fitted.ladder.sha256,
        "law": dataclasses.asdict(fitted.fit.law),
        "noise": fitted.fit.noise,
        "draws": [dataclasses.asdict(law) for law in fitted.fit.laws],
        "runs": [dataclasses.asdict(point) for point in fitted.fit.points],
        "left_out": fitted.left_out,
        "warnings": list(warnings(fitted)),
    }
