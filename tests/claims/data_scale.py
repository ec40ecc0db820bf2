"""Measures prepare.py and the batches of its stores on synthetic jsonl, beside the tokenizer alone on the same text.

    python tests/claims/data_scale.py --megabytes 2000 --output docs/evidence/data.md

It needs five times the size of the text on the disk of --folder, and what it shows holds for this machine.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import numpy as np

from data.corpus import load_corpus
from data.pipeline import prepare, tokenizer_for, training_batches
from data.stores.store import file_name, manifest_sha256, open_store
from parallax.tokenizers.base import Tokenizer
from parallax.tokenizers.bpe import train_bpe
from parallax.tokenizers.registry import load_tokenizer, save_tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
VOCABULARY, BATCH_SIZE, SEQ_LEN = 32_000, 32, 2048
CLAIMED = 10**13


def write_text(path: Path, size: int) -> None:
    """Documents of sentences over 60,000 words with Zipf's frequencies, until there are `size` bytes."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlucmfwypvbgkjqxz", k=rng.randrange(2, 10))) for _ in range(60_000)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    sentences = [" ".join(rng.choices(words, weights, k=rng.randrange(5, 25))) + "." for _ in range(20_000)]
    with path.open("w") as file:
        for number in range(10**9):
            text = " ".join([f"Document {number}.", *rng.choices(sentences, k=rng.randrange(5, 60))])
            size -= file.write(json.dumps({"id": number, "text": text}) + "\n")
            if size <= 0:
                return


def texts(path: Path) -> Iterator[str]:
    with path.open() as file:
        yield from (json.loads(line)["text"] for line in file)


def encode_alone(path: Path, tokenizer: Tokenizer) -> float:
    """Seconds that the library's encode_batch takes, with all of its threads, reading aside."""
    import tokenizers

    model = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.to_json()["definition"]))
    documents, seconds = texts(path), 0.0
    while batch := list(islice(documents, 1000)):
        began = time.perf_counter()
        model.encode_batch(batch)
        seconds += time.perf_counter() - began
    return seconds


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


def run_prepare(*arguments: str) -> tuple[float, int]:
    """Seconds from the start of the command to its end, and the most memory of its processes together."""
    began, most = time.perf_counter(), 0
    with subprocess.Popen([sys.executable, str(ROOT / "scripts/prepare.py"), *arguments]) as process:
        ended = threading.Event()
        while process.poll() is None:
            most = max(most, resident(process.pid))
            ended.wait(0.1)
    if process.returncode:
        raise SystemExit(process.returncode)
    return time.perf_counter() - began, most


def open_and_draw(store: Path) -> tuple[float, float, float]:
    """Seconds to the first batch, to batch 10^7 of another iterator, and tokens a second of 200 batches."""
    began = time.perf_counter()
    corpus = load_corpus(str(store), notify=lambda line: None)
    training, _ = prepare(corpus, tokenizer_for(corpus), SEQ_LEN)
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


def write_holes(store: Path, target: Path) -> None:
    """A store that claims 10 trillion tokens, over files that are holes."""
    manifest = json.loads(json.dumps(open_store(store).manifest))
    shard = manifest["shards"][0]
    shard["train"]["tokens"] = CLAIMED // 64
    manifest["shards"] = [shard] * 64
    manifest["sha256"] = manifest_sha256(manifest)
    target.mkdir()
    (target / "manifest.json").write_text(json.dumps(manifest))
    (target / "tokenizer.json").write_bytes((store / "tokenizer.json").read_bytes())
    for number in range(64):
        for side in ("train", "held_out"):
            with (target / file_name(number, side, "tokens")).open("wb") as file:
                file.truncate(shard[side]["tokens"] * np.dtype(manifest["dtype"]).itemsize)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=2000)
    parser.add_argument("--folder", type=Path, help="by default a temporary folder")
    parser.add_argument("--output", type=Path, help="the page to write; by default it is printed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        text, store = folder / "web.jsonl", folder / "web.store"
        write_text(text, options.megabytes * 10**6)
        save_tokenizer(train_bpe(VOCABULARY, list(islice(texts(text), 20_000))), folder / "tokenizer.json")
        alone = encode_alone(text, load_tokenizer(folder / "tokenizer.json"))
        seconds, most = run_prepare(str(text), "--tokenizer", str(folder), "--output", str(store))
        first, far, speed = open_and_draw(store)
        write_holes(store, folder / "holes.store")
        first_of_holes, far_of_holes, _ = open_and_draw(folder / "holes.store")
        size = os.path.getsize(text) / 1e6
    lines = [
        f"# Data: {size:,.0f} MB of jsonl on {os.cpu_count()} cores",
        "",
        "Written by `python tests/claims/data_scale.py`.",
        "",
        "| what | measured |",
        "| --- | --- |",
        f"| `encode_batch` alone, {VOCABULARY:,} ids | {size / alone:.1f} MB/s |",
        f"| `prepare.py`, start and end included | {size / seconds:.1f} MB/s, {alone / seconds:.2f} of that |",
        f"| memory of all its processes | {most / 1e6:,.0f} MB |",
        f"| first batch; batch 10^7 | {first:.2f} s; {far:.2f} s |",
        f"| the same of a store that claims 10^13 tokens | {first_of_holes:.2f} s; {far_of_holes:.2f} s |",
        f"| batches of {BATCH_SIZE} × {SEQ_LEN} | {speed / 1e6:.1f} M tokens/s |",
    ]
    page = "\n".join(lines) + "\n"
    if options.output is None:
        print(page)
    else:
        options.output.write_text(page)


if __name__ == "__main__":
    main()
