"""Tables of bad input: a line holds the arguments of a script, then what its one line of error must contain."""

import shlex

import pytest


def read_cases(table: str) -> list:
    """Parameters (arguments, words) for each line `arguments | word | word`."""
    lines = [line.strip().split(" | ") for line in table.strip().splitlines()]
    return [pytest.param(shlex.split(arguments), words, id=arguments) for arguments, *words in lines]
