"""Ranges of local files are what the files hold, for threads that share them too, and an error names the file."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from etils import epath

from data.stores import ranges
from data.stores.ranges import Files

SIZE = 256


@pytest.fixture
def folder(tmp_path):
    for at in range(8):
        (tmp_path / f"{at}.tokens").write_bytes(bytes([at]) * SIZE)
    return epath.Path(tmp_path)


@pytest.mark.parametrize("kept_open", [1, 64])
def test_threads_read_files_that_are_closed_and_opened_between(folder, monkeypatch, kept_open):
    monkeypatch.setattr(ranges, "OPEN_FILES", kept_open)
    rng = np.random.default_rng(0)
    drawn = [rng.integers(8, size=40).tolist() for _ in range(100)]

    def read(files, names):
        wanted = [(f"{at}.tokens", at, SIZE) for at in names]
        return [(content[:1], len(content)) for content in files.read(wanted)]

    for names in drawn[:10]:  # all threads open the same files first
        files = Files(folder, "0" * 64, 8 * SIZE)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda names, files=files: read(files, names), [names] * 8 + drawn))
        assert found == [[(bytes([at]), SIZE - at) for at in each] for each in [names] * 8 + drawn]


def test_a_range_beyond_its_file_is_damage(folder, refused):
    files = Files(folder, "0" * 64, 8 * SIZE)
    with refused(f"store {folder} is damaged: 3.tokens cannot be read (it ends at byte {SIZE})"):
        files.read([("3.tokens", 8, SIZE + 1)])
    (folder / "4.tokens").unlink()
    with refused("4.tokens cannot be read (No such file", "prepare.py --verify"):
        files.read([("4.tokens", 0, 1)])
