"""Parameters from safetensors files, straight to where they are to be placed.

Invariant: beside the parameters themselves no more than a few pieces of PIECE elements are held, and each device's
shard is filled with what it needs alone. Every tensor of the files is used once, or the error names it.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from parallax.config import TransformerConfig
from parallax.filling import Bounds, fill
from parallax.interop.llama import JOINED, Tensor, named, tensors
from parallax.model.transformer import Params

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}
HEAD = "lm_head.weight"

WITHOUT_HEAD = ("embed_tokens.", "layers.", "norm.", "rotary_emb.")
"""How names begin where a model was saved without its head, as LlamaModel and not LlamaForCausalLM; else model. stands
before them."""

OTHER_FILES = {
    "adapter_model.safetensors": "an adapter; import it with --base RUN, the run of its model",
    "pytorch_model*.bin": "pickled weights; load the model with transformers and save it with save_pretrained",
    "consolidated*.safetensors": "weights under the names of their first authors; take the files for transformers",
    "*.gguf": "weights for llama.cpp; take the files for transformers",
    "model.*.safetensors": "another edition of the weights; rename it to model.safetensors",
}
"""What a folder without the files that are read may hold instead, and what to do about it."""


class TensorFiles:
    """All tensors of a folder by the name that they have in a whole model.

    As transformers does, it takes the single file where there is one, and else all tensors of the files that the index
    names. Raises ValueError if there are no such files, one is damaged, or two tensors have one name.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, safe_open] = {}
        self._places: dict[str, tuple[str, str]] = {}
        for file in [SINGLE] if (folder / SINGLE).exists() else self._indexed():
            for there in self._open(file):
                name = f"model.{there}" if there.startswith(WITHOUT_HEAD) else there
                if name in self._places:
                    raise ValueError(f"tensor {name} is in {self.place(name)} and in {file}; remove one of them")
                self._places[name] = file, there

    @property
    def names(self) -> set[str]:
        return set(self._places)

    def place(self, name: str) -> Path:
        """The file that holds it."""
        return self.folder / self._places[name][0]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As safetensors spells it, such as BF16."""
        return self._slice(name).get_dtype()

    def read(self, name: str, bounds: Bounds) -> np.ndarray:
        """A block of a tensor, in the dtype of the file."""
        try:
            return self._slice(name)[bounds]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.place(name)} cannot be read ({error}); restore it") from None

    def _slice(self, name: str):
        file, there = self._places[name]
        return self._files[file].get_slice(there)

    def _indexed(self) -> list[str]:
        """The files that the index names."""
        path = self.folder / INDEX
        if not path.exists():
            raise ValueError(self._what_is_there())
        try:
            weight_map = dict(json.loads(path.read_text("utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
            raise ValueError(f"{path} must hold a weight_map ({error}); restore it") from None
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise ValueError(
                    f"{path} has {name} in {file!r}, which must be a safetensors file beside it; restore it"
                )
        return sorted(set(weight_map.values()))

    def _what_is_there(self) -> str:
        rule = f"{self.folder} holds neither {SINGLE} nor {INDEX}"
        for pattern, what in OTHER_FILES.items():
            for found in sorted(self.folder.glob(pattern)):
                return f"{rule} but {found.name}, which is {what}"
        return f"{rule}; save the model with transformers' save_pretrained"

    def _open(self, file: str) -> list[str]:
        path = self.folder / file
        try:
            # Not mapped into memory: what was read would count as this process's.
            self._files[file] = opened = safe_open(path, framework="numpy", backend="pread")
            return list(opened.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}); restore it") from None


PIECE = 2**20
"""Elements read at a time: 4 MiB in float32."""

DERIVED = ".rotary_emb.inv_freq"
"""Old files also hold frequencies, which follow from the config."""


def read_params(
    files: TensorFiles, config: TransformerConfig, abstract: Params, piece: int = PIECE, *, as_stored: bool = False
) -> Params:
    """The parameters of a config from the tensors of a folder.

    Args:
      abstract: the tree of `init_params` as jax.ShapeDtypeStruct, with shardings; by default all on the first device.
      piece: how many elements to hold at a time.
      as_stored: whether parameters have the dtypes of the files and not those of `abstract`; a stack of layers whose
        tensors differ has the first that holds them all exactly, and what is stored without its 1 is float32.

    Raises:
      ValueError: a tensor is missing, left over, or of another shape or dtype.
    """
    check_tensors(files, config, piece)
    params: Params = {}
    for entry in tensors(config, _joined(files)):
        entry = dataclasses.replace(entry, name=_name_in(files, config, entry.name))
        leaf: Any = abstract
        *parents, last = entry.path
        target = params
        for key in parents:
            target, leaf = target.setdefault(key, {}), leaf[key]
        leaf = leaf[last]
        if as_stored:
            leaf = jax.ShapeDtypeStruct(leaf.shape, _dtype_of(files, entry), sharding=leaf.sharding)
        target[last] = fill(leaf, partial(_blocks, files, entry, piece))
    return params


def _dtype_of(files: TensorFiles, entry: Tensor) -> Any:
    kinds = (DTYPES[files.dtype(entry.name.format(*numbers))] for numbers in itertools.product(*entry.stack))
    return jnp.result_type(*kinds, *([jnp.float32] if entry.shift else []))


def check_tensors(files: TensorFiles, config: TransformerConfig, piece: int = PIECE) -> None:
    """Raises ValueError unless the files hold the tensors of the config and no others."""
    wanted = {_name_in(files, config, name): entry for name, (entry, _) in named(config, _joined(files)).items()}
    if missing := [name for name in wanted if name not in files.names]:
        raise ValueError(_missing(files, missing, len(wanted)))
    for name in sorted(files.names - wanted.keys()):
        if name.endswith(DERIVED) or _is_tied(files, config, name, piece):
            continue
        raise ValueError(
            f"tensor {name} of {files.place(name)} has no place in the model of config.json; "
            "convert a model of these architectures alone"
        )
    for name, entry in wanted.items():
        if files.shape(name) != entry.shape_there:
            raise ValueError(
                f"tensor {name} has shape {list(files.shape(name))} and must have {list(entry.shape_there)} by "
                "config.json; restore the model's files"
            )
        if files.dtype(name) not in DTYPES:
            raise ValueError(
                f"tensor {name} has dtype {files.dtype(name)}, which is not one of {', '.join(DTYPES)}; "
                "take the model in one of these"
            )


def _joined(files: TensorFiles) -> bool:
    return any(name.endswith(tuple(JOINED)) for name in files.names)


def _name_in(files: TensorFiles, config: TransformerConfig, name: str) -> str:
    """What a tensor is called there: of a tied table, safetensors' save_model keeps the name of the head alone."""
    is_table = config.tie_embeddings and name == tensors(config)[0].name
    return HEAD if is_table and name not in files.names and HEAD in files.names else name


def _missing(files: TensorFiles, names: list[str], wanted: int) -> str:
    first, others = names[0], sorted(files.names)
    if len(names) == wanted and others:
        return (
            f"{files.folder} has tensors such as {others[0]} and none such as {first}, which config.json asks for; "
            "load the model with transformers and save it with save_pretrained"
        )
    if names == [HEAD]:
        return (
            f"tensor {HEAD} is missing in {files.folder}; restore it, or set tie_word_embeddings to true in "
            "config.json if the input embedding is the output embedding too"
        )
    return (
        f"tensor {first} is missing in {files.folder}, of {len(names)} in all that config.json asks for; "
        "restore the model's files"
    )


def _is_tied(files: TensorFiles, config: TransformerConfig, name: str, piece: int) -> bool:
    """Whether a second copy of a tied table stands there, and equals the first."""
    if name != HEAD or not config.tie_embeddings:
        return False
    table = tensors(config)[0]
    if files.shape(name) == files.shape(table.name) == table.shape_there:
        blocks = table.cut(table.whole, piece)
        if all(np.array_equal(files.read(name, block), files.read(table.name, block)) for block in blocks):
            return True
    raise ValueError(
        f"tensor {name} differs from {table.name}, and config.json ties them; set tie_word_embeddings to false there"
    )


def _blocks(files: TensorFiles, entry: Tensor, piece: int, shard: Bounds) -> Iterator[tuple[list[int], np.ndarray]]:
    """(where in the shard, block) for all of a shard that has a tensor; rows that pad a table have none."""
    stacked, own = shard[: len(entry.stack)], shard[len(entry.stack) :]
    own = tuple(slice(s.start, min(s.stop, size)) for s, size in zip(own, entry.shape, strict=True))
    if any(s.start >= s.stop for s in own):
        return
    for place in itertools.product(*(range(s.start, s.stop) for s in stacked)):
        name = entry.name.format(*(numbers[at] for numbers, at in zip(entry.stack, place, strict=True)))
        for bounds in entry.cut(own, piece):
            block = entry.bring(files.read(name, entry.find(bounds)), bounds)
            first = (*place, *(s.start for s in bounds))
            yield [at - s.start for at, s in zip(first, shard, strict=True)], block[(None,) * len(place)]
