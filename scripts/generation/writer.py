"""Prompts continued on standard output.

Invariant: what is shown is the same whether it is streamed or written at once.
"""

import dataclasses
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from parallax.inference.context import Context, ContextGenerator
from parallax.inference.generate import Generator
from parallax.inference.request import Request
from parallax.inference.sampling import SETTINGS
from parallax.inference.speculative import BothParams, SpeculativeGenerator
from parallax.run_folder import Run
from parallax.text import decode, make_request
from parallax.tokenizers.base import Tokenizer
from scripts.common.command_line import tell
from scripts.generation.flags import Flags


class Writer:
    """Writes continuations by one model, or with a draft that proposes to it; raises ValueError for two tokenizers."""

    def __init__(self, run: Run, draft: Run | None = None, draft_tokens: int = 4, context: Context = "slide"):
        self._run, self._draft, self._warm = run, draft, False
        self._params: Any = run.params
        if draft is None:
            generator = Generator(run.config)
        else:
            check_same_tokenizer(run, draft)
            generator = SpeculativeGenerator(run.config, draft.config, draft_tokens)
            self._params = BothParams(run.params, draft.params)
        self._generator = ContextGenerator(generator, context, run.context_length)
        length = run.context_length
        self._warning = (
            f"context   {length} tokens, as in training; "
            + {
                "slide": f"beyond them the last {length // 2} are read again, and the text goes on from there",
                "crop": "there a text ends",
                "extend": "beyond them text decays",
            }[context]
        )

    def stream(self, flags: Flags, chat: np.ndarray | None = None) -> str:
        """One sample, as it is drawn, which follows the prompt of the flags, or that of a chat [T], which is not shown.

        Raises ValueError as `request_of` and `Generator.stream`, before any output.
        """
        request, began, drawn = request_of(flags, self._run.tokenizer), time.perf_counter(), []
        if chat is not None:
            request = dataclasses.replace(request, prompts=[chat])
        pairs = self._generator.stream(self._params, request)
        self._introduce(request)

        def tokens() -> Iterator[int]:
            for _, token in pairs:
                drawn.append(token)
                yield token

        pieces = []
        try:
            show(flags.prompt if chat is None else "")
            for piece in decode(tokens(), self._run.tokenizer, stops_of(flags)):
                show(piece)
                pieces.append(piece)
        finally:
            if flags.interactive or flags.chat:
                show("\n")
            elif sys.stdout.isatty():
                tell("")
            self._tell_speed(len(drawn), began)
        return "".join(pieces)

    def write_samples(self, flags: Flags) -> None:
        """All samples, drawn in one batch. A new line stands between two.

        Raises ValueError from `request_of` and `Generator.generate`, before anything is shown.
        """
        request, began = request_of(flags, self._run.tokenizer), time.perf_counter()
        rows = self._generator.generate(self._params, request)
        self._introduce(request)
        self._tell_speed(sum(map(len, rows)), began)
        for number, tokens in enumerate(rows):
            show("\n" if number else "")
            tell(f"--- sample {number} ---")
            show(flags.prompt + "".join(decode(tokens, self._run.tokenizer, stops_of(flags))))
        if sys.stdout.isatty():
            tell("")

    def _introduce(self, request: Request) -> None:
        """Says once which model writes and, where a text may outgrow the length of its training, what happens then.

        Only after a request was found good, so that an error is one line.
        """
        run = self._run
        if not self._warm:
            size, kind = f"{run.config.num_params():,} parameters", f"{run.tokenizer.name} tokens"
            tell(f"model     {run.folder}, step {run.step}: {size}, {kind}")
            if self._draft:
                size = f"{self._draft.config.num_params():,} parameters"
                tell(f"draft     {self._draft.folder}, step {self._draft.step}: {size}")
        if self._generator.outgrown(request) and self._warning:
            tell(self._warning)
            self._warning = ""

    def _tell_speed(self, num_tokens: int, began: float) -> None:
        seconds = time.perf_counter() - began
        remark = "" if self._warm else ", compilation included"
        tell(f"speed     {num_tokens} tokens in {seconds:.2f} s: {num_tokens / seconds:.0f} a second{remark}")
        self._warm = True
        if self._draft:
            accepted, proposed = self._generator.accepted, self._generator.proposed
            share = f": {accepted / proposed:.0%}" if proposed else ""
            tell(f"draft     {accepted} of {proposed} proposed tokens accepted{share}")


def check_same_tokenizer(run: Run, draft: Run) -> None:
    """Raises ValueError where an id means another text to the draft."""
    if run.tokenizer.to_json() != draft.tokenizer.to_json():
        raise ValueError(
            f"the tokenizer of draft {draft.folder} ({draft.tokenizer.name}, {draft.tokenizer.vocab_size} ids) must be "
            f"that of {run.folder} ({run.tokenizer.name}, {run.tokenizer.vocab_size} ids); train both on the same text "
            "with the same --tokenizer"
        )


def request_of(flags: Flags, tokenizer: Tokenizer) -> Request:
    """The request that the flags describe. Raises ValueError from `make_request`."""
    return make_request(
        tokenizer,
        [flags.prompt] * flags.num_samples,
        max_tokens=flags.max_tokens,
        stop=stops_of(flags),
        seed=flags.seed,
        **{name: getattr(flags, name) for name in SETTINGS},
    )


def stops_of(flags: Flags) -> list[str]:
    r"""The stops, with \n, \t and \\ as a new line, a tab and one backslash: shells make those hard to type."""
    meant = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}
    return [re.sub(r"\\[nt\\]", lambda match: meant[match[0]], stop) for stop in flags.stop]


def show(text: str) -> None:
    """Text as it is, in UTF-8 whatever the locale."""
    sys.stdout.buffer.write(text.encode("utf-8"))
    sys.stdout.buffer.flush()
