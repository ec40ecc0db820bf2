"""What convert.py takes of memory, each direction in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.parallax.interop.measure_memory import make

ROOT = Path(__file__).parents[2]


def test_memory_stays_below_the_parameters_and_one_and_a_half_of_the_largest_tensor(tmp_path):
    """One matrix of all layers, held beside the parameters, would be too much."""

    def run(command):
        return subprocess.run(
            [sys.executable, "-m", "tests.parallax.interop.measure_memory", command, str(tmp_path)],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
        ).stdout

    make(tmp_path)
    for command in ("import", "export"):
        measured = json.loads(run(command))
        over = measured["used"] - measured["parameters"]
        assert measured["of all layers"] > 1.5 * measured["largest"]
        assert 0 < over < 1.5 * measured["largest"], command
