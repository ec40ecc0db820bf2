"""One run to serve, and one server for all tests that leave it as it was."""

import pytest

from tests.parallax.serving.server import serving, write_run


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """A run folder to serve: an untrained model of a few letters."""
    return write_run(tmp_path_factory.mktemp("served") / "small-run")


@pytest.fixture(scope="session")
def server(small_run):
    """One server for all tests that leave it as it was."""
    with serving(small_run) as served:
        yield served
