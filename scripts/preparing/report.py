"""What is in a store, and whether it is as it was written."""

import itertools
from pathlib import Path

from data.store import open_store
from data.store import verify as verify_store
from parallax.tokenizers.registry import load_tokenizer

SHOWN_DOCUMENTS, SHOWN_CHARS, SHOWN_SOURCES = 3, 72, 5


def describe(folder: str) -> int:
    """Prints a store's manifest in words, and the first documents. Raises ValueError if it cannot be read."""
    store = open_store(Path(folder))
    manifest = store.manifest
    tokenizer, held, left_out = manifest["tokenizer"], manifest["held_out"], manifest["left_out"]
    print(f"store      {folder}, format version {manifest['version']}")
    print(f"sha256     {store.sha256}")
    print(f"tokens     {manifest['tokens']:,} of {manifest['dtype']}, the largest id {manifest['max_id']}")
    print(f"tokenizer  {tokenizer['name']}, {tokenizer['vocab_size']:,} ids, sha256 {tokenizer['sha256']}")
    print(f"documents  {manifest['documents']:,} of {manifest['bytes']:,} bytes of text")
    print(f"held out   {held['documents']:,} documents, {held['tokens']:,} tokens")
    print(f"left out   {', '.join(f'{count:,} {why}' for why, count in left_out.items())}")
    print(f"settings   {', '.join(f'{name} {value}' for name, value in manifest['settings'].items())}")
    print(f"shards     {len(manifest['shards']):,}")
    for source in manifest["sources"][:SHOWN_SOURCES]:
        print(f"source     {source['path']}, {source['format']}, {source['bytes']:,} bytes, sha256 {source['sha256']}")
    if len(manifest["sources"]) > SHOWN_SOURCES:
        print(f"           and {len(manifest['sources']) - SHOWN_SOURCES:,} more in {folder}/manifest.json")
    decoder = load_tokenizer(store.tokenizer_path)
    for document, ids in itertools.islice(store.train.documents(), SHOWN_DOCUMENTS):
        text = " ".join(decoder.decode(ids[: 4 * SHOWN_CHARS]).split())
        print(f"document   {document.path}:{document.line}, {document.tokens:,} tokens: {text[:SHOWN_CHARS]}")
    return 0


def verify(folder: str) -> int:
    """Prints that a store is whole. Raises ValueError that names the files that are not."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    store, console = open_store(Path(folder)), Console(stderr=True)
    total = sum(path.stat().st_size for path in store.folder.iterdir())
    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=total)
        verify_store(store, lambda size: bar.advance(task, size))
    print(f"whole      {folder}: {len(store.manifest['shards']):,} shards, sha256 {store.sha256}")
    return 0
