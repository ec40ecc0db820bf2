"""The safetensors files of a Hugging Face folder, read a part of a tensor at a time.

Invariant: each tensor has one file, and only what is asked for is read.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from parallax.filling import Bounds

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = ("F32", "F16", "BF16")


class TensorFiles:
    """All tensors of a folder by name.

    Raises ValueError if there are no such files, one is damaged, or they are not what their index says.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, safe_open] = {}
        self._file_of: dict[str, str] = {}
        indexed = self._index()
        for file in sorted(set(indexed.values())) if indexed is not None else [SINGLE]:
            for name in self._open(file):
                if indexed is not None and indexed.get(name) != file:
                    raise ValueError(
                        f"tensor {name} of {folder / file} is not of that file in {INDEX}; restore the model's files"
                    )
                self._file_of[name] = file
        for name in sorted((indexed or {}).keys() - self._file_of.keys()):
            raise ValueError(f"tensor {name} of {INDEX} is not in {folder}; restore the model's files")

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    def place(self, name: str) -> Path:
        """The file that holds it."""
        return self.folder / self._file_of[name]

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
        return self._files[self._file_of[name]].get_slice(name)

    def _index(self) -> Mapping[str, str] | None:
        path = self.folder / INDEX
        if path.exists():
            try:
                weight_map = dict(json.loads(path.read_text("utf-8"))["weight_map"])
            except (ValueError, KeyError, TypeError, OSError) as error:
                raise ValueError(f"{path} must hold a weight_map ({error}); restore it") from None
            for name, file in weight_map.items():
                if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                    raise ValueError(
                        f"{path} has {name} in {file!r}, which must be a safetensors file beside it; restore it"
                    )
            return weight_map
        if not (self.folder / SINGLE).exists():
            raise ValueError(
                f"{self.folder} holds neither {SINGLE} nor {INDEX}; save the model with transformers' save_pretrained"
            )
        return None

    def _open(self, file: str) -> list[str]:
        path = self.folder / file
        try:
            # Not mapped into memory: what was read would count as this process's.
            self._files[file] = opened = safe_open(path, framework="numpy", backend="pread")
            return list(opened.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}); restore it") from None
