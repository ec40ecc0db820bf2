"""The tensors of Llama and of what is built like it, by their Hugging Face names.

Invariant: every parameter of a config is one tensor in all, or one a layer, and every such tensor is a parameter.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from parallax.config import TransformerConfig
from parallax.filling import Bounds
from parallax.interop.experts import expert_names
from parallax.model.transformer import parameters
from parallax.pattern import stacks


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
    """In the files, with {} for the number of a layer, and another for that of an expert, where each has a tensor."""
    shape: tuple[int, ...]
    """The dims here of what is one tensor there."""
    parts: tuple[tuple[int, ...], ...]
    numbers: range = range(0)
    """The layers that the parameter here is stacked of."""
    experts: range = range(0)
    """Its experts, where each has a tensor."""
    turns: tuple[tuple[str, ...], ...] = ()
    """The paths of the parameters, this one too, that take turns along the last dim of one tensor."""
    first_row: int = 0
    """Where it begins in a tensor there that holds others too, one below the other."""
    all_rows: int = 0
    """How many rows that tensor has; 0 for those of this parameter alone."""
    shift: float = 0.0
    """Added to a number there to make it the one here."""

    @property
    def is_stacked(self) -> bool:
        """Whether the parameter here has a leading dim of layers."""
        return "{}" in self.name

    @property
    def stack(self) -> tuple[range, ...]:
        """What stands in the name, of each leading dim here that it counts."""
        return (self.numbers, self.experts)[: self.name.count("{}")]

    @property
    def shape_there(self) -> tuple[int, ...]:
        rows, *others = (math.prod(self.shape[dim] for dim in part) for part in self.parts)
        if self.turns:
            others[-1] *= len(self.turns)
        return self.all_rows or rows, *others

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
            before = 0 if found else self.first_row
            found.append(slice(before + bounds[outer].start * size, before + bounds[outer].stop * size))
        if self.turns:
            found[-1] = slice(found[-1].start * len(self.turns), found[-1].stop * len(self.turns))
        return tuple(found)

    def bring(self, there: np.ndarray, bounds: Bounds) -> np.ndarray:
        """What was read at `find(bounds)`, as the block here; a view, if nothing is to be added."""
        if self.shift:
            there = there.astype(np.float32) + np.float32(self.shift)
        if self.turns:
            there = there[..., self.turns.index(self.path) :: len(self.turns)]
        order = [dim for part in self.parts for dim in part]
        outer = {part[0] for part in self.parts}
        sizes = [bounds[dim].stop - bounds[dim].start if dim in outer else self.shape[dim] for dim in order]
        here = there.reshape(sizes).transpose(np.argsort(order))
        return here[tuple(slice(None) if dim in outer else bounds[dim] for dim in range(here.ndim))]

    def send(self, here: np.ndarray) -> np.ndarray:
        """A block here of whole heads, as it is stored there, row after row; without those that it takes turns with."""
        if self.shift:
            here = here.astype(np.float32) - np.float32(self.shift)
        order = [dim for part in self.parts for dim in part]
        sizes = [math.prod(here.shape[dim] for dim in part) for part in self.parts]
        return np.ascontiguousarray(here.transpose(order)).reshape(sizes)


VECTOR = ((0,),)
TABLE = ((0,), (1,))
MATRIX = ((1,), (0,))
INTO_HEADS = ((1, 2), (0,))
OUT_OF_HEADS = ((2,), (0, 1))
HEADS = ((0, 1),)
LAYER = "model.layers.{}."
NAMES = {
    "embedding/table": ("model.embed_tokens.weight", TABLE),
    "attention_norm/scale": (LAYER + "input_layernorm.weight", VECTOR),
    "attention/query": (LAYER + "self_attn.q_proj.weight", INTO_HEADS),
    "attention/query_bias": (LAYER + "self_attn.q_proj.bias", HEADS),
    "attention/key": (LAYER + "self_attn.k_proj.weight", INTO_HEADS),
    "attention/key_bias": (LAYER + "self_attn.k_proj.bias", HEADS),
    "attention/value": (LAYER + "self_attn.v_proj.weight", INTO_HEADS),
    "attention/value_bias": (LAYER + "self_attn.v_proj.bias", HEADS),
    "attention/out": (LAYER + "self_attn.o_proj.weight", OUT_OF_HEADS),
    "attention/out_bias": (LAYER + "self_attn.o_proj.bias", VECTOR),
    "attention/sinks": (LAYER + "self_attn.sinks", VECTOR),
    "attention/query_norm/scale": (LAYER + "self_attn.q_norm.weight", VECTOR),
    "attention/key_norm/scale": (LAYER + "self_attn.k_norm.weight", VECTOR),
    "attention_post_norm/scale": (LAYER + "post_attention_layernorm.weight", VECTOR),
    "mlp_norm/scale": (LAYER + "post_attention_layernorm.weight", VECTOR),
    "mlp/gate": (LAYER + "mlp.gate_proj.weight", MATRIX),
    "mlp/up": (LAYER + "mlp.up_proj.weight", MATRIX),
    "mlp/down": (LAYER + "mlp.down_proj.weight", MATRIX),
    "mlp_post_norm/scale": (LAYER + "post_feedforward_layernorm.weight", VECTOR),
    "final_norm/scale": ("model.norm.weight", VECTOR),
    "output/table": ("lm_head.weight", TABLE),
}
"""By the path of a parameter, within its block if it has one, in the order of the files: its tensor, and of which dims
of one layer that is made."""
BOTH_NORMS = {"mlp_norm/scale": (LAYER + "pre_feedforward_layernorm.weight", VECTOR)}
"""Other names that tensors have where blocks have norms before and after."""
JOINED = {
    "self_attn.qkv_proj.weight": ("attention/query", "attention/key", "attention/value"),
    "mlp.gate_up_proj.weight": ("mlp/gate", "mlp/up"),
}
"""Tensors that hold several parameters, one below the other, by what else each would be; so Phi 3 has them."""


@functools.lru_cache(maxsize=8)
def tensors(config: TransformerConfig, joined: bool = False) -> tuple[Tensor, ...]:
    """One entry for each parameter of the config. Tables have V rows, without their padding.

    Args:
      joined: whether the files have `JOINED` tensors.

    Raises:
      ValueError: the model has a parameter that these architectures lack.
    """
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): parameter
        for path, parameter in jax.tree_util.tree_leaves_with_path(parameters(config))
    }
    found, names = [], NAMES | (BOTH_NORMS if config.norms == "both" else {})
    of_layers = [("/".join(s.path) + "/", s.numbers, s.config.feed_forward) for s in stacks(config)]
    routed = expert_names(config)
    for name, (there, parts) in (*names.items(), *routed.items()):
        for prefix, numbers, kind in of_layers if "{}" in there else [("", range(0), "")]:
            # Experts have names of their own for what is called alike here.
            if name in routed and (kind == "experts") != (routed[name][0] == there):
                continue
            if (leaf := leaves.pop(prefix + name, None)) is None:
                continue
            sizes = dict(zip(leaf.names, leaf.shape, strict=True))
            sizes.pop("layers", None)
            experts = range(sizes.pop("experts") if there.count("{}") == 2 else 0)
            if "vocab" in sizes:
                sizes["vocab"] = config.vocab_size
            shape = tuple(sizes.values())
            # Over all heads at once its weights are stored as one vector.
            parts = HEADS if len(shape) == 2 and parts == VECTOR else parts
            # Gemma multiplies by 1 + w.
            shift = 1.0 if name.endswith("norm/scale") and config.norms == "both" else 0.0
            path = (*prefix.split("/")[:-1], *name.split("/"))
            found.append(Tensor(path, there, shape, parts, numbers, shift=shift, experts=experts))
    if leaves:
        raise ValueError(
            f"{min(leaves)} has no tensor in the architectures of transformers; train without it to export"
        )
    return tuple(_take_turns(_join(found) if joined else found))


def _take_turns(entries: list[Tensor]) -> list[Tensor]:
    """The same where several are in one tensor, and none has rows of its own there."""

    def turns(entry: Tensor) -> tuple[tuple[str, ...], ...]:
        paths = [e.path for e in entries if (e.name, e.numbers) == (entry.name, entry.numbers) and not e.all_rows]
        return tuple(paths) if len(paths) > 1 else ()

    return [dataclasses.replace(entry, turns=turns(entry)) for entry in entries]


def _join(entries: list[Tensor]) -> list[Tensor]:
    """The same with those of `JOINED` in one tensor."""
    joined = list(entries)
    for there, names in JOINED.items():
        for numbers in {entry.numbers for entry in entries}:
            first, parts = 0, [e for e in entries if e.numbers == numbers and "/".join(e.path).endswith(names)]
            rows = [entry.shape_there[0] for entry in parts]
            for entry, own in zip(parts, rows, strict=True):
                place = {"name": LAYER + there, "first_row": first, "all_rows": sum(rows)}
                joined[entries.index(entry)] = dataclasses.replace(entry, **place)
                first += own
    return joined


def named(config: TransformerConfig, joined: bool = False) -> Mapping[str, tuple[Tensor, tuple[int, ...]]]:
    """Every tensor of the files by its full name, with the numbers in that, in the order of a forward pass.

    A tensor that holds several parameters comes with one of them.
    """
    first, *rest = tensors(config, joined)
    layered = {
        entry.name.format(*numbers): (entry, numbers)
        for layer in range(config.num_layers)
        for entry in rest
        if layer in entry.numbers
        for numbers in itertools.product([layer], *entry.stack[1:])
    }
    return {first.name: (first, ())} | layered | {e.name: (e, ()) for e in rest if not e.is_stacked}
