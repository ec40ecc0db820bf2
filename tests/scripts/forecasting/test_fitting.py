import dataclasses
import json
import shutil

import pytest

from scripts.forecasting.fitting import far_beyond, fit, fit_ladder, warnings
from tests.scripts.forecasting.ladders import LAW, finish, finish_all, ladder_in


def test_fits_what_is_finished_and_names_what_failed(tmp_path, capsys):
    ladder = ladder_in(tmp_path / "ladder")
    finish_all(ladder)
    failed = ladder.members[-1]
    ladder.failure_file(failed).write_text("5 steps in a row were not finite")
    assert fit([str(ladder.folder)]) == 0
    out = capsys.readouterr().out
    assert f"warning: {failed.name} failed and is left out: 5 steps in a row were not finite" in out
    written = json.loads((ladder.folder / "fit.json").read_text())
    assert len(written["runs"]) == len(ladder.members) - 1
    assert written["left_out"] == {failed.name: "5 steps in a row were not finite"}
    assert written["ladder_sha256"] == ladder.sha256
    member = failed
    found = fit_ladder(ladder).fit.law.loss(member.params, ladder.tokens(member))
    assert found == pytest.approx(LAW.loss(member.params, ladder.tokens(member)), rel=0.01)


def test_a_run_that_diverged_and_ended_is_left_out(tmp_path):
    ladder = ladder_in(tmp_path / "ladder")
    finish_all(ladder)
    diverged = ladder.members[-1]
    truth = LAW.loss(diverged.params, ladder.tokens(diverged))
    shutil.rmtree(ladder.run_folder(diverged))
    finish(ladder, diverged, 1.3 * truth)
    fitted = fit_ladder(ladder)
    assert [result.member.name for result in fitted.results if result.failure] == [diverged.name]
    assert f"{diverged.name} failed and is left out: it diverged, to a loss of" in " ".join(warnings(fitted))
    expected = fitted.fit.law.loss(diverged.params, ladder.tokens(diverged))
    assert expected == pytest.approx(truth, rel=0.01)


def test_a_size_that_follows_another_law_can_be_left_out(tmp_path, capsys):
    ladder = ladder_in(tmp_path / "ladder")
    finish_all(ladder)
    *others, size = [member for member in ladder.members if member.params == ladder.members[0].params]
    for member in (*others, size):
        shutil.rmtree(ladder.run_folder(member))
        finish(ladder, member, 1.04 * LAW.loss(member.params, ladder.tokens(member)))
    names = [member.name for member in (*others, size)]
    assert fit([str(ladder.folder), "--without", *names]) == 0
    written = json.loads((ladder.folder / "fit.json").read_text())
    assert written["left_out"] == dict.fromkeys(names, "--without names it")
    assert len(written["runs"]) == len(ladder.members) - len(names)
    assert written["law"]["E"] == pytest.approx(LAW.E, rel=0.02)
    assert pytest.approx(LAW.E, rel=0.02) != fit_ladder(ladder).fit.law.E
    assert "left out" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--without 7x7 is no run of .*; choose from"):
        fit([str(ladder.folder), "--without", "7x7"])


def test_the_same_ladder_gives_the_same_bits(tmp_path):
    found = []
    for name in ("one", "other"):
        ladder = ladder_in(tmp_path / name)
        finish_all(ladder)
        fit([str(ladder.folder)])
        found.append((ladder.folder / "fit.json").read_bytes())
    assert found[0] == found[1]


def test_warns_of_few_tokens_of_repeats_and_of_a_bend(tmp_path):
    ladder = ladder_in(tmp_path / "ladder", unique=20_000)
    finish_all(ladder)
    said = " ".join(warnings(fit_ladder(ladder)))
    assert "under-trained, with fewer than 5 tokens a parameter" in said
    assert "repeat their data more than 4 times" in said
    straight = ladder_in(tmp_path / "straight")
    finish_all(straight)
    fitted = fit_ladder(straight)
    said = " ".join(warnings(fitted))
    assert "residuals bend" not in said
    assert "its bounds" not in said
    loose = dataclasses.replace(fitted.fit, law=dataclasses.replace(fitted.fit.law, alpha=3.0, E=1e-5))
    said = " ".join(warnings(dataclasses.replace(fitted, fit=loose)))
    assert "alpha is 3, the end of its bounds: the sizes do not tell it" in said
    assert "E is 1e-05: the runs do not tell" in said


def test_warns_far_beyond_the_largest_run(tmp_path):
    ladder = ladder_in(tmp_path / "ladder")
    finish_all(ladder)
    fitted = fit_ladder(ladder)
    largest = max(member.flops for member in ladder.members)
    assert far_beyond(fitted, 29 * largest) is None
    assert "40 times those of the largest run" in far_beyond(fitted, 40 * largest)


def test_too_few_runs(tmp_path):
    ladder = ladder_in(tmp_path / "ladder")
    for member in ladder.members[:5]:
        finish(ladder, member, 2.0)
    with pytest.raises(ValueError, match="a fit of 5 runs needs at least 6"):
        fit([str(ladder.folder)])
