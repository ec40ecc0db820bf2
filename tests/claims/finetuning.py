"""A small model is taught a task with a right answer, and a manner of answering: `python tests/claims/finetuning.py`.

Writes docs/evidence/finetuning.md: how many held-out questions are answered rightly before, after learning from
conversations in full and by LoRA, and after learning from preferences; and whether layouts have the same bits.
`--work FOLDER` keeps the runs there, and goes on with what is there.
"""

import argparse
import json
import os
import random
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import parallax
from tests.scripts.runs import SCRIPTS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "evidence" / "finetuning.md"
CHATS, PAIRS, HELD_OUT, LETTERS = 2000, 1000, 200, 3
MANNERS = {"rejected": "It is {}.", "chosen": "Sire, {}."}
"""Both are right; the second is preferred."""
# The recipe of `make train`, but that tokens are bytes.
BASE = (
    *("--config", "nano", "--dataset", "tiny_shakespeare", "--tokenizer", "byte", "--seq-len", "64"),
    *("--model.sliding-window", "48", "--batch-size", "32", "--learning-rate", "3e-3", "--steps", "1500"),
    *("--eval-interval", "500"),
)
LORA = ("--lora.rank", "16", "--lora.alpha", "32")
TUNING = {
    "full": ("base", "chats", "--steps", "600", "--batch-size", "32", "--seq-len", "96", "--learning-rate", "2e-3"),
    "lora": (
        *("base", "chats", "--steps", "1200", "--batch-size", "32", "--seq-len", "96", "--learning-rate", "5e-3"),
        *LORA,
    ),
    "preferred": (
        *("full", "pairs", "--steps", "200", "--batch-size", "32", "--seq-len", "128", "--learning-rate", "1e-4"),
        *(*LORA, "--dpo.beta", "1", "--dpo.label-smoothing", "0.02"),
    ),
}
"""Of each run: which it begins with, what it learns from, and its flags.

Without smoothing, DPO goes on pushing the two answers apart when one is fifty times as probable, and both lose to
texts that are neither.
"""
TITLES = {
    "base": "before",
    "full": "after 2,000 conversations, all parameters",
    "lora": "after 2,000 conversations, adapters of rank 16",
    "preferred": "the second, after 1,000 preferences, adapters of rank 16",
}
LAYOUTS = {"one device": (), "pmap on 8": ("--strategy", "pmap"), "mesh data=2,fsdp=4": ("--mesh", "data=2,fsdp=4")}


def script(name: str, *args: str, devices: int = 1) -> str:
    """Runs one of scripts/ to its end; what it printed. Raises CalledProcessError where it fails."""
    print(f"$ {name} {' '.join(args)}", flush=True)
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, str(SCRIPTS / name), *args]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def train(folder: Path, *args: str, devices: int = 1) -> str:
    """Trains to the last step, from wherever the run in that folder is; what it printed."""
    return script("train.py", *args, "--output-dir", str(folder), "--resume", devices=devices)


def draw_words() -> list[str]:
    """What a model is asked to spell backwards, no two alike; nothing learns from the last HELD_OUT."""
    rng, found = random.Random(0), {}
    while len(found) < CHATS + HELD_OUT:
        found["".join(rng.choices(string.ascii_lowercase, k=LETTERS))] = None
    return list(found)


def write_data(work: Path, words: list[str]) -> None:
    """Conversations, each in one manner by chance, and pairs of answers."""
    rng = random.Random(1)

    def row(word: str, manners: dict[str, str]) -> dict[str, str]:
        return {"prompt": f"Reverse {word}"} | {side: manner.format(word[::-1]) for side, manner in manners.items()}

    rows = {
        "chats": [row(word, {"completion": rng.choice([*MANNERS.values()])}) for word in words],
        "pairs": [row(word, MANNERS) for word in words[:PAIRS]],
    }
    for name, learned in (("chats", "assistant"), ("pairs", "pairs")):
        source, store = work / f"{name}.jsonl", work / f"{name}.store"
        source.write_text("".join(json.dumps(each) + "\n" for each in rows[name]))
        form = ("--tokenizer", str(work / "base"), "--chat", learned, "--chat-template", "plain")
        script("prepare.py", str(source), "--output", str(store), "--held-out", "0.05", *form)


class Score(NamedTuple):
    """Shares of the held-out questions."""

    exact: float
    """Answered rightly in one of the manners, and with nothing else, by the most probable tokens."""
    sampled: float
    """The same of answers drawn at temperature 1."""
    preferred: float
    """Of those in one of the two manners, rightly or not: in the preferred one."""


def score(run: Path, words: list[str]) -> Score:
    model = parallax.load(run)
    prompts = [f"User: Reverse {word}\nAssistant:" for word in words]

    def answers(temperature: float) -> list[str]:
        return [text.strip() for text in model.generate(prompts, max_tokens=24, temperature=temperature)]

    def right(texts: list[str]) -> float:
        allowed = [[manner.format(word[::-1]) for manner in MANNERS.values()] for word in words]
        return sum(text in each for text, each in zip(texts, allowed, strict=True)) / len(words)

    def share_preferred(texts: list[str]) -> float:
        begin = {side: manner.partition("{")[0] for side, manner in MANNERS.items()}
        counted = {side: sum(text.startswith(first) for text in texts) for side, first in begin.items()}
        return counted["chosen"] / max(1, sum(counted.values()))

    sampled = answers(1.0)
    return Score(right(answers(0.0)), right(sampled), share_preferred(sampled))


def hashes(work: Path) -> list[str]:
    """The hash of the parameters after a few steps of adapters with exact sums, on each of LAYOUTS."""
    flags = (*LORA, "--steps", "3", "--batch-size", "16", "--seq-len", "64", "--reduction", "exact")
    found = []
    for name, layout in LAYOUTS.items():
        command = ("--init-from", str(work / "base"), "--dataset", str(work / "chats.store"), *flags, *layout)
        lines = train(work / f"layout {name}", *command, "--print-param-hash", devices=8).splitlines()
        found.append(next(line.split()[-1] for line in lines if line.startswith("params sha256 ")))
    return found


def train_all(work: Path, words: list[str]) -> None:
    """Makes the runs, or goes on with those that are there."""
    train(work / "base", *BASE)
    if not (work / "pairs.store").exists():
        write_data(work, words)
    for name, (base, data, *flags) in TUNING.items():
        train(work / name, "--init-from", str(work / base), "--dataset", str(work / f"{data}.store"), *flags)


def page(scores: dict[str, Score], found: list[str], minutes: str) -> str:
    rows = [f"| {TITLES[name]} | {' | '.join(f'{share:.1%}' for share in each)} |" for name, each in scores.items()]
    same = "the same hash of all parameters" if len(set(found)) == 1 else f"different hashes: {', '.join(found)}"
    lines = [
        "# What a small model learns from conversations and preferences",
        "",
        f"Written by `python tests/claims/finetuning.py`{minutes}. The 0.8 M parameters of",
        "NANO, trained on Tiny Shakespeare by the recipe of `make train`, with bytes for tokens, learn to spell",
        f"{LETTERS} letters backwards. To `Reverse abc` both `It is cba.` and `Sire, cba.` are right; by chance each",
        f"of the {CHATS:,} conversations has one of them. Preferences are for the latter. Of {HELD_OUT} questions that",
        "no run learned from:",
        "",
        "| | right, greedy | right, at temperature 1 | `Sire` rather than `It is`, at temperature 1 |",
        "| --- | --- | --- | --- |",
        *rows,
        "",
        "At temperature 1 adapters seldom end an answer: the base never saw the token that ends a text, and they leave",
        "the table of embeddings, and so that token's row, as it is.",
        "",
        f"Adapters after three steps with `--reduction exact` on {', '.join(LAYOUTS)}: {same}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="a folder that is kept")
    work, began, words = parser.parse_args().work, time.monotonic(), draw_words()
    with tempfile.TemporaryDirectory() as folder:
        work = work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        fresh = not any(work.iterdir())
        train_all(work, words[:CHATS])
        scores = {name: score(work / name, words[CHATS:]) for name in TITLES}
        found = hashes(work)
    minutes = f" in {(time.monotonic() - began) / 60:.0f} minutes on {os.cpu_count()} CPU cores" if fresh else ""
    PAGE.write_text(page(scores, found, minutes))
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
