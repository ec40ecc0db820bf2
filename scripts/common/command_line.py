"""Command lines from dataclasses, and errors as one line.

Invariant: bad input gives exactly one line on standard error, with rule, value and remedy, and exit status 2.
"""

import contextlib
import errno
import functools
import importlib
import io
import os
import re
import reprlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import tyro

from parallelism.exit_status import INTERRUPTED, code_of

Flags = TypeVar("Flags")
Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]
"""A flag without a --no- form."""


def parse(
    flags: type[Flags],
    *,
    default: Flags | None = None,
    description: str,
    args: Sequence[str] | None = None,
    registry: tyro.constructors.ConstructorRegistry | None = None,
) -> Flags:
    """The command line as an instance of a dataclass, whose field docstrings are the help.

    A registry says how words are read as what tyro does not know.

    Raises ValueError if a flag is unknown, or its value breaks a rule.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    keywords: dict[str, Any] = {"registry": registry} | ({} if default is None else {"default": default})
    parser = functools.partial(tyro.cli, flags, args=arguments, description=description, **keywords)
    if {"-h", "--help"} & set(arguments):
        return parser()
    box = io.StringIO()
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"  # no message is wrapped, so that its first line is all of it
    try:
        with contextlib.redirect_stderr(box), contextlib.redirect_stdout(box):
            return parser()
    except SystemExit:
        raise ValueError(_first_message(box.getvalue())) from None
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns


def _first_message(box: str) -> str:
    """The sentence inside tyro's boxed error, between its title and its advice, with a remedy where it has none."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    title, *sections = re.split(r"^[ │]*[-─]{3,}[ │]*$", text, flags=re.MULTILINE)
    message = " ".join((sections or [title])[0].replace("│", " ").split()).rstrip(".")
    message = message.partition(". Got errors:")[0]
    # What a dataclass refuses by itself says its rule, and needs no name of the class or of its flag.
    message = re.sub(r"^Error parsing (?:\w+|[\w.-]*(?=: \w+=)): ", "", message)
    return message if "; " in message else f"{message}; see --help"


def flag_name(arg: str) -> str:
    """The flag in --flag or --flag=value, spelt with dashes."""
    return arg.partition("=")[0].replace("_", "-")


def flag_value(args: Sequence[str], flag: str) -> str:
    """The value of one flag, before the command line can be parsed as a whole; empty where it is not given."""
    for arg, following in zip(args, (*args[1:], ""), strict=False):
        if flag_name(arg) == flag:
            return arg.partition("=")[2] if "=" in arg else following
    return ""


def split_at_dashes(args: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """A command's own words, and those behind -- for train.py; None where there is no --."""
    at = list(args).index("--") if "--" in args else len(args)
    return list(args[:at]), list(args[at + 1 :]) if at < len(args) else None


def tell(line: str) -> None:
    """A line for the person who watches, on standard error."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def writing(what: str, remedy: str = "choose another") -> Iterator[None]:
    """Around what writes files; raises ValueError where one cannot be written, such as `--output FILE`."""
    try:
        yield
    except OSError as error:
        from parallax.storage import reason_of  # late: help needs no file system

        raise ValueError(f"{what} cannot be written: {reason_of(error)}; {remedy}") from None


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Around a script's main: bad input prints one line and exits 2; a closed pipe or Ctrl-C exits quietly."""
    try:
        yield
    except ValueError as error:
        if code_of(error) is not None:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more can be flushed
        raise SystemExit(141) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        from parallax.storage import is_of_bucket, reason_of  # late: help needs no file system

        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # even of a question whether it is there
            name = reprlib.repr(str(error.filename))
            line = f"name {name} is longer than a file system takes; give a shorter one"
        elif is_of_bucket(error):
            line = f"gs:// must answer and does not ({reason_of(error)}); try again"
        else:
            raise
        print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2) from None


def late(module: str, name: str) -> Callable[[Sequence[str]], int]:
    """A command by its module, which is imported when it is called: help and bad input answer at once."""
    return lambda args: getattr(importlib.import_module(module), name)(args)


def dispatch(script: str, help: str, commands: Mapping[str, Callable[[Sequence[str]], int]]) -> int:
    """Runs the command that the first argument names, on the others; its exit status, or 2 for bad input."""
    with errors_in_one_line():
        program = os.path.basename(sys.argv[0])  # `script`, or as in parallax launch
        name, *args = sys.argv[1:] or [""]
        if name in ("-h", "--help"):
            print(help.replace(script, program))
            return 0
        if name not in commands:
            raise ValueError(f"command {name!r} is not one of {', '.join(commands)}; see {program} --help")
        sys.argv = [f"{program} {name}", *args]  # what help and reports call it
        return commands[name](args)
