"""Metrics to Weights & Biases, where --wandb asks for it.

Invariant: a run that goes on is one run there too, by an id in its folder. Steps that are trained again have the values
that they had, and are not taken twice.
"""

import importlib
import importlib.util
import secrets
from pathlib import Path
from typing import Any

from parallax.training.loop import Row

FILE = "wandb_id"


def check_wandb(project: str) -> None:
    """Raises ValueError if the library is not there."""
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(f"--wandb {project} needs the package wandb; pip install wandb, or leave it out")


class WeightsAndBiases:
    """Gives each row of metrics to the run of this folder, in a project.

    Args:
      config: what the run is, as config.json has it.

    Raises ValueError if the library cannot begin, as where nobody is logged in.
    """

    def __init__(self, project: str, folder: Path, name: str, config: dict[str, Any]):
        place = folder / FILE
        if not place.exists():
            place.write_text(secrets.token_hex(8))
        wandb = importlib.import_module("wandb")
        try:
            self._run = wandb.init(
                project=project, id=place.read_text(), name=name, config=config, dir=str(folder), resume="allow"
            )
        except Exception as error:  # of kinds that the library names differently from version to version
            remedy = "log in with wandb login, or set WANDB_MODE=offline"
            raise ValueError(f"--wandb {project} cannot begin ({error}); {remedy}") from error

    def step(self, step: int, metrics: Row) -> None:
        pass

    def row(self, row: Row) -> None:
        self._run.log({name: value for name, value in row.items() if name != "step"}, step=int(row["step"]))

    def close(self) -> None:
        self._run.finish()
