"""A run and a text to perplexity and bits per byte.

Invariant: each token is scored once, with at least window - stride tokens of context or all that there are; bits per
byte = nats / ln 2 / UTF-8 bytes of the scored text, whatever the tokenizer.
"""

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import track

from data.corpus import Corpus, is_plain, load_corpus
from data.pipeline import held_out, require_same_tokenizer
from data.samples import Batch
from data.stores.mixture import Stores
from data.stores.store import TokenStore
from parallax.config import TransformerConfig, config_from_dict
from parallax.run_folder import load_run, read_settings, trained_length
from parallax.storage import open_folder
from parallax.tokenizers.base import Tokenizer, encode_checked
from parallax.training.loss import NO_TARGET, make_evaluation
from scripts.common.command_line import tell
from scripts.common.placement import place_model
from scripts.evaluation.flags import Flags
from scripts.preparing.automatic import find_unprepared

USUAL_WINDOW = 1024
TEXT_ALONE = "holds no plain text to count the bytes of; give plain text, or a store that prepare.py makes of it"


class Score(NamedTuple):
    """Summed nats of scored tokens, their number, and the bytes of text that they stand for."""

    nats: float
    tokens: int
    bytes: int

    def rates(self) -> dict[str, Any]:
        perplexity, bits = math.exp(self.nats / self.tokens), self.nats / math.log(2) / self.bytes
        return {"perplexity": perplexity, "bits_per_byte": bits, **self._asdict()}


class Text(NamedTuple):
    """What is scored.

    Attributes:
        documents: the tokens of each.
        lengths: their numbers of tokens.
        bytes: what the targets among the tokens stand for, in UTF-8.
    """

    documents: Iterable[np.ndarray]
    lengths: Sequence[int]
    bytes: int


def evaluate(flags: Flags) -> dict[str, Any]:
    """What evaluate.py prints, and writes as JSON: nats, tokens and bytes scored, and the rates that follow.

    Raises ValueError if the run, the text or the mesh cannot be used, or the window does not fit the model.
    """
    settings = read_settings(open_folder(flags.checkpoint))
    if os.path.isfile(os.path.expanduser(flags.dataset)) and not is_plain(Path(flags.dataset)):
        raise ValueError(f"dataset {flags.dataset} {TEXT_ALONE}")
    if flags.held_out and find_unprepared(flags.dataset, tell):
        rule = f"--held-out of {flags.dataset} is what its store holds out, which train.py makes in the cache"
        raise ValueError(f"{rule}; give that store as --dataset, or leave --held-out out")
    config = config_from_dict(settings["model"])
    window, stride = _sizes(flags, config, settings)
    strategy = place_model(config, flags.mesh, batch_size=flags.batch_size, seq_len=window)
    if config.attention == "cudnn" and strategy.devices[0].platform != "gpu":
        config = dataclasses.replace(config, attention="blocks")  # which gives what that kernel gives
    corpus = load_corpus(flags.dataset, flags.data_dir, notify=tell)
    run = load_run(flags.checkpoint, flags.step, lambda _: strategy.abstract().params, flags.param_dtype)
    config = dataclasses.replace(config, lora=run.config.lora)  # adapters are merged by now
    if corpus.stores is None:
        texts = {flags.dataset: _of_texts(corpus, run.tokenizer, only_held_out=flags.held_out)}
    else:
        texts = _of_stores(corpus.stores, run.tokenizer, only_held_out=flags.held_out)
    compiled = strategy.compile_evaluation(make_evaluation(config))
    scores: dict[str, Score] = {}
    for name, text in texts.items():
        if not text.bytes:  # then there is no token either, but perhaps the ends of texts
            raise ValueError(f"dataset {name} has no token to score; give a longer text")
        total = -(-count_windows(text.lengths, window, stride) // flags.batch_size)
        given = batches(windows(text.documents, window, stride), flags.batch_size, window)
        scores[name] = Score(*_score(functools.partial(compiled, run.params), given, total), text.bytes)
    sources = {name: score.rates() for name, score in scores.items()}
    return Score(*map(sum, zip(*scores.values(), strict=True))).rates() | {
        **({"sources": sources} if len(sources) > 1 else {}),
        "window": window,
        "stride": stride,
        "trained_length": trained_length(settings),
        "held_out": flags.held_out,
        "dataset": corpus.edition,
        "checkpoint": str(run.folder),
        "step": run.step,
    }


def describe(result: dict[str, Any]) -> str:
    """What `evaluate` gives, on a line, after one for each store of several."""
    lines = [
        f"{name}: perplexity {of['perplexity']:.4f} a token, {of['bits_per_byte']:.4f} bits per byte"
        for name, of in result.get("sources", {}).items()
    ]
    lines.append(
        f"perplexity {result['perplexity']:.4f} a token, {result['bits_per_byte']:.4f} bits per byte: "
        f"{result['tokens']:,} tokens of {result['bytes']:,} bytes, window {result['window']}, "
        f"stride {result['stride']}, trained at {result['trained_length']}"
    )
    return "\n".join(lines)


def _sizes(flags: Flags, config: TransformerConfig, settings: dict[str, Any]) -> tuple[int, int]:
    trained = settings.get("train", {}).get("seq_len", USUAL_WINDOW)
    window = min(trained, config.max_seq_len) if flags.window is None else flags.window
    if window > config.max_seq_len:
        raise ValueError(
            f"--window {window} must not exceed max_seq_len={config.max_seq_len}; try --window {config.max_seq_len}"
        )
    stride = max(1, window // 2) if flags.stride is None else flags.stride
    if stride > window:
        raise ValueError(f"--stride {stride} must not exceed the window of {window}; try --stride {window // 2}")
    return window, stride


def _of_texts(corpus: Corpus, tokenizer: Tokenizer, *, only_held_out: bool) -> Text:
    """Raises ValueError if the corpus holds no text, or a character that the tokenizer does not know."""
    if corpus.records is not None:
        raise ValueError(f"{corpus.edition} {TEXT_ALONE}")
    documents, size = [], 0
    several = len(corpus.documents) > 1
    for text in held_out(corpus.documents) if only_held_out else corpus.documents:
        if not text:
            continue
        tokens = encode_checked(tokenizer, text)
        if several and tokenizer.eos_id is not None:  # as train.py lays them out
            tokens = np.append(tokens, np.int32(tokenizer.eos_id))
        documents.append(tokens)
        size += len(text.encode()) - _first_bytes(tokens, tokenizer)
    return Text(documents, [len(tokens) for tokens in documents], size)


def _of_stores(stores: Stores, tokenizer: Tokenizer, *, only_held_out: bool) -> dict[str, Text]:
    """Of each store its documents, read when they are scored. Raises ValueError if they are of another tokenizer."""
    sides, texts = ["held_out"] if only_held_out else ["train", "held_out"], {}
    for name, store in zip(stores.short_names, require_same_tokenizer(stores, tokenizer).stores, strict=True):
        if store.learned:
            raise ValueError(f"store {name} has conversations, and {TEXT_ALONE}")
        lengths, size = [], sum(store.manifest[side]["bytes"] for side in sides)
        for tokens in _documents(store, sides):
            lengths.append(len(tokens))
            size -= _first_bytes(tokens, tokenizer)
        texts[name] = Text(_documents(store, sides), lengths, size)
    return texts


def _documents(store: TokenStore, sides: Sequence[str]) -> Iterator[np.ndarray]:
    for side in sides:
        for _, tokens in getattr(store, side).documents():
            yield tokens


def _first_bytes(tokens: np.ndarray, tokenizer: Tokenizer) -> int:
    """Bytes of the first token, which nothing is before and so is not scored."""
    return sum(len(tokenizer.token_bytes(int(token))) for token in tokens[:1])


def _score(evaluation: Callable[[Batch], Any], given: Iterator[Batch], total: int) -> tuple[float, int]:
    """Summed nats and number of the targets, with a bar on a terminal."""
    nats, tokens = 0.0, 0
    console = Console(stderr=True)
    for batch in track(given, "windows", total, console=console, disable=not console.is_terminal, transient=True):
        loss, count = jax.device_get(evaluation(batch))
        nats, tokens = nats + float(loss), tokens + int(count)
    return nats, tokens


def windows(documents: Iterable[np.ndarray], window: int, stride: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(inputs, targets), each int32 [window]; targets are NO_TARGET where nothing is scored.

    A document's first window scores all of its targets, each further one the last `stride`. Windows are filled up
    with padding at their end, which no earlier token sees.
    """
    for tokens in documents:
        last = len(tokens) - 1  # targets
        start = 0
        scored = 0
        while scored < last:
            stop = min(start + window, last)
            inputs, targets = np.zeros(window, np.int32), np.full(window, NO_TARGET, np.int32)
            inputs[: stop - start] = tokens[start:stop]
            targets[scored - start : stop - start] = tokens[scored + 1 : stop + 1]
            yield inputs, targets
            scored, start = stop, stop + stride - window


def count_windows(lengths: Sequence[int], window: int, stride: int) -> int:
    """How many `windows` gives for documents of so many tokens."""
    rest = (max(length - 1 - window, 0) for length in lengths)
    return sum((length > 1) + -(-more // stride) for length, more in zip(lengths, rest, strict=True))


def batches(rows: Iterator[tuple[np.ndarray, np.ndarray]], size: int, window: int) -> Iterator[Batch]:
    """Windows by the batch; the last batch is filled up with rows in which nothing is scored."""
    padding = (np.zeros(window, np.int32), np.full(window, NO_TARGET, np.int32))
    while batch := list(itertools.islice(rows, size)):
        inputs, targets = zip(*batch, *[padding] * (size - len(batch)), strict=True)
        yield {"inputs": np.stack(inputs), "targets": np.stack(targets)}
