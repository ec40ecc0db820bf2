"""One process-wide set-up for every test: eight simulated CPU devices, strict shapes.

Invariant: nothing here depends on which tests run, so any test can be run alone.
"""

import contextlib
import gc
import os
import signal
from importlib.metadata import version
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the time goes into compiling what then runs for milliseconds: without optimisation that takes half, without
# the fusion emitters of jaxlib 0.10, which 0.12 has no flag for, an eighth, and a quarter less in one module than cut
# into 32 for as many threads. Programs of tests/claims do without this.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
# Tests and the processes that they start compile the same programs again and again: they share them here, the smallest
# too, since one operation takes 10 ms to compile, and 1 ms to write or to read.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parent.parent / ".pytest_cache" / "compiled")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# A process that reads what another is writing there compiles it. To say so would fail tests of the error output.
os.environ["PYTHONWARNINGS"] = "ignore:Error reading persistent compilation cache entry"
# Compiling this project's modules is a tenth of the start of a process, of which tests make hundreds: they are kept,
# though images of containers often have Python keep none.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# No test asks which line an operation comes from, and a tenth of compiling went into the frames of pytest above it.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# A shell has what it starts in the background ignore SIGINT, and so would the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    """What imports and collection made stays: to look through it again and again took a twentieth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(scope="session")
def bucket():
    """The gs:// address of a bucket in an emulator, for tests marked `external`."""
    from tests.google_storage import serving

    with serving() as address:
        yield address


@pytest.fixture
def x64():
    """Numbers of 64 bits, within which finite differences and definitions are exact."""
    with jax.enable_x64(True):
        yield


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


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """A run folder to serve: an untrained model of a few letters."""
    from tests.parallax.serving.server import write_run

    return write_run(tmp_path_factory.mktemp("served") / "small-run")


@pytest.fixture(scope="session")
def server(small_run):
    """One server for all tests that leave it as it was."""
    from tests.parallax.serving.server import serving

    with serving(small_run) as served:
        yield served
