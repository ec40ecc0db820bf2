import json
import math

import pytest

from parallelism.exit_status import FAILED
from scripts.forecasting import tune
from tests.scripts.forecasting.ladders import finish, ladder_in


@pytest.fixture
def trained(monkeypatch):
    """Runs whose loss is least at a rate of 2^-7; that of 2^-5 fails."""
    made = []

    def train_member(ladder, member, passed):
        rate = ladder.learning.learning_rate
        made.append((rate, ladder.train.batch_size, member.steps))
        if rate == 2**-5:
            ladder.folder.joinpath("runs").mkdir(parents=True, exist_ok=True)
            ladder.failure_file(member).write_text("5 steps in a row were not finite")
            return FAILED
        finish(ladder, member, 2 + 0.1 * abs(math.log2(rate) + 7))
        return 0

    monkeypatch.setattr(tune, "train_member", train_member)
    return made


def test_halves_until_one_is_left(tmp_path, trained, capsys):
    ladder = ladder_in(tmp_path / "ladder")
    rates = [str(2.0**power) for power in (-8, -7, -6, -5)]
    assert tune.tune([str(ladder.folder), "--rates", *rates]) == 0
    assert [steps for _, _, steps in trained] == [200] * 4 + [400] * 2 + [800]
    best = json.loads((ladder.folder / "tune.json").read_text())["best"]
    assert best["rate"] == 2**-7
    out = capsys.readouterr().out
    assert "--learning-rate 0.0078125" in out
    assert "at the end of those" not in out
    tune.tune([str(ladder.folder), "--rates", *rates])
    assert len(trained) == 7


def test_other_batches_learn_from_as_many_tokens(tmp_path, trained):
    ladder = ladder_in(tmp_path / "ladder")
    tune.tune([str(ladder.folder), "--rates", str(2**-7), "--batch-sizes", "8", "16"])
    assert {(batch, batch * steps) for _, batch, steps in trained} == {(8, 3200), (16, 3200), (8, 6400)}


def test_warns_at_the_end_of_the_grid(tmp_path, trained, capsys):
    ladder = ladder_in(tmp_path / "ladder")
    tune.tune([str(ladder.folder), "--rates", str(2**-9), str(2**-8)])
    assert "the best rate is at the end of those that were tried" in capsys.readouterr().out


def test_no_rate_is_best_where_all_fail(tmp_path, trained):
    ladder = ladder_in(tmp_path / "ladder")
    with pytest.raises(ValueError, match="no setting that was tried for 800 steps came to their end; try lower"):
        tune.tune([str(ladder.folder), "--rates", str(2**-5)])
    assert not (ladder.folder / "tune.json").exists()


def test_too_many_for_the_steps_that_there_are(tmp_path, trained):
    ladder = ladder_in(tmp_path / "ladder", steps=(30, 60, 120))
    with pytest.raises(ValueError, match="120 steps, halved 3 times, must leave 20"):
        tune.tune([str(ladder.folder), "--rates", *map(str, range(1, 9))])
