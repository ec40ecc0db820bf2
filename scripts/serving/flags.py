"""The flags of serve.py.

Invariant: flags that cannot be meant are refused before a model is loaded.
"""

import dataclasses
from typing import Annotated, Literal

import tyro

from parallax.serving.access import Limits

DESCRIPTION = (
    "Serve a trained model: OpenAI's completions and chats under /v1, and a page to talk to it at /. "
    "The address goes to standard output once the server answers."
)
KEY_VARIABLE = "PARALLAX_API_KEY"


@dataclasses.dataclass(frozen=True)
class Flags:
    checkpoint: str
    """The run folder that train.py wrote, local or on gs://."""
    adapters: tuple[str, ...] = ()
    """Runs of adapters beside the model (train.py --lora.rank): each is a model of its own in requests, by the name of
    its folder. They share the model's parameters, and each has --slots."""
    step: int | None = None
    """Which checkpoint; by default the best."""
    param_dtype: Literal["float32", "bfloat16"] | None = None
    """What parameters are held in; by default as the checkpoint has them: float32 after training, an imported model's
    own."""
    host: str = "127.0.0.1"
    """The address to listen on; any but this machine's own needs --api-key."""
    port: int = 8000
    """The port to listen on; 0 takes a free one."""
    api_key: str = ""
    """What clients must send as Authorization: Bearer KEY; by default $PARALLAX_API_KEY, which hides it
    from lists of processes."""
    slots: int = 16
    """How many answers are computed at once."""
    capacity: int = 1024
    """The tokens that a slot holds, prompt and answer together."""
    context: Literal["crop", "extend"] = "crop"
    """crop: a slot holds no more tokens than the model was trained at; extend: up to max_seq_len, where text decays."""
    prefix_tokens: int = 4096
    """For how many tokens earlier texts stay in memory beside the slots: what a new prompt shares with the beginning of
    one, such as a system prompt, is not read again; 0 keeps none."""
    chat_template: str = ""
    """The file of the chat template, or plain: a line a message, as `User: Hello`. By default the model's own, if it
    has one."""
    limits: Annotated[Limits, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Limits)


def check(flags: Flags, key: str) -> None:
    """Raises ValueError for flags that cannot be meant."""
    if not 0 <= flags.port < 65536:
        raise ValueError(f"--port {flags.port} must be in [0, 65535]; 0 takes a free one")
    for name, value in (("slots", flags.slots), ("capacity", flags.capacity)):
        if value < 1:
            raise ValueError(f"--{name} {value} must be at least 1; try {getattr(Flags, name)}")
    if flags.prefix_tokens < 0:
        raise ValueError(f"--prefix-tokens {flags.prefix_tokens} must be at least 0; 0 keeps none")
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError("--api-key must be printable ASCII without spaces; try letters and digits")
