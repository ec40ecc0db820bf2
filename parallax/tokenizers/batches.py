"""Many documents to ids at once, as a store of tokens holds them.

Invariant: a document is `encode` of its text and the end-of-text id, but that text which spells a special token, such
as <|endoftext|>, is text: only the end of a document gives its id.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from parallax.tokenizers.base import Tokenizer
from parallax.tokenizers.bpe import BPETokenizer
from parallax.tokenizers.hugging_face import HuggingFaceTokenizer

Encode = Callable[[Sequence[str]], list[np.ndarray]]


def document_encoder(tokenizer: Tokenizer) -> Encode:
    """What turns texts into documents of ids, int32 [length] each, with a beginning and an end where there is one.

    Where the tokenizer is the library's, it uses as many threads as TOKENIZERS_PARALLELISM allows. Raises ValueError
    for text that the tokenizer cannot spell.
    """
    start = np.array([], np.int32)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        whole = tokenizer.encode("a")
        start = whole[: len(whole) - len(tokenizer.encode_part("a"))]
    end = np.array([] if tokenizer.eos_id is None else [tokenizer.eos_id], np.int32)
    if not isinstance(tokenizer, BPETokenizer | HuggingFaceTokenizer):
        return lambda texts: [np.concatenate([start, tokenizer.encode(text), end]) for text in texts]
    import tokenizers

    model: Any = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.to_json()["definition"]))
    model.no_truncation()
    model.no_padding()
    model.encode_special_tokens = True

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        found = model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.concatenate([start, np.array(each.ids, np.int32), end]) for each in found]

    return encode
