"""A run folder as a model to use: config, tokenizer and the parameters of a checkpoint.

Invariant: only reads, and needs nothing but the folder.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from contextlib import closing
from typing import Any, NamedTuple

import jax
from etils import epath

from parallax.config import TransformerConfig, config_from_dict
from parallax.model.adapters import beside, join, merge, take_adapters, take_base, without_adapters
from parallax.model.stack import prepare
from parallax.model.transformer import Params, init_params, param_axes
from parallax.storage import is_remote, open_folder, reason_of
from parallax.tokenizers.base import Tokenizer
from parallax.tokenizers.chat_template import ChatTemplate, read_chat_template
from parallax.tokenizers.registry import load_tokenizer
from parallax.training.checkpoint import Checkpointer, to_stderr


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
        """`context_length` of its settings."""
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

    Adapters are merged into their base, which is read from its own run: what comes back is a model without them.

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
    placed = place(config)
    as_saved = param_dtype is None
    abstract = placed if as_saved else in_dtype(placed, param_dtype)
    if not config.lora.rank:
        params, source = read_checkpoint(folder, abstract, step, as_saved=as_saved)
    else:  # adapters stay in float32, so that a merged matrix is rounded once
        adapters, source = read_checkpoint(folder, take_adapters(placed), step)
        base, _ = read_base(folder, settings, take_base(abstract), as_saved=as_saved)
        params = jax.jit(lambda base, adapters: merge(config, join(base, adapters)), donate_argnums=0)(base, adapters)
        config = without_adapters(config)
    return Run(folder, config, tokenizer, params, source.step, settings, read_chat_template(folder, tokenizer))


def load_adapters(folder: str | os.PathLike, base: Run) -> Run:
    """Reads a run of adapters beside a base that is read already and whose arrays it shares: they are not merged.

    Raises ValueError if it has no adapters, or they were learned beside another checkpoint.
    """
    folder = open_folder(folder)
    settings = read_settings(folder)
    config = config_from_dict(settings["model"])
    if not config.lora.rank:
        raise ValueError(f"{folder} must hold adapters and holds a whole model; serve it by itself")
    named = _base_of(folder, settings)
    if named.sha256 != identity_of(base.folder, base.step):
        raise ValueError(
            f"{folder} has adapters for step {named.step} of {named.run}, "
            f"which step {base.step} of {base.folder} is not; give their own base"
        )
    adapters, source = read_checkpoint(folder, take_adapters(abstract_params(config)))
    params = beside(config, base.params, adapters)
    template = read_chat_template(folder, base.tokenizer)
    return Run(folder, config, base.tokenizer, params, source.step, settings, template)


def identity_of(run: epath.Path, step: int) -> str:
    """What tells the checkpoint of a step from others. Raises ValueError if it cannot be trusted."""
    with _checkpoints(run) as checkpoints:
        return checkpoints.identity(step)


class Source(NamedTuple):
    """The checkpoint that parameters came from."""

    run: str
    """Its run folder, absolute."""
    step: int
    sha256: str
    """As `Checkpointer.identity` gives it."""


def read_checkpoint(
    run: str | os.PathLike,
    abstract: Params,
    step: int | None = None,
    *,
    as_saved: bool = False,
    notify: Callable[[str], None] = to_stderr,
) -> tuple[Params, Source]:
    """The parameters of `step` of a run, by default of its best checkpoint, as `abstract` has them, or `as_saved`.

    `notify` takes one line about a checkpoint that cannot be trusted.

    Raises ValueError if it has no such checkpoint that is intact, or one of other shapes.
    """
    with _checkpoints(open_folder(run), notify) as checkpoints:
        found, params = checkpoints.restore_params(abstract, step, as_saved=as_saved)
        return params, Source(_whole_path(run), found, checkpoints.identity(found))


def best_source(run: str | os.PathLike) -> Source:
    """The best checkpoint of a run, whose arrays are not read. Raises ValueError if it has none."""
    folder = open_folder(run)
    with _checkpoints(folder) as checkpoints:
        step = checkpoints.best_step()
        if step is None:
            raise ValueError(f"{folder} must have a checkpoint and has none; give another run")
        return Source(_whole_path(run), step, checkpoints.identity(step))


def _checkpoints(run: epath.Path, notify: Callable[[str], None] = to_stderr) -> closing[Checkpointer]:
    """The checkpoints of a run, to be read alone."""
    return closing(Checkpointer(run / "checkpoints", keep=1, is_writer=False, notify=notify))


def _whole_path(run: str | os.PathLike) -> str:
    return str(run) if is_remote(run) else os.path.abspath(open_folder(run))


def read_base(
    folder: Any, settings: dict[str, Any], abstract: Params, *, as_saved: bool = False
) -> tuple[Params, Source]:
    """The frozen parameters beside which the adapters of a run were learned.

    Args:
      settings: the config.json of the run, which names them as `base`.

    Raises:
      ValueError: they are not there, or are others by now.
    """
    named = _base_of(folder, settings)
    remedy = f"bring back checkpoint {named.step} of {named.run}"
    beside = folder.parent / os.path.basename(named.run)  # both folders may have been moved together
    places = [place for place in (named.run, beside) if (open_folder(place) / "checkpoints").exists()]
    if not places:
        raise ValueError(f"{folder} holds adapters alone, and their base {named.run} is not there; {remedy}")
    params, found = read_checkpoint(places[0], abstract, named.step, as_saved=as_saved)
    if found.sha256 != named.sha256:
        raise ValueError(
            f"{folder} has adapters of a base with sha256 {named.sha256}, and {named.run} has {found.sha256}; {remedy}"
        )
    return params, named


def _base_of(folder: Any, settings: dict[str, Any]) -> Source:
    """What the config.json of a run of adapters names as their base. Raises ValueError if it names none."""
    try:
        return Source(**settings["base"])
    except (KeyError, TypeError):
        raise ValueError(f"{folder / 'config.json'} must name the base of the adapters; restore the file") from None


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
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON ({error}); {remedy}") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("model"), dict):
        raise ValueError(f"{path} must hold an object with a model config; {remedy}")
    return settings
