"""Long calls into a library: interrupted at once, in any thread, with the same ids."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from parallax.tokenizers.native import LONG_TEXT, interruptible
from parallax.tokenizers.registry import train_tokenizer
from tests.parallax.interop.tokenizers import TEXT


def test_an_interrupt_does_not_wait_for_a_native_call():
    ended = threading.Event()

    def call():
        os.kill(os.getpid(), signal.SIGINT)
        ended.wait(30)

    try:
        with pytest.raises(KeyboardInterrupt):
            interruptible(call)
        assert not ended.is_set()
    finally:
        ended.set()


def test_a_native_call_answers_or_raises_in_any_thread():
    def fail():
        raise ValueError("no")

    with ThreadPoolExecutor(1) as pool:
        assert interruptible(lambda: 3) == pool.submit(interruptible, lambda: 3).result() == 3
        for caught in (lambda: interruptible(fail), pool.submit(interruptible, fail).result):
            with pytest.raises(ValueError, match="no"):
                caught()


def test_a_long_text_has_the_ids_of_the_library():
    tokenizer, text = train_tokenizer("bpe:300", [TEXT]), TEXT * 100
    assert len(text) > LONG_TEXT
    np.testing.assert_array_equal(tokenizer.encode(text), tokenizer._model.encode(text).ids)
