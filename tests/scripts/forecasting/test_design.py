import dataclasses

import pytest

from parallax.config import OptimizerConfig, TrainConfig
from scripts.forecasting.design import Timed, design, members_of
from scripts.forecasting.flags import DesignFlags
from tests.scripts.forecasting.ladders import TARGET

TIMED = [
    Timed(dataclasses.replace(TARGET, embed_dim=width), 1000 * width, 1e6 * width, 0.01 * width, 2.0)
    for width in (8, 16, 24)
]


@pytest.mark.parametrize("seeds", [1, 2])
def test_runs_take_the_time_that_there_is(seeds):
    members = members_of(DesignFlags(output="ladder", minutes=100.0, lengths=3, seeds=seeds), TIMED)
    assert len(members) == 3 * 3 * seeds
    assert 0.99 * 6000 < sum(member.seconds for member in members) <= 6000
    assert len({member.name for member in members}) == len(members)
    for timed in TIMED:
        own = sorted({member.steps for member in members if member.params == timed.params})
        assert own == [own[0], 2 * own[0], 4 * own[0]]


def test_or_the_operations():
    members = members_of(DesignFlags(output="ladder", flops=1e12, lengths=3), TIMED)
    assert 0.99e12 < sum(member.flops for member in members) <= 1e12


def test_too_little_is_refused():
    with pytest.raises(ValueError, match=r"--minutes 1 leaves \d+ steps for the shortest run and must leave 50"):
        members_of(DesignFlags(output="ladder", minutes=1.0, lengths=3), TIMED)


def test_a_warm_up_longer_than_the_shortest_run_is_refused():
    learning = OptimizerConfig(warmup_steps=100_000)
    with pytest.raises(ValueError, match=r"warmup_steps=100000 must not exceed steps=\d+"):
        members_of(DesignFlags(output="ladder", minutes=100.0, learning=learning), TIMED)


def test_a_folder_that_is_there_is_refused_before_anything_is_timed(tmp_path):
    with pytest.raises(ValueError, match="exists already; choose another"):
        design(["--output", str(tmp_path), "--minutes", "1", "--dataset", "no such"])


def test_a_budget_and_a_folder_are_needed():
    with pytest.raises(ValueError, match="give either --minutes or --flops"):
        DesignFlags(output="ladder").check_whole()
    with pytest.raises(ValueError, match="a ladder needs a folder"):
        DesignFlags(minutes=1.0).check_whole()
    with pytest.raises(ValueError, match="--steps 500 differs by run; leave it to the ladder"):
        DesignFlags(output="ladder", minutes=1.0, train=TrainConfig(steps=500)).check_whole()
    with pytest.raises(ValueError, match="--schedule-steps 500 differs by run; leave it to the ladder"):
        DesignFlags(output="ladder", minutes=1.0, learning=OptimizerConfig(schedule_steps=500)).check_whole()
    with pytest.raises(ValueError, match="sizes=2 must be at least 3"):
        DesignFlags(output="ladder", minutes=1.0, sizes=2)
