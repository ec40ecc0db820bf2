"""What `--dataset` names, prepared into the cache where it is no store and too large, or in no shape, to be read whole.

Invariant: a cached store is named by all that decides it, so another file, tokenizer or setting is another store.
"""

import fcntl
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data.corpus import is_records
from data.mixture import load_stores
from data.preparation import Preparation, Settings
from data.sources import COMPRESSIONS, Source, documents_in, find_sources, format_of
from data.store import VERSION, is_store
from parallax.storage import cache_folder
from scripts.preparing.make import run_preparation

READ_WHOLE = 64 << 20
"""Bytes of text up to which a run holds it in memory, as it is."""


def prepared(dataset: str, tokenizer: str, notify: Callable[[str], None]) -> str:
    """The dataset, or a store of it in the cache, which is made if it is not there.

    Text of up to 64 MiB, stores, mixtures and ArrayRecord files are left as they are. Of several processes on a machine
    one prepares and the others wait. Raises ValueError if the sources cannot be prepared as they are.
    """
    sources = _sources(dataset, notify)
    size = sum(source.bytes for source in sources)
    if not sources or (size <= READ_WHOLE and all(_is_plain(source) for source in sources)):
        return dataset
    # Of little data a hundredth may be no document at all.
    settings = Settings(held_out=0.1 if size <= READ_WHOLE else 0.01)
    facts = [(os.path.abspath(source.path), source.format, source.bytes, source.changed) for source in sources]
    key = hashlib.sha256(repr((VERSION, tokenizer, settings, facts)).encode()).hexdigest()[:16]
    folder = cache_folder() / "stores" / key / f"{Path(dataset).resolve().name.split('.')[0] or 'text'}.store"
    try:
        with _turn(folder.parent):
            preparation = Preparation(folder, sources, settings, tokenizer)
            if preparation.finished is None:
                notify(f"prepare   {dataset} into {folder}")
                run_preparation(preparation, tokenizer, sources, settings)
    except OSError as error:
        raise ValueError(
            f"cache {folder} cannot be written ({error.strerror}); set XDG_CACHE_HOME to another"
        ) from None
    except ValueError as error:
        what = f"dataset {dataset} cannot be prepared as it is: {error}"
        raise ValueError(f"{what}; prepare.py takes --field, --format and --on-error") from None
    return str(folder)


def _sources(dataset: str, notify: Callable[[str], None]) -> list[Source]:
    """The files of documents that the dataset names; none where it is read in another way."""
    path = Path(dataset).expanduser()
    if path.is_file():
        if format_of(path.name) is None or (path.suffix == ".json" and load_stores(dataset) is not None):
            return []
        return find_sources([dataset])
    if not path.is_dir() or is_store(path) or any(map(is_records, path.rglob("*"))):
        return []
    sizes: Counter[str] = Counter()
    for name, format in documents_in(path):
        sizes[format] += (path / name).stat().st_size
    if not sizes:
        return []
    (format, _), *others = sizes.most_common()
    if others:
        held = ", ".join(f"{kind} ({size:,} bytes)" for kind, size in sizes.most_common())
        if format != "text":
            rule = f"dataset folder {dataset} must hold files of one format and holds {held}"
            raise ValueError(f"{rule}; choose by prepare.py --format {format}")
        notify(f"dataset folder {dataset} holds {held}: its text files are taken")
    return find_sources([dataset], format)


def _is_plain(source: Source) -> bool:
    return source.format == "text" and not source.path.lower().endswith(COMPRESSIONS)


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """One process at a time; the others wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
