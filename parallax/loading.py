"""A trained or imported model to use from Python: `parallax.load`.

Invariant: a prompt is continued as generate.py continues it with the same options, token for token.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np

from parallax.config import TransformerConfig
from parallax.inference.context import ContextGenerator
from parallax.inference.generate import Generator
from parallax.inference.stopping import round_up
from parallax.interop.folders import read_model
from parallax.layers.attend import cut
from parallax.model.transformer import Params, TransformerLM
from parallax.run_folder import PlaceParams, Run, abstract_params, load_run
from parallax.storage import open_folder
from parallax.text import Options, decode, listed, make_request, whole_number
from parallax.tokenizers.base import encode_checked

SMALLEST_WIDTH, LOGITS_OF = 32, 256
"""Tokens: a text to score is padded to the former at least; logits of so many are held at once."""


@dataclasses.dataclass(frozen=True)
class Score:
    """The tokens of a text that have something before them, each given all before it."""

    token_ids: np.ndarray
    """int32 [T]"""
    log_probs: np.ndarray
    """float32 [T], in nats; their sum is the log-probability of the text."""


class Model:
    """What `load` gives: the parameters of a run with its tokenizer. What it compiled, it keeps."""

    def __init__(self, run: Run):
        self.config, self.tokenizer, self.params = run.config, run.tokenizer, run.params
        self.folder, self.step, self.context_length = run.folder, run.step, run.context_length
        self.chat_template = run.chat_template
        self._generator = Generator(run.config)
        self._log_probs = jax.jit(functools.partial(token_log_probs, run.config))

    @overload
    def generate(self, prompt: str, **options: Unpack[Options]) -> str: ...
    @overload
    def generate(self, prompt: list[str] | tuple[str, ...], **options: Unpack[Options]) -> list[str]: ...
    def generate(self, prompt: str | list[str] | tuple[str, ...], **options: Unpack[Options]) -> str | list[str]:
        """The continuation of a prompt, without the prompt; of several, a list, computed in one batch.

        Args:
          options: max_tokens=200, temperature=0.8, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, stop=(),
            seed=0 and context="slide"; `parallax.text.Options` says what they mean. Prompt i is drawn with seed + i.

        Raises:
          ValueError: a prompt cannot be spelled or is too long, or an option is out of its range.
        """
        generator = self._in_context(options)
        rows = generator.generate(self.params, make_request(self.tokenizer, listed(prompt), **options))
        stop = options.get("stop", ())
        texts = ["".join(decode(row.tolist(), self.tokenizer, stop)) for row in rows]
        return texts[0] if isinstance(prompt, str) else texts

    def stream(self, prompt: str, **options: Unpack[Options]) -> Iterator[str]:
        """What `generate` gives for one prompt, in pieces as it is drawn; raises ValueError as that, at the call."""
        generator = self._in_context(options)
        pairs = generator.stream(self.params, make_request(self.tokenizer, [prompt], **options))
        pieces = decode((token for _, token in pairs), self.tokenizer, options.get("stop", ()))
        return (piece for piece in pieces if piece)

    def _in_context(self, options: Options) -> ContextGenerator:
        """What takes the option `context`, out of the others."""
        return ContextGenerator(self._generator, options.pop("context", "slide"), self.context_length)

    def score(self, text: str) -> Score:
        """Log-probabilities of the tokens of a text.

        The first token has nothing before it and is left out, unless the tokenizer begins a text with an id of its own,
        such as <s>: then that one is left out. Raises ValueError if the text cannot be spelled, or is longer than the
        model sees at once.
        """
        (text,) = listed([text])
        ids = encode_checked(self.tokenizer, text)
        inputs, targets, limit = ids[:-1], ids[1:], self.config.max_seq_len
        if len(inputs) > limit:
            raise ValueError(
                f"text of {len(ids)} tokens must not exceed max_seq_len + 1 = {limit + 1}; score it in parts, or use "
                "evaluate.py, which slides a window over it"
            )
        width = min(max(SMALLEST_WIDTH, round_up(len(inputs))), limit)  # few widths, few compilations
        padding = 0, width - len(inputs)
        log_probs, _ = self._log_probs(self.params, np.pad(inputs, padding)[None], np.pad(targets, padding)[None])
        return Score(targets, np.array(log_probs)[0, : len(targets)])


def load(
    folder: str | os.PathLike,
    *,
    step: int | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    param_dtype: Literal["float32", "bfloat16"] | None = None,
    mesh: PlaceParams | None = None,
) -> Model:
    """Loads a run folder, local or on gs://, or a local Hugging Face folder of a Llama, Mistral or Qwen model.

    Args:
      step: which checkpoint of a run; by default the best.
      dtype: what to compute in; by default as in training, float32 for a Hugging Face folder.
      param_dtype: what to hold parameters in, which are read straight into it; by default as in the files.
      mesh: spreads the parameters over devices: `parallelism.placement.on_mesh("fsdp=8")`, or any function that gives
        where they go. A function and not a string, since the model knows no devices and this package therefore does not
        import `parallelism`: whoever uses both joins them. By default all are on the first device.

    Raises:
      ValueError: the folder holds no model that can be run here, or the mesh does not fit the devices or the model.
    """
    step = None if step is None else whole_number("step", step)
    place = functools.partial(abstract_params, place=mesh)
    if _is_hugging_face(folder):
        if step is not None:
            raise ValueError(f"step={step} names a checkpoint of a run, and {folder} has none; leave it out")
        run = read_model(Path(folder), place, param_dtype)
    else:
        run = load_run(folder, step, place, param_dtype)
    if dtype is not None:
        run = dataclasses.replace(run, config=dataclasses.replace(run.config, dtype=dtype))
    return Model(run.prepared())


def _is_hugging_face(folder: str | os.PathLike) -> bool:
    """Whether config.json names a model type; of a folder that has none, `load_run` tells what is missing."""
    try:
        settings = json.loads((open_folder(folder) / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and "model_type" in settings


def token_log_probs(
    config: TransformerConfig, params: Params, inputs_BT: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """log p(target | inputs of its row up to its place), and whether it is the most probable there.

    Returns:
      float32 [B, T], in nats, and bool [B, T]. Padding at the end of rows changes nothing.
    """
    # By blocks, memory stays linear in the length, on all devices.
    config = dataclasses.replace(config, attention="blocks", dropout_rate=0.0)
    model = TransformerLM.from_params(config, params)
    x_BTD, _, _ = model.hidden(inputs_BT)
    B, T = inputs_BT.shape
    table_WD, chunk = model.head.whole(), min(max(1, LOGITS_OF // B), T)

    def of_chunk(arrays: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x_BCD, targets_BC = arrays
        logits_BCW = model.head.logits(table_WD, x_BCD)
        log_probs_BC1 = jnp.take_along_axis(jax.nn.log_softmax(logits_BCW), targets_BC[..., None], axis=-1)
        return log_probs_BC1[..., 0], jnp.argmax(logits_BCW, axis=-1) == targets_BC

    scored = jax.lax.map(of_chunk, (cut(x_BTD, chunk), cut(targets_BT, chunk)))
    log_probs_BT, greedy_BT = (array.swapaxes(0, 1).reshape(B, -1)[:, :T] for array in scored)
    return log_probs_BT, greedy_BT
