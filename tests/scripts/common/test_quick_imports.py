import gc
import subprocess
import sys
from pathlib import Path

from scripts.common.quick_imports import quick_imports

ROOT = Path(__file__).resolve().parents[3]
FIRST = """
import gc
from scripts.common.quick_imports import quick_imports
try:
    with quick_imports():
        assert not gc.isenabled()
        import no_such_module
except ImportError:
    print(gc.isenabled(), gc.get_freeze_count() > 0)
"""


def test_what_was_imported_is_looked_through_no_more():
    done = subprocess.run([sys.executable, "-c", FIRST], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "True True\n"


def test_a_process_that_has_jax_is_left_as_it_is():
    frozen = gc.get_freeze_count()
    with quick_imports():
        assert gc.isenabled()
    assert gc.get_freeze_count() == frozen
