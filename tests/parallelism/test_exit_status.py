"""What ended a process, by the code of the error: its own fault, a device's, or a peer's."""

import os

import jax
import pytest

from parallelism.exit_status import DEVICE_FAILURE, FAILED, LOST_PEER, OUT_OF_MEMORY, code_of, status_of
from parallelism.hosts import run_process

GLOO = "Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer"


@pytest.mark.parametrize(
    ("message", "several", "alone"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes.", FAILED, FAILED),
        ("INVALID_ARGUMENT: Argument does not match host shape", FAILED, FAILED),
        ("UNIMPLEMENTED: no such collective", FAILED, FAILED),
        ("INTERNAL: Mosaic failed to compile TPU kernel: barrier", FAILED, FAILED),
        ("INTERNAL: Failed to execute: CUDA_ERROR_ILLEGAL_ADDRESS", DEVICE_FAILURE, DEVICE_FAILURE),
        ("DATA_LOSS: uncorrectable ECC error", DEVICE_FAILURE, DEVICE_FAILURE),
        (f"UNKNOWN: {GLOO}", LOST_PEER, DEVICE_FAILURE),
        (f"INTERNAL: {GLOO}", LOST_PEER, DEVICE_FAILURE),
        (f"FAILED_PRECONDITION: Buffer Definition Event: {GLOO}", LOST_PEER, FAILED),
        ("UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats)", LOST_PEER, DEVICE_FAILURE),
        ("DEADLINE_EXCEEDED: Barrier timed out", LOST_PEER, DEVICE_FAILURE),
        ("no code at all", FAILED, FAILED),
    ],
)
def test_a_failure_that_would_repeat_is_told_from_one_that_may_pass(message, several, alone):
    for error in (jax.errors.JaxRuntimeError(message), ValueError(message)):
        assert (status_of(error, True), status_of(error, False)) == (several, alone)


def test_other_errors_have_no_code():
    assert code_of(ValueError("UNKNOWN: x")) == "UNKNOWN"
    assert code_of(KeyError("UNKNOWN: x")) is None
    assert code_of(ValueError("steps=0 must be at least 1; try 1000")) is None
    assert status_of(KeyError("a bug"), True) == FAILED


def test_memory_that_is_too_small_ends_a_process_with_one_line(monkeypatch, capsys):
    def main():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nBuffers: many")

    monkeypatch.setattr(os, "_exit", lambda status: None)
    assert run_process(main) == FAILED
    line = f"error: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.; {OUT_OF_MEMORY}\n"
    assert capsys.readouterr().err == line
