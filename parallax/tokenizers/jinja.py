"""Renders chat templates: the program that `ChatTemplate` starts, since a template is a program of a stranger.

Invariant: a template reaches nothing but the variables that it is given, by Jinja's immutable sandbox, set up as
transformers does; and a rendering that takes more than SECONDS of a core or MEMORY bytes ends this process. Standard
input has a request a line, standard output an answer a line, both JSON; only the standard library and Jinja are used.
"""

import contextlib
import datetime
import functools
import json
import resource
import signal
import sys
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 1
MEMORY = 1 << 29
"""Bytes of address space, this program's own included. macOS does not hold processes to it."""
MAX_TEXT = 1 << 23
"""Characters of all texts of a request."""
HOSTILE = (SecurityError, jinja2.TemplateNotFound, OverflowError, RecursionError)
"""What no conversation is to blame for: unsafe attributes, other files, ranges beyond 100,000, macros without end."""


class Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %}, by which a template says what the assistant writes: put between marks."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_put_between_marks"), [], [], body).set_lineno(line)

    def _put_between_marks(self, caller: Any) -> str:
        begin, end = self.environment.marks  # type: ignore[attr-defined]
        return f"{begin}{caller()}{end}"


class Sandbox(ImmutableSandboxedEnvironment):
    """Refuses what is unsafe at once, where Jinja waits until it is used."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise SecurityError(f"it reads the attribute {attribute!r}")


@functools.lru_cache(maxsize=4)
def compiled(source: str, begin: str, end: str) -> jinja2.Template:
    """Raises jinja2.TemplateSyntaxError."""
    environment = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, jinja2.ext.loopcontrols],
        loader=jinja2.DictLoader({}),
    )
    environment.extend(marks=(begin, end))
    environment.filters["tojson"] = to_json  # Jinja's own is for HTML, and escapes <, > and &
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Options: indent, separators, sort_keys."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def refuse(message: str) -> None:
    """What a template calls for a conversation that it cannot render."""
    raise jinja2.TemplateError(message)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """{"texts": one for each of the variable sets}, or {"error": one line, "invalid": whether no template would do}."""
    try:
        template = compiled(request["source"], *request["marks"])
    except (jinja2.TemplateSyntaxError, RecursionError) as error:
        return {"error": first_line(error), "invalid": True}
    texts, left = [], MAX_TEXT
    for variables in request["variables"]:
        pieces = []
        try:
            for piece in template.generate(variables):
                pieces.append(piece)
                left -= len(piece)
                if left < 0:
                    return {"error": f"it writes more than {MAX_TEXT} characters", "invalid": True}
        except MemoryError:
            raise
        except Exception as error:  # whatever a stranger's program raises
            return {"error": first_line(error), "invalid": isinstance(error, HOSTILE)}
        texts.append("".join(pieces))
    return {"texts": texts}


def first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]


def main() -> None:
    with contextlib.suppress(ValueError, OSError):  # macOS
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process, inside a long operation too
        reply = json.dumps(answer(request)).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(reply + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
