"""A local run folder is its own workspace; tests/scripts/test_train_gs.py has the others."""

from parallax.training.remote import open_folder
from scripts.workspace import Workspace


def test_a_local_folder_is_written_in_place(tmp_path):
    folder = open_folder(tmp_path / "runs" / "x")
    workspace = Workspace(folder)
    assert not folder.exists()
    workspace.fetch()
    assert list(workspace.path.iterdir()) == []
    (workspace.path / "loss.png").write_bytes(b"x")
    workspace.send()
    assert [str(path) for path in (tmp_path / "runs" / "x").iterdir()] == [str(folder / "loss.png")]
