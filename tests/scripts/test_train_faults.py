"""The programs of tests/claims that break runs, at a small size; docs/claims.md has the command lines of the whole."""

from tests.claims.faults import SMOKE
from tests.claims.kill_and_resume import kill_and_compare
from tests.claims.soak import soak


def test_a_run_that_is_killed_in_a_save_equals_one_that_was_left_alone_to_the_bit(tmp_path):
    """The soak below kills between steps."""
    report = kill_and_compare(tmp_path, kills=1, seed=1, steps=40)
    assert len(report) == 2
    assert "in a save" in report[0]


def test_faults_on_changing_layouts_cost_a_run_nothing_but_time(tmp_path):
    """Raises by itself where an attempt misbehaves or a bit differs in the end."""
    lines = soak(tmp_path, SMOKE, faults=2, seed=14)
    struck = {line.split("|")[1].strip() for line in lines if line.startswith("| ")}
    assert struck == {fault.name for fault in SMOKE}
    assert "bits of the undisturbed run" in lines[-2]
