"""Sources to a store, with a bar.

Invariant: the tokenizer of a store that was begun is the one in its folder: it is not made a second time.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from data.preparing.chats import ChatForm
from data.preparing.preparation import Preparation, Progress, Settings
from data.preparing.sources import Source, find_sources
from data.preparing.tokenizing import first_fault, sample_texts
from data.stores.store import TokenStore
from parallax.storage import open_folder
from parallax.tokenizers.base import Tokenizer
from parallax.tokenizers.chat import Learned
from parallax.tokenizers.chat_template import choose_template, read_chat_template
from parallax.tokenizers.plain import ByteTokenizer, CharTokenizer
from parallax.tokenizers.registry import bpe_size, load_tokenizer, train_tokenizer
from scripts.common.command_line import tell
from scripts.preparing.flags import Flags

TRAINED_BYTES = 64 << 20
"""Of text that a tokenizer is trained on: its memory would grow with more, and its pairs hardly change."""
SMALL_BYTES = 1 << 20
"""Of sources for each process beside this one: to start one takes as long as this one needs for so many."""
LINE_SECONDS = 10.0
"""Between two lines of progress where there is no terminal."""


def make(flags: Flags) -> int:
    """Makes the store, or goes on with it. Raises ValueError for whatever is wrong with the input."""
    output, given = flags.output or "", flags.tokenizer or ""
    settings = Settings(
        field="" if flags.chat else flags.field,
        chat=None if flags.chat is None else _chat_form(given, flags.chat_template, flags.chat),
        min_chars=flags.min_chars,
        nfc=flags.nfc,
        deduplicate=flags.deduplicate,
        held_out=flags.held_out,
        shard_tokens=flags.shard_tokens,
    )
    sources = find_sources(flags.sources, flags.format)
    preparation = Preparation(output, sources, settings, given)
    if preparation.finished is not None:
        tell(f"finished   {output} already: {_counts(preparation.finished)}")
        return 0
    skip = flags.on_error == "skip"
    store = run_preparation(preparation, given, sources, settings, workers=flags.workers, skip_unreadable=skip)
    tell(f"store      {output}: {_counts(store)}; sha256 {store.sha256}")
    if preparation.unreadable:
        tell(f"left out   {preparation.unreadable:,} documents that cannot be read, the first of them:")
        for line in preparation.named:
            tell(f"           {line}")
    if not store.manifest["held_out"]["documents"]:
        tell(
            "held out   no document at all: train.py will ask for some; give a larger --held-out with another --output"
        )
    return 0


def _chat_form(given: str, template: str, learned: Learned | Literal["pairs"]) -> ChatForm:
    """Of --chat-template or the tokenizer's folder. Raises ValueError if there is neither."""
    tokenizer = choose_tokenizer(given, [], Settings())
    own = None if given == "byte" else read_chat_template(open_folder(given), tokenizer)
    chosen = choose_template(template, own, tokenizer)
    if chosen is None:
        raise ValueError(f"{given} has no chat template; give one with --chat-template, a file or plain")
    return ChatForm.of(chosen, learned)


def run_preparation(
    preparation: Preparation,
    given: str,
    sources: list[Source],
    settings: Settings,
    *,
    workers: int | None = None,
    skip_unreadable: bool = False,
) -> TokenStore:
    """Makes the store with the tokenizer that `given` says, or goes on with its own. Raises ValueError."""
    if preparation.begun:
        tell(f"going on   with {preparation.tokenizer_path.parent}")
        tokenizer = load_tokenizer(preparation.tokenizer_path)
    else:
        tokenizer = choose_tokenizer(given, sources, settings)
    workers = workers or min(usable_cores(), 1 + sum(source.bytes for source in sources) // SMALL_BYTES)
    with _shown() as observe:
        return preparation.run(tokenizer, workers=workers, skip_unreadable=skip_unreadable, observe=observe)


def choose_tokenizer(given: str, sources: list[Source], settings: Settings) -> Tokenizer:
    """What `--tokenizer` says. Raises ValueError if it says nothing that is known."""
    if given == "char":
        tell("tokenizer  char: reading all sources for their characters")
        alphabet: set[str] = set()
        for text in sample_texts(sources, settings.field, settings.nfc, None):
            alphabet.update(text)
        if not alphabet:
            raise _nothing_read(sources, settings)
        return CharTokenizer("".join(sorted(alphabet)), has_eos=True)
    if given == "byte":
        return ByteTokenizer()
    if given.partition(":")[0] == "bpe":
        bpe_size(given)  # it refuses what no text could be read for
        texts = list(sample_texts(sources, settings.field, settings.nfc, TRAINED_BYTES))
        if not texts:
            raise _nothing_read(sources, settings)
        return train_tokenizer(given, texts)
    path = open_folder(given) / "tokenizer.json"
    if not path.exists():
        rule = f"--tokenizer {given} must be char, byte, bpe:VOCABULARY or a folder with a tokenizer.json"
        raise ValueError(f"{rule}; try bpe:32000")
    try:
        values = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be a tokenizer in JSON ({error}); choose another folder") from None
    if isinstance(values, dict) and "kind" in values:
        return load_tokenizer(path)
    from parallax.interop.folders import read_tokenizer  # late: it loads JAX

    return read_tokenizer(Path(given))


def _nothing_read(sources: list[Source], settings: Settings) -> ValueError:
    fault = first_fault(sources, settings.field, settings.nfc)
    rule = "the sources must hold a document and hold none that can be read"
    return ValueError(f"{rule}{f' ({fault})' if fault else ''}; check --field")


def usable_cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _counts(store: TokenStore) -> str:
    manifest = store.manifest
    held = manifest["held_out"]["documents"]
    return f"{manifest['documents']:,} documents ({held:,} held out), {manifest['tokens']:,} tokens"


@contextlib.contextmanager
def _shown() -> Iterator[Callable[[Progress], None]]:
    """Shows progress as it is reported: a bar on a terminal, or else a line now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console, began, first = Console(stderr=True), time.monotonic(), list[Progress]()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeRemainingColumn(),
    )
    last_line = began
    with Bar(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("preparing", total=1.0)

        def observe(progress: Progress) -> None:
            nonlocal last_line
            first.append(Progress(progress.documents, progress.tokens, progress.bytes, progress.share))
            del first[1:]  # what an earlier process did says nothing of this one's speed
            now = time.monotonic()
            seconds = max(now - began, 1e-9)
            documents, content = progress.documents - first[0].documents, progress.bytes - first[0].bytes
            speed = f"{documents / seconds:,.0f} documents/s, {content / seconds / 1e6:.1f} MB/s"
            bar.update(task, completed=progress.share, description=f"{progress.documents:,} documents, {speed}")
            if bar.disable and now - last_line >= LINE_SECONDS:
                last_line, done = now, max(progress.share - first[0].share, 1e-9)
                left = (1 - progress.share) * seconds / done
                tell(f"progress   {progress.share:.0%}, {progress.documents:,} documents, {speed}, {left:,.0f} s left")

        yield observe
