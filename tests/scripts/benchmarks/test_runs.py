"""`benchmark.py runs`: what the curve of a run answers."""

import math

import pytest

from scripts.benchmarks.runs import FORMS, result, run_train

CURVE = [(10.0, 100, 2.4), (20.0, 200, 1.9), (30.0, 300, 1.8), (40.0, 400, 1.85), (101.0, 500, 1.0)]
TO_LOSS, AFTER_TIME = FORMS


def test_when_a_loss_was_reached_and_how_good_a_run_was_in_time():
    runs = [{"question": question, "evaluations": CURVE} for question in ("loss", "time")]
    assert result(runs) == {TO_LOSS: [30.0], AFTER_TIME: [1.8]}


def test_a_loss_that_was_not_reached_is_not_left_out():
    runs = [{"question": "loss", "evaluations": CURVE[:count]} for count in (4, 1)]
    assert result(runs)[TO_LOSS] == [30.0, math.inf]


def test_the_curve_of_a_run_is_read_to_its_end(tmp_path):
    (tmp_path / "text").write_text("to be or not to be " * 20)
    shape = "--steps 4 --eval-interval 2 --seq-len 8 --batch-size 2 --model.num-layers 1 --model.embed-dim 8"
    curve = run_train([*shape.split(), "--dataset", str(tmp_path / "text")], tmp_path / "run", 500.0)
    assert [step for _, step, _ in curve] == [2, 4]
    assert 0 < curve[0][0] <= curve[1][0]
    assert all(loss > 0 for _, _, loss in curve)


def test_a_run_that_train_refuses_is_named_by_its_last_line(tmp_path):
    with pytest.raises(ValueError, match=r"train.py ended with status 2: error: .*steps"):
        run_train(["--steps", "0"], tmp_path / "run")


def test_bad_input_is_one_line(refuse):
    refuse("runs --seeds a", "seed 'a' must be a number")
