"""Scripts as real processes: one, or two that meet over loopback."""

import contextlib
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]
HANG_SECONDS = 120
START = """
    import json, sys
    import numpy as np
    from jax.experimental import multihost_utils
    from parallelism.hosts import Cluster, agree, fetch, join, run_process
    from parallelism.sentinel import require_same
    from scripts.common.command_line import errors_in_one_line
    number = int(sys.argv[2])
    cluster = Cluster(coordinator="127.0.0.1:" + sys.argv[1], num_processes=2, process_id=number)
"""


@contextlib.contextmanager
def started(script, *arguments, **variables):
    """A process that runs a script, with pipes for all that goes in and comes out."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        cwd=ROOT,
        env=os.environ | variables,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@contextlib.contextmanager
def pair(script):
    """Two processes of two devices each, which will meet at a port of their own."""
    port = free_port()
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(started(START + script, port, number, JAX_NUM_CPU_DEVICES="2")) for number in ("0", "1")
        ]
