"""loss.png shows the record, whole and quickly."""

import json
import logging
import struct
import subprocess
import sys

import numpy as np
import pytest

from parallax.training.plot import plot_loss, smooth

BLUE, ORANGE, RED = (31, 119, 180), (255, 127, 14), (214, 39, 40)


def record(folder, rows):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def curve(count, evaluations=10):
    noise = np.random.default_rng(0).normal(size=count) * 0.2
    rows = [{"step": 10 * i, "loss": 1.5 + 2.7 * float(np.exp(-i * 5 / count)) + noise[i]} for i in range(count)]
    every = count // evaluations
    return rows + [
        {"step": 10 * i, "eval_loss": 1.6 + 2.7 * float(np.exp(-i * 5 / count))} for i in range(0, count, every)
    ]


def pixels(path) -> np.ndarray:
    from matplotlib.image import imread

    return (imread(path)[..., :3] * 255).round().astype(int)


def count_of(image, color) -> int:
    return int((np.abs(image - np.array(color)).max(-1) < 12).sum())


def test_draws_training_evaluation_and_the_best(tmp_path):
    record(tmp_path, curve(500))
    plot_loss(tmp_path)
    content = (tmp_path / "loss.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", content[16:24]) == (1200, 675)
    image = pixels(tmp_path / "loss.png")
    # Each series is there: some hundred pixels of its colour, far more than its key in the legend has.
    assert count_of(image, BLUE) > 2000
    assert count_of(image, ORANGE) > 1000
    assert count_of(image, RED) > 200
    assert sorted(file.name for file in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


@pytest.mark.parametrize("name", ["loss", "eval_loss"])
def test_draws_what_there_is(tmp_path, name):
    record(tmp_path, [{"step": 1, name: 2.0}, {"step": 2, name: None}, {"step": 3, "grad_norm": 1.0}])
    plot_loss(tmp_path)
    image = pixels(tmp_path / "loss.png")
    assert (count_of(image, ORANGE) > 0) == (name == "eval_loss")


def test_the_folder_s_name_is_no_formula(tmp_path):
    folder = tmp_path / "$^$"
    folder.mkdir()
    record(folder, curve(20))
    plot_loss(folder)
    assert (folder / "loss.png").exists()


def test_without_a_record_there_is_no_picture(tmp_path):
    plot_loss(tmp_path)
    record(tmp_path, [{"step": 1, "loss": None}])
    plot_loss(tmp_path)
    assert not (tmp_path / "loss.png").exists()


def test_smoothing_keeps_constants_lines_and_means():
    rng = np.random.default_rng(0)
    np.testing.assert_allclose(smooth(np.full(300, 2.5)), 2.5)
    line = np.arange(300.0)
    np.testing.assert_allclose(smooth(line)[6:-6], line[6:-6])
    noise = rng.normal(size=3000)
    assert smooth(noise).std() < 0.2 < noise.std()
    for short in ([], [1.0], [1.0, 2.0]):
        np.testing.assert_array_equal(smooth(np.array(short)), short)


def test_a_first_use_is_silent_and_loads_no_pyplot(tmp_path):
    record(tmp_path, curve(50))
    script = """
import sys
from parallax.training.plot import plot_loss
plot_loss(sys.argv[1])
assert "matplotlib.pyplot" not in sys.modules
"""
    environment = {"MPLCONFIGDIR": str(tmp_path / "empty"), "PATH": "", "HOME": str(tmp_path), "PYTHONPATH": "."}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert logging.getLogger("matplotlib").level in (logging.NOTSET, logging.ERROR)
