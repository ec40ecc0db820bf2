"""One parameter in two layouts: dims here, and the tensor of a Hugging Face file.

Invariant: a block that goes there and comes back has the same bits.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from parallax.filling import Bounds


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
