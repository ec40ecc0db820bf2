"""Safetensors folders that are not whole, or contradict themselves."""

import json

import pytest
from safetensors.numpy import load_file, save_file

from parallax.interop.files import INDEX, TensorFiles
from tests.parallax.interop.folders import write_folder

FIRST = "model-00001-of-00002.safetensors"


def _drop_file(folder):
    (folder / FIRST).unlink()


def _cut_file(folder):
    content = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes(content[: len(content) // 2])


def _append(folder):
    (folder / FIRST).write_bytes((folder / FIRST).read_bytes() + b"more")


def _add_to_file(folder):
    """A second copy of a tensor, in the other file."""
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    (other,) = set(names.values()) - {names["model.norm.weight"]}
    held = load_file(folder / other)
    save_file({**held, "model.norm.weight": next(iter(held.values()))}, folder / other)


def _reindex(change):
    def damage(folder):
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop_file, f"{FIRST} is not a whole safetensors file"),
        (_cut_file, f"{FIRST} is not a whole safetensors file"),
        (_reindex(lambda names: names.pop("model.norm.weight")), "tensor model.norm.weight of"),
        (_reindex(lambda names: names.update(more=FIRST)), f"tensor more of {INDEX} is not in"),
        (_reindex(lambda names: names.update(more=5)), "has more in 5, which must be a safetensors file"),
        (
            _reindex(lambda names: names.update(more=f"../{FIRST}")),
            f"has more in '../{FIRST}', which must be a safetensors file beside it",
        ),
        (_add_to_file, "tensor model.norm.weight of"),
        (_append, f"{FIRST} is not a whole safetensors file"),
        (lambda folder: (folder / INDEX).write_text("{}"), f"{INDEX} must hold a weight_map"),
        (lambda folder: (folder / INDEX).unlink(), "holds neither model.safetensors nor"),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    write_folder(tmp_path, files=2)
    damage(tmp_path)
    with pytest.raises(ValueError) as refused:  # noqa: PT011 (the message is compared below)
        TensorFiles(tmp_path)
    assert message in str(refused.value)
    assert "; " in str(refused.value)
    assert "\n" not in str(refused.value)
