"""Which layers of a model share arrays of parameters, and in which order loops go through them.

Invariant: each layer is in one stack. A model whose layers are all alike is one stack, whose parameters have no name of
their own in the tree.
"""

import functools
from typing import Any, NamedTuple

from parallax.config import TransformerConfig


class Stack(NamedTuple):
    """Layers of one config. Each of their parameters is one array, with a leading dim for these layers."""

    name: str
    """Under which the tree of blocks holds it, after its first layer; empty where it is all of that tree."""
    config: TransformerConfig
    """The config of each of its layers."""
    numbers: range
    """Its layers, counted from 0."""

    @property
    def path(self) -> tuple[str, ...]:
        """Where its parameters are in the tree of the model."""
        return ("blocks", self.name) if self.name else ("blocks",)

    def of(self, blocks: Any) -> Any:
        """Its part of the blocks."""
        return blocks[self.name] if self.name else blocks


@functools.lru_cache(maxsize=256)
def loops(config: TransformerConfig) -> tuple[tuple[Stack, ...], ...]:
    """The stacks by the loops that go through them: in each turn a loop takes the next layer of each of its stacks.

    The pattern is repeated by one loop, over as many stacks as it is long. Layers before it, and behind its last whole
    repetition, are stacks of one, of loops of one turn.
    """
    first, depth, period = len(config.first_layers), config.num_layers, config.period
    end = depth - (depth - first) % period
    spans = (
        [range(number, number + 1) for number in range(first)],
        [range(number, end, period) for number in range(first, first + period)] if end > first else [],
        [range(number, number + 1) for number in range(end, depth)],
    )
    alone = sum(map(len, spans)) == 1

    def stack(numbers: range) -> Stack:
        name = "" if alone else f"layer_{numbers.start}"
        return Stack(name, config.layers[numbers.start], numbers)

    return tuple(tuple(map(stack, span)) for span in spans if span)


def stacks(config: TransformerConfig) -> tuple[Stack, ...]:
    """All stacks, by their first layers."""
    return tuple(stack for loop in loops(config) for stack in loop)
