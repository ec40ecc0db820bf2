"""A trace of the steps that were asked for, and always closed."""

import jax
import jax.numpy as jnp
import pytest

from parallax.training.progress import SKIPPED, TRACED, Profiler


@pytest.fixture
def trace(monkeypatch):
    """What the profiler received, in order, with the step before it."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(("start", folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop",)))
    return calls


@pytest.mark.parametrize("start", [0, 40])
@pytest.mark.parametrize("steps", range(SKIPPED + TRACED + 4))
def test_one_trace_of_five_steps_or_of_as_many_as_there_are(trace, tmp_path, steps, start):
    profiler, running, traced = Profiler(tmp_path / "profile", start), False, []
    for step in range(start + 1, start + steps + 1):
        if running:
            traced.append(step)
        profiler.step(step, {"loss": 1.0})
        profiler.row({"step": step})
        running = bool(trace) and trace[-1] != ("stop",)
    profiler.close()
    profiler.close()
    begun = steps >= SKIPPED
    assert trace == ([("start", str(tmp_path / "profile")), ("stop",)] if begun else [])
    first = start + SKIPPED + 1
    assert traced == list(range(first, min(start + steps, first + TRACED - 1) + 1))


@pytest.mark.parametrize("steps", [SKIPPED + 1, SKIPPED + TRACED + 2])
def test_a_trace_lies_in_the_folder(tmp_path, steps):
    """A run that ends within the traced steps leaves one as well."""
    profiler, double = Profiler(tmp_path / "profile", 0), jax.jit(lambda x: 2 * x)
    for step in range(1, steps + 1):
        double(jnp.float32(step)).block_until_ready()
        profiler.step(step, {})
    profiler.close()
    files = [path for path in (tmp_path / "profile").rglob("*.xplane.pb") if path.stat().st_size]
    assert len(files) == 1
