"""A Hugging Face folder becomes a run folder, and a run folder a Hugging Face folder.

Invariant: the work is done in a hidden folder, beside the target or above it, which is renamed at the end.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from etils import epath

from parallax.config import TransformerConfig, config_from_dict, config_to_dict
from parallax.interop.hf_config import config_from_hf, config_to_hf
from parallax.interop.peft import read_adapters, write_adapters
from parallax.interop.reading import TensorFiles, read_params
from parallax.interop.writing import MAX_FILE_BYTES, write_params
from parallax.model.adapters import take_adapters, without_adapters
from parallax.model.transformer import Params
from parallax.run_folder import (
    Run,
    abstract_params,
    best_source,
    in_dtype,
    load_run,
    read_checkpoint,
    read_settings,
    trained_length,
)
from parallax.storage import is_remote, open_folder, write_json
from parallax.tokenizers.base import Tokenizer
from parallax.tokenizers.chat_template import CONFIG, ChatTemplate, read_chat_template, write_chat_template
from parallax.tokenizers.hugging_face import HuggingFaceTokenizer, tokenizer_from_hf, tokenizer_to_hf
from parallax.tokenizers.registry import load_tokenizer, save_tokenizer
from parallax.training.checkpoint import Checkpointer

Place = Callable[[TransformerConfig], Params]
"""Gives the tree of `init_params` as ShapeDtypeStructs with shardings."""


def import_model(source: Path, run: str | Path, place: Place = abstract_params, param_dtype: str | None = None) -> str:
    """Makes the run folder `run`: config.json, tokenizer.json, the chat template, and checkpoint 0.

    That holds parameters alone, which have `param_dtype`, by default the dtypes of the folder's tensors.

    Returns:
      a line for the person who watches.

    Raises:
      ValueError: `source` is no folder of a model that can be run here, or `run` exists.
    """
    _check_folder(source)
    with _made(run) as draft:
        read = read_model(source, place, param_dtype)
        if read.chat_template:
            read.chat_template.check()
        _write_run(draft, read.settings, read.tokenizer, read.chat_template, read.params)
    size, kind = f"{read.config.num_params():,} parameters", f"{read.tokenizer.name} tokens"
    return f"imported  {source}: {size}, {kind}; run folder: {run}"


def read_model(source: Path, place: Place = abstract_params, param_dtype: str | None = None) -> Run:
    """The model of a Hugging Face folder, as the run that `import_model` makes of it: step 0, nothing of training.

    Raises ValueError if `source` is no folder of a model that can be run here.
    """
    _check_folder(source)
    values = _read_json(source / "config.json")
    config = config_from_hf(values)
    tokenizer = _read_tokenizer(source, values, config)
    abstract = place(config) if param_dtype is None else in_dtype(place(config), param_dtype)
    params = read_params(TensorFiles(source), config, abstract, as_stored=param_dtype is None)
    imported = {"folder": source.resolve().name, "model_type": values["model_type"]}
    settings = {"model": config_to_dict(config), "imported": imported}
    template = read_chat_template(epath.Path(source), tokenizer)
    return Run(epath.Path(source), config, tokenizer, params, 0, settings, template)


def read_tokenizer(source: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder. Raises ValueError if it has none, or one that cannot be used here."""
    _check_folder(source)
    values = _read_json(source / "config.json")
    return _read_tokenizer(source, values, config_from_hf(values))


def read_config(source: Path) -> TransformerConfig:
    """The model of a Hugging Face folder, or of a config.json by itself.

    Raises ValueError if there is no such file, it lacks a size, or the model computes what this one cannot.
    """
    return config_from_hf(_read_json(source / "config.json" if source.is_dir() else source))


def _check_folder(source: Path) -> None:
    if not source.is_dir():
        raise ValueError(f"{source} must be a Hugging Face folder and is none; download one, and give its path")


def export_model(
    run: str,
    target: str | Path,
    *,
    step: int | None = None,
    dtype: str = "float32",
    context: Literal["crop", "extend"] = "crop",
    max_file_bytes: int = MAX_FILE_BYTES,
    place: Place = abstract_params,
) -> str:
    """Makes the Hugging Face folder `target` of the best checkpoint, or of `step`.

    Args:
      context: what becomes max_position_embeddings, which other programs keep to. crop: how many tokens the model reads
        as it learned to; extend: its max_seq_len.

    Returns:
      a line for the person who watches.

    Raises:
      ValueError: `run` is no run, no such architecture computes what it does, or `target` exists.
    """

    def checked(config: TransformerConfig) -> Params:
        config_to_hf(without_adapters(config))  # refuses before parameters are read
        return place(config)

    with _made(target) as draft:
        loaded = load_run(run, step, checked, "bfloat16" if dtype == "bfloat16" else None)
        longest = loaded.context_length if context == "crop" else loaded.config.max_seq_len
        values = config_to_hf(dataclasses.replace(loaded.config, max_seq_len=longest))
        values |= {"dtype": dtype, **_special_ids(loaded.tokenizer)}
        write_params(loaded.params, loaded.config, draft, dtype, max_file_bytes)
        _write_tokenizer(loaded.tokenizer, loaded.chat_template, draft)
        write_json(draft / "config.json", values)
    return f"exported  {run}, step {loaded.step}: {values['model_type']}, {dtype}; folder: {target}"


def import_adapters(source: Path, base: str | Path, run: str | Path) -> str:
    """Makes the run folder `run` of a PEFT folder: checkpoint 0 holds the adapters, and names that of their base.

    Args:
      base: the run folder of the model that they are beside; its best checkpoint is meant.

    Returns:
      a line for the person who watches.

    Raises:
      ValueError: `source` holds no adapters of this base, `base` is no run, or `run` exists.
    """
    _check_folder(source)
    above = open_folder(base)
    settings = read_settings(above)
    model = config_from_dict(settings["model"])
    if model.lora.rank:
        raise ValueError(f"--base {base} holds adapters alone; give the run of the model that they are beside")
    config, adapters = read_adapters(source, model)
    tokenizer = load_tokenizer(above / "tokenizer.json")
    with _made(run) as draft:
        named = best_source(base)._asdict()
        imported = {"folder": source.resolve().name, "model_type": "adapters"}
        kept = {"model": config_to_dict(config), "trained_length": trained_length(settings)}
        settings = kept | {"imported": imported, "base": named}
        _write_run(draft, settings, tokenizer, read_chat_template(above, tokenizer), adapters)
    return f"imported  {source}: adapters of rank {config.lora.rank} for {base}; run folder: {run}"


def export_adapters(run: str, target: str | Path, *, step: int | None = None) -> str:
    """Makes the PEFT folder `target` of the adapters of the best checkpoint, or of `step`.

    Returns:
      a line for the person who watches.

    Raises:
      ValueError: `run` has no adapters, or `target` exists.
    """
    folder = open_folder(run)
    config = config_from_dict(read_settings(folder)["model"])
    if not config.lora.rank:
        raise ValueError(f"{run} has no adapters, but all of its parameters; leave out --adapter")
    with _made(target) as draft:
        adapters, source = read_checkpoint(folder, take_adapters(abstract_params(config)), step)
        write_adapters(adapters, config, draft)
    return f"exported  {run}, step {source.step}: adapters of rank {config.lora.rank}; folder: {target}"


def _write_run(
    folder: Path, settings: dict[str, Any], tokenizer: Tokenizer, template: ChatTemplate | None, params: Params
) -> None:
    """The files of a run folder, with checkpoint 0."""
    if template:
        write_chat_template(template, folder)
    write_json(folder / "config.json", settings)
    save_tokenizer(tokenizer, folder / "tokenizer.json")
    with contextlib.closing(Checkpointer(folder / "checkpoints", keep=1)) as checkpoints:
        checkpoints.save(0, {"params": params}, {"config": settings, "tokenizer": tokenizer.to_json()})


@contextlib.contextmanager
def _made(folder: str | Path) -> Iterator[Path]:
    """A folder to fill, which becomes `folder`; nothing stays where it fails."""
    target = Path(folder)
    if is_remote(folder):
        raise ValueError(f"folder {folder} must be local, since it is renamed when it is whole; copy it afterwards")
    if target.exists():
        raise ValueError(f"folder {target} exists already; choose another")
    target = target.expanduser().absolute()
    above = next(folder for folder in target.parents if folder.exists())
    draft = above / f".{target.name}.{uuid.uuid4().hex}"
    try:
        draft.mkdir()
        yield draft
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(draft, target)
    except OSError as error:
        raise ValueError(f"folder {target} cannot be written ({error.strerror or error}); choose another") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        adapters = path.with_name("adapter_config.json").exists()
        remedy = "it holds adapters alone, so give --base RUN" if adapters else "restore the model's files"
        raise ValueError(f"{path} must be a JSON file ({reason}); {remedy}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object; restore the model's files")
    return values


def _read_tokenizer(source: Path, values: dict[str, Any], config: TransformerConfig) -> Tokenizer:
    path = source / "tokenizer.json"
    if not path.exists():
        raise ValueError(
            f"{source} holds no tokenizer.json; load its tokenizer with transformers' AutoTokenizer and save it there"
        )
    definition, more = _read_json(path), source / "generation_config.json"
    ends: list[int] = []
    for holder in (values, _read_json(more) if more.exists() else {}):
        given = holder.get("eos_token_id")
        ends += [] if given is None else given if isinstance(given, list) else [given]
    if not all(type(token) is int for token in ends):
        raise ValueError(f"eos_token_id={ends!r} of {source} must be one id or several; restore the model's files")
    begin = values.get("bos_token_id")
    if begin is not None and type(begin) is not int:
        raise ValueError(f"bos_token_id={begin!r} of {source} must be one id; restore the model's files")
    try:
        return tokenizer_from_hf(definition, config.vocab_size, tuple(dict.fromkeys(ends)), begin)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """What generation begins and ends with, in config.json; null where there is none, else 1 and 2 are meant."""
    ends = list(tokenizer.end_ids)
    begin = tokenizer.begin_ids if isinstance(tokenizer, HuggingFaceTokenizer) else ()
    return {
        "bos_token_id": next(iter(begin), None),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": None,
    }


def _write_tokenizer(tokenizer: Tokenizer, template: ChatTemplate | None, folder: Path) -> None:
    definition = tokenizer_to_hf(tokenizer)
    (folder / "tokenizer.json").write_text(json.dumps(definition, ensure_ascii=False), "utf-8")
    spelled = {token["id"]: token["content"] for token in definition.get("added_tokens") or ()}
    special = _special_ids(tokenizer)
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, token in (("bos_token", special["bos_token_id"]), ("eos_token", tokenizer.eos_id)):
        if token in spelled:
            values[name] = spelled[token]
    if template:
        write_chat_template(template, folder)
        values |= template.special_tokens
    write_json(folder / CONFIG, values)
