"""The tensors of Llama, Mistral and Qwen models, by their Hugging Face names.

Invariant: every parameter of a config is one tensor in all, or one a layer, and every such tensor is a parameter.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from parallax.config import TransformerConfig
from parallax.filling import Bounds
from parallax.model.transformer import parameters


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a parameter, or one layer of it, is found.

    A linear layer is [out, in] there and [in, out] here, and heads with their dims are one dim there. So dim i there is
    made of the dims `parts[i]` here, outermost first: a query of [D, H, K] that is [H·K, D] there has
    ((1, 2), (0,)).
    """

    path: tuple[str, ...]
    """In the tree of parameters."""
    name: str
    """In the files, with {} for the number of a layer where there is one tensor a layer."""
    shape: tuple[int, ...]
    """Of one layer here."""
    parts: tuple[tuple[int, ...], ...]

    @property
    def is_stacked(self) -> bool:
        """Whether the parameter here has a leading dim of layers."""
        return "{}" in self.name

    @property
    def shape_there(self) -> tuple[int, ...]:
        return tuple(math.prod(self.shape[dim] for dim in part) for part in self.parts)

    @property
    def whole(self) -> Bounds:
        """The block of everything."""
        return tuple(slice(0, size) for size in self.shape)

    def cut(self, bounds: Bounds, elements: int) -> Iterator[Bounds]:
        """The block in smaller ones of about so many elements, each of neighbouring rows there, in their order."""
        dim = self.parts[0][0]
        of_one = math.prod(s.stop - s.start for at, s in enumerate(bounds) if at != dim)
        step, stop = max(1, elements // max(1, of_one)), bounds[dim].stop
        for start in range(bounds[dim].start, stop, step):
            yield (*bounds[:dim], slice(start, min(start + step, stop)), *bounds[dim + 1 :])

    def find(self, bounds: Bounds) -> Bounds:
        """The block there that holds a block here. Heads are the unit: a part of each head is read as all of it."""
        found = []
        for outer, *inner in self.parts:
            size = math.prod(self.shape[dim] for dim in inner)
            found.append(slice(bounds[outer].start * size, bounds[outer].stop * size))
        return tuple(found)

    def bring(self, there: np.ndarray, bounds: Bounds) -> np.ndarray:
        """What was read at `find(bounds)`, as the block here; a view."""
        order = [dim for part in self.parts for dim in part]
        outer = {part[0] for part in self.parts}
        sizes = [bounds[dim].stop - bounds[dim].start if dim in outer else self.shape[dim] for dim in order]
        here = there.reshape(sizes).transpose(np.argsort(order))
        return here[tuple(slice(None) if dim in outer else bounds[dim] for dim in range(here.ndim))]

    def send(self, here: np.ndarray) -> np.ndarray:
        """A block here of whole heads, as it is stored there, row after row."""
        order = [dim for part in self.parts for dim in part]
        sizes = [math.prod(here.shape[dim] for dim in part) for part in self.parts]
        return np.ascontiguousarray(here.transpose(order)).reshape(sizes)


VECTOR = ((0,),)
TABLE = ((0,), (1,))
MATRIX = ((1,), (0,))
INTO_HEADS = ((1, 2), (0,))
OUT_OF_HEADS = ((2,), (0, 1))
HEADS = ((0, 1),)
NAMES = {
    "embedding/table": ("model.embed_tokens.weight", TABLE),
    "blocks/attention_norm/scale": ("model.layers.{}.input_layernorm.weight", VECTOR),
    "blocks/attention/query": ("model.layers.{}.self_attn.q_proj.weight", INTO_HEADS),
    "blocks/attention/query_bias": ("model.layers.{}.self_attn.q_proj.bias", HEADS),
    "blocks/attention/key": ("model.layers.{}.self_attn.k_proj.weight", INTO_HEADS),
    "blocks/attention/key_bias": ("model.layers.{}.self_attn.k_proj.bias", HEADS),
    "blocks/attention/value": ("model.layers.{}.self_attn.v_proj.weight", INTO_HEADS),
    "blocks/attention/value_bias": ("model.layers.{}.self_attn.v_proj.bias", HEADS),
    "blocks/attention/out": ("model.layers.{}.self_attn.o_proj.weight", OUT_OF_HEADS),
    "blocks/attention/out_bias": ("model.layers.{}.self_attn.o_proj.bias", VECTOR),
    "blocks/attention/query_norm/scale": ("model.layers.{}.self_attn.q_norm.weight", VECTOR),
    "blocks/attention/key_norm/scale": ("model.layers.{}.self_attn.k_norm.weight", VECTOR),
    "blocks/mlp_norm/scale": ("model.layers.{}.post_attention_layernorm.weight", VECTOR),
    "blocks/mlp/gate": ("model.layers.{}.mlp.gate_proj.weight", MATRIX),
    "blocks/mlp/up": ("model.layers.{}.mlp.up_proj.weight", MATRIX),
    "blocks/mlp/down": ("model.layers.{}.mlp.down_proj.weight", MATRIX),
    "final_norm/scale": ("model.norm.weight", VECTOR),
    "output/table": ("lm_head.weight", TABLE),
}
"""By the path of a parameter, in the order of the files: its tensor, and of which dims of one layer that is made."""


@functools.lru_cache(maxsize=8)
def tensors(config: TransformerConfig) -> tuple[Tensor, ...]:
    """One entry for each parameter of the config. Tables have V rows, without their padding.

    Raises ValueError if the model has a parameter that these architectures lack.
    """
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): parameter
        for path, parameter in jax.tree_util.tree_leaves_with_path(parameters(config))
    }
    if unknown := sorted(leaves.keys() - NAMES.keys()):
        raise ValueError(f"{unknown[0]} has no tensor in a Llama, Mistral or Qwen; train without it to export")
    found = []
    for path, (name, parts) in NAMES.items():
        if path in leaves:
            sizes = dict(zip(leaves[path].names, leaves[path].shape, strict=True))
            sizes.pop("layers", None)
            if "vocab" in sizes:
                sizes["vocab"] = config.vocab_size
            found.append(Tensor(tuple(path.split("/")), name, tuple(sizes.values()), parts))
    return tuple(found)


def named(config: TransformerConfig) -> Mapping[str, tuple[Tensor, int | None]]:
    """Every tensor of the files by its full name, with its layer, in the order of a forward pass."""
    first, *rest = tensors(config)
    layered = {
        entry.name.format(layer): (entry, layer)
        for layer in range(config.num_layers)
        for entry in rest
        if entry.is_stacked
    }
    return {first.name: (first, None)} | layered | {e.name: (e, None) for e in rest if not e.is_stacked}
