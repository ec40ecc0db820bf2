"""What the tests of the data package share: refusals are one line of text."""

import contextlib

import pytest


@pytest.fixture
def refused():
    """Expects a ValueError whose single line holds all of the given parts."""

    @contextlib.contextmanager
    def expect(*parts: str):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (the parts are the match)
            yield
        message = str(caught.value)
        assert "\n" not in message
        for part in parts:
            assert part in message

    return expect
