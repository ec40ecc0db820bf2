"""The prompt loop of generate.py: a line is a prompt or a message, a line that begins with / is a command.

Invariant: no line ends the loop but /quit and the end of input; a bad one costs one line of complaint.
"""

import contextlib
import dataclasses
import sys

from parallax.inference.sampling import SETTINGS, SamplingSettings
from parallax.run_folder import Run
from parallax.tokenizers.chat import Chat
from parallax.tokenizers.chat_template import Message, choose_template
from scripts.common.command_line import tell
from scripts.generation.flags import Flags
from scripts.generation.writer import Writer

SETTABLE = (*SETTINGS, "max_tokens", "seed", "stop")
HELP = r"""A line is a prompt, or a message of a chat. These lines are commands:
  /temperature 0.8   and in the same way /top-k /top-p /min-p /repetition-penalty /max-tokens /seed
  /stop TEXT         end before TEXT, where \n is a new line; /stop alone clears it
  /new               begin a chat again
  /help              this, and the settings as they are
  /quit              leave, as Ctrl-D does
Ctrl-C ends a continuation. The seed grows by one with each prompt."""


class Talk:
    """A chat under way: its turns, from the system prompt on."""

    def __init__(self, writer: Writer, chat: Chat, flags: Flags):
        self._writer, self._chat, self._system = writer, chat, flags.system
        self.begin()

    def begin(self) -> None:
        self._turns: list[Message] = [{"role": "system", "content": self._system}] if self._system else []

    def say(self, flags: Flags, message: str) -> None:
        """Shows the answer. The turn is not kept where the answer fails or is interrupted."""
        turns = [*self._turns, {"role": "user", "content": message}]
        flags = dataclasses.replace(flags, stop=(*flags.stop, *self._chat.template.stops))
        answer = self._writer.stream(flags, self._chat.prompt(turns))
        self._turns = [*turns, {"role": "assistant", "content": answer}]


def chat_of(run: Run, template: str) -> Chat:
    """The run's chat, by a template as `choose_template` takes it. Raises ValueError where there is none."""
    chosen = choose_template(template, run.chat_template, run.tokenizer)
    if chosen is None:
        raise ValueError(f"{run.folder} has no chat template; give one with --chat-template FILE, or plain")
    return Chat(chosen, run.tokenizer)


def converse(writer: Writer, flags: Flags, talk: Talk | None = None) -> None:
    """Reads lines from standard input until it ends."""
    with contextlib.suppress(ImportError):  # absent on some systems
        import readline  # noqa: F401 (gives input() editing and history)
    tell("/help lists the commands, Ctrl-D leaves.")
    while True:
        try:
            line = _read_line()
            if line is None or line == "/quit":
                return
            flags = _obey(writer, flags, line, talk)
        except ValueError as error:
            tell(f"error: {' '.join(str(error).split())}")
        except KeyboardInterrupt:
            tell("")


def _obey(writer: Writer, flags: Flags, line: str, talk: Talk | None) -> Flags:
    if line == "/help":
        tell(HELP)
        tell("  ".join(f"{name.replace('_', '-')} {getattr(flags, name)!r}" for name in SETTABLE))
    elif line == "/new" and talk:
        talk.begin()
    elif line.startswith("/"):
        return _set(flags, *line[1:].partition(" ")[::2])
    elif line:
        if talk:
            talk.say(flags, line)
        else:
            writer.stream(dataclasses.replace(flags, prompt=line))
        return dataclasses.replace(flags, seed=(flags.seed + 1) % 2**32)
    return flags


def _set(flags: Flags, word: str, value: str) -> Flags:
    name = word.replace("-", "_")
    if name not in SETTABLE:
        raise ValueError(f"/{word} is not a command; try /help")
    if name == "stop":
        return dataclasses.replace(flags, stop=(value,) if value else ())
    try:
        number = type(getattr(flags, name))(value)
    except ValueError:
        raise ValueError(f"/{word} {value!r} must be a number of its kind; try /help") from None
    if name in SETTINGS:
        SamplingSettings.create(1, **{name: number})  # complains at once, not at the next prompt
    return dataclasses.replace(flags, **{name: number})


def _read_line() -> str | None:
    """The next line without its end, or None at the end of input."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        try:
            return input("> ")
        except EOFError:
            return None
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)  # standard output is for text alone
    line = sys.stdin.readline()
    return line.removesuffix("\n") if line else None
