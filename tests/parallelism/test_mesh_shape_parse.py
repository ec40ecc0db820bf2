"""The sizes of a mesh from text, or a complaint whose remedy works."""

import re

import pytest

from parallelism.mesh_shape import parse_mesh
from parallelism.rules import MESH_AXES


@pytest.mark.parametrize(
    ("text", "data", "fsdp"),
    [
        ("", 8, 1),
        ("data=8", 8, 1),
        ("data=all", 8, 1),
        ("fsdp=8", 1, 8),
        ("fsdp=all", 1, 8),
        ("data=2,fsdp=4", 2, 4),
        ("fsdp=4,data=2", 2, 4),
        (" data=2, fsdp=4", 2, 4),
        ("data=2,fsdp=all", 2, 4),
        ("data=all,fsdp=4", 2, 4),
        ("data=8,fsdp=all", 8, 1),
    ],
)
def test_mesh_from_text(text, data, fsdp):
    assert parse_mesh(text, 8) == {"data": data, "fsdp": fsdp, "sequence": 1, "tensor": 1}
    assert tuple(parse_mesh(text, 8)) == MESH_AXES


def test_one_device_is_a_mesh_too():
    assert parse_mesh("", 1) == parse_mesh("fsdp=all", 1) == dict.fromkeys(MESH_AXES, 1)


def test_every_axis_has_a_size_of_its_own():
    assert parse_mesh("tensor=2,sequence=2,data=2", 8) == {"data": 2, "fsdp": 1, "sequence": 2, "tensor": 2}
    assert parse_mesh("tensor=all,sequence=2", 8) == {"data": 1, "fsdp": 1, "sequence": 2, "tensor": 4}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("modle=8", "unknown axis 'modle'"),
        ("8", "unknown axis '8'"),
        ("data=8,", "unknown axis ''"),
        ("data=2,data=4", "gives data twice"),
        ("data=0", "positive number for data, not '0'"),
        ("data=-8", "positive number for data, not '-8'"),
        ("data=1.5", "positive number for data, not '1.5'"),
        ("data", "positive number for data, not ''"),
        ("fsdp=eight", "positive number for fsdp, not 'eight'"),
        ("data=2,fsdp=0", "positive number for fsdp, not '0'"),
        ("data=all,fsdp=all", "positive number for fsdp, not 'all'"),
        ("fsdp=x,data=all", "positive number for fsdp, not 'x'"),
        ("data=3", "needs 3 devices but 8 are visible"),
        ("data=16", "needs 16 devices but 8 are visible"),
        ("data=4,fsdp=4", "needs 16 devices but 8 are visible"),
        ("data=all,fsdp=3", "needs 6 devices but 8 are visible"),
        ("data=all,fsdp=16", "needs 16 devices but 8 are visible"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_with_a_remedy(text, complaint):
    with pytest.raises(ValueError, match="mesh=") as caught:
        parse_mesh(text, 8)
    message = str(caught.value)
    assert "\n" not in message
    assert repr(text) in message
    assert complaint in message
    whole, part = re.search(r"try --mesh (\S+)$", message), re.search(r"try (\w+)=(\w+)$", message)
    if whole:
        parse_mesh(whole[1], 8)
    elif part:
        sizes = dict(piece.partition("=")[::2] for piece in text.split(","))
        mended = sizes | {part[1]: part[2]}
        parse_mesh(",".join(f"{axis}={size}" for axis, size in mended.items()), 8)
    else:
        assert re.search(r"known are data, fsdp, sequence, tensor$|give each axis once$", message)
