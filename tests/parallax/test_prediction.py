import dataclasses
import json

import pytest

from parallax.prediction import Prediction, expected_at, judge, read_prediction
from parallax.training.plot import plot_loss

MODEL = {"embed_dim": 64, "attention": "auto"}
CURVE = ((0.2, 1.5, 1.1), (0.6, 1.2, 1.05), (1.0, 1.0, 1.0))
PREDICTION = Prediction(2.0, 1.9, 2.1, 0.8, 1000, 100 * 4 * 8, 8, 512, MODEL, "c0ffee", "1add3e", CURVE)


@pytest.fixture
def run(tmp_path):
    (tmp_path / "prediction.json").write_text(json.dumps(dataclasses.asdict(PREDICTION)))
    write_config(tmp_path)
    return tmp_path


def write_config(folder, steps=100, batch_size=4, seq_len=8, eval_tokens=512, sha256="c0ffee", **model):
    train = {"steps": steps, "batch_size": batch_size, "seq_len": seq_len}
    values = {"run": {"eval_tokens": eval_tokens}, "train": train, "model": MODEL | model}
    values["corpus"] = {"sha256": sha256}
    (folder / "config.json").write_text(json.dumps(values))


def write_losses(folder, losses):
    rows = [{"step": step, "eval_loss": loss} for step, loss in losses.items()]
    rows = [row | expected_at(folder, row["step"]) for row in rows]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_interval_narrows_to_that_of_the_last_loss():
    assert PREDICTION.at(1.0) == pytest.approx((1.9, 2.0, 2.1))
    assert PREDICTION.at(0.6) == pytest.approx((1.9 * 1.2 / 1.05, 2.4, 2.1 * 1.2 * 1.05))
    assert PREDICTION.at(0.05) == pytest.approx(PREDICTION.at(0.2))


def test_a_run_that_keeps_it(run):
    write_losses(run, {10: 9.0, 20: 3.0, 60: 2.4})
    assert judge(run)["kept"] is None
    assert judge(run)["left_at"] is None
    write_losses(run, {10: 9.0, 20: 3.0, 60: 2.4, 100: 2.05})
    assert judge(run)["kept"] is True


def test_a_run_that_leaves_it_and_comes_back(run):
    write_losses(run, {20: 3.0, 60: 2.8, 100: 2.05})
    verdict = judge(run)
    assert (verdict["left_at"], verdict["kept"]) == (60, True)
    write_losses(run, {20: 3.0, 60: 2.4, 100: 2.2})
    verdict = judge(run)
    assert (verdict["left_at"], verdict["kept"]) == (100, False)


def test_a_loss_that_is_not_finite_is_not_kept(run):
    write_losses(run, {20: 3.0, 60: None, 100: None})
    assert (judge(run)["left_at"], judge(run)["kept"]) == (60, False)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"steps": 200}, ["tokens"]),
        ({"batch_size": 2, "seq_len": 16}, ["seq_len"]),
        ({"eval_tokens": 256}, ["eval_tokens"]),
        ({"sha256": "0ther"}, ["corpus"]),
        ({"embed_dim": 32}, ["model.embed_dim"]),
    ],
)
def test_another_run_is_not_judged(run, change, named):
    write_config(run, **change)
    verdict = judge(run)
    assert (verdict["kept"], verdict["differs"]) == (None, named)


def test_how_a_model_is_computed_is_free(run):
    write_config(run, attention="blocks", remat="full")
    assert "differs" not in judge(run)


def test_nothing_without_a_prediction(tmp_path):
    write_config(tmp_path)
    assert (read_prediction(tmp_path), judge(tmp_path), expected_at(tmp_path, 50)) == (None, {}, {})


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "[" * 100_000,
        json.dumps(dataclasses.asdict(PREDICTION) | {"curve": []}),
        json.dumps(dataclasses.asdict(PREDICTION) | {"low": "1.9"}),
    ],
    ids=["list", "deep", "no curve", "text"],
)
def test_a_file_that_is_none(tmp_path, text):
    (tmp_path / "prediction.json").write_text(text)
    with pytest.raises(ValueError, match=r"is no prediction .* remove it, or register another"):
        read_prediction(tmp_path)


def test_is_drawn_with_the_run(run):
    write_losses(run, {20: 3.0, 60: 2.4})
    (run / "prediction.json").rename(run / "aside")
    plot_loss(run)
    without = (run / "loss.png").read_bytes()
    (run / "aside").rename(run / "prediction.json")
    plot_loss(run)
    assert (run / "loss.png").read_bytes() != without
