"""Ladders whose runs were not trained but written, with losses that follow a law."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from parallax.config import TINY_CONFIG, OptimizerConfig, TrainConfig
from scripts.forecasting.family import below, flops_of, size_of, with_mup
from scripts.forecasting.ladder import Ladder, Member
from scripts.forecasting.law import Law

LAW = Law(E=1.2, A=30.0, B=60.0, alpha=0.4, beta=0.35)
TARGET = dataclasses.replace(TINY_CONFIG, num_heads=8, num_kv_heads=8, head_dim=8, embed_dim=64)
DATA = dict.fromkeys(("data_dir", "tokenizer", "packing", "held_out")) | {
    "dataset": "tiny_shakespeare",
    "eval_tokens": 4096,
}


def ladder_in(folder: Path, unique: int = 10**9, steps=(100, 200, 400, 800)) -> Ladder:
    """Four sizes by so many numbers of steps, written as design would."""
    models, train = below(TARGET, 4, 1.0), TrainConfig(batch_size=8, seq_len=16)
    members = tuple(
        Member(f"{model.embed_dim}x{count}", with_mup(model, models[0]), count, 0, size_of(model), flops, 1.0)
        for model in models
        for count in steps
        for flops in [flops_of(model, 16) * count * 8 * 16]
    )
    ladder = Ladder(folder, with_mup(TARGET, models[0]), DATA, "c0ffee", unique, train, OptimizerConfig(), members)
    ladder.write()
    return ladder


def finish(ladder: Ladder, member: Member, loss: float) -> None:
    """The files of a run that ended with this loss."""
    folder = ladder.run_folder(member)
    folder.mkdir(parents=True)
    rows = [{"step": member.steps * part // 10, "eval_loss": loss * (1 + 0.1 * (10 - part))} for part in range(1, 11)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps({"finished": True}))
    (folder / "config.json").write_text(json.dumps({"corpus": {"sha256": ladder.corpus_sha256}}))


def finish_all(ladder: Ladder, noise: float = 0.002) -> None:
    random = np.random.default_rng(0)
    for member in ladder.members:
        finish(ladder, member, LAW.loss(member.params, ladder.tokens(member)) * np.exp(random.normal(0, noise)))
