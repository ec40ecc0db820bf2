"""What was damaged is never restored: it is named, set aside, and the checkpoint before it is used."""

import shutil

import pytest

from tests.parallax.training.checkpoints import (
    ABSTRACT,
    DOCUMENTS,
    assert_same_bits,
    damage,
    listing,
    make_state,
    reader,
    saved,
)


def test_any_damaged_file_is_named_and_the_one_before_is_used(tmp_path):
    saved(tmp_path, [10, 20])
    names = list(listing(tmp_path / "20"))
    assert any("/d/" in name for name in names)
    (tmp_path / "20").rename(tmp_path / "intact")
    for name in names[::4]:
        for how in ("flip a byte", "truncate", "extend", "delete", "add"):
            shutil.copytree(tmp_path / "intact", tmp_path / "20")
            damage(tmp_path / "20" / name, how)
            checkpointer, lines = reader(tmp_path)
            restored = checkpointer.restore(ABSTRACT)
            assert restored.step == 10
            assert_same_bits(restored.state, make_state(10))
            assert len(lines) == 1
            named = f"{name}.extra was not saved with it" if how == "add" else f"{name} "
            assert lines[0].startswith(f"checkpoint 20 is damaged: {named}")
            assert "it is now 20.damaged" in lines[0]
            assert not (tmp_path / "20").exists()
    assert len(list(tmp_path.glob("20.damaged*"))) == 5 * len(names[::4])


def test_damage_everywhere_is_an_error_and_is_set_aside_once(tmp_path):
    saved(tmp_path, [10, 20])
    for step in (10, 20):
        damage(next((tmp_path / str(step)).rglob("_METADATA")), "truncate")
    checkpointer, lines = reader(tmp_path)
    with pytest.raises(ValueError, match=r"no checkpoint in .* is intact; start anew") as error:
        checkpointer.restore(ABSTRACT)
    assert "\n" not in str(error.value)
    assert [line.split(":")[0] for line in lines] == ["checkpoint 20 is damaged", "checkpoint 10 is damaged"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["10.damaged", "20.damaged"]
    assert checkpointer.restore(ABSTRACT) is None


def test_a_damaged_step_that_was_asked_for_is_an_error_and_stays(tmp_path):
    saved(tmp_path, [10, 20])
    damage(next((tmp_path / "20").rglob("_METADATA")), "truncate")
    before = listing(tmp_path)
    for restore in (
        lambda c: c.restore(ABSTRACT, step=20),
        lambda c: c.restore_params(ABSTRACT.params, step=20),
    ):
        with pytest.raises(ValueError, match="checkpoint 20 is damaged: state/_METADATA has"):
            restore(reader(tmp_path)[0])
    with pytest.raises(ValueError, match=r"checkpoint 15 is asked for, .* has steps 10, 20"):
        reader(tmp_path)[0].restore(ABSTRACT, step=15)
    assert listing(tmp_path) == before


def test_saving_goes_on_after_a_fall_back(tmp_path):
    saved(tmp_path, [10, 20])
    damage(tmp_path / "20" / "manifest.json", "delete")
    checkpointer, lines = reader(tmp_path)
    assert checkpointer.restore(ABSTRACT).step == 10
    assert "manifest.json is missing, so its save was cut off" in lines[0]
    assert checkpointer.save(20, make_state(20), DOCUMENTS)
    assert_same_bits(checkpointer.restore(ABSTRACT).state, make_state(20))
    assert not checkpointer.save(20, make_state(99), DOCUMENTS)
    assert_same_bits(checkpointer.restore(ABSTRACT).state, make_state(20))
    checkpointer.close()


def test_a_save_over_an_unfinished_step_sets_that_aside(tmp_path):
    saved(tmp_path, [10, 20])
    damage(tmp_path / "20" / "manifest.json", "delete")
    assert "it is now 20.damaged" in saved(tmp_path, [20])[0]
    assert reader(tmp_path)[0].steps() == [10, 20]
