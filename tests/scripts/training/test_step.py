"""What is timed is train.py's loop: its steps, one after another."""

import dataclasses

import numpy as np

from parallax.config import TINY_CONFIG, TrainConfig
from scripts.training.flags import Flags
from scripts.training.job import build
from scripts.training.step import TimedRun

MODEL = dataclasses.replace(TINY_CONFIG, num_layers=1, embed_dim=16, mlp_dim=16, vocab_size=13)
TRAIN = TrainConfig(batch_size=2, seq_len=8, steps=100)


class Kept:
    def __init__(self):
        self.steps, self.losses = [], []

    def step(self, step, metrics):
        self.steps.append(step)
        self.losses.append(metrics["loss"])

    def row(self, row):
        pass


def batches():
    rng = np.random.default_rng(0)
    while True:
        ids = rng.integers(0, 13, (2, 9), dtype=np.int32)
        yield {"inputs": ids[:, :-1], "targets": ids[:, 1:]}


def test_a_timed_run_takes_the_steps_of_the_job():
    _, strategy, step, _ = build(Flags(model=MODEL, train=TRAIN, strategy="single"))
    run, kept = TimedRun(strategy, step, TRAIN, batches()), Kept()
    assert run.advance(1, [kept]) > 0
    run.advance(3, [kept])
    assert (kept.steps, int(run.state.step)) == ([1, 2, 3, 4], 4)
    state, compiled, expected = strategy.init(), strategy.compile(step), []
    for _, batch in zip(range(4), batches(), strict=False):
        state, metrics = compiled(state, strategy.put_batch(batch))
        expected.append(float(metrics["loss"]))
    assert kept.losses == expected
