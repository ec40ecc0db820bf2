"""Faults on changing layouts, real processes and all, cost a run nothing but time."""

from tests.claims.soak import soak


def test_five_faults(tmp_path):
    """Raises by itself where an attempt misbehaves or a bit differs in the end."""
    lines = soak(tmp_path, faults=5, seed=3, mounts=False)
    struck = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert len(struck) == len(set(struck)) == 5
    assert "bits of the undisturbed run" in lines[-2]
