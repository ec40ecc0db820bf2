"""ladder.py forecast: what a run larger than those of a ladder will reach, and what it takes.

Invariant: a forecast names the ladder, the text and the model that it stands on by their hashes, and an interval always
goes with a loss.
"""

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from parallax.config import PRESETS, TransformerConfig, config_to_dict
from parallax.prediction import FREE, PREDICTION_FILE
from parallax.storage import write_json
from parallelism.planning.hardware import machine
from scripts.common.command_line import parse, tell, writing
from scripts.forecasting.family import at_share, flops_of, size_of
from scripts.forecasting.fitting import Fitted, far_beyond, fit_ladder, warnings
from scripts.forecasting.flags import ForecastFlags
from scripts.forecasting.ladder import Ladder, read_ladder
from scripts.forecasting.law import worth
from scripts.forecasting.plot import plot_forecast
from scripts.planning.flags import Flags as PlanFlags
from scripts.planning.plan import Plan
from scripts.planning.report import bill

DESCRIPTION = "Forecast the held-out loss of a run of the ladder's family, with an interval, and what it costs."
SHARES = np.geomspace(0.05, 16, 33)
"""Sizes among which the best is sought, as shares of the target's width."""
CURVE = np.linspace(0.2, 1, 9)
"""Shares of the steps at which the curve of a run is told; before, the warm-up decides it."""


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Of one run."""

    params: int
    tokens: float
    flops: float
    loss: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of the best plan on a machine."""

    topology: str
    step_seconds: float
    low_seconds: float
    high_seconds: float
    hours: float
    usd: float | None
    """None where no price is known."""


def forecast(args: Sequence[str]) -> int:
    """Shows the forecast, writes forecast.json and forecast.png, and registers it where that is asked for.

    Exit status: 0 done, 1 no plan fits the machine.
    """
    flags = parse(ForecastFlags, description=DESCRIPTION, args=args)
    if flags.register is not None:
        _require_new(flags.register)
    fitted = fit_ladder(read_ladder(flags.ladder), flags.without)
    model = at_share(asked_model(fitted.ladder, flags.config), flags.share)
    own = tell_of(fitted, model, flags.tokens, flags.level)
    best, doubled = (optimum(fitted, times * own.flops, flags.level) for times in (1, 2))
    cost = None if flags.topology is None else plan(fitted, model, flags)
    if flags.topology is not None and cost is None:
        return 1
    result = {
        "ladder_sha256": fitted.ladder.sha256,
        "left_out": fitted.left_out,
        "corpus_sha256": fitted.ladder.corpus_sha256,
        "level": flags.level,
        "run": dataclasses.asdict(own),
        "best_for_its_flops": dataclasses.asdict(best),
        "best_for_twice_its_flops": dataclasses.asdict(doubled),
        "cost": cost and dataclasses.asdict(cost),
        "warnings": [
            *warnings(fitted),
            *filter(None, [far_beyond(fitted, own.flops) or far_beyond(fitted, doubled.flops)]),
            *filter(None, [of_another_family(fitted.ladder, model)]),
            *_at_the_end(fitted.ladder, best, doubled),
        ],
    }
    _show(own, best, doubled, cost, flags.level)
    for line in result["warnings"]:
        print(f"warning: {line}")
    folder = flags.output or fitted.ladder.folder
    with writing(f"--output {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "forecast.json", result)
        plot_forecast(fitted, own, folder / "forecast.png")
    if flags.register is not None:
        register(fitted, model, own, flags.level, flags.register)
    return 0


def asked_model(ladder: Ladder, config: str | None) -> TransformerConfig:
    """The ladder's target, or a preset with its vocabulary and parametrization."""
    if config is None:
        return ladder.target
    own = {"vocab_size": ladder.target.vocab_size, "parametrization": ladder.target.parametrization}
    return dataclasses.replace(PRESETS[config], **own)


def of_another_family(ladder: Ladder, model: TransformerConfig) -> str | None:
    """A warning where the ladder's target, as wide as the model, differs from it in more than how it is computed."""
    relative = config_to_dict(at_share(ladder.target, model.embed_dim / ladder.target.embed_dim))
    own = config_to_dict(model)
    if not (differ := [name for name in sorted(own.keys() - FREE) if own[name] != relative[name]]):
        return None
    return f"the model is not of the ladder's family, by its {', '.join(differ)}; the law need not be its own"


def tell_of(fitted: Fitted, model: TransformerConfig, tokens: float, level: float) -> Forecast:
    """The loss of a run of this model and so many tokens of the ladder's text, which it may have to repeat."""
    params, seq_len = size_of(model), fitted.ladder.train.seq_len
    useful = worth(tokens, fitted.ladder.unique_tokens)
    low, high = fitted.fit.interval(params, useful, level)
    loss = fitted.fit.law.loss(params, useful)
    return Forecast(params, tokens, flops_of(model, seq_len) * tokens, loss, min(low, loss), max(high, loss))


def optimum(fitted: Fitted, flops: float, level: float) -> Forecast:
    """The member of the family, and its tokens, with the least expected loss for so many FLOPs."""
    models = {model.embed_dim: model for model in (at_share(fitted.ladder.target, share) for share in SHARES)}
    seq_len = fitted.ladder.train.seq_len

    def loss(model: TransformerConfig) -> float:
        tokens = worth(flops / flops_of(model, seq_len), fitted.ladder.unique_tokens)
        return fitted.fit.law.loss(size_of(model), tokens)

    best = min(models.values(), key=loss)
    return tell_of(fitted, best, flops / flops_of(best, seq_len), level)


def _at_the_end(ladder: Ladder, best: Forecast, doubled: Forecast) -> Iterator[str]:
    """A warning where the best size is the smallest or the largest of those that are compared."""
    ends = [size_of(at_share(ladder.target, share)) for share in (SHARES[0], SHARES[-1])]
    for told, what in ((best, "its"), (doubled, "twice its")):
        if told.params in ends:
            end = "smallest" if told.params == ends[0] else "largest"
            yield f"the best size for {what} FLOPs is the {end} that was compared; a better one may be beyond it"


def plan(fitted: Fitted, model: TransformerConfig, flags: ForecastFlags) -> Cost | None:
    """What the best plan that fits takes of a machine; None where none fits. Raises ValueError as plan.py."""
    sliced = machine(flags.topology or "")
    seq_len = flags.seq_len or fitted.ladder.train.seq_len
    asked = PlanFlags(
        topology=sliced.name,
        model=model,
        batch_size=flags.batch_size or 256,
        seq_len=seq_len,
        tokens=flags.tokens,
        price=flags.price,
        optimizer=fitted.ladder.learning,
    )
    row = Plan(asked).best(Console(stderr=True))
    if row is None:
        tell(f"no layout that was compiled fits {sliced.name}; try a larger machine, or a smaller --batch-size")
        return None
    hours, usd = bill(row, sliced, asked)
    expected = row.expected
    return Cost(sliced.name, expected.seconds, expected.low, expected.high, hours or 0.0, usd)


def register(fitted: Fitted, model: TransformerConfig, own: Forecast, level: float, folder: Path) -> None:
    """Writes prediction.json into the folder of a run that has not begun."""
    values = {
        "loss": own.loss,
        "low": own.low,
        "high": own.high,
        "level": level,
        "params": own.params,
        "tokens": own.tokens,
        "seq_len": fitted.ladder.train.seq_len,
        "eval_tokens": fitted.ladder.data.get("eval_tokens"),
        "model": config_to_dict(model),
        "corpus_sha256": fitted.ladder.corpus_sha256,
        "ladder_sha256": fitted.ladder.sha256,
        "left_out": fitted.left_out,
        "curve": curve_of(fitted, level),
    }
    with writing(f"--register {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / PREDICTION_FILE, values)
    words = f"--output-dir {folder} --seq-len {values['seq_len']}"
    words += f" --eval-tokens {values['eval_tokens']}" if values["eval_tokens"] else ""
    tell(f"registered {folder / PREDICTION_FILE}; a run of train.py with {words} is held against it")


def _require_new(folder: Path) -> None:
    """Raises ValueError if a run's folder is not local, or not empty: a prediction goes before a run."""
    if str(folder).startswith("gs:"):
        raise ValueError(f"--register {folder} must be a local folder; copy {PREDICTION_FILE} from one to gs://")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"--register {folder} holds files already; a prediction goes before a run, choose another")


def curve_of(fitted: Fitted, level: float) -> list[list[float]]:
    """How far above its last loss a run is on the way: the larger half of the ladder's runs, by FLOPs.

    Runs of one family with one schedule have nearly one curve as multiples of their last loss (Qiu et al. 2025,
    arXiv:2507.02119). Of each share of the steps the mean, and the factor that holds this share of the runs.
    """
    ordered = sorted(fitted.finished, key=lambda result: result.member.flops)
    logs = []
    for result in ordered[len(ordered) // 2 :]:
        shares, losses = np.array(result.curve).T
        logs.append(np.interp(CURVE, shares, np.log(losses)) - np.log(losses[-1]))
    means, deviations = np.mean(logs, axis=0), np.std(logs, axis=0)
    reach = statistics.NormalDist().inv_cdf((1 + level) / 2)
    columns = CURVE, np.exp(means), np.exp(reach * deviations)
    return [list(map(float, row)) for row in zip(*columns, strict=True)]


def _show(own: Forecast, best: Forecast, doubled: Forecast, cost: Cost | None, level: float) -> None:
    def line(what: str, told: Forecast) -> None:
        print(
            f"{what:22} loss {told.loss:.4f}, {level:.0%} between {told.low:.4f} and {told.high:.4f}: "
            f"{told.params:,} parameters, {told.tokens:.3g} tokens, {told.flops:.3g} FLOPs"
        )

    line("this run", own)
    line("best for its FLOPs", best)
    line("best for twice as many", doubled)
    if cost is not None:
        money = "no price is known, give --price" if cost.usd is None else f"{cost.usd:,.0f} USD"
        print(
            f"{'on ' + cost.topology:22} {cost.step_seconds * 1e3:,.0f} ms a step "
            f"({cost.low_seconds * 1e3:,.0f} to {cost.high_seconds * 1e3:,.0f}), {cost.hours:,.1f} hours, {money}; "
            "none of this has run there"
        )
