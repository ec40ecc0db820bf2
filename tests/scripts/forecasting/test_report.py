import pytest

from scripts.forecasting.report import report
from tests.scripts.forecasting.ladders import LAW, finish, ladder_in


@pytest.mark.parametrize(
    ("finished", "reason"), [(0, "a fit of 0 runs needs at least 6"), (8, "a fit of 2 sizes needs at least 3")]
)
def test_a_ladder_on_the_way_has_no_law_yet(tmp_path, capsys, finished, reason):
    ladder = ladder_in(tmp_path / "ladder")
    for member in ladder.members[:finished]:
        finish(ladder, member, LAW.loss(member.params, ladder.tokens(member)))
    assert report([str(ladder.folder)]) == 0
    said = capsys.readouterr().out
    assert said.count("finished") == finished
    assert f"no law yet: {reason}" in said
