"""Which parametrization a model has: the config of `parallax/mup.py`.

Invariant: as with every config, one that exists is valid in itself.
"""

from typing import Literal

import chex

from parallax.layer_config import require, require_choices


@chex.dataclass(frozen=True)
class Parametrization:
    """How initial values and rates follow the size of the model, see `parallax/mup.py`."""

    kind: Literal["standard", "mup"] = "standard"
    """mup: made so that a learning rate found on a small model serves a large one (maximal update parametrization)."""
    base_width: int = 128
    """mup: the embed_dim at which it is the standard one, and where the rate was found."""
    base_depth: int = 4
    """mup: the num_layers at which it is the standard one."""

    def __post_init__(self):
        require_choices(self, "parametrization.")
        for name in ("base_width", "base_depth"):
            value = getattr(self, name)
            require(value >= 1, f"parametrization.{name}={value} must be at least 1; give that of the model you tuned")
