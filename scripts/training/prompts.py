"""What a model makes of fixed prompts at each evaluation.

Invariant: a text depends on the parameters alone: each token is the most probable one, on every layout.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from parallax.config import TransformerConfig
from parallax.inference.generate import whole
from parallax.inference.request import Request
from parallax.model.transformer import Params
from parallax.storage import reason_of
from parallax.text import decode, make_request
from parallax.tokenizers.base import Tokenizer
from parallax.tokenizers.chat import Chat
from parallax.tokenizers.chat_template import ChatTemplate

TOKENS = 64
"""Of a continuation, at the most."""


class Prompts:
    """The prompts of a file, one a line; what a user says, where there is a chat template.

    Attributes:
      lines: of the file, those that hold something.

    Raises ValueError if the file cannot be read or has no line, or a line cannot be continued.
    """

    def __init__(self, path: str, config: TransformerConfig, tokenizer: Tokenizer, template: ChatTemplate | None):
        try:
            self.lines = [line for line in Path(path).read_text("utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--sample-prompts {path} cannot be read: {reason_of(error)}; give a text file") from None
        if not self.lines:
            raise ValueError(f"--sample-prompts {path} must have a prompt a line and has none; leave it out")
        try:
            self._request = request_of(self.lines, tokenizer, template)
            self._arrays, capacity = self._request.arrays(config)
        except ValueError as error:
            raise ValueError(f"--sample-prompts {path}: {error}") from None
        self._tokenizer, self._stops = tokenizer, () if template is None else template.stops
        self._whole = functools.partial(whole, config, capacity=capacity)
        self._compiled: Callable | None = None

    def texts(self, params: Params) -> dict[str, str]:
        """The continuation of each prompt. The devices that hold the parameters work together."""
        if self._compiled is None:
            sharding = jax.tree.leaves(params)[0].sharding
            if isinstance(sharding, NamedSharding):  # all of it on each device, so that each process can read it
                sharding = NamedSharding(sharding.mesh, PartitionSpec())
            self._compiled = jax.jit(self._whole, out_shardings=sharding)
        tokens, lengths = jax.device_get(self._compiled(params, self._arrays))
        rows = zip(self.lines, self._request.prompts, tokens, lengths, strict=True)
        return {
            line: "".join(decode(row[len(prompt) : length].tolist(), self._tokenizer, self._stops))
            for line, prompt, row, length in rows
        }


def request_of(lines: list[str], tokenizer: Tokenizer, template: ChatTemplate | None) -> Request:
    """Greedy continuations of prompts, or answers to them. Raises ValueError for what the tokenizer cannot spell."""
    if template is None:
        return make_request(tokenizer, lines, max_tokens=TOKENS, temperature=0.0)
    chat = Chat(template, tokenizer)
    asked = [np.asarray(chat.prompt([{"role": "user", "content": line}]), np.int32) for line in lines]
    shape = make_request(tokenizer, ["x"] * len(lines), max_tokens=TOKENS, temperature=0.0, stop=template.stops)
    return dataclasses.replace(shape, prompts=asked)
