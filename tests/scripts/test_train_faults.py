"""The program of tests/claims that breaks runs, at a small size; docs/claims.md has the command lines of the whole."""

from tests.claims.faults import SMOKE
from tests.claims.soak import soak
from tests.scripts.runs import mesh, pmap, single


def test_faults_on_changing_layouts_cost_a_run_nothing_but_time(tmp_path):
    """Raises by itself where an attempt misbehaves or a bit differs in the end."""
    lines = soak(tmp_path, SMOKE, faults=len(SMOKE), seed=2, layouts=[single(), pmap(2), mesh("fsdp=4", 2)])
    struck = {line.split("|")[1].strip() for line in lines if line.startswith("| ")}
    assert struck == {fault.name for fault in SMOKE}
    assert "bits of the undisturbed run" in lines[-2]
