"""Which checkpoints stay, what is deleted when; and what was damaged is named, set aside, and never restored."""

import grp
import hashlib
import json
import os
import pathlib
import pwd
import shutil

import numpy as np
import pytest
import tensorstore

from parallax.storage import open_folder
from parallax.training import checkpoint_folder
from parallax.training.checkpoint import Checkpointer
from tests.parallax.training.checkpoints import (
    ABSTRACT,
    DOCUMENTS,
    abstract,
    assert_same_bits,
    damage,
    flip_a_bit,
    listing,
    make_state,
    reader,
    saved,
)


@pytest.mark.parametrize(
    ("keep", "losses", "expected"),
    [
        (3, {}, [4, 5, 6]),
        (1, {1: 2.0, 3: 1.0, 5: 1.5}, [3, 6]),
        (2, {1: 2.0, 2: 1.0, 6: 0.5}, [5, 6]),
        (2, {2: 1.0, 3: 1.0, 4: float("nan"), 5: float("-inf")}, [3, 5, 6]),
    ],
)
def test_keeps_the_newest_and_the_best(tmp_path, keep, losses, expected):
    saved(tmp_path, range(1, 7), keep=keep, losses=losses)
    checkpointer, _ = reader(tmp_path)
    assert checkpointer.steps() == expected
    assert sorted(int(entry.name) for entry in tmp_path.iterdir()) == expected
    finite = {step: loss for step, loss in losses.items() if step in expected and np.isfinite(loss)}
    best = min(finite, key=finite.get) if finite else 6
    assert checkpointer.best_step() == best
    step, params = checkpointer.restore_params(ABSTRACT.params)
    assert step == best
    assert_same_bits(params, make_state(best).params)


def test_reading_changes_nothing(tmp_path):
    saved(tmp_path, [10, 20], losses={10: 1.0, 20: 2.0})
    (tmp_path / "30.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "30.orbax-checkpoint-tmp" / "part").write_text("half")
    damage(next((tmp_path / "10").rglob("_METADATA")), "flip a byte")
    before = listing(tmp_path)
    checkpointer, lines = reader(tmp_path)
    assert checkpointer.restore_params(ABSTRACT.params)[0] == 20
    assert checkpointer.best_step() == 10
    assert "checkpoint 10 is damaged: state/_METADATA" in lines[0]
    assert reader(tmp_path, is_writer=False)[0].restore(ABSTRACT, step=20).step == 20
    checkpointer.close()
    assert listing(tmp_path) == before


def test_the_writer_removes_what_a_killed_save_left(tmp_path):
    saved(tmp_path, [10])
    for act in (lambda: reader(tmp_path)[0].restore(ABSTRACT), lambda: saved(tmp_path, [11])):
        (tmp_path / "30.orbax-checkpoint-tmp").mkdir()
        (tmp_path / "30.orbax-checkpoint-tmp" / "part").write_text("half")
        act()
        assert not (tmp_path / "30.orbax-checkpoint-tmp").exists()


def test_writes_that_a_failed_save_left_going_do_not_fail_the_next(tmp_path, monkeypatch):
    """TensorStore's outlive the exception of the first that fails."""
    left, rmdir = tmp_path / "6.orbax-checkpoint-tmp", os.rmdir
    left.mkdir()

    def late(folder, **how):
        left.joinpath("late").write_text("")
        rmdir(folder, **how)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", late)
        assert saved(tmp_path, [9]) == []
    assert reader(tmp_path)[0].steps() == [9]
    assert left.exists()
    saved(tmp_path, [12])
    assert not left.exists()


def test_a_deletion_cut_short_is_not_trusted_and_is_completed_by_the_next_save(tmp_path, monkeypatch):
    saved(tmp_path, [10])
    files = [file for file in (tmp_path / "10").rglob("*") if file.is_file()]
    checkpointer = Checkpointer(tmp_path, keep=1)
    folder_type = type(open_folder(tmp_path))
    for step, cut in enumerate((0, 1, len(files) // 2), start=11):
        newest = checkpointer.latest_step()

        def dies(path, cut=cut):
            for file in sorted(file for file in pathlib.Path(path).rglob("*") if file.is_file())[:cut]:
                file.unlink()
            raise OSError("killed here")

        with monkeypatch.context() as patch:
            patch.setattr(folder_type, "rmtree", dies)
            checkpointer.save(step, make_state(step), DOCUMENTS)
            with pytest.raises(OSError, match=f"checkpoint {step} could not be saved in .*: killed here"):
                checkpointer.wait()
        assert (tmp_path / str(newest)).exists()
        assert reader(tmp_path)[0].steps() == [step]
        assert_same_bits(reader(tmp_path)[0].restore(ABSTRACT).state, make_state(step))
    checkpointer.save(20, make_state(20), DOCUMENTS)
    checkpointer.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["20"]


def test_nothing_is_deleted_before_the_new_step_is_trusted(tmp_path, monkeypatch):
    saved(tmp_path, [10])
    before = listing(tmp_path / "10")

    def dies(folder, facts):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("parallax.training.checkpoint_folder.write_manifest", dies)
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(20, make_state(20), DOCUMENTS)
    with pytest.raises(OSError, match=r"checkpoint 20 could not be saved in .* No space left on device"):
        checkpointer.save(30, make_state(30), DOCUMENTS)
    checkpointer.close()
    assert listing(tmp_path / "10") == before
    assert checkpointer.steps() == [10]


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


@pytest.fixture
def large_files(monkeypatch):
    """Files of arrays of any length are left to the hashes of their pieces, as those of a large model are."""
    monkeypatch.setattr(checkpoint_folder, "SMALL", -1)


def large_state(step):
    """Values beyond 1 kB, which do not stand in the index."""
    params = {"w": np.arange(2**16, dtype=np.float32).reshape(4, 128, 128) + step}
    return {"params": params, "moments": [-params["w"], 2 * params["w"]]}


@pytest.fixture
def large_saved(tmp_path):
    """The checkpoints 10 and 20, the better one, of a large state; and its shapes."""
    checkpointer = Checkpointer(tmp_path, keep=2)
    for step in (10, 20):
        checkpointer.save(step, large_state(step), DOCUMENTS, eval_loss=1 / step)
    checkpointer.close()
    return abstract(large_state(0))


def flip_a_moment(folder, step):
    flip_a_bit(folder / str(step), large_state(step)["moments"][1].tobytes())


def test_damaged_arrays_are_found_by_who_reads_them_and_by_nobody_else(tmp_path, large_files, large_saved):
    flip_a_moment(tmp_path, 20)
    checkpointer, lines = reader(tmp_path, is_writer=False)
    assert checkpointer.restore_params(large_saved["params"])[0] == 20  # whose parameters are as they were
    assert lines == []
    with pytest.raises(
        ValueError, match=r"checkpoint 20 is damaged: moments/1 has other contents than were saved; name"
    ):
        checkpointer.restore(large_saved, step=20)
    assert checkpointer.restore(large_saved).step == 10
    assert (tmp_path / "20").exists()
    writer, lines = reader(tmp_path)
    assert_same_bits(writer.restore(large_saved).state, large_state(10))
    assert lines == ["checkpoint 20 is damaged: moments/1 has other contents than were saved; it is now 20.damaged"]


def test_a_save_reads_no_array_back_and_a_restore_reads_once_what_it_gives(tmp_path, large_files, monkeypatch):
    params = {"w": np.arange(2**18, dtype=np.float32).reshape(4, 256, 256)}
    state, whole = {"params": params, "moments": [params, params]}, 3 * 2**20
    hashed, hash_file = [], checkpoint_folder._sha256
    monkeypatch.setattr(
        checkpoint_folder, "_sha256", lambda file: hashed.append(len(file.read_bytes())) or hash_file(file)
    )

    def read_bytes():
        (metric,) = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
        return sum(hashed) + sum(value["value"] for value in metric["values"])

    checkpointer = Checkpointer(tmp_path, keep=1)
    before = read_bytes()
    checkpointer.save(1, state, DOCUMENTS)
    checkpointer.wait()
    after_save = read_bytes()
    assert after_save - before < whole / 10
    assert_same_bits(checkpointer.restore(abstract(state)).state, state)
    after_restore = read_bytes()
    assert whole <= after_restore - after_save < 1.1 * whole
    assert_same_bits(checkpointer.restore_params(abstract(params))[1], params)
    assert whole / 3 <= read_bytes() - after_restore < whole / 3 + whole / 10
    checkpointer.close()


def test_damaged_arrays_everywhere_are_an_error(tmp_path, large_files, large_saved):
    for step in (10, 20):
        flip_a_moment(tmp_path, step)
    with pytest.raises(ValueError, match=r"no checkpoint in .* is intact; start again"):
        reader(tmp_path)[0].restore(large_saved)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["10.damaged", "20.damaged"]


def test_a_checkpoint_whose_files_were_all_hashed_is_verified_and_read(tmp_path, large_saved):
    """As those before arrays had hashes of their own."""
    for step in (10, 20):
        facts = json.loads((tmp_path / str(step) / "manifest.json").read_text())
        (tmp_path / str(step) / "state" / "sha256.process_0.json").unlink()
        names = {name: tmp_path / str(step) / name for name in listing(tmp_path / str(step)) if name != "manifest.json"}
        entries = {
            name: {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "bytes": file.stat().st_size}
            for name, file in names.items()
        }
        content = {name: facts[name] for name in ("step", "eval_loss", "arrays")} | {"files": entries}
        own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        (tmp_path / str(step) / "manifest.json").write_text(json.dumps({**content, "sha256": own}))
    assert_same_bits(reader(tmp_path)[0].restore(large_saved).state, large_state(20))
    flip_a_moment(tmp_path, 20)
    checkpointer, lines = reader(tmp_path)
    assert_same_bits(checkpointer.restore(large_saved).state, large_state(10))
    assert lines[0].startswith("checkpoint 20 is damaged: state/ocdbt.process_0/d/")


def test_files_of_users_whom_this_machine_does_not_know_are_saved_and_read(tmp_path, monkeypatch):
    def unknown(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(grp, "getgrgid", unknown)
    assert saved(tmp_path, [10, 20, 30], keep=1) == []
    assert_same_bits(reader(tmp_path)[0].restore(ABSTRACT).state, make_state(30))
    assert_same_bits(reader(tmp_path)[0].restore_params(ABSTRACT.params)[1], make_state(30).params)


def test_damage_everywhere_is_an_error_and_is_set_aside_once(tmp_path, refused):
    saved(tmp_path, [10, 20])
    for step in (10, 20):
        damage(next((tmp_path / str(step)).rglob("_METADATA")), "truncate")
    checkpointer, lines = reader(tmp_path)
    with refused("no checkpoint in ", " is intact; start again"):
        checkpointer.restore(ABSTRACT)
    assert [line.split(":")[0] for line in lines] == ["checkpoint 20 is damaged", "checkpoint 10 is damaged"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["10.damaged", "20.damaged"]
    assert checkpointer.restore(ABSTRACT) is None


def test_a_damaged_step_that_was_asked_for_is_an_error_and_stays(tmp_path):
    saved(tmp_path, [10, 20])
    damage(next((tmp_path / "20").rglob("_METADATA")), "truncate")
    before = listing(tmp_path)
    for restore in (lambda c: c.restore(ABSTRACT, step=20), lambda c: c.restore_params(ABSTRACT.params, step=20)):
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


def test_a_loss_that_is_measured_after_the_save_makes_a_step_the_best(tmp_path):
    saved(tmp_path, [10, 20, 30], losses={10: 2.0, 30: 3.0})
    other, _ = reader(tmp_path, is_writer=False)
    other.measured(20, 1.0)
    assert other.best_first() == [10, 30, 20]
    writer, lines = reader(tmp_path)
    writer.measured(20, 1.0)
    writer.measured(10, float("nan"))
    assert writer.best_first() == [20, 10, 30]
    (tmp_path / "20" / ".manifest.json.0123").write_text("{")  # what a kill while it is written leaves
    restored = writer.restore(ABSTRACT, step=20)
    assert_same_bits(restored.state, make_state(20))
    assert (restored.eval_loss, lines) == (1.0, [])
