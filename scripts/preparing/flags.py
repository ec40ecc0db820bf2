"""The flags of prepare.py."""

import dataclasses
from typing import Annotated, Literal

import tyro

from scripts.common.command_line import Switch

DESCRIPTION = (
    "Tokenize documents into a store for train.py --dataset STORE: .parquet, and .txt, .md, .jsonl, .ndjson, .json and "
    ".csv, also with .gz, .zst or .bz2 behind. Memory does not grow with the corpus. A command that was ended goes on "
    "where it was when it is given again, and makes the same store to the bit, whatever the number of workers."
)


@dataclasses.dataclass(frozen=True)
class Flags:
    sources: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SOURCE")] = ()
    """Files, folders (with their subfolders) and globs in quotes. In jsonl, json, csv and parquet each row is a
    document; a text file is one, or several of 1 MiB."""
    output: str | None = None
    """The store to make, a folder."""
    tokenizer: str | None = None
    """char, byte, bpe:VOCABULARY (trained on 64 MiB from all sources), a run folder, another store, or a Hugging
    Face folder."""
    format: Literal["text", "jsonl", "json", "csv", "parquet", "records"] | None = None
    """What the files are, whatever their names; of a folder, which of its files are meant."""
    field: str = "text"
    """Where the text is: a column, or a dotted path into an object such as meta.body."""
    chat: Literal["assistant", "last", "all", "pairs"] | None = None
    """Rows are conversations: `messages`, `prompt` and `completion`, or ShareGPT's `conversations`. Learned are the
    assistant's turns, the last of these alone, or all that the chat template writes. pairs: rows have `chosen` and
    `rejected` answers, and perhaps the `prompt`."""
    chat_template: str = ""
    """With --chat, another template than that of the --tokenizer folder: a file, or plain."""
    on_error: Literal["fail", "skip"] = "fail"
    """A document that cannot be read ends the command, or is left out, counted and named."""
    min_chars: int = 1
    """Leave out documents of fewer characters."""
    nfc: Switch = False
    """Put accents and letters together (Unicode NFC)."""
    deduplicate: Switch = False
    """Leave out a text that came before; takes about 100 bytes of memory a document."""
    held_out: float = 0.01
    """The fraction of documents, chosen by the hash of their text, that is kept for evaluation. 1 makes a
    store that train.py --held-out takes."""
    shard_tokens: int = 1 << 26
    """Tokens in a shard, which is what a kill can lose."""
    workers: int | None = None
    """Processes that tokenize; by default one for each core."""
    describe: str | None = None
    """Print what is in this store, with its first documents."""
    verify: str | None = None
    """Read all of this store and compare it with the hashes in its manifest."""
    seen: str | None = None
    """Say which documents this run learned from at --step, or at which steps it saw --document."""
    step: int | None = None
    """A step of the run, from 1."""
    document: str | None = None
    """FILE:LINE of a document, as its store names them."""

    def __post_init__(self):
        actions = [name for name in ("output", "describe", "verify", "seen") if getattr(self, name) is not None]
        if len(actions) != 1:
            given = " and ".join(f"--{name}" for name in actions) or "none of them"
            raise ValueError(
                f"prepare.py needs one of --output, --describe, --verify and --seen, got {given}; see --help"
            )
        if self.output is not None and not self.sources:
            raise ValueError(f"--output {self.output} needs sources to make it from; name files or folders")
        if self.output is None and self.sources:
            raise ValueError(f"source {self.sources[0]} does not go with --{actions[0]}; leave it out, or add --output")
        asked = [name for name in ("step", "document") if getattr(self, name) is not None]
        if len(asked) != (self.seen is not None):
            given = " and ".join(f"--{name}" for name in asked) or "neither"
            raise ValueError(f"--seen RUN goes with --step or with --document, got {given}; see --help")
        if self.output is not None and not self.tokenizer:
            raise ValueError(
                "--tokenizer is missing: char, byte, bpe:VOCABULARY or a folder; try --tokenizer bpe:32000"
            )
        if self.chat_template and self.chat is None:
            raise ValueError(f"--chat-template {self.chat_template} goes with --chat; add --chat assistant")
        if self.chat is not None and self.field != "text":
            raise ValueError(f"--field {self.field} does not go with --chat, which reads whole rows; leave it out")
        if self.chat is not None and (self.tokenizer or "").partition(":")[0] in ("char", "bpe"):
            raise ValueError(
                f"--chat needs the tokenizer of a model, not --tokenizer {self.tokenizer}; give the model's folder"
            )
        for name in ("min_chars", "shard_tokens", "workers", "step"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1; leave it out")
        if not 0 <= self.held_out <= 1:
            raise ValueError(f"--held-out {self.held_out} must be from 0 to 1; try 0.01")
