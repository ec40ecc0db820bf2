"""A tokenizer that another model brings: the `tokenizer.json` of the `tokenizers` library.

Invariant: ids are those of the library itself, and each id stands for fixed bytes, so that streams work as for any
other tokenizer. A kind of which that is not known is refused.
"""

import copy
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from parallax.tokenizers.base import Tokenizer, check_id
from parallax.tokenizers.bpe import BPETokenizer, byte_of_character
from parallax.tokenizers.native import encode
from parallax.tokenizers.plain import ByteTokenizer, CharTokenizer

SPACE = "▁"
"""How SentencePiece spells a space."""


class HuggingFaceTokenizer(Tokenizer):
    """Byte-level pairs (Llama 3, Qwen, SmolLM), or SentencePiece's with bytes to fall back on (Llama 2, Mistral).

    A text begins with the ids that the tokenizer puts before one, such as <s>, once, also where the text spells them
    itself; where it puts none, an empty text is the id that the model begins with. Ids that the tokenizer puts there
    stand for no bytes, nor do those that end a text. Text that spells an added token, such as <|im_start|>, gets its
    id, as in the library: in a prompt it is meant. decode(encode(text)) == text but for these, and as far as the
    tokenizer leaves text as it is: some put accents and letters together (NFC).
    """

    def __init__(
        self, definition: dict[str, Any], vocab_size: int, end_ids: Sequence[int], bos_id: int | None = None
    ) -> None:
        """Takes a tokenizer.json, the rows of the model's embedding, the ids that end a text, `eos_id` first, and the
        one that the model begins with.

        Raises ValueError if it is damaged, of another kind, or has ids that the model has not.
        """
        import tokenizers

        try:
            self._model = tokenizers.Tokenizer.from_str(json.dumps(definition))
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"its tokenizer.json is damaged ({error}); restore it") from None
        self._model.no_truncation()
        self._model.no_padding()
        self._definition, self._vocab_size = definition, vocab_size
        self._end_ids = tuple(int(token) for token in end_ids)
        largest = max(self._model.get_vocab().values(), default=-1)
        bos = () if bos_id is None else (bos_id,)
        for token in (largest, *self._end_ids, *bos):
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"its id {token} must be from 0 to {vocab_size - 1}, the rows of the embedding; "
                    "take the tokenizer.json and config.json of one model"
                )
        self._begin = self._begin_ids()
        self._begin_of_nothing: tuple[int, ...] = self._begin or bos
        self._bytes, self._drops_space = self._spellings()

    @property
    def name(self) -> str:
        return f"hugging_face:{self._vocab_size}"

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def eos_id(self) -> int | None:
        return next(iter(self._end_ids), None)

    @property
    def end_ids(self) -> tuple[int, ...]:
        return self._end_ids

    @property
    def begin_ids(self) -> tuple[int, ...]:
        """What a text of nothing is."""
        return self._begin_of_nothing

    @property
    def added_tokens(self) -> dict[int, str]:
        """Spellings, by id, of the tokens that the library finds in a text before all others."""
        return {token["id"]: token["content"] for token in self._definition.get("added_tokens") or ()}

    @property
    def special_tokens(self) -> dict[str, int]:
        """Ids, by spelling, of those that no text is meant to hold: what is called special, begins or ends a text."""
        own = {token["id"] for token in self._definition.get("added_tokens") or () if token.get("special")}
        own |= {*self._begin_of_nothing, *self._end_ids}
        return {spelling: token for token, spelling in self.added_tokens.items() if token in own}

    def respelled(self, mark: str) -> tuple[Any, dict[int, int]]:
        """The library's tokenizer with `mark` before the spelling of each special token, and its ids of added tokens.

        The library may give added tokens other ids then; theirs here, by these.
        """
        import tokenizers

        special = self.special_tokens
        added = [
            token | {"content": mark * (token["content"] in special) + token["content"]}
            for token in self._definition.get("added_tokens") or ()
        ]
        changed = {"added_tokens": added, "post_processor": None}
        model: Any = tokenizers.Tokenizer.from_str(json.dumps(self._definition | changed))
        model.no_truncation()
        model.no_padding()
        return model, {model.token_to_id(token["content"]): token["id"] for token in added}

    def encode(self, text: str) -> np.ndarray:
        if not text:
            return np.array(self._begin_of_nothing, np.int32)
        ids = self.encode_part(text)
        if tuple(ids[: len(self._begin)].tolist()) == self._begin:
            return ids  # the text spells them itself
        return np.concatenate([np.array(self._begin, np.int32), ids])

    def encode_part(self, text: str) -> np.ndarray:
        return encode(self._model, text)

    def token_bytes(self, token_id: int) -> bytes:
        check_id(token_id, self._vocab_size)
        return self._bytes.get(token_id, b"")  # an embedding may have rows that no token uses

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text, without SentencePiece's space before it where they begin one, as those of `encode` do."""
        given = [int(token) for token in ids]
        text = b"".join(map(self.token_bytes, given)).decode("utf-8", "replace")
        whole = self._drops_space and tuple(given[: len(self._begin)]) == self._begin
        return text.removeprefix(" ") if whole else text

    def to_json(self) -> dict[str, Any]:
        values = {
            "kind": "hugging_face",
            "definition": self._definition,
            "vocab_size": self._vocab_size,
            "end_ids": list(self._end_ids),
        }
        if self._begin_of_nothing != self._begin:
            values["bos_id"] = self._begin_of_nothing[0]
        return values

    def _begin_ids(self) -> tuple[int, ...]:
        plain, ids = (self._model.encode("a", add_special_tokens=special).ids for special in (False, True))
        starts = (start for start in range(len(ids)) if ids[start : start + len(plain)] == plain)
        return tuple(ids[: next(starts, 0)])

    def _spellings(self) -> tuple[dict[int, bytes], bool]:
        """The bytes of each id, and whether a space stands before a text that is none of it."""
        steps = list(_steps(self._definition.get("decoder")))
        kinds = {step["type"] for step in steps}
        added = self.added_tokens
        pieces = {token: piece for piece, token in self._model.get_vocab().items() if token not in added}
        try:
            if "ByteLevel" in kinds:
                byte_of, drops_space = byte_of_character(), False
                spelled = {token: bytes(byte_of[character] for character in piece) for token, piece in pieces.items()}
            elif "ByteFallback" in kinds:
                drops_space = any(step["type"] in ("Strip", "Metaspace") for step in steps)
                spelled = {token: _piece_bytes(piece) for token, piece in pieces.items()}
            else:
                raise ValueError(f"decoder {', '.join(sorted(kinds)) or 'none'}")
            # 13 bytes never occur in UTF-8.
            if len({piece for piece in spelled.values() if len(piece) == 1}) < 256 - 13:
                raise ValueError("bytes are missing")
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"its tokenizer.json must spell any text by bytes ({error}); convert a model of Llama, Mistral or Qwen"
            ) from None
        if drops_space and not self._begin:
            raise ValueError(
                "its tokenizer.json puts a space before a text and no id, so that a text looks like a "
                "continuation; convert a model whose texts begin with an id"
            )
        silent = {*self._begin, *self._end_ids}
        literal = {token: b"" if token in silent else text.encode() for token, text in added.items()}
        return spelled | literal | dict.fromkeys(silent, b""), drops_space


END_OF_TEXT = "<|endoftext|>"


def tokenizer_to_hf(tokenizer: Tokenizer) -> dict[str, Any]:
    """Any tokenizer of this project as a tokenizer.json with the same ids.

    One of characters refuses those that it does not know, as it does here, and does not drop them.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    if isinstance(tokenizer, HuggingFaceTokenizer):
        return copy.deepcopy(tokenizer.to_json()["definition"])
    ours = tokenizer.to_json()
    splitter: Any
    if ours["kind"] == "bpe":
        model = tokenizers.Tokenizer.from_str(json.dumps(ours["definition"]))
    elif ours["kind"] == "byte":
        model = tokenizers.Tokenizer(models.BPE(vocab=byte_of_character(), merges=[]))
        splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        model.pre_tokenizer = splitter
    else:
        vocab = {character: token for token, character in enumerate(ours["alphabet"])}
        # Where <unk> is no word either, this model raises an error for an unknown one; BPE would leave it out.
        model = tokenizers.Tokenizer(models.WordLevel(vocab=vocab))
        splitter = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        model.pre_tokenizer = splitter
    decoder: Any = decoders.Fuse() if ours["kind"] == "char" else decoders.ByteLevel()
    model.decoder = decoder
    if tokenizer.eos_id is not None:
        model.add_special_tokens([END_OF_TEXT])  # takes the next id, which is ours
    return json.loads(model.to_str())


def tokenizer_from_hf(
    definition: dict[str, Any], vocab_size: int, end_ids: Sequence[int], bos_id: int | None = None
) -> Tokenizer:
    """The tokenizer that `tokenizer_to_hf` made a tokenizer.json of, or else a HuggingFaceTokenizer of it.

    Raises ValueError as that does.
    """
    ours = _exported_here(definition)
    if ours is not None and (ours.vocab_size, ours.end_ids) == (vocab_size, tuple(end_ids)):
        return ours
    return HuggingFaceTokenizer(definition, vocab_size, end_ids, bos_id)


def _exported_here(definition: dict[str, Any]) -> Tokenizer | None:
    match definition:
        case {"added_tokens": [{"content": content}]} if content != END_OF_TEXT:
            return None
        case {"added_tokens": [_, _, *_]}:  # models of others have many, and large vocabularies to compare
            return None
        case {"added_tokens": list(added), "model": {"type": "WordLevel", "vocab": dict(vocab)}}:
            ours: Tokenizer = CharTokenizer("".join(vocab), has_eos=bool(added))
        case {"pre_tokenizer": {"use_regex": False}, "model": {"type": "BPE", "merges": []}}:
            ours = ByteTokenizer()
        case {"model": {"type": "BPE"}}:
            try:
                ours = BPETokenizer(definition | {"decoder": None, "added_tokens": []})
            except ValueError:
                return None
        case _:
            return None
    return ours if tokenizer_to_hf(ours) == definition else None


def _steps(decoder: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The steps of a decoder, which may be a sequence of them."""
    if decoder is not None:
        inner = decoder.get("decoders") if decoder["type"] == "Sequence" else None
        yield from [decoder] if inner is None else [step for each in inner for step in _steps(each)]


def _piece_bytes(piece: str) -> bytes:
    """A piece of SentencePiece, in which <0x0A> is a byte."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE, " ").encode()
