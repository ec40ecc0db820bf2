"""ladder.py run, with a stand-in for train.py: real training is the business of tests/claims/forecasts.py."""

import json
from pathlib import Path

import pytest

from parallelism.exit_status import FAILED, OUTSIDE_FAILURE
from scripts.forecasting import running
from scripts.forecasting.ladder import result_of
from tests.scripts.forecasting.ladders import ladder_in

STAND_IN = """
import json, pathlib, sys
words = sys.argv[1:]
folder = pathlib.Path(words[words.index("--output-dir") + 1])
behaviour = json.loads(pathlib.Path(__file__).with_name("behaviour.json").read_text())
with open(pathlib.Path(__file__).with_name("calls"), "a") as calls:
    calls.write(json.dumps(words) + "\\n")
status = behaviour.get(folder.name, 0)
if status:
    print("error: stopped: 5 steps in a row were not finite; try a lower rate", file=sys.stderr)
    sys.exit(status)
steps = int(words[words.index("--steps") + 1])
folder.mkdir(parents=True)
(folder / "metrics.jsonl").write_text(json.dumps({"step": steps, "eval_loss": 2.0}) + "\\n")
(folder / "summary.json").write_text(json.dumps({"finished": True}))
(folder / "config.json").write_text(json.dumps({"corpus": {"sha256": "c0ffee"}}))
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A function that sets how train.py ends for members by name; behind it, the calls so far."""
    script = tmp_path / "train.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(running, "TRAIN", script)

    def behave(**statuses: int) -> None:
        (tmp_path / "behaviour.json").write_text(json.dumps(statuses))

    behave()
    return behave


def calls(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def test_trains_all_and_does_nothing_twice(tmp_path, stand_in, capsys):
    ladder = ladder_in(tmp_path / "ladder", steps=(100,))
    assert running.run([str(ladder.folder), "--", "--strategy", "single"]) == 0
    assert [result_of(ladder, member).loss for member in ladder.members] == [2.0] * 4
    assert all(words[-2:] == ["--strategy", "single"] and "--resume" in words for words in calls(tmp_path))
    assert "finished  4 of 4 runs" in capsys.readouterr().err
    assert running.run([str(ladder.folder)]) == 0
    assert len(calls(tmp_path)) == 4


def test_a_host_takes_its_own_runs(tmp_path, stand_in):
    ladder = ladder_in(tmp_path / "ladder", steps=(100,))
    first, second, third, _ = (member.name for member in ladder.members)
    assert running.run([str(ladder.folder), "--only", third, first]) == 0
    assert [result_of(ladder, member).loss for member in ladder.members] == [2.0, None, 2.0, None]
    assert running.run([str(ladder.folder), "--only", second, "--", "--strategy", "single"]) == 0
    assert calls(tmp_path)[-1][-2:] == ["--strategy", "single"]
    with pytest.raises(ValueError, match=r"--only 7x7 is no run of .*; choose from"):
        running.run([str(ladder.folder), "--only", "7x7"])


def test_a_run_that_fails_by_itself_is_left_out_for_good(tmp_path, stand_in, capsys):
    ladder = ladder_in(tmp_path / "ladder", steps=(100,))
    failed = ladder.members[1]
    stand_in(**{failed.name: FAILED})
    assert running.run([str(ladder.folder)]) == 0
    said = capsys.readouterr().err
    assert f"left out  {failed.name}: stopped: 5 steps in a row were not finite" in said
    assert "finished  3 of 4 runs" in said
    running.run([str(ladder.folder)])
    assert len(calls(tmp_path)) == 4


def test_a_run_that_could_not_begin_is_noted_too(tmp_path, stand_in):
    """What it said may be in any encoding."""
    ladder = ladder_in(tmp_path / "ladder", steps=(100,))
    (tmp_path / "train.py").write_text("import os\nos.write(2, b'no such \\xff device\\n')\nraise SystemExit(1)")
    assert running.run([str(ladder.folder)]) == 0
    assert result_of(ladder, ladder.members[0]).failure == "no such \ufffd device"


def test_a_failure_from_outside_stops_it_and_it_goes_on(tmp_path, stand_in):
    ladder = ladder_in(tmp_path / "ladder", steps=(100,))
    stand_in(**{ladder.members[2].name: OUTSIDE_FAILURE})
    assert running.run([str(ladder.folder)]) == OUTSIDE_FAILURE
    assert len(calls(tmp_path)) == 3
    stand_in()
    assert running.run([str(ladder.folder)]) == 0
    assert len(calls(tmp_path)) == 5
    assert result_of(ladder, ladder.members[-1]).loss == 2.0
