"""What `--dataset` names, prepared into the cache where it is too large, or in no shape, to be read as it is.

Invariant: a cached store is named by all that decides it, so that another file, tokenizer or setting is another store,
and each side of it holds a document.
"""

import fcntl
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data.corpus import DATA_SETS, is_plain
from data.preparing.preparation import Preparation, Settings
from data.preparing.sources import Source, documents_in, find_sources, format_of, is_records, spelled
from data.preparing.tokenizing import sample_texts
from data.stores.mixture import load_stores
from data.stores.store import VERSION, is_store
from parallax.storage import cache_folder, is_remote, open_folder
from parallax.tokenizers.registry import bpe_size
from scripts.preparing.make import run_preparation

READ_WHOLE = 64 << 20
"""Bytes of text up to which a run holds it in memory, as it is."""


def find_unprepared(dataset: str, notify: Callable[[str], None]) -> list[Source]:
    """The files to prepare before a run can read the data set; none where it reads it as it is.

    That are rows of other formats, and text of more than READ_WHOLE; not stores, mixtures and ArrayRecord files. Raises
    ValueError if it is a folder of several formats, of which text is not most.
    """
    sources = _sources(dataset, notify)
    size = sum(source.bytes for source in sources)
    is_text = all(is_plain(Path(source.path)) for source in sources)
    return [] if is_text and size <= READ_WHOLE else sources


def prepare_into_cache(dataset: str, sources: list[Source], tokenizer: str, notify: Callable[[str], None]) -> str:
    """The folder of the store of these sources, which is made where it is not there.

    Of several processes on a machine one prepares and the others wait. Machines that share no cache each prepare their
    own, to the same bits.

    Args:
        tokenizer: char, byte, bpe[:N], or a folder with a tokenizer.json.

    Raises:
        ValueError: the sources cannot be prepared as they are.
    """
    name, size = Path(dataset).name.split(".")[0] or "text", sum(source.bytes for source in sources)
    try:
        given = _name_of(tokenizer)
        settings = Settings(held_out=held_out_fraction(sources, 0.1 if size <= READ_WHOLE else 0.01))
        facts = [(source.path, source.format, source.bytes, source.changed) for source in sources]
        key = hashlib.sha256(repr((VERSION, given, settings, facts)).encode()).hexdigest()[:16]
        folder = cache_folder() / "stores" / key / f"{name}.store"
        with _turn(folder.parent, lambda: notify(f"waiting   for the process that prepares {spelled(dataset)}")):
            preparation = Preparation(folder, sources, settings, given)
            if preparation.finished is None:
                notify(f"prepare   {spelled(dataset)} into {folder}")
                run_preparation(preparation, tokenizer, sources, settings)
    except OSError as error:
        rule = f"cache {cache_folder()} cannot be written ({error.strerror})"
        raise ValueError(f"{rule}; set XDG_CACHE_HOME to another") from None
    except ValueError as error:
        rule = f"dataset {spelled(dataset)} cannot be prepared as it is: {error}"
        raise ValueError(f"{rule}; prepare.py takes --field, --format and --on-error") from None
    return str(folder)


def held_out_fraction(sources: list[Source], wanted: float) -> float:
    """The fraction to hold out: `wanted`, or where that leaves a side without a document, what holds out one text.

    Reads documents until there is one on each side, a few hundred or all that there are. Raises ValueError if all hold
    the same text.
    """
    least, most = math.inf, -math.inf
    for text in sample_texts(sources, Settings.field, Settings.nfc, None):
        value = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
        least, most = min(least, value), max(most, value)
        if least < wanted <= most:
            return wanted
    if least == most:
        raise ValueError("it must hold two documents, one of them to hold out, and holds one")
    return wanted if least > most else math.nextafter(least, 1)  # of no document the preparation says why


def _name_of(tokenizer: str) -> str:
    """What tells one tokenizer from another: how it is made, or its content. Raises ValueError if it is none."""
    if tokenizer in ("char", "byte"):
        return tokenizer
    folder = open_folder(tokenizer)
    if not (folder / "tokenizer.json").exists():
        return f"bpe:{bpe_size(tokenizer)}"
    content = (folder / "tokenizer.json").read_bytes()
    if "kind" not in json.loads(content):  # one of Hugging Face, whose first and last ids are in other files
        others = [folder / name for name in ("config.json", "generation_config.json")]
        content += b"".join(path.read_bytes() for path in others if path.exists())
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _sources(dataset: str, notify: Callable[[str], None]) -> list[Source]:
    """The files of documents that the data set names, by their full paths; none where it is read in another way."""
    if is_remote(dataset) or dataset in DATA_SETS:
        return []
    path = Path(os.path.abspath(os.path.expanduser(dataset)))
    if os.path.isfile(path):  # that of pathlib raises for a name that is too long
        if format_of(path.name) in (None, "records") or (path.suffix == ".json" and load_stores(dataset) is not None):
            return []
        return find_sources([str(path)])
    if not os.path.isdir(path) or is_store(path) or any(is_records(found.name) for found in path.rglob("*")):
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
            rule = f"dataset folder {spelled(dataset)} must hold files of one format and holds {held}"
            raise ValueError(f"{rule}; choose by prepare.py --format {format}")
        notify(f"dataset folder {spelled(dataset)} holds {held}: its text files are taken")
    return find_sources([str(path)], format)


@contextmanager
def _turn(folder: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """One process at a time; the others say that they wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
