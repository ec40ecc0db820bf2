"""The best learning rate at several widths, in and without µP: `python tests/claims/rates.py FOLDER`.

Two layers of NANO's shape on Tiny Shakespeare, each width at each rate, --steps steps under train.py's own step and
schedule; a loss is the mean of the last tenth of the steps. Results are written as they come to FOLDER/rates.json, so
the same command goes on after a stop, and drawn to FOLDER/rates.png. Exit status: 0 where in µP the best rate of every
width is that of the smallest or its neighbour. On two idle cores it takes about 40 minutes by the operations, most of
them at a width of 512; --widths 64 128 256 --rates 1e-3 2e-3 4e-3 8e-3 1.6e-2 --steps 40 takes five.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import matplotlib.figure
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.pipeline import training_batches
from parallax import mup
from parallax.config import NANO_CONFIG, OptimizerConfig, TrainConfig
from parallax.training.loop import Stopwatch, train
from scripts.forecasting.family import at_share, with_mup
from scripts.training.flags import Flags
from scripts.training.job import prepare_job

TARGET = dataclasses.replace(NANO_CONFIG, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=16)
RATES = [2.0**power for power in range(-11, -3)]


class Losses:
    """An observer that keeps the loss of each step."""

    def __init__(self):
        self.values: list[float] = []

    def step(self, step: int, metrics) -> None:
        self.values.append(float(metrics["ce_loss"]))

    def row(self, row) -> None:
        pass


def loss_of(kind: str, width: int, base: int, rate: float, flags: argparse.Namespace) -> float:
    """Of one run; infinite where it is not finite."""
    model = dataclasses.replace(at_share(TARGET, width / TARGET.embed_dim), num_layers=TARGET.num_layers)
    if kind == "mup":
        small = dataclasses.replace(at_share(TARGET, base / TARGET.embed_dim), num_layers=TARGET.num_layers)
        model = with_mup(model, small)
    settings = TrainConfig(steps=flags.steps, batch_size=16, seq_len=64, max_bad_steps=10**6)
    learning = OptimizerConfig(optimizer=flags.optimizer, learning_rate=rate)
    job = prepare_job(Flags(model=model, train=settings, learning=learning.settled(flags.steps)))
    losses = Losses()
    train(
        job.strategy.init(),
        start=0,
        step=job.strategy.compile(job.step),
        batches=training_batches(job.training, batch_size=16, seed=0, rows=job.strategy.rows(16)),
        placement=job.strategy,
        config=settings,
        evaluate=lambda _: {"eval_loss": 0.0},
        save=lambda *_: None,
        check=lambda *_: None,
        observers=[losses],
        stopwatch=Stopwatch(),
    )
    return float(np.mean(losses.values[-max(1, flags.steps // 10) :]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--logits", type=float, default=1, help="by what all logits are multiplied")
    flags = parser.parse_args()
    mup.output_multiplier = lambda config: flags.logits / mup.width_ratio(config)
    flags.folder.mkdir(parents=True, exist_ok=True)
    path = flags.folder / "rates.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for kind in ("mup", "standard"):
        for width in flags.widths:
            for rate in flags.rates:
                name = _name(kind, width, rate, flags)
                if name not in found:
                    loss = loss_of(kind, width, flags.widths[0], rate, flags)
                    found[name] = loss if np.isfinite(loss) else None
                    path.write_text(json.dumps(found, indent=1))
    best = {kind: [_best(found, kind, width, flags) for width in flags.widths] for kind in ("mup", "standard")}
    for kind, places in best.items():
        print(
            f"{kind:9} best rate by width:",
            {w: f"{flags.rates[p]:g}" for w, p in zip(flags.widths, places, strict=True)},
        )
    _draw(found, flags)
    return 0 if all(abs(place - best["mup"][0]) <= 1 for place in best["mup"]) else 1


def _name(kind: str, width: int, rate: float, flags: argparse.Namespace) -> str:
    """Of a run in rates.json; in µP the base is a part of what it is."""
    base = f" of {flags.widths[0]}" if kind == "mup" else ""
    times = f" {flags.logits:g} times" if flags.logits != 1 else ""
    return f"{kind}{base} {width} {rate:g} {flags.optimizer} {flags.steps}{times}"


def _curve(found: dict, kind: str, width: int, flags: argparse.Namespace) -> list[float]:
    names = (_name(kind, width, rate, flags) for rate in flags.rates)
    return [np.inf if found[name] is None else found[name] for name in names]


def _best(found: dict, kind: str, width: int, flags: argparse.Namespace) -> int:
    return int(np.argmin(_curve(found, kind, width, flags)))


def _draw(found: dict, flags: argparse.Namespace) -> None:
    figure = matplotlib.figure.Figure((8, 3.5), dpi=150, layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("mup", "standard"), strict=True):
        for width in flags.widths:
            axes.plot(flags.rates, _curve(found, kind, width, flags), "o-", label=f"width {width}")
        axes.set(title=kind, xscale="log", xlabel="learning rate")
        axes.legend(frameon=False)
    figure.savefig(flags.folder / "rates.png")


if __name__ == "__main__":
    raise SystemExit(main())
