"""A file is whole or absent."""

import pytest

from data.atomic import replacing, write_atomically


def test_content_replaces_what_was_there_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "file"
    for content in (b"first", b"second"):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_failure_half_way_changes_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def fail_half_way():
        with replacing(path) as temporary:
            temporary.write_bytes(b"hal")
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fail_half_way()
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
