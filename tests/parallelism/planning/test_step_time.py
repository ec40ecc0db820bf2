"""What a step is expected to take: the formula by hand, and a fit that finds figures which made the runs."""

import dataclasses
import itertools

import pytest

from parallelism.planning.step_time import Calibration, Work, calibration
from tests.claims.step_time_fit import Run, calibrate, fit, leave_out

TRUE = Calibration(
    efficiency={"": 0.7, "a": 0.8, "b": 0.6},
    overlap={"": 0.7, "a": 0.9, "b": 0.5},
    size_class={"narrow": 0.9, "middle": 1.0, "wide": 1.1},
    kernel=0.6,
    experts={"few": 0.5, "many": 0.25},
    error=0.1,
    error_unseen=0.5,
)
WORK = Work(matmuls=8.0, kernels=0.6, elementwise=0.5, update=0.25, in_layer=1.0, beside=2.0, embed_dim=8192)


def test_a_step_waits_for_what_matmuls_do_not_hide():
    """(8 + 0.6 / 0.6) / 0.8 of matmuls, 0.5 between them, 1 in layers, a tenth of 2 beside, 0.25 of the update."""
    assert TRUE.seconds(WORK, "a") == pytest.approx(9 / 0.8 + 0.5 + 1.0 + 0.2 + 0.25)
    # More than there are matmuls to hide it: all that is left over shows.
    assert TRUE.seconds(dataclasses.replace(WORK, beside=20.0), "a") == pytest.approx(20.0 + 1.0 + 0.25)
    assert TRUE.seconds(dataclasses.replace(WORK, embed_dim=2048), "a") == pytest.approx(
        (8 / 0.9 + 1) / 0.8 + 0.5 + 1.0 + 0.2 + 0.25
    )
    assert TRUE.seconds(dataclasses.replace(WORK, experts=0.5), "a") == pytest.approx(10 / 0.8 + 0.5 + 1.0 + 0.2 + 0.25)
    many = dataclasses.replace(WORK, experts=0.5, num_experts=128)
    assert TRUE.seconds(many, "a") == pytest.approx(11 / 0.8 + 0.5 + 1.0 + 0.2 + 0.25)
    assert TRUE.seconds(dataclasses.replace(WORK, host=50.0), "a") == pytest.approx(50.0 + 1.0 + 0.2 + 0.25)


def test_a_generation_without_runs_is_expected_by_the_mean_with_a_wider_interval():
    seen, unseen = TRUE.expected(WORK, "a"), TRUE.expected(WORK, "z")
    assert (seen.high / seen.seconds, unseen.high / unseen.seconds) == pytest.approx((1.1, 1.5))
    assert unseen.low == pytest.approx(unseen.seconds / 1.5)
    assert unseen.seconds == pytest.approx(9 / 0.7 + 0.5 + 1.0 + 0.6 + 0.25)


@pytest.fixture(scope="module")
def runs():
    """Of two generations, three widths and two shares of collectives, as the true figures make them."""
    found = []
    for name, width, beside, kernels in itertools.product("ab", (4096, 8192, 16384), (0.5, 5.0), (0.2, 3.0)):
        work = dataclasses.replace(WORK, embed_dim=width, beside=beside, kernels=kernels)
        found.append(Run(name, str(width), work, TRUE.seconds(work, name)))
    return found


def test_a_fit_finds_the_figures_that_made_the_runs(runs):
    found = fit(runs)
    for work, name in ((run.work, run.generation) for run in runs):
        assert found.seconds(work, name) == pytest.approx(TRUE.seconds(work, name), rel=0.05)
    assert found.efficiency["a"] == pytest.approx(0.8, rel=0.05)
    assert found.overlap["a"] > found.overlap["b"]


def test_what_is_left_out_of_a_fit_does_not_shape_it(runs):
    """A run of five times its time moves what is expected of the others, and not what is expected of itself."""
    wrong = [dataclasses.replace(runs[0], seconds=5 * runs[0].seconds), *runs[1:]]
    alone = leave_out(wrong)
    assert alone[0] == pytest.approx(runs[0].seconds, rel=0.03)
    # Without its generation the mean of the priors and the other one is all there is.
    apart = leave_out(wrong, lambda run: run.generation)[0]
    assert apart == leave_out(runs, lambda run: run.generation)[0] != pytest.approx(runs[0].seconds, rel=0.05)


def test_errors_are_of_models_and_generations_that_were_not_seen(runs):
    found = calibrate(runs)
    assert 0 < found.error < 0.1 < found.error_unseen < 0.5


def test_the_figures_that_come_with_the_project_are_plausible():
    found = calibration()
    assert all(0.4 < share < 0.95 for share in found.efficiency.values())
    assert all(0.2 < share < 1 for share in found.overlap.values())
    assert found.error <= found.error_unseen < 0.6
