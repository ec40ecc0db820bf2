"""The allocator keeps what it was given."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import resource
import numpy as np
from scripts.common.jax_process import keep_large_buffers
keep_large_buffers()
def touch():
    for _ in range(20):
        np.ones(2**22)  # 32 MiB, far above the size that malloc maps on its own
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_a_second_round_of_large_temporaries_faults_no_pages_in():
    root = Path(__file__).resolve().parent.parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=root, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 1000  # one round without it: 20 × 8192 pages
