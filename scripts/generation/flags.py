"""The flags of generate.py.

Invariant: flags that cannot be meant together are refused before a model is loaded.
"""

import dataclasses
from typing import Annotated, Literal

import tyro

from scripts.common.command_line import Switch

DESCRIPTION = "Continue a prompt with a trained model. The text goes to standard output, all else to standard error."


@dataclasses.dataclass(frozen=True)
class Flags:
    checkpoint: str
    """The run folder that train.py wrote, local or on gs://."""
    prompt: str = ""
    """The text to continue; none where the model begins a text with a token of its own."""
    max_tokens: int = 200
    """How many tokens to add at most."""
    temperature: float = 0.8
    """The lower, the rarer are unlikely tokens; 0 is greedy: always the most probable."""
    top_k: int = 0
    """Draw from the k most probable tokens; 0 is off."""
    top_p: float = 1.0
    """Draw from the fewest most probable tokens whose probability reaches p; 1 is off."""
    min_p: float = 0.0
    """Draw from tokens with at least this share of the most probable one's probability; 0 is off."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that occurred before less likely; 1 is off."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    r"""End before this text, in which \n is a new line and \t a tab; several can be given."""
    seed: int = 0
    """What all draws follow from; sample i of several, from 0, is the only sample of seed + i."""
    context: Literal["slide", "crop", "extend"] = "slide"
    """What happens where the text outgrows the length of the model's training. slide: the last half of that length is
    read again, and it goes on from there; crop: it ends; extend: it goes on to max_seq_len, and decays."""
    num_samples: int = 1
    """How many continuations to write, one after another."""
    draft: str = ""
    """The run folder of a smaller model with the same tokenizer, which proposes tokens that the model then checks
    several at a time: the same text at temperature 0, and the same distribution of texts at others."""
    draft_tokens: int = 4
    """How many tokens the draft proposes at a time."""
    step: int | None = None
    """Which checkpoint; by default the best."""
    param_dtype: Literal["float32", "bfloat16"] | None = None
    """What parameters are held in; by default as the checkpoint has them: float32 after training, an imported model's
    own."""
    interactive: Switch = False
    """Read prompts from standard input, one a line."""
    chat: Switch = False
    """Talk with the model in the form of its chat template: each line of standard input is a message, or --prompt the
    only one."""
    system: str = ""
    """The system prompt of a chat."""
    chat_template: str = ""
    """The file of the chat template, or plain: a line a message, as `User: Hello`. By default the model's own."""


def check(flags: Flags) -> None:
    """Raises ValueError for flags that cannot be meant together."""
    if flags.num_samples < 1:
        raise ValueError(f"--num-samples {flags.num_samples} must be at least 1; try 1")
    if not 1 <= flags.draft_tokens <= 64:
        raise ValueError(f"--draft-tokens {flags.draft_tokens} must be in [1, 64]; try 4")
    if flags.chat and (flags.num_samples > 1 or flags.interactive):
        given = "--interactive" if flags.interactive else f"--num-samples {flags.num_samples}"
        raise ValueError(f"{given} cannot go with --chat, which gives one answer to each message; leave it out")
    if not flags.chat and (flags.system or flags.chat_template):
        raise ValueError(f"--{'system' if flags.system else 'chat-template'} is of a chat; add --chat")
    if flags.interactive and flags.num_samples > 1:
        raise ValueError(f"--num-samples {flags.num_samples} must be 1 with --interactive; leave it out")
    if flags.interactive and flags.prompt:
        raise ValueError("--prompt cannot go with --interactive, which reads prompts itself; leave one out")
