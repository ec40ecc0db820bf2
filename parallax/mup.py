"""The maximal update parametrization: initial values and rates that follow a model's size, so that one learning rate
serves all sizes. From width 64 to 512 the best one stayed where it was (docs/forecasting.md, tests/claims/rates.py).

With n = embed_dim / base_width and m = num_layers / base_depth:
  role      initial deviation   rate under Adam   rate under Muon
  input     as at the base      1                 -
  hidden    fan-in^-1/2         1/n               n^-1/2
  output    1/n of the base's   1/n               -
Width: Yang et al. 2022 (arXiv:2203.03466, table 3). Adam's update has entries of one size that line up with what comes
in, so its effect grows as the fan-in. Muon's is orthogonal and has by `consistent_rms` the entries of one size too: its
spectral norm grows as the square root of the width (Yang et al. 2023, arXiv:2310.17813, asks for one that stays).
Only one side of an adapter grows: A has the rate of an output, under Muon too, and B that of an input, as LoRA+ has it
for Adam (Hayou et al. 2024, arXiv:2402.12354), times the multiplier of the matrix beside it.
Adam's ε stays, where CompleteP has it shrink with a parameter's gradient.
A tied table is an input; what it gives as an output is divided by n in the final norm, whose scale goes before it.
Depth: what a block adds to the residual stream is divided by m (CompleteP, Dey et al. 2025, arXiv:2505.01618), not by
its square root as in Depth-µP (arXiv:2310.02244), which is derived for branches of one matrix, and under which the best
rate of transformers was seen to move.
Weight decay follows the rate of the schedule alone, as CompleteP's: a parameter's memory is as long in every size.
Scores are multiplied by 1/√K as ever: models that are compared have heads of one width.

Invariant: at the base width and depth nothing differs from the standard parametrization, and nothing of this is in the
forward pass: a multiplier is in the initial value and in the rate of what it would multiply. So a model of this kind is
served, exported and planned as any other.
"""

import dataclasses

from parallax.axes import Parameter
from parallax.config import TransformerConfig


def width_ratio(config: TransformerConfig) -> float:
    """n; 1 in the standard parametrization."""
    own = config.parametrization
    return config.embed_dim / own.base_width if own.kind == "mup" else 1.0


def branch_multiplier(config: TransformerConfig) -> float:
    """1/m, of what a block adds to the residual stream."""
    own = config.parametrization
    return own.base_depth / config.num_layers if own.kind == "mup" else 1.0


def branch_deviation(config: TransformerConfig, fan_in: int) -> float:
    """The deviation of matrices that add to the residual stream: 2N branches sum up to one at the base depth."""
    own = config.parametrization
    return (2 * (own.base_depth if own.kind == "mup" else config.num_layers) * fan_in) ** -0.5


def output_multiplier(config: TransformerConfig) -> float:
    """1/n, of logits."""
    return 1 / width_ratio(config)


def with_rates(config: TransformerConfig, parameter: Parameter) -> Parameter:
    """The parameter with the rate of its role; Muon's differs, see `muon_rate`."""
    grows = parameter.role != "input" and parameter.inputs != ("rank",)
    shrink = 1 / width_ratio(config) if grows else 1.0
    return dataclasses.replace(parameter, rate=shrink * parameter.multiplier)


def muon_rate(parameter: Parameter) -> float:
    """The rate of a matrix that Muon updates: with n^-1/2 where Adam's has 1/n, but for adapters."""
    if "rank" in parameter.names:
        return parameter.rate
    return (parameter.rate / parameter.multiplier) ** 0.5 * parameter.multiplier
