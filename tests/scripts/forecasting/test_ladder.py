import dataclasses

import pytest

from parallax.config import TransformerConfig, config_to_dict
from scripts.forecasting.ladder import point_of, read_ladder, result_of
from scripts.forecasting.running import train_words
from scripts.training.flags import read_flags
from tests.scripts.forecasting.ladders import finish, ladder_in


def test_is_read_as_it_was_written(tmp_path):
    ladder = ladder_in(tmp_path / "ladder")
    again = read_ladder(tmp_path / "ladder")
    assert again == ladder
    assert again.sha256 == ladder.sha256
    with pytest.raises(ValueError, match="exists already; choose another"):
        ladder.write()
    with pytest.raises(ValueError, match=r"has no ladder\.json .* make one with ladder.py design"):
        read_ladder(tmp_path)


def test_a_member_is_known_by_its_folder(tmp_path):
    ladder = ladder_in(tmp_path / "ladder")
    first, second, third, *_ = ladder.members
    finish(ladder, first, 2.0)
    finish(ladder, second, 2.0)
    (ladder.run_folder(second) / "summary.json").write_text('{"finished": false}')
    finish(ladder, third, 2.0)
    ladder.failure_file(third).write_text("5 steps in a row were not finite")
    assert result_of(ladder, first).loss == 2.0
    assert result_of(ladder, first).curve[-1] == (1.0, 2.0)
    assert point_of(ladder, result_of(ladder, first)).tokens == 100 * 8 * 16
    assert (result_of(ladder, second).loss, result_of(ladder, second).failure) == (None, None)
    assert result_of(ladder, third).failure == "5 steps in a row were not finite"
    with pytest.raises(ValueError, match="is not finished; go on with"):
        point_of(ladder, result_of(ladder, second))


def test_a_last_loss_that_is_not_finite_is_not_that_of_an_earlier_step(tmp_path):
    ladder = ladder_in(tmp_path / "ladder")
    member = ladder.members[0]
    finish(ladder, member, 2.0)
    with (ladder.run_folder(member) / "metrics.jsonl").open("r+") as file:
        rows = file.read().replace('"step": 100, "eval_loss": 2.0', '"step": 100, "eval_loss": null')
        file.seek(0)
        file.write(rows)
    result = result_of(ladder, member)
    assert (result.loss, result.failure) == (None, "its last held-out loss is not finite")
    assert result.curve[-1][0] == 0.9


def test_a_run_of_another_text_is_refused(tmp_path):
    ladder = ladder_in(tmp_path / "ladder")
    member = ladder.members[0]
    finish(ladder, member, 2.0)
    (ladder.run_folder(member) / "config.json").write_text('{"corpus": {"sha256": "0ther"}}')
    with pytest.raises(ValueError, match=r"must have learned from the text of .* and has from another \(0ther…\)"):
        result_of(ladder, member)


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"corpus": null}'])
def test_a_run_with_a_damaged_file_is_named(tmp_path, text):
    ladder = ladder_in(tmp_path / "ladder")
    member = ladder.members[0]
    finish(ladder, member, 2.0)
    folder = ladder.run_folder(member)
    (folder / "config.json").unlink() if text is None else (folder / "config.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"runs/.*/config\.json must say .* restore it, or remove .* and train it again"
    ):
        result_of(ladder, member)
    (folder / "summary.json").write_text(text or "")
    assert result_of(ladder, member).loss is None


@pytest.mark.parametrize("text", ['"ladder"', "7", "[" * 100_000], ids=["text", "number", "deep"])
def test_a_file_that_is_no_ladder(tmp_path, text):
    (tmp_path / "ladder.json").write_text(text)
    with pytest.raises(ValueError, match=r"has no ladder\.json .* make one with ladder.py design"):
        read_ladder(tmp_path)


def test_train_takes_the_words_of_a_member(tmp_path):
    ladder = ladder_in(tmp_path / "ladder")
    for member in ladder.members[:1] + ladder.members[-1:]:
        flags = read_flags(train_words(ladder, member))
        same = {name: getattr(member.model, name) for name in ("vocab_size", "attention")}
        assert config_to_dict(dataclasses.replace(flags.model, **same)) == config_to_dict(member.model)
        assert isinstance(flags.model, TransformerConfig)
        assert (flags.train.steps, flags.train.batch_size, flags.train.seq_len) == (member.steps, 8, 16)
        assert (flags.train.eval_interval, flags.eval_tokens) == (member.steps // 10, 4096)
