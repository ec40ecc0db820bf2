"""A run that is killed and resumed equals one that was left alone, to the bit."""

import importlib.util
from pathlib import Path


def test_three_kills(tmp_path):
    path = Path(__file__).with_name("kill_and_resume.py")
    spec = importlib.util.spec_from_file_location("kill_and_resume", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    report = script.kill_and_compare(tmp_path, kills=3, seed=1)
    assert len(report) == 4
    assert "in a save" in report[1]
