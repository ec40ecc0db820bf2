"""What a job says of itself."""

import pytest

from parallax.training.optimizer import make_learning_rate
from scripts.training.flags import read_flags
from scripts.training.job import describe_schedule


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--steps 60", ""),
        ("--steps 90 --schedule-steps 60", "the rate falls until step 60 and stays at 0.0001; --schedule-steps 90"),
        ("--steps 40 --schedule-steps 60", "the rate would fall until step 60 and is cut off at step 40; "),
        ("--steps 4 --schedule-steps 60", "; --schedule-steps 4 --warmup-steps 1 lets it fall"),  # a tenth of 60 is 6
    ],
)
def test_a_schedule_that_is_not_as_long_as_the_run_is_named_with_flags_that_make_it_so(flags, words):
    said = describe_schedule(read_flags(flags.split()))
    assert words in said
    assert bool(said) == bool(words)
    advised = said.partition("; ")[2].partition(" lets")[0]
    settled = read_flags([*flags.split(), *advised.split()])
    assert describe_schedule(settled) == ""
    make_learning_rate(settled.learning, settled.train.steps)
