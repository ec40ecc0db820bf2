"""Calls into the `tokenizers` library, which take long for long texts and give Python no turn meanwhile.

Invariant: Ctrl-C during such a call raises KeyboardInterrupt at once, and not at its end.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np

from parallax.tokenizers.base import to_utf8

Answer = TypeVar("Answer")
LONG_TEXT = 1 << 16
"""Characters: for a shorter text a thread would cost more than the wait."""


def encode(model: Any, text: str) -> np.ndarray:
    """The ids of a text, int32 [T], without those that the library puts before and after one.

    Raises ValueError for text that is not valid Unicode.
    """
    to_utf8(text)  # for its error: the library's own is no ValueError
    if len(text) < LONG_TEXT:
        return np.array(model.encode(text, add_special_tokens=False).ids, np.int32)
    # Of a batch, since the library keeps Python's lock while it encodes one text.
    (found,) = interruptible(lambda: model.encode_batch_fast([text], add_special_tokens=False))
    return np.array(found.ids, np.int32)


def encode_with_places(model: Any, text: str) -> tuple[np.ndarray, np.ndarray]:
    """`encode`, and where each id begins in the text, in characters, [T]."""
    to_utf8(text)
    (found,) = interruptible(lambda: model.encode_batch([text], add_special_tokens=False))
    places = np.array(found.offsets, np.int64).reshape(-1, 2)[:, 0]
    return np.array(found.ids, np.int32), places


def interruptible(call: Callable[[], Answer]) -> Answer:
    """What `call` returns or raises; it must release Python's lock. After KeyboardInterrupt it goes on unheeded.

    Python handles signals in the main thread alone, and only between two of its own instructions: so the call is made
    in another thread, which ends with the process.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    answer: Future[Answer] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:  # the library's panics are no Exception
            answer.set_exception(error)

    threading.Thread(target=run, name="native call", daemon=True).start()
    return answer.result()
