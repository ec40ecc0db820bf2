"""How long a TPU is asked for and how often a deletion is tried; tests/scripts has the same over a fake gcloud."""

import pytest

from scripts.launching import tpu_lifecycle as tpu
from scripts.launching.gcloud import GcloudError, Node, Tpu

READY = Node("READY", "v3-8", 1, "HEALTHY")


class Scene:
    """Google Cloud as a variable: a node or none, and errors to come."""

    def __init__(self, monkeypatch):
        self.node, self.errors, self.pauses, self.said, self.asked = None, [], [], [], []
        monkeypatch.setattr(tpu, "run", self.run)
        monkeypatch.setattr(tpu, "find_node", lambda _: self.node)
        monkeypatch.setattr(tpu, "find_queued", lambda _: None)
        monkeypatch.setattr(tpu.time, "sleep", self.pauses.append)
        self.keeper = tpu.Keeper(Tpu("t1", "us-central1-a"), self.said.append, poll=1, pause=30)

    def run(self, argv):
        self.asked.append(argv[4])
        if self.errors:
            raise GcloudError(argv, 1, f"ERROR: (gcloud.compute) {self.errors.pop(0)}")
        self.node = READY if "create" in argv else None


@pytest.fixture
def scene(monkeypatch):
    return Scene(monkeypatch)


def test_the_pause_before_the_next_request_grows_up_to_a_quarter_of_an_hour(scene):
    scene.errors = ['"code": 8'] * 7
    assert scene.keeper.ensure() == READY
    assert scene.pauses[:-1] == [30, 60, 120, 240, 480, 900, 900]
    assert sum("trying again in" in line for line in scene.said) == 7


def test_a_node_that_someone_stopped_is_left_alone(scene):
    scene.node = Node("STOPPED", "v3-8", 1, "")
    with pytest.raises(ValueError, match=r"t1 is STOPPED, not READY; delete it with launch.py down"):
        scene.keeper.ensure()
    assert scene.asked == []


def test_a_deletion_is_tried_for_a_quarter_of_an_hour(scene):
    scene.node, scene.errors = READY, ["no network"] * 99
    with pytest.raises(GcloudError, match="no network"):
        scene.keeper.delete()
    assert scene.asked == ["delete"] * 6
    assert scene.pauses == [30, 60, 120, 240, 480]


def test_a_queued_resource_that_cannot_be_seen_keeps_no_node_alive(scene, monkeypatch):
    def refuse(_):
        raise GcloudError(["gcloud"], 1, "ERROR: PERMISSION_DENIED")

    monkeypatch.setattr(tpu, "find_queued", refuse)
    scene.node = READY
    with pytest.raises(GcloudError, match="PERMISSION_DENIED"):
        scene.keeper.delete()
    assert scene.node is None


def test_a_node_that_does_not_go_is_not_said_to_be_gone(scene, monkeypatch):
    scene.node = READY
    monkeypatch.setattr(tpu, "run", lambda argv: "")
    with pytest.raises(GcloudError, match="still there"):
        scene.keeper.delete()
