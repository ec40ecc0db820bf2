"""What the processes that save a checkpoint together learn of each other: that all are done, or that one has failed.

Invariant: a save ends alike in all processes. By itself a barrier would wait for the one whose disk is full.
"""

import contextlib
import itertools
import time
from collections.abc import Iterator
from typing import Any

import jax

POLL_MS = 1000
"""How long a process that waits for the others goes without looking for a failure."""
_numbers = itertools.count(1)


class Together:
    """One save, or one change of what is saved. All processes make theirs in the same order; one alone never waits."""

    def __init__(self):
        from jax._src import distributed  # JAX has no public name for what its processes say to each other

        several = jax.process_count() > 1
        self._client: Any = distributed.global_state.client if several else None
        self._key = f"parallax/save/{next(_numbers)}"

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Lets the others know of an exception within, which is raised here."""
        try:
            yield
        except Exception as error:
            if self._client is not None:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                with contextlib.suppress(jax.errors.JaxRuntimeError):  # another failed before, or has said this
                    self._client.key_value_set(f"{self._key}/failed", f"process {jax.process_index()}: {reason}")
            raise

    def wait(self, key: str, timeout_ms: int) -> None:
        """Returns when all processes have come to this point. May be called in any thread.

        Raises OSError if one has failed, with its words, or TimeoutError.
        """
        if self._client is None:
            return
        point, limit = f"{self._key}/{key}", time.monotonic() + timeout_ms / 1000
        if self._client.key_value_increment(f"{point}/arrived", 1) == jax.process_count():
            self._client.key_value_set(f"{point}/all", "here")
        while self._read(f"{point}/all", POLL_MS) is None:
            if failure := self._read(f"{self._key}/failed"):
                raise OSError(failure)
            if time.monotonic() > limit:
                raise TimeoutError(f"not all processes came to {key} within {timeout_ms / 1000:.0f} s")

    def forget(self) -> None:
        """Removes what was said, once all processes are past it."""
        if self._client is not None and jax.process_index() == 0:
            self._client.key_value_delete(f"{self._key}/")

    def _read(self, key: str, timeout_ms: int = 0) -> str | None:
        """What stands there within that time. Raises what means that the others cannot be reached."""
        try:
            if timeout_ms:
                return self._client.blocking_key_value_get(key, timeout_ms)
            return self._client.key_value_try_get(key)
        except jax.errors.JaxRuntimeError as error:
            if str(error).startswith(("DEADLINE_EXCEEDED", "NOT_FOUND")):
                return None
            raise
