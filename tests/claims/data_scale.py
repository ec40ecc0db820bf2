"""Measures prepare.py and the batches of its stores on synthetic jsonl, beside what a user would take instead.

    python tests/claims/data_scale.py --output docs/evidence/data.md

2 GB take about a quarter of an hour on two cores, and five times their size on the disk of --folder. Contenders take
turns, each a process of its own with all cores; what is shown holds for this machine. `datasets` must be installed,
which the extra `bench` brings.
"""

import argparse
import importlib.util
import itertools
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import numpy as np

from data.corpus import load_corpus
from data.pipeline import prepare, tokenizer_for, training_batches
from data.stores.store import file_name, manifest_sha256, open_store, verify
from parallax.tokenizers.bpe import train_bpe
from parallax.tokenizers.registry import load_tokenizer, save_tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
VOCABULARY, BATCH_SIZE, SEQ_LEN = 32_000, 32, 2048
CLAIMED, SHARDS = 10**13, 2048
KILLS = 10
SLICE = 200 * 10**6
"""Bytes of the text, at its start and at its end, on which the tokenizer alone is timed."""
KILLED_BYTES = 30 * 10**6
ROUND_SECONDS, ROUNDS = 10, 3
"""What the tokenizer alone takes of the text of a comparison, and how often all contenders have their turn."""
FLAGS = ["--config", "tiny", "--steps", "1", "--batch-size", "8", "--seq-len", "256", "--eval-tokens", "2048"]


def write_text(path: Path, size: int) -> None:
    """Documents of sentences over 60,000 words with Zipf's frequencies, until there are `size` bytes."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlucmfwypvbgkjqxz", k=rng.randrange(2, 10))) for _ in range(60_000)]
    sums = list(itertools.accumulate(1 / (rank + 1) for rank in range(len(words))))
    sentences = [" ".join(rng.choices(words, cum_weights=sums, k=rng.randrange(5, 25))) + "." for _ in range(20_000)]
    with path.open("w") as file:
        for number in range(10**9):
            text = " ".join([f"Document {number}.", *rng.choices(sentences, k=rng.randrange(5, 60))])
            size -= file.write(json.dumps({"id": number, "text": text}) + "\n")
            if size <= 0:
                return


def cut(path: Path, target: Path, start: int, size: int) -> None:
    """Whole lines of a file, about `size` bytes from `start` on."""
    with path.open("rb") as source, target.open("wb") as file:
        if start:
            source.seek(start)
            source.readline()
        while size > 0 and (line := source.readline()):
            size -= file.write(line)


def texts(path: Path) -> Iterator[str]:
    with path.open() as file:
        yield from (json.loads(line)["text"] for line in file)


class Measured(NamedTuple):
    """A command: seconds from its start to its end, and the most memory of its processes together, in bytes."""

    seconds: float
    memory: int
    printed: str


def measure(*command: object) -> Measured:
    began, most = time.perf_counter(), 0
    words = [sys.executable, *map(str, command)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as process:
        ended = threading.Event()
        while process.poll() is None:
            most = max(most, resident(process.pid))
            ended.wait(0.1)
        printed = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise SystemExit(process.returncode)
    return Measured(time.perf_counter() - began, most, printed)


def resident(pid: int) -> int:
    """Bytes of a process and its children, what they share counted once for each."""
    total = 0
    for process in [pid, *children(pid)]:
        try:
            total += int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize()
        except OSError:
            continue
    return total


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def run_prepare(text: Path, tokenizer: Path | str, store: Path, *flags: str) -> Measured:
    return measure(ROOT / "scripts/prepare.py", text, "--tokenizer", tokenizer, "--output", store, *flags)


def run_contender(name: str, text: Path, tokenizer: Path, output: Path) -> Measured:
    end = load_tokenizer(tokenizer / "tokenizer.json").eos_id
    return measure(
        Path(__file__).with_name("data_contenders.py"), name, text, tokenizer / "tokenizer.json", end, output
    )


def megabytes(path: Path) -> float:
    return os.path.getsize(path) / 1e6


def compare(text: Path, tokenizer: Path, folder: Path) -> list[str]:
    """Rows of a table: all contenders on one text, taking turns; the ids of all must be the same."""
    found: dict[str, list[Measured]] = {"prepare.py": [], "nanogpt": [], "datasets_map": []}
    tokens = 0
    for turn in range(ROUNDS):
        ids = {}
        for name in [*found][turn:] + [*found][:turn]:
            with tempfile.TemporaryDirectory(dir=folder) as made:
                if name == "prepare.py":
                    store = Path(made, "made.store")
                    found[name].append(run_prepare(text, tokenizer, store, "--held-out", "0"))
                    tokens = open_store(store).manifest["tokens"]
                    ids[name] = open_store(store).train.read(0, min(tokens, 10**6))
                else:
                    found[name].append(run_contender(name, text, tokenizer, Path(made, "ids")))
                    ids[name] = np.fromfile(Path(made, "ids"), np.uint16)[: 10**6]
                    if Path(made, "ids").stat().st_size != 2 * tokens and tokens:
                        raise SystemExit(f"{name} made another number of tokens than prepare.py")
        if any((each != ids["prepare.py"]).any() for each in ids.values()):
            raise SystemExit("the contenders made other tokens")
    rows = []
    for name, runs in found.items():
        ratios = [run.seconds / ours.seconds for run, ours in zip(runs, found["prepare.py"], strict=True)]
        speed = statistics.median(tokens / run.seconds for run in runs)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
        rows.append(f"| {TITLES[name]} | {speed:,.0f} | {spread} | {max(run.memory for run in runs) / 1e6:,.0f} MB |")
    return rows


TITLES = {
    "prepare.py": "`prepare.py`",
    "nanogpt": "as nanoGPT's `prepare.py` for Shakespeare, a single process",
    "datasets_map": "`datasets.map` and `tokenizers`, 2 processes",
}


def open_and_draw(store: Path, packing: str) -> tuple[float, float, float]:
    """Seconds to the first batch, to batch 10^7 as a run resumed there takes it, and tokens a second of 200 batches."""
    began = time.perf_counter()
    corpus = load_corpus(str(store), notify=lambda line: None)
    training, _ = prepare(corpus, tokenizer_for(corpus), SEQ_LEN, packing=packing)
    batches = training_batches(training, batch_size=BATCH_SIZE, seed=0)
    next(batches)
    first = time.perf_counter() - began
    began = time.perf_counter()
    next(training_batches(training, batch_size=BATCH_SIZE, seed=0, start=10**7))
    far = time.perf_counter() - began
    began = time.perf_counter()
    for _ in range(200):
        next(batches)
    return first, far, 200 * BATCH_SIZE * SEQ_LEN / (time.perf_counter() - began)


def train_once(store: Path, folder: Path) -> Measured:
    """train.py from its start to the end of one step."""
    with tempfile.TemporaryDirectory(dir=folder) as made:
        return measure(ROOT / "scripts/train.py", "--dataset", store, *FLAGS, "--output-dir", Path(made, "run"))


def train_nano(store: Path, folder: Path) -> float:
    """Tokens a second that NANO learns from, once it is compiled; the fewer ids it has, the more."""
    flags = ["--config", "nano", "--steps", "30", "--log-interval", "10", "--eval-tokens", "2048"]
    with tempfile.TemporaryDirectory(dir=folder) as made:
        measure(ROOT / "scripts/train.py", "--dataset", store, *flags, "--output-dir", Path(made, "run"))
        rows = map(json.loads, Path(made, "run/metrics.jsonl").read_text().splitlines())
        return max(row["tokens_per_second"] for row in rows if "tokens_per_second" in row)


def kill_often(text: Path, tokenizer: Path, folder: Path) -> int:
    """Kills prepare.py KILLS times and lets it end; how many of them were between the renames of a shard's files.

    The first kills wait for such a moment, the others come at random. Ends the program if the store is not the one that
    is made undisturbed, or opens before it is finished.
    """
    command = [sys.executable, ROOT / "scripts/prepare.py", text, "--tokenizer", tokenizer, "--shard-tokens", "300000"]
    whole, target, rng, renamed = folder / "whole.store", folder / "killed.store", random.Random(0), 0
    began = time.perf_counter()
    subprocess.run([*command, "--output", whole], check=True, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    for kill in range(KILLS):
        limit = time.perf_counter() + (seconds if kill < 2 else rng.uniform(0, seconds / 2))
        with subprocess.Popen([*command, "--output", target], stderr=subprocess.DEVNULL) as process:
            while time.perf_counter() < limit and process.poll() is None:
                if kill < 2 and is_half_renamed(target):
                    renamed += 1
                    break
            process.kill()
        if process.returncode == 0:
            shutil.rmtree(target)
        elif is_open(target):
            raise SystemExit("a store opens that is not finished")
    subprocess.run([*command, "--output", target], check=True, stderr=subprocess.DEVNULL)
    verify(open_store(target))
    if open_store(target).sha256 != open_store(whole).sha256:
        raise SystemExit("kills changed the store")
    return renamed


def is_half_renamed(store: Path) -> bool:
    """Whether some of a shard's files have their names and others are drafts."""
    names = set(os.listdir(store)) if store.exists() else set()
    drafts = {name[1:6] for name in names if name.endswith(".draft")}
    return any(name[:5] in drafts for name in names)


def is_open(store: Path) -> bool:
    try:
        return bool(open_store(store))
    except ValueError:
        return False


def write_holes(store: Path, target: Path) -> None:
    """A store that claims 10 trillion tokens, over files that are holes."""
    manifest = json.loads(json.dumps(open_store(store).manifest))
    shard = manifest["shards"][0]
    shard["train"]["tokens"] = CLAIMED // SHARDS
    manifest["shards"] = [shard] * SHARDS
    manifest["sha256"] = manifest_sha256(manifest)
    target.mkdir()
    (target / "manifest.json").write_text(json.dumps(manifest))
    (target / "tokenizer.json").write_bytes((store / "tokenizer.json").read_bytes())
    for number in range(SHARDS):
        for side in ("train", "held_out"):
            with (target / file_name(number, side, "tokens")).open("wb") as file:
                file.truncate(shard[side]["tokens"] * np.dtype(manifest["dtype"]).itemsize)


def tell(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def work(folder: Path, size: int) -> str:
    """Makes everything and returns the page."""
    text, store, small = folder / "web.jsonl", folder / "web.store", folder / "small.store"
    tell(f"writing {size / 1e6:,.0f} MB of text, and a tokenizer of its start")
    write_text(text, size)
    save_tokenizer(train_bpe(VOCABULARY, list(islice(texts(text), 20_000))), folder / "tokenizer.json")
    for name, start in (("head", 0), ("tail", max(0, size - SLICE))):
        cut(text, folder / name, start, SLICE)
    cut(text, folder / "small.jsonl", 0, 10**6)
    tell("the tokenizer alone on the head, prepare.py on all, the tokenizer alone on the tail")
    alone = [float(run_contender("encode_batch", folder / "head", folder, folder).printed)]
    whole = run_prepare(text, folder, store)
    alone.append(float(run_contender("encode_batch", folder / "tail", folder, folder).printed))
    speed = (megabytes(folder / "head") + megabytes(folder / "tail")) / sum(alone)
    run_prepare(folder / "small.jsonl", folder, small, "--held-out", "0.1")
    tell("the first batches of the store, of a small one, and of one that claims 10^13 tokens")
    open_and_draw(small, "concat")  # start-up: what is imported late is there from now on
    first, far, drawn = open_and_draw(store, "concat")
    packed_first, packed_far, packed = open_and_draw(store, "best-fit")
    write_holes(store, folder / "holes.store")
    first_of_holes, far_of_holes, _ = open_and_draw(folder / "holes.store", "concat")
    runs = [(train_once(store, folder), train_once(small, folder)) for _ in range(ROUNDS)]
    later = statistics.median(large.seconds - little.seconds for large, little in runs)
    larger = statistics.median(large.memory - little.memory for large, little in runs)
    run_prepare(folder / "small.jsonl", "byte", folder / "bytes.store", "--held-out", "0.1")
    nano = train_nano(folder / "bytes.store", folder)
    tell("kills")
    cut(text, folder / "few.jsonl", 0, KILLED_BYTES)
    renamed = kill_often(folder / "few.jsonl", folder, folder)
    tell("the comparison")
    cut(text, folder / "some.jsonl", 0, int(ROUND_SECONDS * speed * 1e6))
    rows = compare(folder / "some.jsonl", folder, folder)
    return "\n".join(
        [
            f"# Data: {megabytes(text):,.0f} MB of jsonl on {os.cpu_count()} cores",
            "",
            f"Written by `python tests/claims/data_scale.py` on {time.strftime('%Y-%m-%d')}. The text is synthetic.",
            "",
            "| what | measured | wanted |",
            "| --- | --- | --- |",
            f"| `encode_batch` alone, {VOCABULARY:,} ids, before and after | {speed:.1f} MB/s | |",
            f"| `prepare.py`, start and end included | {megabytes(text) / whole.seconds:.1f} MB/s, "
            f"{megabytes(text) / whole.seconds / speed:.2f} of that | at least 0.85 |",
            f"| memory of all its processes | {whole.memory / 1e6:,.0f} MB | at most 600 MB |",
            f"| `train.py` of one step, beyond that on a store of 1 MB | {later:.2f} s, {larger / 1e6:,.0f} MB | "
            "at most 3 s, 100 MB |",
            f"| first batch; batch 10^7, as a resumed run takes it | {first:.2f} s; {far:.2f} s | |",
            f"| the same of a store that claims 10^13 tokens in {SHARDS:,} shards | {first_of_holes:.2f} s; "
            f"{far_of_holes:.2f} s | less than 1 s each |",
            f"| the same with `--packing best-fit` | {packed_first:.2f} s; {packed_far:.2f} s | |",
            f"| batches of {BATCH_SIZE} × {SEQ_LEN} | {drawn / 1e6:.1f} M tokens/s | at least 5 M |",
            f"| the same with `--packing best-fit` | {packed / 1e6:.1f} M tokens/s | |",
            f"| the former, beside the {nano:,.0f} tokens/s of training NANO on bytes | {drawn / nano:,.0f} × | "
            "at least 20 × |",
            f"| kills of `prepare.py`, those between renames of a shard's files | {KILLS}, {renamed}: the store is the "
            "undisturbed one | |",
            "",
            f"## The same tokens of {megabytes(folder / 'some.jsonl'):,.0f} MB, {ROUNDS} rounds",
            "",
            "| what | tokens/s | time / that of `prepare.py` | memory of all its processes |",
            "| --- | ---: | ---: | ---: |",
            *rows,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=2000)
    parser.add_argument("--folder", type=Path, help="by default a temporary folder")
    parser.add_argument("--output", type=Path, help="the page to write; by default it is printed")
    options = parser.parse_args()
    if importlib.util.find_spec("datasets") is None:
        raise SystemExit("error: datasets is not installed, which is measured too; try pip install -e '.[bench]'")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        page = work(Path(name), options.megabytes * 10**6)
    if options.output is None:
        print(page)
    else:
        options.output.write_text(page)
    tell("done")


if __name__ == "__main__":
    main()
