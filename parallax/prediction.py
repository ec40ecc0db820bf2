"""prediction.json: the loss that was forecast for a run before it began, and whether the run keeps to it.

Invariant: only reads. What was registered does not change when the run is known, and a run that is not the one it was
made for is said to differ, never judged.
"""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from parallax.training.metric_writers import METRICS_FILE, read_metrics

PREDICTION_FILE = "prediction.json"


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A forecast of a run's held-out loss, in nats a token."""

    loss: float
    """After its last step."""
    low: float
    high: float
    level: float
    """Probability that the last loss is between low and high."""
    params: int
    tokens: float
    """Tokens that the run learns from."""
    seq_len: int
    """Of the ladder's runs: a token is predicted better with more context before it."""
    eval_tokens: int | None
    """How many tokens an evaluation takes, as train.py's --eval-tokens: others have another loss."""
    model: dict[str, Any]
    """Its config, as config.json has it."""
    corpus_sha256: str
    ladder_sha256: str
    curve: tuple[tuple[float, float, float], ...]
    """At shares of the steps, ascending to 1: by what the last loss is multiplied on the way, and by what factor up or
    down that may differ."""
    left_out: dict[str, str | None] = dataclasses.field(default_factory=dict)
    """Names of the ladder's runs on which it does not stand, and why."""

    def at(self, share: float) -> tuple[float, float, float]:
        """Low, expected and high loss when this share of the steps is done; before the curve begins, as there."""
        shares, means, spreads = zip(*self.curve, strict=True)
        mean = np.exp(np.interp(share, shares, np.log(means)))
        spread = np.exp(np.interp(share, shares, np.log(spreads)))
        return float(self.low * mean / spread), float(self.loss * mean), float(self.high * mean * spread)

    @property
    def first_share(self) -> float:
        """Where the curve begins."""
        return self.curve[0][0]


FREE = {"attention", "layer_loop", "remat", "dtype", "max_seq_len"}
"""Fields of a model that say how it is computed and not what."""


def read_prediction(folder: str | os.PathLike) -> Prediction | None:
    """What was registered in a run folder, if anything. Raises ValueError if the file is none."""
    path = Path(folder, PREDICTION_FILE)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        prediction = Prediction(**values | {"curve": tuple(map(tuple, values["curve"]))})
        prediction.at(prediction.first_share)  # which needs what it is made of to be numbers
        return prediction
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no prediction ({error}); remove it, or register another") from None


def differences(prediction: Prediction, config: dict[str, Any]) -> list[str]:
    """The settings in which a run, by its config.json, is not the one that was predicted."""
    train, model = config["train"], config["model"]
    tokens = train["steps"] * train["batch_size"] * train["seq_len"]
    found = [
        f"model.{name}"
        for name in sorted((prediction.model.keys() | model.keys()) - FREE)
        if prediction.model.get(name) != model.get(name)
    ]
    found += ["tokens"] if abs(tokens / prediction.tokens - 1) > 0.01 else []
    found += ["eval_tokens"] if config["run"]["eval_tokens"] != prediction.eval_tokens else []
    found += ["seq_len"] if train["seq_len"] != prediction.seq_len else []
    return found + (["corpus"] if config["corpus"]["sha256"] != prediction.corpus_sha256 else [])


def expected_at(folder: str | os.PathLike, step: int) -> dict[str, float]:
    """The prediction for an evaluation after a step, as a row of metrics has it; nothing without one."""
    prediction, steps = read_prediction(folder), _steps(folder)
    if prediction is None or not steps:
        return {}
    low, middle, high = prediction.at(step / steps)
    return {"predicted_share": step / steps, "predicted_loss": middle, "predicted_low": low, "predicted_high": high}


def judge(folder: str | os.PathLike) -> dict[str, Any]:
    """What the summary says of a prediction: whether the run kept it, and where it first left its interval.

    `kept` is None while the run is not finished, and for a run that differs from what was predicted.
    """
    prediction = read_prediction(folder)
    if prediction is None:
        return {}
    config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    facts = {"loss": prediction.loss, "low": prediction.low, "high": prediction.high, "level": prediction.level}
    facts |= {"ladder_sha256": prediction.ladder_sha256}
    if differs := differences(prediction, config):
        return facts | {"kept": None, "differs": differs}
    steps, left_at, kept = config["train"]["steps"], None, None
    for row in read_metrics(Path(folder, METRICS_FILE)):
        share = row["step"] / steps
        if "eval_loss" not in row or share < prediction.first_share:
            continue
        low, _, high = prediction.at(share)
        inside = low <= (row["eval_loss"] or math.inf) <= high  # null was not finite
        left_at = row["step"] if left_at is None and not inside else left_at
        kept = inside if row["step"] == steps else None
    return facts | {"kept": kept, "left_at": left_at}


def _steps(folder: str | os.PathLike) -> int:
    try:
        return json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))["train"]["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0
