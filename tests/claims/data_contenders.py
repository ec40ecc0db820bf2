"""What prepare.py is measured against by data_scale.py: a process for each, with no import that it does not need.

python tests/claims/data_contenders.py NAME TEXT.jsonl tokenizer.json END_ID OUTPUT
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np


def texts(path: Path) -> Iterator[str]:
    with path.open() as file:
        yield from (json.loads(line)["text"] for line in file)


def library_tokenizer(path: Path) -> Any:
    """The library's own object of a byte-pair tokenizer of this project."""
    import tokenizers

    return tokenizers.Tokenizer.from_str(json.dumps(json.loads(path.read_text())["definition"]))


def encode_batch(text: Path, tokenizer: Path, end: int, output: Path) -> None:
    """The library with all of its threads, reading aside: prints the seconds and makes nothing."""
    model, documents, seconds = library_tokenizer(tokenizer), texts(text), 0.0
    while batch := list(islice(documents, 1000)):
        began = time.perf_counter()
        model.encode_batch(batch)
        seconds += time.perf_counter() - began
    print(seconds)


def nanogpt(text: Path, tokenizer: Path, end: int, output: Path) -> None:
    """As nanoGPT's prepare.py does for Shakespeare: all ids in a list, then an array, then a file."""
    model, ids = library_tokenizer(tokenizer), []
    for document in texts(text):
        ids += [*model.encode(document).ids, end]
    np.array(ids, np.uint16).tofile(output)


def datasets_map(text: Path, tokenizer: Path, end: int, output: Path) -> None:
    """As nanoGPT's prepare.py does for OpenWebText: datasets.map with two processes, then a memory map of the ids."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process is a thread
    import datasets  # pyright: ignore[reportMissingImports]

    datasets.disable_progress_bars()
    model = library_tokenizer(tokenizer)

    def encoded(rows: dict[str, list]) -> dict[str, list]:
        ids = [[*found.ids, end] for found in model.encode_batch(rows["text"])]
        return {"ids": ids, "length": [len(each) for each in ids]}

    cache = str(output.parent / "datasets")
    rows = datasets.load_dataset("json", data_files=str(text), split="train", cache_dir=cache)
    rows = rows.map(encoded, batched=True, num_proc=2, remove_columns=["id", "text"])
    array = np.memmap(output, np.uint16, "w+", shape=(sum(rows["length"]),))
    at, parts = 0, 256
    for part in range(parts):
        batch = rows.shard(num_shards=parts, index=part, contiguous=True).with_format("numpy")
        ids = np.concatenate(batch["ids"])
        array[at : at + len(ids)] = ids
        at += len(ids)
    array.flush()


if __name__ == "__main__":
    name, text, tokenizer, end, output = sys.argv[1:]
    contenders = {each.__name__: each for each in (encode_batch, nanogpt, datasets_map)}
    contenders[name](Path(text), Path(tokenizer), int(end), Path(output))
