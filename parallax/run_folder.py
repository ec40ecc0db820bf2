"""A run folder as a model to use: config, tokenizer and the parameters of a checkpoint.

Invariant: only reads, and needs nothing but the folder.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from parallax.config import TransformerConfig, config_from_dict
from parallax.model.stack import prepare
from parallax.model.transformer import Params, init_params, param_axes
from parallax.storage import open_folder, reason_of
from parallax.tokenizers.base import Tokenizer
from parallax.tokenizers.chat_template import ChatTemplate, read_chat_template
from parallax.tokenizers.registry import load_tokenizer
from parallax.training.checkpoint import Checkpointer


@dataclasses.dataclass(frozen=True)
class Run:
    """What a training run left, ready to use."""

    folder: epath.Path
    config: TransformerConfig
    tokenizer: Tokenizer
    params: Params
    step: int
    """The checkpoint that `params` came from."""
    settings: dict[str, Any]
    """All of config.json: how the run was trained, and on what."""
    chat_template: ChatTemplate | None = None
    """How its conversations are written, where it has a form for them."""

    @property
    def context_length(self) -> int:
        """As `context_length` has it."""
        return context_length(self.settings)

    def prepared(self) -> "Run":
        """The run with parameters as `prepare` leaves them for inference."""
        return dataclasses.replace(self, params=prepare(self.config, self.params))


PARAM_DTYPES = ("float32", "bfloat16")

PlaceParams = Callable[[Callable[[], Params], Params], Params]
"""A function of (init, axes): what `init` gives, as ShapeDtypeStructs with shardings; `axes` names the logical axes of
each array. `parallelism.placement.on_mesh` makes one."""


def abstract_params(config: TransformerConfig, place: PlaceParams | None = None) -> Params:
    """The tree of `init_params` as ShapeDtypeStructs, by default all on the first device."""

    def init() -> Params:
        return init_params(config, jax.random.key(0))

    return jax.eval_shape(init) if place is None else place(init, param_axes(config))


def in_dtype(abstract: Params, dtype: str) -> Params:
    """ShapeDtypeStructs of that dtype; raises ValueError if parameters cannot be held in it."""
    if dtype not in PARAM_DTYPES:
        raise ValueError(f"param_dtype={dtype!r} is not one of {', '.join(PARAM_DTYPES)}; try bfloat16")
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding), abstract)


def load_run(
    folder: str | os.PathLike,
    step: int | None = None,
    place: Callable[[TransformerConfig], Params] = abstract_params,
    param_dtype: str | None = None,
) -> Run:
    """Reads a run with the parameters of `step`, by default those of its best checkpoint.

    Args:
      place: gives the tree of `init_params` as ShapeDtypeStructs with shardings; by default all on the first device.
      param_dtype: what parameters are read into and held in, of PARAM_DTYPES; by default as the checkpoint has them.

    Raises:
      ValueError: the folder is no run, its files contradict each other, or no such checkpoint is intact.
    """
    folder = open_folder(folder)
    settings = read_settings(folder)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    config = config_from_dict(settings["model"])
    if config.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"vocab_size={config.vocab_size} in {folder / 'config.json'} must equal the {tokenizer.vocab_size} of "
            "tokenizer.json; restore the files that training wrote"
        )
    abstract = place(config) if param_dtype is None else in_dtype(place(config), param_dtype)
    checkpoints = Checkpointer(folder / "checkpoints", keep=1, is_writer=False)
    try:
        found, params, _ = checkpoints.restore_params(abstract, step, as_saved=param_dtype is None)
    finally:
        checkpoints.close()
    return Run(folder, config, tokenizer, params, found, settings, read_chat_template(folder, tokenizer))


def trained_length(settings: dict[str, Any]) -> int:
    """The longest sequence that a run's parameters learned from, in tokens, by its config.json.

    Those of other models say it as max_seq_len, and so does a run that recorded neither this nor its flags.
    """
    most = config_from_dict(settings["model"]).max_seq_len
    return min(settings.get("trained_length") or settings.get("train", {}).get("seq_len", most), most)


def context_length(settings: dict[str, Any]) -> int:
    """How many tokens a run's model reads as it learned to, by its config.json.

    Those of its training; or max_seq_len where its attention sees fewer than those at once, and so no distance that
    training never showed.
    """
    config, trained = config_from_dict(settings["model"]), trained_length(settings)
    windows = [layer.sliding_window for layer in config.layers]
    return config.max_seq_len if 0 < min(windows) <= max(windows) < trained else trained


def read_settings(folder: epath.Path) -> dict[str, Any]:
    """All of config.json. Raises ValueError where there is none, or none of a model."""
    path = folder / "config.json"
    remedy = "give the folder that train.py or convert.py wrote"
    try:
        settings = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"run folder {folder} has no readable config.json ({reason_of(error)}); {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{path} must be JSON ({error}); {remedy}") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("model"), dict):
        raise ValueError(f"{path} must hold an object with a model config; {remedy}")
    return settings
