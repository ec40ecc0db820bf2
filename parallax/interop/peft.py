"""Adapters as PEFT keeps them: a folder of adapter_config.json and adapter_model.safetensors, in and out.

Invariant: the base is a model of `llama.tensors`, and an adapter has the name of its matrix there. What would compute
something else than `LoraConfig` says is refused by name.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError

from parallax.config import TransformerConfig
from parallax.interop.llama import Tensor, tensors
from parallax.layer_config import ADAPTED, LoraConfig
from parallax.layers.lora import ADAPTERS
from parallax.model.adapters import without_adapters
from parallax.model.stack import Params
from parallax.storage import write_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, SUFFIX = "base_model.model.", ".weight"
USUAL = {"peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False, "lora_bias": False}
"""What other values of these would compute is not here."""
EMPTY = (
    *("rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform"),
    *("target_parameters", "layer_replication", "trainable_token_indices", "alora_invocation_tokens"),
    *("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
)
"""What these would compute is not here either: a folder in which one of them holds something is refused."""
RESIDUAL = ("pissa", "olora", "corda", "loftq")
"""Beginnings of `init_lora_weights` by which PEFT changes the base, both before it trains adapters and when it reads
them."""


class _Adapter(NamedTuple):
    """Both matrices of one adapter of one layer, in the files and here."""

    entry: Tensor
    layer: int
    place: int
    """Where the layer is in the stack of its parameter."""

    @property
    def names(self) -> tuple[str, str]:
        """The names of A and of B."""
        matrix = PREFIX + self.entry.name.format(self.layer).removesuffix(SUFFIX)
        return f"{matrix}.lora_A{SUFFIX}", f"{matrix}.lora_B{SUFFIX}"

    @property
    def path(self) -> tuple[str, ...]:
        """Here, of what holds `down` and `up`."""
        *module, matrix = self.entry.path
        return (*module, ADAPTERS, matrix)

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of one layer of `down` and `up`."""
        outs, ins = ([self.entry.shape[dim] for dim in part] for part in self.entry.parts)
        return (*ins, rank), (rank, *outs)


def write_adapters(adapters: Params, config: TransformerConfig, folder: Path) -> None:
    """Writes the adapters of a model with this config, in float32. Raises OSError if a file cannot be written."""
    from safetensors.numpy import save_file

    lora, found = config.lora, {}
    for adapter in _adapters(config, lora):
        held = functools.reduce(dict.__getitem__, adapter.path, adapters)
        down, up = (np.asarray(held[name][adapter.place], np.float32) for name in ("down", "up"))
        matrices = down.reshape(-1, lora.rank).T, up.reshape(lora.rank, -1).T
        found |= {name: np.ascontiguousarray(x) for name, x in zip(adapter.names, matrices, strict=True)}
    save_file(found, folder / WEIGHTS, metadata={"format": "pt"})
    modules = sorted({name.split(".")[-3] for name in found})
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    values = {"r": lora.rank, "lora_alpha": alpha, "lora_dropout": lora.dropout, "use_rslora": lora.rslora}
    values |= {"task_type": "CAUSAL_LM", "target_modules": modules, "base_model_name_or_path": None}
    write_json(folder / CONFIG, USUAL | values | {"inference_mode": True})


def read_adapters(folder: Path, config: TransformerConfig) -> tuple[TransformerConfig, Params]:
    """The config of a base with its adapters, and these, float32, as `take_adapters` gives them.

    Args:
      config: of the base.

    Raises:
      ValueError: the folder holds no adapters, or some that are not of this base or compute what these cannot.
    """
    from safetensors.flax import load_file

    values = _read_config(folder / CONFIG)
    try:
        there = {name: np.asarray(x, np.float32) for name, x in load_file(folder / WEIGHTS).items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS} cannot be read ({error}); restore the adapter's files") from None
    every = LoraConfig(
        rank=_of_type(values, "r", int), alpha=float(_of_type(values, "lora_alpha", (int, float))),
        dropout=float(values.get("lora_dropout") or 0), rslora=bool(values.get("use_rslora")),
    )  # fmt: skip
    wanted = [adapter for adapter in _adapters(config, every) if adapter.names[0] in there]
    targets = {adapter.entry.path[-1] for adapter in wanted}
    lora = dataclasses.replace(every, targets=tuple(name for name in ADAPTED if name in targets))
    found: dict[tuple[str, ...], dict[int, tuple[np.ndarray, ...]]] = {}
    for adapter in _adapters(config, lora) if targets else ():
        here = []
        for name, shape in zip(adapter.names, adapter.shapes(lora.rank), strict=True):
            if name not in there:
                raise ValueError(f"{folder} lacks {name}; adapters must be beside that matrix in all layers or in none")
            matrix = there.pop(name)
            if matrix.size != np.prod(shape):
                raise ValueError(f"{name} of {list(matrix.shape)} in {folder} is not of this base; give its own base")
            here.append(matrix.T.reshape(shape))
        found.setdefault(adapter.path, {})[adapter.place] = tuple(here)
    if there or not found:
        rule = f"{folder} has an adapter for {min(there)}" if there else f"{folder} has no adapter"
        raise ValueError(f"{rule}; those of {', '.join(ADAPTED)} of attention and dense feed-forwards can be read")
    return dataclasses.replace(config, lora=lora), _stacked(found)


def _adapters(config: TransformerConfig, lora: LoraConfig) -> Iterator[_Adapter]:
    """The adapters that a model has, one for each matrix but those of experts."""
    for entry in tensors(without_adapters(config)):
        is_matrix = entry.is_stacked and len(entry.parts) == 2 and not entry.experts
        if is_matrix and entry.path[-1] in ADAPTED and lora.adapts(entry.path[-1]):
            for place, layer in enumerate(entry.numbers):
                yield _Adapter(entry, layer, place)


def _stacked(found: dict[tuple[str, ...], dict[int, tuple[np.ndarray, ...]]]) -> Params:
    tree: Params = {}
    for path, layers in found.items():
        at = tree
        for name in path:
            at = at.setdefault(name, {})
        down, up = zip(*(layers[place] for place in sorted(layers)), strict=True)
        at |= {"down": jnp.asarray(np.stack(down)), "up": jnp.asarray(np.stack(up))}
    return tree


def _read_config(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be a JSON file ({error}); give a folder that PEFT saved") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object; give a folder that PEFT saved")
    remedy = "merge it into its model with peft's merge_and_unload, and import that"
    for name, usual in USUAL.items():
        if values.get(name, usual) != usual:
            raise ValueError(f"{name}={values[name]!r} of {path} must be {usual!r}; {remedy}")
    for name in EMPTY:
        if values.get(name):
            raise ValueError(f"{name}={values[name]!r} of {path} must be empty; {remedy}")
    if str(first := values.get("init_lora_weights")).lower().startswith(RESIDUAL):
        raise ValueError(f"init_lora_weights={first!r} of {path} changes the base too; {remedy}")
    return values


def _of_type(values: dict[str, Any], name: str, kind: Any) -> Any:
    value = values.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} of {CONFIG} must be a number; restore the adapter's files")
    return value
