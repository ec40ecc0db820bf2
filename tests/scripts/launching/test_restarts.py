"""Which deaths are followed by another attempt, and who is blamed for them."""

import signal

import pytest

from scripts.launching.restarts import Death, describe_status, first_to_fail, keep_running


def attempts(*statuses):
    """An attempt that ends with each of these in turn, and the numbers it was given."""
    numbers = []

    def attempt(number):
        numbers.append(number)
        status = statuses[number - 1]
        return Death(status, "it died") if status else None

    return attempt, numbers


@pytest.mark.parametrize(
    ("statuses", "restarts", "status", "made"),
    [
        ([0], 0, 0, 1),
        ([3, 0], 1, 0, 2),
        ([4, 0], 1, 0, 2),
        ([-9, 3, 0], 2, 0, 3),
        ([-9, 3], 1, 3, 2),
        ([3, -9], 1, 137, 2),
        ([1], 5, 1, 1),
        ([2], 5, 2, 1),
        ([3, 77], 5, 77, 2),
    ],
)
def test_only_what_may_pass_is_tried_again(statuses, restarts, status, made):
    attempt, numbers = attempts(*statuses)
    assert keep_running(attempt, restarts=restarts) == status
    assert numbers == list(range(1, made + 1))


def test_nothing_is_tried_again_once_it_is_to_stop():
    attempt, numbers = attempts(3, 0)
    assert keep_running(attempt, restarts=5, stopping=lambda: True) == 3
    assert numbers == [1]


@pytest.mark.parametrize(
    ("statuses", "first"),
    [
        ({}, None),
        ({0: 0, 1: None}, None),
        ({0: 4, 1: -9}, 1),
        ({0: 4, 1: 1, 2: 2}, 1),
        ({0: None, 1: 4, 2: 4}, 1),
        ({0: 3, 1: 4, 2: -6}, 0),
        ({0: 4, 1: -6, 2: 3}, 2),
        ({0: 4, 1: -6}, 1),
    ],
)
def test_one_that_lost_a_peer_is_blamed_last(statuses, first):
    assert first_to_fail(statuses) == first


def test_words_for_a_status():
    assert describe_status(3) == "exited with status 3"
    assert describe_status(-signal.SIGKILL) == "was killed by SIGKILL"
    assert describe_status(-40) == "was killed by signal 40"
