"""Parallax as a contender: its own step, loop and pipeline, as train.py puts them together, and its generation.

Invariant: nothing here computes; whatever is measured is the code that users run.
"""

import json
import time
from pathlib import Path
from typing import Any

import jax

from data.pipeline import training_batches
from parallax.config import TrainConfig, TransformerConfig
from parallax.inference.generate import Generator
from parallax.inference.request import Request
from parallax.inference.sampling import SamplingSettings
from parallax.interop.hf_config import config_to_hf
from parallax.interop.writing import write_params
from parallax.model.stack import prepare
from parallax.model.transformer import Params, init_params
from parallax.training.loop import Row
from scripts.benchmarks.settings import CHECKED_STEPS, LEARNING, MODELS, SEED, Measure, prompts, read_setting, samples
from scripts.common.jax_process import keep_large_buffers
from scripts.training.flags import Flags
from scripts.training.job import build
from scripts.training.step import TimedRun


class Losses:
    """An observer that keeps the loss of each step."""

    def __init__(self):
        self.values: list[float] = []

    def step(self, step: int, metrics: Row) -> None:
        self.values.append(float(metrics["loss"]))

    def row(self, row: Row) -> None:
        pass


def training(setting: str, strategy: str, weights: str) -> tuple[dict[str, Any], Measure]:
    """Trains by `{"units": steps}`; writes the first weights to the folder `weights`, for the others to begin with.

    A step is one turn of train.py's loop: the batch from the pipeline, the step, its metrics read a step behind.
    """
    keep_large_buffers()
    shape = read_setting(setting)
    # Losses of others have no z-loss.
    config = TrainConfig(batch_size=shape.batch_size, seq_len=shape.seq_len, seed=SEED, z_loss=0.0, steps=10**6)
    _, placement, step, _ = build(
        Flags(
            strategy=strategy,  # pyright: ignore[reportArgumentType]: checked where strategies are made
            model=shape.model,
            learning=LEARNING,
            train=config,
        )
    )
    rows = placement.rows(shape.batch_size)
    batches = training_batches(samples(shape), batch_size=shape.batch_size, seed=SEED, rows=rows)
    run = TimedRun(placement, step, config, batches)
    first = placement.canonical(run.state).params
    write_weights(weights, shape.model, first)
    params = sum(leaf.size for leaf in jax.tree.leaves(first))
    losses = Losses()
    ready = run.advance(CHECKED_STEPS, [losses])
    facts = {"params": params, "losses": losses.values, "first_steps_seconds": ready}
    return facts, lambda request: {"seconds": run.advance(request["units"])}


def decoding(
    model: str, batch_size: int, prompt_tokens: int, new_tokens: int, weights: str
) -> tuple[dict[str, Any], Measure]:
    """Greedy generation; each of `{"units": requests}` is streamed up to its first token, then asked for whole."""
    keep_large_buffers()
    config = MODELS[model]
    params = jax.jit(lambda: init_params(config, jax.random.key(SEED)))()
    write_weights(weights, config, params)
    params = prepare(config, params)
    generator = Generator(config)
    request = Request(
        prompts=list(prompts(config, batch_size, prompt_tokens)),
        settings=SamplingSettings.create(batch_size, temperature=0.0),
        seeds=list(range(batch_size)),
        max_tokens=new_tokens,
    )

    def measure(asked: dict[str, Any]) -> dict[str, Any]:
        first = whole = 0.0
        for _ in range(asked["units"]):
            start = time.perf_counter()
            next(generator.stream(params, request))
            middle = time.perf_counter()
            generator.generate(params, request)
            first, whole = first + middle - start, whole + time.perf_counter() - middle
        return {"seconds": first + whole, "first": first / asked["units"], "whole": whole / asked["units"]}

    return {"tokens": [row.tolist() for row in generator.generate(params, request)]}, measure


def write_weights(folder: str, config: TransformerConfig, params: Params) -> None:
    """The parameters as a Hugging Face folder without a tokenizer, which torch and transformers read."""
    path = Path(folder)
    path.mkdir(exist_ok=True)
    write_params(params, config, path)
    (path / "config.json").write_text(json.dumps(config_to_hf(config)))
