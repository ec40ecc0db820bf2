"""A forecast held against the run that it was made for: `python tests/claims/forecasts.py FOLDER --corpus grammar`.

A ladder of --minutes at the rate that `tune` finds on the smallest size, its forecast of a run with at least ten times
the operations of its largest member, registered before that run begins, then the run. What is done is not done again,
so the same command goes on after a stop. The last lines are those for docs/forecasting.md.

Corpora: `grammar` is words of a lexicon, whose entropy is computed beside it; `sources` are the Python files of the
installed packages, at least 50 MB. With --minutes 25 the ladder takes 25 minutes on the machine that designs it, about
four of them for each of its largest members, and the run ten times as many operations, in less than ten times as long.
To try it, --flops 1e12 --sizes 3 --seeds 1 --characters 2000000 asks for nearly the shortest runs that a ladder may
have.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.forecasting.family import at_share, flops_of
from scripts.forecasting.ladder import Member, read_ladder
from scripts.forecasting.running import train_words

ROOT = Path(__file__).resolve().parents[2]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = 2**20
CHARACTERS = 60_000_000
LENGTH = 64
PASSAGE = 5
"""Lines; a passage that stands in two files is a copy."""
SHAPE = ("--batch-size", "16", "--seq-len", str(LENGTH), "--final-rate", "0")
TRIED = (2e-3, 4e-3, 8e-3, 16e-3, 32e-3)
"""Learning rates."""


def grammar(path: Path, characters: int, seed: int = 0) -> float:
    """Writes words of a lexicon, each drawn by itself; returns the entropy of what a row is scored on, nats a symbol.

    Word k has a chance like k^-1.3. Frequent words are learned first and more of them by larger models, so that losses
    fall as powers (Hutter 2021, arXiv:2102.04074; Michaud et al. 2023, arXiv:2303.13506).
    """
    random = np.random.default_rng(seed)
    drawn = random.choice(list(LETTERS), (2 * WORDS, 8))
    lengths = random.integers(3, 9, len(drawn))
    spelled = ("".join(letters[:length]) for letters, length in zip(drawn, lengths, strict=True))
    words = list(dict.fromkeys(spelled))[:WORDS]
    chances = np.arange(1, len(words) + 1) ** -1.3
    chances /= chances.sum()
    numbers = np.searchsorted(np.cumsum(chances), random.random(characters // 5))
    text = " ".join([words[min(number, len(words) - 1)] for number in numbers.tolist()])[:characters]
    path.write_text(text)
    starts = random.integers(len(text) - LENGTH, size=20_000)
    rows = [text[start : start + LENGTH + 1] for start in starts.tolist()]
    return entropy_of(rows, dict(zip(words, chances, strict=True)))


def entropy_of(rows: list[str], chances: dict[str, float]) -> float:
    """The mean -log of what follows the first symbol of each row, a symbol, from the chances of words.

    A row begins anywhere: with the end of a word, then come words, then the beginning of one.
    """
    parts = [row.split(" ") for row in rows]
    ends, begins = dict.fromkeys((each[0] for each in parts), 0.0), dict.fromkeys((each[-1] for each in parts), 0.0)
    firsts = dict.fromkeys(LETTERS, 0.0)
    for word, chance in chances.items():
        for cut in range(len(word) + 1):
            if word[cut:] in ends:
                ends[word[cut:]] += chance
            if word[:cut] in begins:
                begins[word[:cut]] += chance
        for letter in word:
            firsts[letter] += chance
    logs = [
        np.log(ends[end]) + sum(np.log(chances[word]) for word in words) + np.log(begins[begin])
        - np.log(firsts[end[0]] if end else 1.0)
        for end, *words, begin in parts
    ]  # fmt: skip
    return float(-np.mean(logs) / (len(rows[0]) - 1))


def sources(path: Path, characters: int) -> None:
    """Writes ASCII Python files of the installed packages, as many as are asked for.

    They come in the order of the hashes of their paths, so that what is held out, the end, is like the rest. A file of
    which a tenth was written before is left out, since packages carry copies of each other: a run that sees more of the
    text would meet more of what is held out in it.
    Raises ValueError if there are too few.
    """

    def place(source: Path) -> bytes:
        return hashlib.sha256(source.relative_to(packages).as_posix().encode()).digest()

    packages, written, seen = Path(sysconfig.get_paths()["purelib"]), 0, set()
    with path.open("wb") as file:
        for source in sorted(packages.rglob("*.py"), key=place):
            text = source.read_bytes()
            lines = text.splitlines()
            passages = {hash(tuple(lines[at : at + PASSAGE])) for at in range(max(1, len(lines) - PASSAGE + 1))}
            if text.isascii() and written < characters and len(passages & seen) <= 0.1 * len(passages):
                written += file.write(text)
                seen |= passages
    if written < characters:
        raise ValueError(f"--characters {characters} must not exceed {written}, those in {packages}; ask for fewer")


def call(script: str, *words: str | float | Path) -> None:
    subprocess.run([sys.executable, str(ROOT / "scripts" / script), *map(str, words)], check=True)


def main() -> int:
    """Exit status: 0 the run ended within the interval and within 2% of what was forecast; else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--corpus", choices=("grammar", "sources"), default="grammar")
    parser.add_argument("--minutes", type=float, default=25, help="of the ladder's runs together")
    parser.add_argument("--flops", type=float, help="operations of the ladder's runs, in place of --minutes")
    parser.add_argument("--sizes", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--times", type=float, default=10, help="operations of the run, by the ladder's largest member")
    parser.add_argument("--share", type=float, default=1.25, help="width of the run's model, by the ladder's target")
    parser.add_argument("--characters", type=int, default=CHARACTERS)
    flags = parser.parse_args()
    folder, ladder = flags.folder, flags.folder / "ladder"
    folder.mkdir(parents=True, exist_ok=True)
    text, facts = folder / "corpus.txt", folder / "corpus.json"
    if not facts.exists():
        entropy = grammar(text, flags.characters) if flags.corpus == "grammar" else sources(text, flags.characters)
        facts.write_text(json.dumps({"entropy": entropy}))
    if not ladder.exists():
        heads = ("--model.num-heads", 16, "--model.num-kv-heads", 16, "--model.head-dim", 8)
        model = ("--config", "nano", "--model.num-layers", 2, *heads)
        budget = ("--minutes", flags.minutes) if flags.flops is None else ("--flops", flags.flops)
        sizes = ("--sizes", flags.sizes, "--largest", 0.75, "--seeds", flags.seeds)
        design = ("design", "--dataset", text, *model, *budget, *sizes, *SHAPE, "--output")
        tried = folder / "tried"
        if not tried.exists():
            call("ladder.py", *design, tried)
        call("ladder.py", "tune", tried, "--rates", *TRIED)
        rate = json.loads((tried / "tune.json").read_text())["best"]["rate"]
        call("ladder.py", *design, ladder, "--learning-rate", rate)
    call("ladder.py", "run", ladder)
    call("ladder.py", "fit", ladder)
    read, run = read_ladder(ladder), folder / "run"
    model, a_step = at_share(read.target, flags.share), read.train.batch_size * read.train.seq_len
    wanted = flags.times * max(member.flops for member in read.members)
    steps = int(np.ceil(wanted / flops_of(model, read.train.seq_len) / a_step))
    if not run.exists():
        asked = ("--share", flags.share, "--tokens", steps * a_step, "--register", run)
        call("ladder.py", "forecast", ladder, *asked)
    summary = run / "summary.json"
    if not summary.exists() or not json.loads(summary.read_text())["finished"]:
        words = train_words(read, Member("run", model, steps, 1, 0, 0.0, 0.0))
        own = words[3:]  # without the ladder's --output-dir FOLDER --resume
        call("train.py", *own, "--output-dir", run, "--resume")
    return _verdict(folder, ladder, run)


def _verdict(folder: Path, ladder: Path, run: Path) -> int:
    verdict = json.loads((run / "summary.json").read_text())["prediction"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    loss = [row["eval_loss"] for row in rows if row.get("eval_loss") is not None][-1]
    law = json.loads((ladder / "fit.json").read_text())["law"]
    off = loss / verdict["loss"] - 1
    print(
        f"forecast {verdict['loss']:.4f}, {verdict['low']:.4f} to {verdict['high']:.4f}; reached {loss:.4f}, "
        f"{off:+.2%}; kept: {verdict['kept']}"
    )
    if (entropy := json.loads((folder / "corpus.json").read_text())["entropy"]) is not None:
        print(f"E {law['E']:.4f}, entropy of the grammar {entropy:.4f}, {law['E'] / entropy - 1:+.2%}")
    return 0 if verdict["kept"] and abs(off) <= 0.02 else 1


if __name__ == "__main__":
    raise SystemExit(main())
