"""Which documents a step learned from, and at which steps a document was seen.

Invariant: the answers follow from the stores, the batch size and the seed alone, as batches do: they hold for every
layout and however often the run was resumed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from data.samples import Samples
from data.stores.mixture import Mixture, Stores, rows_by_store
from data.stores.store import Document


@dataclass(frozen=True)
class Piece:
    """The part of a document that a row of a batch shows, as inputs or targets.

    Attributes:
        row: of the global batch, from 0.
        store: its place in the mixture.
        document: where it came from.
        start: its first token in the document, from 0.
        stop: behind its last one.
    """

    row: int
    store: int
    document: Document
    start: int
    stop: int


def pieces_of_step(training: Samples, batch_size: int, seed: int, step: int) -> Iterator[Piece]:
    """What step `step`, from 1, learned from: row by row, in the order of the tokens."""
    stores = rows_by_store(training)
    for row, sample_id in enumerate(training.draw(batch_size, seed, step - 1).tolist()):
        store = 0
        if isinstance(training, Mixture):
            store = int(training.source_of(sample_id))
            sample_id -= int(training.starts[store])
        rows = stores[store]
        for span in rows.spans([sample_id])[0]:
            for first, document in rows.tokens.documents_in(span.start, span.stop):
                end = first + document.tokens
                yield Piece(row, store, document, max(span.start - first, 0), min(span.stop, end) - first)


def steps_of_document(
    stores: Stores, training: Samples, batch_size: int, seed: int, steps: int, path: str, line: int
) -> list[tuple[Document, str, list[int] | None]]:
    """Each document from that line of that source, its store, and the steps up to `steps` that learned from it.

    None in place of the steps where it is held out. Raises ValueError if no store has such a document.
    """
    found: list[tuple[Document, str, list[int] | None]] = []
    counts = (
        training.counts(batch_size, seed, steps * batch_size) if isinstance(training, Mixture) else [steps * batch_size]
    )
    for place, (store, rows) in enumerate(zip(stores.stores, rows_by_store(training), strict=True)):
        for first, document in store.train.find(path, line):
            shown = rows.rows_of(first, first + document.tokens)
            numbers = [number for row in shown for number in rows.order.numbers_of(row, seed, counts[place])]
            if isinstance(training, Mixture):
                numbers = [training.sample_of(place, number, batch_size, seed) for number in numbers]
            seen = sorted({number // batch_size + 1 for number in numbers})
            found.append((document, stores.names[place], seen))
        found += [(document, stores.names[place], None) for _, document in store.held_out.find(path, line)]
    if not found:
        raise ValueError(f"no document of {', '.join(stores.names)} is from {path}:{line}; see prepare.py --describe")
    return found
