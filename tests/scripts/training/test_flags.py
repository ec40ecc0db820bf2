"""What a resumed run takes of the flags of the run: its schedule."""

import json

import numpy as np
import pytest

from parallax.config import OptimizerConfig
from parallax.training.optimizer import make_learning_rate
from scripts import train
from scripts.training.flags import read_flags
from tests.scripts.runs import rows


def rates(folder):
    return {row["step"]: row["learning_rate"] for row in rows(folder) if "learning_rate" in row}


@pytest.mark.parametrize(
    ("flags", "length", "words"),
    [
        ([], 12, "the rate falls until step 12 and stays at 0.0001; --schedule-steps 30 lets it fall until the end"),
        (["--schedule-steps", "30"], 30, ""),
        (["--schedule-steps", "40"], 40, "the rate would fall until step 40 and is cut off at step 30; "),
    ],
)
def test_more_steps_leave_the_schedule_as_it_is_unless_asked(call, finished, flags, length, words):
    """The warm-up of a step stays too, though a tenth of 30 would be three."""
    before = rates(finished)
    more = ["--steps", "30", "--log-interval", "1"]
    status, _, err = call(train, "--resume", "--output-dir", "run", *more, *flags)
    assert status == 0
    assert f"schedule  {words}" in err if words else "schedule  " not in err
    found, schedule = rates(finished), make_learning_rate(OptimizerConfig(warmup_steps=1), length)
    assert {step: found[step] for step in before} == before
    steps = np.arange(13, 31)
    expected = [schedule(np.int32(step - 1)) for step in steps]
    np.testing.assert_allclose([found[step] for step in steps], expected, rtol=1e-6)
    optimizer = json.loads((finished / "config.json").read_text())["optimizer"]
    assert (optimizer["schedule_steps"], optimizer["warmup_steps"]) == (length, 1)


def test_a_run_that_recorded_no_schedule_keeps_that_of_its_steps(finished):
    config = json.loads((finished / "config.json").read_text())
    config["optimizer"] |= {"warmup_steps": None}
    del config["optimizer"]["schedule_steps"]
    (finished / "config.json").write_text(json.dumps(config))
    learning = read_flags(["--resume", "--output-dir", str(finished), "--steps", "300"]).learning
    assert (learning.schedule_steps, learning.warmup_steps) == (12, 1)
