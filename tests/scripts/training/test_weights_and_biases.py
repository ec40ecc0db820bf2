"""--wandb: every row goes to one run, which goes on as the run does; without the library it is refused."""

import sys
from types import ModuleType
from unittest.mock import Mock

import pytest

from scripts.training.weights_and_biases import WeightsAndBiases, check_wandb


@pytest.fixture
def library(monkeypatch):
    library = Mock(spec=ModuleType("wandb"), init=Mock())
    monkeypatch.setitem(sys.modules, "wandb", library)
    return library


def test_rows_go_to_one_run_over_all_attempts(library, tmp_path):
    for steps in ((1, 2), (2, 3)):
        observer = WeightsAndBiases("project", tmp_path, "name", {"model": {}})
        for step in steps:
            observer.row({"step": step, "loss": 1 / step})
        observer.close()
    first, second = (call.kwargs for call in library.init.call_args_list)
    assert first == second
    assert (first["project"], first["resume"], first["name"]) == ("project", "allow", "name")
    rows = [(call.args[0], call.kwargs["step"]) for call in library.init().log.call_args_list]
    assert rows == [({"loss": 1 / step}, step) for step in (1, 2, 2, 3)]
    assert library.init().finish.call_count == 2


def test_another_run_is_another_one_there(library, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        WeightsAndBiases("project", tmp_path / name, name, {})
    assert len({call.kwargs["id"] for call in library.init.call_args_list}) == 2


def test_a_library_that_cannot_begin_says_why_in_one_line(library, tmp_path):
    library.init.side_effect = RuntimeError("api_key not configured")
    with pytest.raises(ValueError, match=r"--wandb mine cannot begin \(api_key not configured\); log in"):
        WeightsAndBiases("mine", tmp_path, "name", {})


def test_without_the_library_it_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--wandb mine needs the package wandb; pip install"):
        check_wandb("mine")
