"""Where a row ends: stop strings, as token sequences on the device and as text on the host.

Invariant: a stop counts only in what was generated, never in the prompt. The device knows a stop by one
spelling in tokens; the host reads the text, so it also finds a stop whose letters other tokens spell.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

NO_TOKEN = -1


def pack_stops(stops: Sequence[np.ndarray]) -> np.ndarray:
    """Token sequences as one array int32 [R, L], padded with -1 on the left and with empty rows.

    R and L are at least 4 and 16 and powers of two, so that most sets of stops have the same shape. Raises ValueError
    if a stop is empty.
    """
    for number, stop in enumerate(stops):
        if len(stop) == 0:
            raise ValueError(f"stop {number} is empty; leave it out, or give at least one token")
    num_rows = max(4, round_up(len(stops)))
    packed = np.full((num_rows, max(16, *(round_up(len(stop)) for stop in stops), 0)), NO_TOKEN, np.int32)
    for row, stop in enumerate(stops):
        packed[row, -len(stop) :] = stop
    return packed


def round_up(number: int) -> int:
    """The next power of two, at least 1."""
    return 1 << max(number - 1, 0).bit_length()


def ends_with_stop(
    tokens_BS: jax.Array, prompt_lengths_B: jax.Array, lengths_B: jax.Array, stops_RL: jax.Array
) -> jax.Array:
    """Which rows' generated tokens end with one of the packed stops, bool [B].

    Row b's generated tokens are those from prompt_lengths_B[b] up to, without, lengths_B[b].
    """
    L = stops_RL.shape[1]
    at_BL = lengths_B[:, None] - L + jnp.arange(L)[None, :]
    tail_BL = jnp.take_along_axis(tokens_BS, jnp.maximum(at_BL, 0), axis=1)
    generated_BL = at_BL >= prompt_lengths_B[:, None]
    padding_1RL = (stops_RL == NO_TOKEN)[None]
    equal_BRL = padding_1RL | (generated_BL[:, None] & (stops_RL[None] == tail_BL[:, None]))
    return jnp.any(jnp.all(equal_BRL, axis=2) & ~jnp.all(padding_1RL, axis=2), axis=1)


class StopFilter:
    """Lets text through up to the first stop string that completes, however the text is cut into pieces."""

    def __init__(self, stops: Sequence[str]):
        self.stopped = False
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def push(self, piece: str) -> str:
        """The text that is now certain to come before any stop; nothing once `stopped`."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        maybe = (text[max(len(text) - length, 0) :] for length in range(longest, 0, -1))
        self._held = next((end for end in maybe if any(stop.startswith(end) for stop in self._stops)), "")
        return text[: len(text) - len(self._held)]

    def flush(self) -> str:
        """The text held back in case it began a stop, once no more comes."""
        held, self._held = self._held, ""
        return held
