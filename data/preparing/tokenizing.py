"""Records to documents of ids, in this process or in several others.

Invariant: results come in the order of the records, the same for any number of processes, and at most CHUNKS_AHEAD
chunks a process are under way.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import queue
import signal
import sys
import threading
import types
import unicodedata
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from data.preparing.chats import ChatForm, chat_encoder
from data.preparing.readers import Record, field_of, read_records
from data.preparing.sources import Source, opened, spelled
from parallax.tokenizers.batches import Encode, document_encoder
from parallax.tokenizers.registry import tokenizer_from_json

CHUNK_BYTES, CHUNK_RECORDS = 1 << 20, 4096
CHUNKS_AHEAD = 2
SAMPLED_SOURCES = 1024


@dataclass(frozen=True)
class Work:
    """How each record becomes a document.

    Attributes:
        tokenizer: its JSON form.
        field: a dotted path to the text in an object.
        dtype: of the ids.
        nfc: whether accents and letters are put together (NFC).
        min_chars: a text that is shorter gives no ids.
        chat: how texts that are conversations in JSON are written; None where they are plain.
    """

    tokenizer: dict[str, Any]
    field: str
    dtype: str
    nfc: bool
    min_chars: int
    chat: ChatForm | None = None

    def encoder(self) -> Encode:
        """What turns texts into ids."""
        tokenizer = tokenizer_from_json(self.tokenizer)
        return document_encoder(tokenizer) if self.chat is None else chat_encoder(tokenizer, self.chat)


class Document(NamedTuple):
    """A record's place, and its ids or why there are none: an error, or neither where the text is too short."""

    source: int
    number: int
    line: int
    offset: int
    size: int = 0
    digest: bytes = b""
    ids: np.ndarray | None = None
    error: str = ""


def sample_texts(sources: Sequence[Source], field: str, nfc: bool, limit: int | None) -> Iterator[str]:
    """Texts to make a tokenizer of: all, or about `limit` bytes, a like share from the start of each source.

    Of very many sources every n-th is read. What cannot be read is passed over: the preparation itself reports it.
    """
    chosen = list(sources)
    if limit is not None:
        chosen = chosen[:: max(1, len(chosen) // SAMPLED_SOURCES)]
    for source in chosen:
        size = 0
        with opened(source.path) as file:
            for record in read_records(source, 0, file, field):
                text, document = read_text(record, field, nfc)
                size += document.size
                if text:
                    yield text
                if limit is not None and size >= limit / len(chosen):
                    break


def first_fault(sources: Sequence[Source], field: str, nfc: bool) -> str:
    """Where and why the first record that is no text cannot be read, or nothing where there is none."""
    for source in sources:
        with opened(source.path) as file:
            for record in read_records(source, 0, file, field):
                _, document = read_text(record, field, nfc)
                if document.error:
                    return f"{spelled(source.path)}:{document.line}: {document.error}"
    return ""


def chunks_of(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Records by about CHUNK_BYTES."""
    chunk, size = [], 0
    for record in records:
        chunk.append(record)
        size += len(record.content)
        if size >= CHUNK_BYTES or len(chunk) >= CHUNK_RECORDS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def tokenized(records: Iterable[Record], work: Work, workers: int) -> Generator[list[Document]]:
    """The documents of all records, in order, by the chunk; with one worker in this process.

    Raises ValueError if another process ends.
    """
    chunks = chunks_of(records)
    if workers == 1:
        encode = work.encoder()
        yield from (_tokenize(chunk, work, encode) for chunk in chunks)
        return
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    try:
        for _ in range(workers):
            here, there = context.Pipe()
            processes.append(context.Process(target=_serve, args=(there, work), daemon=True))
            with _without_main():
                processes[-1].start()
            there.close()  # so that this end reads no more when the process ends
            pipes.append(here)
        yield from _in_order(chunks, pipes)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise ValueError(
            "a process that tokenizes ended, perhaps for want of memory; give the command again, with fewer --workers"
        ) from None
    finally:
        for pipe in pipes:
            pipe.close()  # a worker ends with its pipe
        for process in processes:
            process.join()


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Hides the script that runs from `spawn`, which would import it in each worker: train.py loads JAX."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def _in_order(chunks: Iterator[list[Record]], pipes: list[Connection]) -> Iterator[list[Document]]:
    sent = received = 0
    for chunk in chunks:
        if sent - received == CHUNKS_AHEAD * len(pipes):
            yield pipes[received % len(pipes)].recv()
            received += 1
        pipes[sent % len(pipes)].send(chunk)
        sent += 1
    for number in range(received, sent):
        yield pipes[number % len(pipes)].recv()


def _serve(pipe: Connection, work: Work) -> None:
    """A worker: answers chunks until the other end of the pipe closes, as it does however that process ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # to a group of processes: they are for the one that gives the work
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker is a thread
    encode = work.encoder()
    waiting: queue.SimpleQueue[list[Record] | None] = queue.SimpleQueue()
    # Received beside the work: else both ends could wait for the other to read.
    threading.Thread(target=_receive, args=(pipe, waiting), daemon=True).start()
    while (chunk := waiting.get()) is not None:
        try:
            pipe.send(_tokenize(chunk, work, encode))
        except BrokenPipeError:
            return


def _receive(pipe: Connection, waiting: queue.SimpleQueue) -> None:
    try:
        while True:
            waiting.put(pipe.recv())
    except (EOFError, OSError):
        waiting.put(None)


def _tokenize(chunk: list[Record], work: Work, encode: Encode) -> list[Document]:
    documents = [read_text(record, work.field, work.nfc) for record in chunk]
    kept = [text is not None and len(text) >= work.min_chars for text, _ in documents]
    texts = [text for (text, _), keep in zip(documents, kept, strict=True) if text is not None and keep]
    try:
        ids = iter(encode(texts))
    except (ValueError, RecursionError):  # one of them cannot be written in this tokenizer's ids
        ids = (_encode_alone(text, encode) for text in texts)
    return [
        _with_ids(document, next(ids), work.dtype) if keep else document
        for (_, document), keep in zip(documents, kept, strict=True)
    ]


def _encode_alone(text: str, encode: Encode) -> np.ndarray | str:
    try:
        return encode([text])[0]
    except (ValueError, RecursionError) as error:  # the latter of JSON that is nested too deep
        return str(error)


def _with_ids(document: Document, ids: np.ndarray | str, dtype: str) -> Document:
    if isinstance(ids, str):
        return document._replace(error=ids)
    return document._replace(ids=ids.astype(dtype))


def read_text(record: Record, field: str, nfc: bool) -> tuple[str | None, Document]:
    """The text of a record, or None where it cannot be read, and its document without ids."""
    document = Document(record.source, record.number, record.line, record.offset, error=record.error)
    if record.error:
        return None, document
    try:
        text = record.content if isinstance(record.content, str) else record.content.decode("utf-8")
        if record.is_json:
            text = field_of(json.loads(text), field)
        if nfc and not field:  # an object, in which JSON may spell letters by escapes
            text = json.dumps(json.loads(text), ensure_ascii=False)
        if nfc:
            text = unicodedata.normalize("NFC", text)
        content = text.encode("utf-8")
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        return None, document._replace(error=f"its text is not UTF-8 ({error.reason} at {error.start})")
    except (ValueError, RecursionError) as error:
        return None, document._replace(error=" ".join(str(error).split()))
    return text, document._replace(size=len(content), digest=hashlib.sha256(content).digest()[:16])
