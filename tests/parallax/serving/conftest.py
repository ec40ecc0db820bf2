"""A second server that several modules share, beside the one of all tests, and a browser."""

import pytest

from tests.parallax.serving.browser import chromium
from tests.parallax.serving.server import serving


@pytest.fixture(scope="session")
def strict(small_run, tmp_path_factory):
    """A server of low limits; of one answer a request, since no schema can bound prompts times n.

    The letters of this model spell no colon, so of the plain form it can be told nothing: it has a template of its own.
    """
    template = tmp_path_factory.mktemp("strict") / "mine.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}!")
    flags = ("--max-prompt-tokens", "64", "--max-tokens", "8", "--max-answers", "1", "--chat-template", str(template))
    with serving(small_run, *flags, "--max-body-bytes", "50000", "--body-seconds", "2") as served:
        yield served


@pytest.fixture(scope="session")
def driver():
    """Of a browser that all pages share: to start one takes longer than most of what is done in it."""
    with chromium() as driver:
        yield driver
