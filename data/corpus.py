"""A name or a path becomes checked text, or a source of token records.

Invariant: a Corpus is never empty and is the same on every host that reads the same files, in the same order.
"""

import dataclasses
import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np

from data.preparing.sources import COMPRESSIONS, documents_in, format_of, is_records, spelled
from data.records import TokenRecords
from data.stores.mixture import Stores, load_stores, open_stores
from data.stores.store import is_store, open_store
from data.tiny_shakespeare import load_tiny_shakespeare
from parallax.storage import is_remote

TEXT_SUFFIXES = (".txt", ".md")
RECORD_SUFFIXES = (".array_record", ".arrayrecord")
NAMED = 10
"""Files at most that one message names."""
DATA_SETS = {"tiny_shakespeare": load_tiny_shakespeare}
"""Data sets given by name: each loads its text and title, from `data_dir` or from where it is published."""
OVERFIT_SENTENCE = "All happy families are alike; each is unhappy in its own way."


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What a run learns from: `documents` of text, `records` of tokens, or `stores` of them, one of the three.

    Attributes:
        name: short, fit for the name of a run folder.
        edition: one line that says what the text is and where it came from.
        documents: the texts, a single one for a single file; empty for the others.
        records: token documents with the tokenizer that made them, or None.
        stores: token stores, or None.
        evaluated: stores whose held-out sides are evaluated, instead of a part of this.
    """

    name: str
    edition: str
    documents: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    records: TokenRecords | None = None
    stores: Stores | None = None
    evaluated: Stores | None = None

    @cached_property
    def sha256(self) -> str:
        """The sha256 of all documents, each with its length in bytes before it; of stores that of their content.

        With other stores to be evaluated, of both.
        """
        if self.evaluated is not None:
            both = (dataclasses.replace(self, evaluated=None).sha256, self.evaluated.sha256)
            return hashlib.sha256("\n".join(both).encode()).hexdigest()
        if self.stores is not None:
            return self.stores.sha256
        digest = hashlib.sha256()
        for document in self.documents if self.records is None else self.records:
            piece = document.encode() if isinstance(document, str) else np.ascontiguousarray(document).tobytes()
            digest.update(f"{len(piece)}\n".encode() + piece)
        return digest.hexdigest()


def load_corpus(
    name_or_path: str,
    data_dir: str | None = None,
    *,
    evaluated: str | None = None,
    notify: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> Corpus:
    """Loads `tiny_shakespeare`, a text file, a folder of text files (*.txt, *.md), ArrayRecord files or token stores.

    A folder with record files in it is read as records, any other as text, with all its subfolders, but for what is
    hidden (a name with a dot first) and a README.md at its top, where that is not all. The records' `tokenizer.json`
    stands beside the first of them, or in the folder.

    Args:
        name_or_path: the `--dataset` flag.
        data_dir: where to look for Tiny Shakespeare first; None means $PARALLAX_DATA_DIR.
        evaluated: the `--held-out` flag, a store or a mixture.
        notify: receives a line that says which text is used and where it came from.

    Raises:
        ValueError: one line with the rule, the value and a remedy.
    """
    if name_or_path in DATA_SETS:
        text, title = DATA_SETS[name_or_path](data_dir, notify)
        corpus = Corpus(name_or_path, title, (text,))
    else:
        corpus = _load(name_or_path)
        notify(f"dataset {corpus.edition}")
    if evaluated is None:
        return corpus
    stores = open_stores(evaluated)
    notify(f"held out  {stores.title}")
    return dataclasses.replace(corpus, edition=f"{corpus.edition}, evaluated on {stores.title}", evaluated=stores)


def _load(name: str) -> Corpus:
    path, stores = Path(name).expanduser(), load_stores(name)
    if stores is not None or is_remote(name):
        return _of_stores(stores or open_stores(name))
    if not os.path.exists(path):  # that of pathlib raises for a name that is too long
        rule = f"dataset {name!r} must be {', '.join(DATA_SETS)} or a path that exists"
        raise ValueError(f"{rule}; check the spelling")
    return _load_folder(path) if path.is_dir() else _load_file(path)


def is_plain(path: Path) -> bool:
    """Whether a file's name is that of text to be read as it is, or says nothing else."""
    return format_of(path.name) in (None, "text") and path.suffix.lower() not in COMPRESSIONS


def overfit_corpus() -> Corpus:
    """One short sentence, for the test that a model can learn a single window by heart."""
    return Corpus("overfit", "one sentence to be learned by heart", (OVERFIT_SENTENCE,))


def _load_file(path: Path) -> Corpus:
    if is_records(path.name):
        return _load_records(path, [path])
    if not is_plain(path):
        remedy = f"prepare it first: prepare.py {path} --tokenizer bpe:32000 --output {path.name.split('.')[0]}.store"
        raise ValueError(f"dataset {spelled(path)} must be plain text to be read as it is; {remedy}")
    return Corpus(_short_name(path.stem), f"text file {spelled(path)}", _read_texts([path]))


def _load_folder(folder: Path) -> Corpus:
    if is_store(folder):
        return _of_stores(Stores((open_store(folder),)))
    records = sorted(entry for entry in folder.rglob("*") if is_records(entry.name) and not entry.name.startswith("."))
    if records:
        return _load_records(folder, records)
    found = [path for path in folder.rglob("*") if path.suffix.lower() in TEXT_SUFFIXES and path.is_file()]
    shown = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    texts = [path for path in shown if path.parent != folder or path.name.lower() != "readme.md"] or shown
    if not texts:
        kinds = ", ".join(f"*{suffix}" for suffix in TEXT_SUFFIXES + RECORD_SUFFIXES)
        raise ValueError(
            f"dataset folder {folder} must hold a text or record file ({kinds}) and holds none; prepare.py takes others"
        )
    texts.sort(key=lambda path: path.relative_to(folder).as_posix())
    left_out = ["README.md"] if len(texts) < len(shown) else []
    left_out += [f"{len(found) - len(shown)} hidden"] if len(shown) < len(found) else []
    edition = f"folder {spelled(folder)}, text files: {len(texts)}"
    edition += f" (left out: {' and '.join(left_out)})" if left_out else ""
    return Corpus(_short_name(folder.resolve().name), edition, _read_texts(texts))


def _of_stores(stores: Stores) -> Corpus:
    documents, tokens = (sum(store.manifest[what] for store in stores.stores) for what in ("documents", "tokens"))
    return Corpus(
        _short_name("+".join(stores.short_names)),
        f"{stores.title}: {documents:,} documents, {tokens:,} tokens",
        stores=stores,
    )


def _load_records(path: Path, files: list[Path]) -> Corpus:
    records = TokenRecords(files, path if path.is_dir() else path.parent)
    edition = f"token records {spelled(path)}: {len(records)} documents, files: {len(files)}"
    others = Counter(kind for _, kind in documents_in(path) if kind != "records") if path.is_dir() else {}
    if others:
        edition += f" (left out: {', '.join(f'{kind} ({count})' for kind, count in others.items())})"
    return Corpus(_short_name(path.resolve().stem), edition, records=records)


def _read_texts(paths: list[Path]) -> tuple[str, ...]:
    """All of the files. Raises ValueError that names those which hold no text, the first NAMED of them."""
    texts, faults = [], []
    for path in paths:
        try:
            texts.append(_read_text(path))
        except ValueError as error:
            faults.append(f"{path} {error}")
    if faults:
        what = "text file" if len(faults) == 1 else f"{len(faults)} text files:"
        more = f" and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
        remedy = "convert to UTF-8 what is text, and remove the rest"
        raise ValueError(f"{what} {', '.join(faults[:NAMED])}{more}; {remedy}")
    return tuple(texts)


def _read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")  # drops a byte order mark, keeps line ends as they are
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise ValueError(f"must be UTF-8 and has {found}") from None
    except OSError as error:
        raise ValueError(f"must be readable ({error.strerror})") from None
    if not text:
        raise ValueError("must hold text and is empty")
    return text


def _short_name(stem: str) -> str:
    return re.sub(r"[^\w.-]+", "_", stem) or "text"
