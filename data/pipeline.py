"""A corpus to global batches, and of those the rows that this process holds.

Invariant: global batch k is a pure function of (corpus, tokenizer, seq_len, batch_size, seed, k). Processes
differ only in the rows that they take of it, and the state of the pipeline is the integer k.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from data.corpus import Corpus
from data.packing import pack
from data.samples import Batch, PackedDocuments, Samples, Windows
from data.stores.mixture import Stores
from parallax.tokenizers.base import Tokenizer, encode_checked
from parallax.tokenizers.registry import load_tokenizer, train_tokenizer

Rows = np.ndarray | slice
PREFETCHED_BATCHES = 2
ENDLESS = 2**40  # batches; a source must have a length


def tokenizer_for(corpus: Corpus, spec: str | None = None) -> Tokenizer:
    """The corpus's tokenizer: trained on its texts as `spec` says (None: `char`), or that of its records or its store.

    Raises ValueError if the spec is unknown, or is given where the tokens are made already.
    """
    tokens = corpus.records if corpus.stores is None else corpus.stores
    if tokens is None:
        return train_tokenizer(spec or "char", corpus.documents)
    if spec is not None:
        kind = "token records, which carry their" if corpus.stores is None else "a store, which carries its"
        raise ValueError(f"--tokenizer {spec} does not go with {kind} own; leave it out")
    return load_tokenizer(tokens.tokenizer_path)


def prepare(
    corpus: Corpus, tokenizer: Tokenizer, seq_len: int, *, held_out_fraction: float = 0.1, packing: str | None = None
) -> tuple[Samples, Samples]:
    """Splits the corpus into (train, held out) and lays it out for rows of `seq_len` tokens.

    One document is split by its characters, at the same place for every tokenizer, and trained on in random windows;
    several are split by whole documents, at least one to each side, and packed. The last ones are held out. With
    `held_out_fraction=0` both sides are the whole corpus. A store was split when it was made, and `packing` says how
    its documents fill rows; None means whole for conversations, and concat else. Where other stores are evaluated,
    text and records are trained on whole.

    Raises ValueError if a text is shorter than one sequence, it holds a character that the tokenizer does not know, a
    store's tokens are of another tokenizer, or an argument or a record is out of range.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len={seq_len} must be at least 1; try 256")
    if not 0 <= held_out_fraction < 1:
        raise ValueError(f"held_out_fraction={held_out_fraction} must be at least 0 and less than 1; try 0.1")
    if corpus.stores is None and packing is not None:
        raise ValueError(
            f"--packing {packing} goes with a store, and {corpus.edition} is none; see prepare.py, or leave it out"
        )
    if (evaluated := corpus.evaluated or corpus.stores) is not None:
        if corpus.stores is None:
            alone = dataclasses.replace(corpus, evaluated=None)
            training, _ = prepare(alone, tokenizer, seq_len, held_out_fraction=0.0)
        else:
            training = require_same_tokenizer(corpus.stores, tokenizer).training(seq_len, packing)
        if corpus.evaluated is not None:
            require_same_tokenizer(evaluated, tokenizer)
        return training, evaluated.held_out(seq_len, packing)
    if len(corpus.records or corpus.documents) > 1:
        return _prepare_documents(corpus, tokenizer, seq_len, held_out_fraction)
    return _prepare_text(corpus, tokenizer, seq_len, held_out_fraction)


def held_out(documents: Sequence[str], fraction: float = 0.1) -> list[str]:
    """The texts that `prepare` holds out: the end of a single one, or the last of several."""
    if len(documents) > 1:
        return list(documents[_first_held_out(len(documents), fraction) :])
    (text,) = documents
    return [text[_cut(len(text), fraction) :]]


def training_batches(
    train: Samples, *, batch_size: int, seed: int, rows: Rows | None = None, start: int = 0
) -> Iterator[Batch]:
    """Global batches start, start + 1, ... without end; of each the rows `rows` (None: all), made ahead.

    Raises ValueError if the batch size, the seed or the start is out of range.
    """
    _check_batch_size(batch_size)
    if seed < 0 or start < 0:
        raise ValueError(f"seed={seed} and the first batch, {start}, must be at least 0; try 0")
    held = slice(None) if rows is None else rows
    return _prefetched(lambda k: train.gather(train.draw(batch_size, seed, k)[held]), start, ENDLESS)


def evaluation_batches(
    samples: Samples, *, batch_size: int, rows: Rows | None = None, most_tokens: int | None = None
) -> Iterator[Batch]:
    """Every target of `samples` once, in order; the last batch is filled up with rows of padding.

    With `most_tokens` as many samples as hold no more, one at least, the same ones each time. Raises ValueError if the
    batch size is not positive.
    """
    _check_batch_size(batch_size)
    held = slice(None) if rows is None else rows
    ids = samples.all_ids(None if most_tokens is None else max(1, most_tokens // samples.seq_len))
    ids = np.pad(ids, (0, -len(ids) % batch_size), constant_values=-1).reshape(-1, batch_size)
    return _prefetched(lambda k: samples.gather(ids[k][held]), 0, len(ids))


def _prepare_text(
    corpus: Corpus, tokenizer: Tokenizer, seq_len: int, held_out_fraction: float
) -> tuple[Samples, Samples]:
    if corpus.records:
        corpus.records.lengths(tokenizer.vocab_size)  # checks the ids
    whole = corpus.records[0] if corpus.records else corpus.documents[0]

    def windows(part: str | np.ndarray, what: str) -> Windows:
        return Windows(encode_checked(tokenizer, part) if isinstance(part, str) else part, seq_len, what)

    if held_out_fraction == 0:
        samples = windows(whole, "text")
        return samples, samples
    cut = _cut(len(whole), held_out_fraction)
    return windows(whole[:cut], "training text"), windows(whole[cut:], "held-out text")


def require_same_tokenizer(stores: Stores, tokenizer: Tokenizer) -> Stores:
    """The stores. Raises ValueError if their tokens are of another tokenizer."""
    if tokenizer.to_json() != load_tokenizer(stores.tokenizer_path).to_json():
        made = stores.stores[0].manifest["tokenizer"]["name"]
        rule = f"store {stores.names[0]} holds tokens of another tokenizer ({made}) than the run's ({tokenizer.name})"
        raise ValueError(f"{rule}; prepare one with --tokenizer and the folder of the run")
    return stores


def _prepare_documents(
    corpus: Corpus, tokenizer: Tokenizer, seq_len: int, held_out_fraction: float
) -> tuple[Samples, Samples]:
    if corpus.records is None:
        documents: Sequence[np.ndarray] = [encode_checked(tokenizer, text) for text in corpus.documents]
        lengths = np.array([len(document) for document in documents])
    else:
        documents, lengths = corpus.records, corpus.records.lengths(tokenizer.vocab_size)

    def packed(first: int, stop: int) -> PackedDocuments:
        index = pack(np.arange(first, stop), lengths[first:stop], seq_len)
        return PackedDocuments(documents, index, seq_len, tokenizer.eos_id)

    count = len(documents)
    if held_out_fraction == 0:
        samples = packed(0, count)
        return samples, samples
    cut = _first_held_out(count, held_out_fraction)
    return packed(0, cut), packed(cut, count)


def _first_held_out(count: int, fraction: float) -> int:
    """The first of several documents that is held out, so that each side has one."""
    return min(max(_cut(count, fraction), 1), count - 1)


def _cut(length: int, fraction: float) -> int:
    """Where what is held out begins."""
    return int(length * (1 - fraction))


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1; try 32")


class _BatchSource:
    """Whole batches as a random-access source: one item a batch costs far less than one item a row."""

    def __init__(self, build: Callable[[int], Batch], length: int) -> None:
        self._build, self._length = build, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Batch:
        return self._build(index)


def _prefetched(build: Callable[[int], Batch], start: int, stop: int) -> Iterator[Batch]:
    """build(start), ..., build(stop - 1), in order; a background thread stays PREFETCHED_BATCHES ahead."""
    import grain

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCHED_BATCHES)
    return iter(grain.MapDataset.source(_BatchSource(build, stop))[start:].to_iter_dataset(options))
