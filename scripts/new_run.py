"""The folder that a training run writes, and who may write it.

Invariant: a folder that exists is resumed or refused, never overwritten, and nothing is made before all input is known
to be good.
"""

import json
import os

from etils import epath

from parallax.storage import is_remote, open_folder


def choose_folder(output_dir: str | None, dataset: str, config: str, *, resume: bool) -> epath.Path:
    """The folder to write: `output_dir`, or the next free runs/DATASET-CONFIG[-N]. Makes nothing.

    Raises:
      ValueError: it exists and is not to be resumed, is not a run, or is on gs:// and cannot be reached.
    """
    if output_dir is None:
        base = epath.Path("runs") / f"{dataset}-{config}"
        folder, number = base, 1
        while folder.exists():
            number += 1
            folder = base.with_name(f"{base.name}-{number}")
        return folder
    folder = open_folder(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output-dir {folder} must be a folder and is a file; choose another")
    if folder.exists() and not resume:
        raise ValueError(f"--output-dir {folder} exists already; add --resume, or choose another")
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise ValueError(f"--output-dir {folder} holds files but no config.json of a run; choose another")
    if is_remote(folder):
        return folder  # nothing says beforehand what may be written there
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(
            f"--output-dir {folder} cannot be made in {parent}, which is not writable; choose another"
        )
    return folder


def require_corpus(folder: epath.Path, sha256: str, edition: str) -> None:
    """Raises ValueError when a run that is resumed learned from another text."""
    path = folder / "config.json"
    if path.exists():
        corpus = json.loads(path.read_text())["corpus"]
        if corpus["sha256"] != sha256:
            raise ValueError(
                f"dataset ({edition}) is not the text that {folder} was trained on ({corpus['edition']}, sha256 "
                f"{corpus['sha256'][:12]}…); give that one back, or start a run in another --output-dir"
            )
