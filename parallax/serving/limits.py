"""How much the server takes on.

Invariant: memory is bounded by these numbers, the slots and their capacity, whatever clients send.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    max_prompt_tokens: int = 1024
    """The longest prompt, in tokens."""
    max_tokens: int = 1024
    """The most tokens that an answer may ask for; prompt and answer together must also fit a slot."""
    max_answers: int = 32
    """The most answers that one request may ask for: its prompts times n."""
    queue: int = 256
    """How many answers may wait for a slot; a request beyond that is refused with status 429."""
    max_body_bytes: int = 1 << 20
    """The largest body of a request, in bytes."""
    body_seconds: int = 30
    """How long a body may take to arrive, in seconds; a request that is slower is refused with status 408."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, flag = getattr(self, field.name), f"--{field.name.replace('_', '-')}"
            if value < 1:
                raise ValueError(f"{flag} {value} must be at least 1; try {field.default}")
        if self.max_answers > self.queue:
            raise ValueError(
                f"--max-answers {self.max_answers} must not exceed --queue {self.queue}, or no such request could "
                f"ever wait; try --queue {self.max_answers}"
            )

    def within(self, capacity: int) -> "Limits":
        """These limits, with lengths that a slot of `capacity` tokens can hold."""
        return dataclasses.replace(
            self, max_prompt_tokens=min(self.max_prompt_tokens, capacity), max_tokens=min(self.max_tokens, capacity)
        )
