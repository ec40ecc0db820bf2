"""A JAX language-model codebase; `parallax.load` is its door: docs/library.md.

Invariant: importing this package imports nothing else, so that each part costs only what it needs.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parallax.loading import load as load


def __getattr__(name: str) -> Any:
    if name != "load":
        raise AttributeError(f"module 'parallax' has no attribute {name!r}")
    from parallax.loading import load

    return load
