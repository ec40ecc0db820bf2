"""What is in a store, whether it is as it was written, and what a run took of it."""

import itertools
import json
import sys

import numpy as np
from etils import epath

from data.corpus import load_corpus
from data.preparing.sources import spelled
from data.stores.provenance import pieces_of_step, steps_of_document
from data.stores.store import open_store
from data.stores.store import verify as verify_store
from parallax.storage import open_folder
from parallax.tokenizers.base import Tokenizer
from parallax.tokenizers.registry import load_tokenizer
from scripts.common.command_line import tell
from scripts.preparing.automatic import find_unprepared, prepare_into_cache

SHOWN_DOCUMENTS, SHOWN_CHARS, SHOWN_SOURCES = 3, 72, 5


def describe(folder: str) -> int:
    """Prints a store's manifest in words, and the first documents. Raises ValueError if it cannot be read."""
    store = open_store(folder)
    manifest = store.manifest
    tokenizer, held, left_out = manifest["tokenizer"], manifest["held_out"], manifest["left_out"]
    print(f"store      {folder}, format version {manifest['version']}")
    print(f"sha256     {store.sha256}")
    print(f"tokens     {manifest['tokens']:,} of {manifest['dtype']}, the largest id {manifest['max_id']}")
    print(f"tokenizer  {tokenizer['name']}, {tokenizer['vocab_size']:,} ids, sha256 {tokenizer['sha256']}")
    print(f"documents  {manifest['documents']:,} of {manifest['bytes']:,} bytes of text")
    print(f"held out   {held['documents']:,} documents, {held['tokens']:,} tokens")
    print(f"left out   {', '.join(f'{count:,} {why}' for why, count in left_out.items())}")
    settings = dict(manifest["settings"])
    if store.learned:  # of whole rows, and no field of them
        settings |= {"chat": store.learned}
        del settings["field"]
    print(f"settings   {', '.join(f'{name} {value}' for name, value in settings.items())}")
    print(f"shards     {len(manifest['shards']):,}")
    for source in manifest["sources"][:SHOWN_SOURCES]:
        facts = f"{source['format']}, {source['bytes']:,} bytes, sha256 {source['sha256']}"
        print(f"source     {spelled(source['path'])}, {facts}")
    if len(manifest["sources"]) > SHOWN_SOURCES:
        print(f"           and {len(manifest['sources']) - SHOWN_SOURCES:,} more in {folder}/manifest.json")
    decoder = load_tokenizer(store.tokenizer_path)
    for document, ids, learned in itertools.islice(store.train.learned_documents(), SHOWN_DOCUMENTS):
        place = f"document   {spelled(document.path)}:{document.line}, {document.tokens:,} tokens"
        if store.learned:
            print(f"{place}, {int(learned.sum()):,} learned:\n{_with_learned(ids, learned, decoder)}")
            continue
        text = " ".join(decoder.decode(ids[: 4 * SHOWN_CHARS]).split())
        print(f"{place}: {text[:SHOWN_CHARS]}")
    return 0


def _with_learned(ids: np.ndarray, learned: np.ndarray, tokenizer: Tokenizer) -> str:
    """The text of a conversation with what is learned in green, or between brackets where there is no terminal."""
    begin, end = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("[[", "]]")
    cuts = np.flatnonzero(np.diff(learned)) + 1
    runs = [tokenizer.decode(run) for run in np.split(ids, cuts)]
    return "".join(f"{begin}{run}{end}" if learned[at] else run for at, run in zip([0, *cuts], runs, strict=True))


def seen(run: str, step: int | None, document: str | None) -> int:
    """Prints which documents a run learned from at a step, or the steps at which it saw a document.

    Raises ValueError if the run was not trained on stores, they are others now, or have no such step or document.
    """
    from parallax.run_folder import read_settings  # late: it loads JAX

    settings = read_settings(open_folder(run))
    if "train" not in settings:
        raise ValueError(f"{run} was imported and learned from nothing here; name a run that train.py wrote")
    train, run_flags = settings["train"], settings["run"]
    size, seed = train["batch_size"], train["seed"]
    dataset = run_flags["dataset"]
    if sources := find_unprepared(dataset, tell):
        dataset = prepare_into_cache(dataset, sources, run_flags["init_from"] or run_flags["tokenizer"] or "char", tell)
    corpus = load_corpus(dataset, evaluated=run_flags.get("held_out"), notify=lambda line: None)
    if corpus.stores is None:
        raise ValueError(f"{run} was trained on {corpus.edition}, and only stores know their documents; prepare one")
    if corpus.sha256 != settings["corpus"]["sha256"]:
        raise ValueError(f"{corpus.edition} is not what {run} was trained on; give that one back")
    training = corpus.stores.training(train["seq_len"], run_flags.get("packing") or "concat")
    done = _steps_done(open_folder(run), train["steps"])
    if step is not None:
        if step > done:
            raise ValueError(f"--step {step} must not exceed the {done} steps of {run}; name an earlier one")
        for piece in pieces_of_step(training, size, seed, step):
            found, store = piece.document, corpus.stores.names[piece.store]
            tokens = f"tokens {piece.start} to {piece.stop - 1} of {found.tokens}"
            print(f"row {piece.row:<5} {spelled(found.path)}:{found.line} (offset {found.offset}, {store}), {tokens}")
        return 0
    path, _, line = (document or "").rpartition(":")
    if not path or not line.isdecimal():
        raise ValueError(f"--document {document} must be FILE:LINE; see prepare.py --describe")
    for found, store, steps in steps_of_document(corpus.stores, training, size, seed, done, path, int(line)):
        when = "held out" if steps is None else f"none of {done} steps"
        when = f"steps {', '.join(map(str, steps))}" if steps else when
        place = f"{spelled(found.path)}:{found.line} (offset {found.offset}, {store})"
        print(f"document   {place}, {found.tokens} tokens: {when}")
    return 0


def _steps_done(run: epath.Path, planned: int) -> int:
    """Of a run that goes on, those up to its last checkpoint."""
    try:
        return json.loads((run / "summary.json").read_text())["step"]
    except (OSError, ValueError, KeyError):
        return planned


def verify(folder: str) -> int:
    """Prints that a store is whole. Raises ValueError that names the files that are not."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    store, console = open_store(folder), Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=store.size)
        verify_store(store, lambda size: bar.advance(task, size))
    print(f"whole      {folder}: {len(store.manifest['shards']):,} shards, sha256 {store.sha256}")
    return 0
