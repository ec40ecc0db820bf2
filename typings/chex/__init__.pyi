"""chex.dataclass as pyright should see it: chex itself leaves its arguments and result without types.

Invariant: it declares what the project uses of chex and nothing else. Change a value with `dataclasses.replace`, which
is typed, and not with the method that chex adds.
"""

from collections.abc import Callable
from typing import TypeVar, dataclass_transform

T = TypeVar("T")

@dataclass_transform()
def dataclass(*, frozen: bool = False, mappable_dataclass: bool = True) -> Callable[[type[T]], type[T]]: ...
