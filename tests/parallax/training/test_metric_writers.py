"""The record of a run: whole lines of standard JSON, the same after any interruption, and TensorBoard agrees."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from parallax.training.metric_writers import MetricsWriter, read_metrics
from tests.parallax.training.harness import TIMING

ROOT = Path(__file__).resolve().parent.parent.parent.parent


def values(step: int, seconds: float = 1.0) -> dict[str, float]:
    noise = np.random.default_rng(step).normal(size=3)
    return {"loss": float(np.float32(noise[0])), "grad_norm": noise[1], "learning_rate": 1e-3 / (step + 1),
            "tokens_per_second": 100 / seconds, "step_time": seconds}  # fmt: skip


def write_run(writer: MetricsWriter, steps, seconds=1.0):
    for step in steps:
        writer.write(step, values(step, seconds))
        if step % 4 == 0:
            writer.write(step, {"eval_loss": 1 / (step + 1)})


def timeless(path) -> list[str]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [json.dumps({name: value for name, value in row.items() if name not in TIMING}) for row in rows]


def events(folder) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {tag: {e.step: e.value for e in accumulator.Scalars(tag)} for tag in accumulator.Tags()["scalars"]}


def test_rows_are_readable_the_moment_they_are_written(tmp_path):
    writer = MetricsWriter(tmp_path / "new" / "run", resume_step=None)
    path = tmp_path / "new" / "run" / "metrics.jsonl"
    assert read_metrics(path) == []
    for step in range(1, 6):
        writer.write(step, values(step))
        assert read_metrics(path) == [{"step": s, **values(s)} for s in range(1, step + 1)]
    writer.close()


def test_samples_go_on_as_metrics_do_and_tensorboard_shows_them(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def write(resume_step, steps):
        writer = MetricsWriter(tmp_path, resume_step=resume_step)
        for step in steps:
            writer.write_samples(step, {"Who?": f"<b> {step}\n"})
        writer.close()

    write(None, (2, 4, 6))
    write(4, (6, 8))
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert rows == [{"step": step, "prompt": "Who?", "text": f"<b> {step}\n"} for step in (2, 4, 6, 8)]
    accumulator = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    accumulator.Reload()
    shown = {each.step: each.tensor_proto.string_val[0] for each in accumulator.Tensors("sample/0/text_summary")}
    assert shown == {step: f"    Who?\n    <b> {step}\n".encode() for step in (2, 4, 6, 8)}
    write(None, (1,))
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 1


def test_device_scalars_keep_every_bit(tmp_path):
    writer = MetricsWriter(tmp_path, resume_step=None)
    loss = jnp.float32(1) / 3
    writer.write(jnp.int32(1), {"loss": loss, "grad_norm": np.float32(0.1), "bad_steps": 2})
    writer.close()
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert np.float32(row["loss"]) == np.float32(loss)
    assert row == {"step": 1, "loss": float(loss), "grad_norm": float(np.float32(0.1)), "bad_steps": 2}


def test_what_is_not_finite_is_null_in_standard_json(tmp_path, capfd):
    def refuse(constant):
        raise AssertionError(f"{constant} is not standard JSON")

    writer = MetricsWriter(tmp_path, resume_step=None)
    writer.write(1, {"loss": math.nan, "grad_norm": jnp.inf, "param_norm": -math.inf, "z_loss": 0.5})
    writer.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse) == {
        "step": 1, "loss": None, "grad_norm": None, "param_norm": None, "z_loss": 0.5
    }  # fmt: skip
    assert events(tmp_path) == {"z_loss": {1: 0.5}}
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("torn", ["", '{"step": 13, "lo', '{"step": 13, "loss": 1.0}', "\x00\x00\x00"])
def test_a_resumed_record_equals_one_that_never_stopped(tmp_path, torn):
    whole = MetricsWriter(tmp_path / "whole", resume_step=None)
    write_run(whole, range(1, 21))
    whole.close()
    cut = MetricsWriter(tmp_path / "cut", resume_step=None)
    write_run(cut, range(1, 13), seconds=2.0)
    cut.close()
    path = tmp_path / "cut" / "metrics.jsonl"
    with path.open("a") as file:
        file.write(torn)
    resumed = MetricsWriter(tmp_path / "cut", resume_step=8)
    assert read_metrics(path)[-1] == {"step": 8, "eval_loss": 1 / 9}
    write_run(resumed, range(9, 21), seconds=3.0)
    resumed.close()
    assert timeless(path) == timeless(tmp_path / "whole" / "metrics.jsonl")
    assert [file for file in path.parent.iterdir() if "tfevents" not in file.name] == [path]
    curves, expected = events(tmp_path / "cut"), events(tmp_path / "whole")
    assert curves.keys() == expected.keys()
    for tag in expected.keys() - TIMING:
        assert curves[tag] == expected[tag]


def test_a_resumed_record_forgets_events_that_were_not_repeated(tmp_path):
    for resume_step, steps in ((None, range(1, 10)), (5, [6])):
        writer = MetricsWriter(tmp_path, resume_step=resume_step)
        write_run(writer, steps)
        writer.close()
    assert list(events(tmp_path)["loss"]) == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row] == [*range(1, 7)]


def test_resuming_from_the_start_or_from_nothing_is_a_new_record(tmp_path):
    MetricsWriter(tmp_path, resume_step=3).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    write_run(writer := MetricsWriter(tmp_path, resume_step=3), [4, 5])
    writer.close()
    MetricsWriter(tmp_path, resume_step=0).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("bad", ["not json", "[1]", '{"loss": 1.0}', '{"step": "1"}', "", '"step"'])
def test_a_broken_line_inside_is_an_error_that_names_it(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n')
    for act in (lambda: read_metrics(path), lambda: MetricsWriter(tmp_path, resume_step=3)):
        with pytest.raises(ValueError, match=r"line 2 of .*metrics.jsonl is not a row of metrics; remove that line"):
            act()
    assert path.read_text().count("\n") == 3


def test_tensorboard_reads_the_events_without_tensorflow_and_torch(tmp_path):
    writer = MetricsWriter(tmp_path, resume_step=None)
    write_run(writer, range(1, 9))
    # Written and not closed, as by a run that is killed now: what is in the record is in the events.
    read = events(tmp_path)
    writer.close()
    assert read["eval_loss"] == {4: pytest.approx(1 / 5), 8: pytest.approx(1 / 9)}
    for name in values(1):
        assert read[name] == {step: pytest.approx(values(step)[name], rel=1e-6) for step in range(1, 9)}
    script = """
import sys
from parallax.training.metric_writers import MetricsWriter
writer = MetricsWriter(sys.argv[1], resume_step=8)
writer.write(9, {"loss": 1.0})
writer.close()
assert not {"tensorflow", "jax"} & sys.modules.keys()
import torch
"""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    (tmp_path / "google" / "cloud").mkdir(parents=True)
    (tmp_path / "google" / "cloud" / "storage.py").write_text("raise SystemExit('the client of buckets was imported')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-W", "error", "-c", script, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stderr == "torch was imported\n"  # by the last line, where it can be had again
    assert events(tmp_path)["loss"][9] == 1.0
