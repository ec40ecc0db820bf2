"""A run that is killed and resumed equals one that was left alone, to the bit."""

from tests.claims.kill_and_resume import kill_and_compare


def test_three_kills(tmp_path):
    report = kill_and_compare(tmp_path, kills=3, seed=1)
    assert len(report) == 4
    assert "in a save" in report[1]
