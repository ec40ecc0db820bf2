"""Safetensors folders that are not whole, or contradict themselves."""

import json

import pytest

from parallax.interop.files import INDEX, TensorFiles
from tests.interop.folders import write_folder

FIRST = "model-00001-of-00002.safetensors"


def _drop_file(folder):
    (folder / FIRST).unlink()


def _cut_file(folder):
    content = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes(content[: len(content) // 2])


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
