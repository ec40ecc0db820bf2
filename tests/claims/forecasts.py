"""A forecast held against the run that it was made for: `python tests/claims/forecasts.py FOLDER --corpus grammar`.

A ladder of --minutes, its forecast of a run with at least ten times the operations of its largest member, registered
before that run begins, then the run. What is done is not done again, so the same command goes on after a stop. The last
lines are those for docs/forecasting.md.

Corpora: `grammar` is drawn from a source whose entropy is computed beside it; `sources` are the Python files of the
installed packages, at least 50 MB. With --minutes 25 the ladder takes 25 minutes on the machine that designs it, about
eight of them for its largest member, and the run ten times as many operations: about two hours in all, on an idle
machine. To try it, --flops 1e12 --sizes 3 --lengths 3 --characters 2000000 asks for nearly the shortest runs that a
ladder may have.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SYMBOLS = "abcdefghijklmnopqrstuvwxyz .,;:\n"
CHARACTERS = 60_000_000
SHAPE = ["--batch-size", "16", "--seq-len", "64"]


def grammar(path: Path, characters: int, seed: int = 0) -> float:
    """Writes text in which two symbols decide how likely each next one is; returns its entropy in nats a symbol.

    Pairs of symbols are the states of a Markov chain. Its entropy is the mean of those of the states' distributions,
    weighted by how often the chain is there.
    """
    random, V = np.random.default_rng(seed), len(SYMBOLS)
    next_VVV = random.dirichlet(np.full(V, 0.15), (V, V))
    share_VV = np.full((V, V), 1 / V**2)
    for _ in range(2000):
        share_VV = np.einsum("ab,abc->bc", share_VV, next_VVV)
    logs = np.log(np.where(next_VVV > 0, next_VVV, 1))
    entropy = float(-np.sum(share_VV[:, :, None] * next_VVV * logs))
    sums = np.cumsum(next_VVV, axis=2)
    chains = 1000  # drawn side by side, each from two symbols on; where they meet the text does not follow the rule
    length = characters // chains
    drawn = np.empty((chains, length), np.uint8)
    first, second = np.zeros(chains, int), random.integers(V, size=chains)
    for position in range(length):
        chance = random.random(chains)
        third = np.minimum(np.sum(sums[first, second] < chance[:, None], axis=1), V - 1)
        drawn[:, position] = third
        first, second = second, third
    letters = np.frombuffer(SYMBOLS.encode(), np.uint8)
    path.write_bytes(letters[drawn].tobytes())
    return entropy


def sources(path: Path, characters: int) -> None:
    """Writes ASCII Python files of the installed packages, as many as are asked for.

    They come in the order of the hashes of their paths, so that what is held out, the end, is like the rest.
    Raises ValueError if there are too few.
    """

    def place(source: Path) -> bytes:
        return hashlib.sha256(source.relative_to(packages).as_posix().encode()).digest()

    packages, written = Path(sysconfig.get_paths()["purelib"]), 0
    with path.open("wb") as file:
        for source in sorted(packages.rglob("*.py"), key=place):
            text = source.read_bytes()
            if text.isascii() and written < characters:
                written += file.write(text)
    if written < characters:
        raise ValueError(f"--characters {characters} must not exceed {written}, those in {packages}; ask for fewer")


def call(script: str, *words: str | Path) -> None:
    subprocess.run([sys.executable, str(ROOT / "scripts" / script), *map(str, words)], check=True)


def main() -> int:
    """Exit status: 0 the run ended within the interval and within 2% of what was forecast; else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--corpus", choices=("grammar", "sources"), default="grammar")
    parser.add_argument("--minutes", type=float, default=25, help="of the ladder's runs together")
    parser.add_argument("--flops", type=float, help="operations of the ladder's runs, in place of --minutes")
    parser.add_argument("--sizes", type=int, default=4)
    parser.add_argument("--lengths", type=int, default=4)
    parser.add_argument("--times", type=float, default=10, help="operations of the run, by the ladder's largest member")
    parser.add_argument("--characters", type=int, default=CHARACTERS)
    flags = parser.parse_args()
    folder, ladder = flags.folder, flags.folder / "ladder"
    folder.mkdir(parents=True, exist_ok=True)
    text, facts = folder / "corpus.txt", folder / "corpus.json"
    if not facts.exists():
        entropy = grammar(text, flags.characters) if flags.corpus == "grammar" else sources(text, flags.characters)
        facts.write_text(json.dumps({"entropy": entropy}))
    if not ladder.exists():
        model = ("--config", "nano", "--model.num-heads", 8, "--model.num-kv-heads", 8, "--model.head-dim", 16)
        budget = ("--minutes", flags.minutes) if flags.flops is None else ("--flops", flags.flops)
        budget += ("--sizes", flags.sizes, "--lengths", flags.lengths, "--learning-rate", "4e-3")
        call("ladder.py", "design", "--dataset", text, *map(str, model), *map(str, budget), *SHAPE, "--output", ladder)
    call("ladder.py", "run", ladder)
    call("ladder.py", "fit", ladder)
    run, tokens = folder / "run", _tokens(ladder, flags.times)
    if not run.exists():
        call("ladder.py", "forecast", ladder, "--tokens", str(tokens), "--register", run)
    summary = run / "summary.json"
    if not summary.exists() or not json.loads(summary.read_text())["finished"]:
        call("train.py", *_words(ladder, tokens), "--output-dir", run, "--resume")
    return _verdict(folder, ladder, run)


def _tokens(ladder: Path, times: float) -> int:
    """Whole steps of the target that take so many times the operations of the largest member."""
    sys.path.insert(0, str(ROOT))
    from scripts.forecasting.family import flops_of
    from scripts.forecasting.ladder import read_ladder

    read = read_ladder(ladder)
    wanted = times * max(member.flops for member in read.members)
    a_step = read.train.batch_size * read.train.seq_len
    return int(np.ceil(wanted / flops_of(read.target, read.train.seq_len) / a_step)) * a_step


def _words(ladder: Path, tokens: int) -> list[str]:
    """train.py's flags for the target and so many tokens."""
    from scripts.forecasting.ladder import Member, read_ladder
    from scripts.forecasting.running import train_words

    read = read_ladder(ladder)
    steps = tokens // (read.train.batch_size * read.train.seq_len)
    words = train_words(read, Member("run", read.target, steps, 1, 0, 0.0, 0.0))
    return words[3:]  # without the ladder's own --output-dir FOLDER --resume


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
