"""JAX imported late by a command: help and bad flags answer before it.

Invariant: a process that has JAX already, as where tests call a script, is left as it is.
"""

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def late_imports() -> Iterator[None]:
    """Imports within it are not looked through for garbage, then or later, since what they make stays.

    That saves 0.6 s of the 3.8 s in which a small model is served: while it is imported and while it is traced.
    """
    if "jax" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
