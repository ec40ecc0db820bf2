"""A chat template: the Jinja program by which a model's conversations become text; and its files.

Invariant: a template is rendered in a process of its own, which `jinja` bounds in time and memory: it can neither reach
this process nor stop it. Run folders and Hugging Face folders keep it in the same files.
"""

import json
import secrets
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from parallax.storage import open_folder, reason_of
from parallax.tokenizers.base import Tokenizer
from parallax.tokenizers.hugging_face import END_OF_TEXT, HuggingFaceTokenizer

FILE, CONFIG, WITH_TOOLS = "chat_template.jinja", "tokenizer_config.json", "additional_chat_templates/tool_use.jinja"
NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
"""The variables that hold a tokenizer's special tokens."""
PROGRAM = Path(__file__).with_name("jinja.py")
PLAIN = """\
{% for message in messages %}
{{ message.role | capitalize }}: {{ message.content }}{{ (eos_token or '') if message.role == 'assistant' else '' }}
{% endfor %}
{% if add_generation_prompt %}Assistant:{% endif %}"""
"""For a model that was taught no other form: a line a message, such as `User: Hello`."""
PLAIN_STOPS = ("\nUser:",)
"""Where a model that never ends a text goes on to write the other side too."""
NOTHING: Mapping[str, Any] = {}

Message = Mapping[str, Any]
"""{"role": …, "content": …} and whatever else the template reads; a value of None is as if it were not there."""


class ChatTemplate:
    """Conversations to text.

    Args:
      source: the template.
      special_tokens: spellings by the names of NAMES.
      with_tools: the template for conversations with tools, where the model has one of its own.

    Attributes:
      stops: texts that end an answer, beside the ids that end one.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], with_tools: str | None = None):
        self.source, self.special_tokens, self.with_tools = source, dict(special_tokens), with_tools
        self.stops = PLAIN_STOPS if source == PLAIN else ()
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        """What a process of its own cannot be copied with."""
        return ChatTemplate, (self.source, self.special_tokens, self.with_tools)

    def check(self) -> None:
        """Raises ValueError for a template that can render no conversation: a fault of its syntax, or a hostile one."""
        message = {"role": "user", "content": "Hello"}
        for source in filter(None, (self.source, self.with_tools)):
            reply = self._ask(source, [self._variables([message], None, True, {})], ("", ""))
            if reply.get("invalid"):
                raise ValueError(f"chat template cannot be used ({reply['error']}); give another with --chat-template")

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] = NOTHING,
    ) -> str:
        """The text of a conversation, with the beginning of the assistant's answer if it is to be generated.

        `variables` are what else the template may read, by name. Raises ValueError if the template refuses the
        conversation or takes too much to render it.
        """
        (text,) = self.render_all([messages], tools, [add_generation_prompt], ("", ""), variables)
        return text

    def render_all(
        self,
        conversations: Sequence[Sequence[Message]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: Sequence[bool],
        marks: tuple[str, str],
        variables: Mapping[str, Any] = NOTHING,
    ) -> list[str]:
        """`render` of several, with marks before and after each {% generation %} block."""
        source = self.with_tools if tools and self.with_tools else self.source
        sets = [
            self._variables(messages, tools, add, variables)
            for messages, add in zip(conversations, add_generation_prompt, strict=True)
        ]
        reply = self._ask(source, sets, marks)
        if "error" in reply:
            raise ValueError(f"chat template refuses the conversation ({reply['error']}); change its messages")
        return reply["texts"]

    def _variables(self, messages: Sequence[Message], tools: Any, add: bool, more: Mapping[str, Any]) -> dict[str, Any]:
        # As transformers: None is what OpenAI's clients send for what is not there, and templates would print it.
        given = [{name: value for name, value in message.items() if value is not None} for message in messages]
        own = {"messages": given, "tools": tools, "documents": None, "add_generation_prompt": add}
        return {**self.special_tokens, **more, **own}

    def _ask(self, source: str, sets: list[dict[str, Any]], marks: tuple[str, str]) -> dict[str, Any]:
        """The answer of `jinja.answer`. Raises ValueError where the process ended over it."""
        line = json.dumps({"source": source, "variables": sets, "marks": marks}).encode() + b"\n"
        with self._lock:
            process, reply = self._process or self._start(), b""
            self._process = None  # what Ctrl-C interrupts would answer the next request
            try:
                process.stdin.write(line)  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]
                reply = process.stdout.readline()  # type: ignore[union-attr]
                self._process = process if reply.endswith(b"\n") else None
            except BrokenPipeError:
                pass
            finally:
                if self._process is None:
                    self._end()
            if self._process is None:
                raise ValueError(
                    "chat template must take no more than 1 s and 512 MiB for a conversation, and took more; "
                    "give another with --chat-template"
                )
        return json.loads(reply)

    def _start(self) -> subprocess.Popen[bytes]:
        # It finds packages where this process does, but nothing beside the program (-P); in a session of its own Ctrl-C
        # passes it by.
        process = subprocess.Popen(  # noqa: S603 (this package's own program)
            [sys.executable, "-P", "-B", str(PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._end = weakref.finalize(self, _end, process)
        return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def plain_template(tokenizer: Tokenizer) -> ChatTemplate:
    """PLAIN, for any tokenizer."""
    return ChatTemplate(PLAIN, special_tokens_of(tokenizer))


def special_tokens_of(tokenizer: Tokenizer) -> dict[str, str]:
    """What a template is given where no file names the special tokens."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return {} if tokenizer.eos_id is None else {"eos_token": END_OF_TEXT}
    spelled = tokenizer.added_tokens
    ids = {"bos_token": next(iter(tokenizer.begin_ids), None), "eos_token": tokenizer.eos_id}
    return {name: spelled[token] for name, token in ids.items() if token in spelled}


def read_chat_template(folder: epath.Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template that a run folder or a Hugging Face folder holds, or None.

    It is in chat_template.jinja or in tokenizer_config.json, which also names the special tokens. Raises ValueError for
    files that hold something else.
    """
    config = _read_config(folder / CONFIG)
    given = config.get("chat_template") or {}
    if isinstance(given, list):  # one a purpose, in folders of some years ago
        given = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
    templates = given if isinstance(given, dict) else {"default": given}
    for name, file in (("default", FILE), ("tool_use", WITH_TOOLS)):
        if (folder / file).exists():
            templates = {**templates, name: read_template(folder / file)}
    source, with_tools = templates.get("default"), templates.get("tool_use")
    if source is None and with_tools is None:
        return None
    if not isinstance(source, str) or not isinstance(with_tools, str | None):
        raise ValueError(f"chat_template in {folder / CONFIG} must be a text; restore the model's files")
    tokens = {name: _spelling(config[name]) for name in NAMES if config.get(name) is not None}
    return ChatTemplate(source, special_tokens_of(tokenizer) | tokens, with_tools)


def choose_template(given: str, own: ChatTemplate | None, tokenizer: Tokenizer) -> ChatTemplate | None:
    """What --chat-template means: a model's own where it is empty, `plain`, or that of a file.

    Raises ValueError for a file that cannot be read, or that holds a template which can render nothing.
    """
    if not given:
        template = own
    elif given == "plain":
        template = plain_template(tokenizer)
    else:
        tokens = special_tokens_of(tokenizer) if own is None else own.special_tokens
        template = ChatTemplate(read_template(open_folder(given)), tokens)
    if template:
        template.check()
    return template


def read_template(path: epath.Path) -> str:
    """A template as text. Raises ValueError if there is none."""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"chat template {path} must be a readable text ({reason_of(error)}); check the path") from None


def write_chat_template(template: ChatTemplate, folder: Path) -> None:
    """The files that `read_chat_template` reads, into a folder that holds none of them."""
    (folder / FILE).write_text(template.source, "utf-8")
    (folder / CONFIG).write_text(json.dumps(template.special_tokens, indent=2, ensure_ascii=False) + "\n", "utf-8")
    if template.with_tools is not None:
        (folder / WITH_TOOLS).parent.mkdir()
        (folder / WITH_TOOLS).write_text(template.with_tools, "utf-8")


def _read_config(path: epath.Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON ({reason_of(error)}); restore the model's files") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold an object; restore the model's files")
    return config


def _spelling(token: Any) -> str:
    """The text of a special token, which a file may give with its properties."""
    return str(token.get("content", "") if isinstance(token, dict) else token)


def random_mark() -> str:
    """Characters that no text holds: eight of Unicode's noncharacters, drawn at random."""
    return "".join(chr(0xFDD0 + secrets.randbelow(32)) for _ in range(8))
