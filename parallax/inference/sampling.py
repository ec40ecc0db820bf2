"""Draw one token a row from logits, each row by its own settings and its own key.

Invariant: settings are arrays, operands of the compiled function, so all settings share one compilation; and
a row's token is a function of that row's logits, settings, seen tokens, key and position, never of its neighbours.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

import chex
import jax
import jax.numpy as jnp
import numpy as np

from parallax import cpu


@dataclasses.dataclass(frozen=True)
class Setting:
    """A sampling setting as its users see it."""

    kind: type
    off: float
    """The value that changes nothing."""
    rule: str
    """Its range and a remedy, as in `must be in [0, 1); 0 is off`."""
    bounds: Mapping[str, float]
    """Its range in the words of JSON Schema."""

    def holds(self, value: float) -> bool:
        """Whether a value is in the range."""
        inside = self.bounds["minimum"] <= value <= self.bounds.get("maximum", math.inf)
        return inside and value < self.bounds.get("exclusiveMaximum", math.inf)


SETTINGS = {
    "temperature": Setting(float, 1.0, "[0, 1e6]; try 0.8, or 0 for greedy", {"minimum": 0, "maximum": 1e6}),
    "top_k": Setting(int, 0, "[0, 2^31); 0 is off", {"minimum": 0, "maximum": 2**31 - 1}),
    "top_p": Setting(float, 1.0, "(0, 1]; 1 is off", {"minimum": 1e-30, "maximum": 1}),
    "min_p": Setting(float, 0.0, "[0, 1); 0 is off", {"minimum": 0, "exclusiveMaximum": 1}),
    "repetition_penalty": Setting(float, 1.0, "[1e-6, 1e6]; 1 is off", {"minimum": 1e-6, "maximum": 1e6}),
}
"""Every sampling setting by name: a field of `SamplingSettings`, an option of the library and of the server."""


class Sampling(TypedDict, total=False):
    """Sampling settings as keywords, each one value, or one a row; what is left out is off."""

    temperature: float | Sequence[float]
    """The lower, the rarer are unlikely tokens; 0 is greedy."""
    top_k: int | Sequence[int]
    """Draw from the k most probable tokens."""
    top_p: float | Sequence[float]
    """Draw from the fewest most probable tokens whose probability reaches p."""
    min_p: float | Sequence[float]
    """Draw from tokens with at least this share of the highest probability."""
    repetition_penalty: float | Sequence[float]
    """Above 1 makes tokens that occurred before less likely."""


@chex.dataclass(frozen=True)
class SamplingSettings:
    """How each of B rows draws its tokens; every field is an array [B]. `create` builds and checks one."""

    temperature: jax.Array
    """Divides the logits; 0 is greedy: it takes the argmax."""
    top_k: jax.Array
    """Keeps the k most probable tokens; 0 is off."""
    top_p: jax.Array
    """Keeps the fewest most probable tokens whose probability reaches p; 1 is off."""
    min_p: jax.Array
    """Keeps the tokens with at least this share of the greatest probability; 0 is off."""
    repetition_penalty: jax.Array
    """Above 1 makes the tokens of the prompt and of the text so far less likely; 1 is off."""

    @classmethod
    def create(cls, num_rows: int, **given: Unpack[Sampling]) -> "SamplingSettings":
        """Settings of `num_rows` rows, from one value for all of them or one value each.

        Raises ValueError if a value is out of its range, or there is not one value a row.
        """
        if unknown := given.keys() - SETTINGS.keys():
            raise TypeError(f"{min(unknown)} is not one of {', '.join(SETTINGS)}")
        off = {name: setting.off for name, setting in SETTINGS.items()}
        return cls(**{name: _column(name, value, num_rows) for name, value in (off | given).items()})

    def where(self, active_B: jax.Array) -> "SamplingSettings":
        """These for active rows, and for others what costs nothing: greedy, without filters."""
        off = SamplingSettings.create(1, temperature=0.0)
        return jax.tree.map(lambda x_B, x_1: jnp.where(active_B, x_B, x_1), self, off)


def _column(name: str, given: Any, num_rows: int) -> Any:
    several = isinstance(given, Sequence) and not isinstance(given, str)
    values, setting = list(given) if several else [given] * num_rows, SETTINGS[name]
    if len(values) != num_rows:
        raise ValueError(f"{name} has {len(values)} values for {num_rows} rows; give one, or one a row")
    for value in values:
        number = _number(setting, value)
        if number is None or not setting.holds(number):
            raise ValueError(f"{name}={value} must be in {setting.rule}")
        if number != value and setting.kind is int:
            raise ValueError(f"{name}={value} must be a whole number; try {number}")
    return np.asarray(values, np.int32 if setting.kind is int else np.float32)


def _number(setting: Setting, value: Any) -> float | None:
    """A value as its setting has it, or None for what is no number."""
    try:
        return None if isinstance(value, str) else setting.kind(value)
    except (TypeError, ValueError, OverflowError):
        return None


def penalise(logits_BV: jax.Array, penalty_B: jax.Array, seen_BV: jax.Array) -> jax.Array:
    """Logits [B, V], those of seen tokens l moved to l / r where l > 0 and to l · r elsewhere.

    Keskar et al. 2019, CTRL, arXiv:1909.05858, section 4.1, which divides whatever the sign; a negative logit
    is multiplied here, since dividing it would make a seen token more likely.
    """
    penalty_B1 = penalty_B[:, None]
    moved_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(seen_BV, moved_BV, logits_BV)


def keep(logits_BV: jax.Array, settings: SamplingSettings) -> jax.Array:
    """Which tokens may be drawn, bool [B, V]; the argmax always may, and of equal ones the lower id is first.

    In this order, each filter sees the tokens left by the one before, their probabilities summing to 1 again:
      top-k: the k first (Fan et al. 2018, arXiv:1805.04833, section 5.4);
      top-p: the shortest beginning whose probability reaches p, that is, each token with less than p before
        it (Holtzman et al. 2020, arXiv:1904.09751, equation 2);
      min-p: probability ≥ min_p · that of the first (Nguyen et al. 2024, arXiv:2407.01082, section 3).
    """
    top_k_B1, top_p_B1 = settings.top_k[:, None], settings.top_p[:, None]
    # Over the greatest probability.
    share_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=1, keepdims=True))

    def by_top_k() -> jax.Array:
        # In floats, exact up to 2²⁴ tokens.
        bound_B1 = jnp.where(top_k_B1 == 0, jnp.inf, top_k_B1)
        return _beginning(logits_BV, jnp.ones_like(share_BV), bound_B1)

    def by_top_p(kept_BV: jax.Array) -> jax.Array:
        left_BV = jnp.where(kept_BV, share_BV, 0)
        mass_B1 = jnp.sum(left_BV, axis=1, keepdims=True)
        # Off must be off: a rounded sum may reach all of it early.
        bound_B1 = jnp.where(top_p_B1 == 1, jnp.inf, top_p_B1 * mass_B1)
        return kept_BV & _beginning(logits_BV, left_BV, bound_B1)

    kept_BV = jnp.ones(logits_BV.shape, bool)
    kept_BV = jax.lax.cond(jnp.any(top_k_B1 > 0), by_top_k, lambda: kept_BV)
    kept_BV = jax.lax.cond(jnp.any(top_p_B1 < 1), by_top_p, lambda kept_BV: kept_BV, kept_BV)
    return kept_BV & (share_BV >= settings.min_p[:, None])


def _beginning(logits_BV: jax.Array, weights_BV: jax.Array, bound_B1: jax.Array) -> jax.Array:
    """Each token before which, in falling order of logits, is less weight than the bound; bool [B, V].

    The least logit of them is found bit by bit, in 32 sums over a row: a sort of all takes 5 times as long on a CPU.
    """
    bits_BV = jax.lax.bitcast_convert_type(logits_BV.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    rank_BV = bits_BV ^ jnp.where(bits_BV < sign, sign, ~jnp.uint32(0))  # ordered as the logits are

    def before(rank_B1: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(rank_BV > rank_B1, weights_BV, 0), axis=1, keepdims=True)

    def settle_bit(step: jax.Array, least_B1: jax.Array) -> jax.Array:
        bit = sign >> step.astype(jnp.uint32)
        return jnp.where(before(least_B1 | (bit - 1)) < bound_B1, least_B1, least_B1 | bit)

    least_B1 = jax.lax.fori_loop(0, 32, settle_bit, jnp.zeros(bound_B1.shape, jnp.uint32))
    equal_BV = rank_BV == least_B1
    before_BV = before(least_B1) + jnp.cumsum(equal_BV * weights_BV, axis=1) - weights_BV
    return (rank_BV > least_B1) | (equal_BV & (before_BV < bound_B1))


def _is_greedy(settings: SamplingSettings) -> jax.Array:
    """Which rows are greedy, bool [B]: a temperature that is subnormal divides like 0."""
    return settings.temperature < jnp.finfo(jnp.float32).tiny


def _scaled(penalised_BV: jax.Array, settings: SamplingSettings) -> jax.Array:
    """Penalised logits over temperature [B, V], with the best of a row at 0; over 1 for the greedy."""
    # The best logit becomes 0 first: a temperature near 0 then sends the others to -inf, and none to inf.
    shifted_BV = penalised_BV - jnp.max(penalised_BV, axis=1, keepdims=True)
    return shifted_BV / jnp.where(_is_greedy(settings), 1.0, settings.temperature)[:, None]


def probabilities(logits_BV: jax.Array, settings: SamplingSettings, seen_BV: jax.Array) -> jax.Array:
    """What `sample` draws from, as a distribution [B, V]: one token has it all at temperature 0."""
    scaled_BV = _scaled(penalise(logits_BV, settings.repetition_penalty, seen_BV), settings)
    best_B1 = jnp.argmax(scaled_BV, axis=1, keepdims=True)
    ids_BV = jax.lax.broadcasted_iota(best_B1.dtype, scaled_BV.shape, 1)
    kept_BV = keep(scaled_BV, settings) & (~_is_greedy(settings)[:, None] | (ids_BV == best_B1))
    return jax.nn.softmax(jnp.where(kept_BV, scaled_BV, -jnp.inf), axis=1)


def sample(
    logits_BV: jax.Array, settings: SamplingSettings, seen_BV: jax.Array, keys_B: jax.Array, positions_B: jax.Array
) -> jax.Array:
    """One token a row, int32 [B]: repetition penalty, temperature, the filters of `keep`, then the draw.

    The draw is argmax(l + g) over what is kept, g ~ Gumbel(0, 1), which is a draw from softmax(l). The noise
    is tied to token ids, not ranks, so near-equal logits that rounding swaps still give the same token.

    Args:
      logits_BV: float32 [B, V].
      settings: arrays [B].
      seen_BV: bool [B, V], which tokens the row holds so far, its prompt included.
      keys_B: one typed random key a row, of which each position has its own by fold_in.
      positions_B: int32 [B], where the tokens will stand.
    """
    penalised_BV, greedy_B = penalise(logits_BV, settings.repetition_penalty, seen_BV), _is_greedy(settings)

    def draw() -> jax.Array:
        scaled_BV = _scaled(penalised_BV, settings)
        own_B = jax.vmap(jax.random.fold_in)(keys_B, positions_B)
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, scaled_BV.shape[1:], scaled_BV.dtype))(own_B)
        noisy_BV = jnp.where(keep(scaled_BV, settings), scaled_BV + noise_BV, -jnp.inf)
        return cpu.argmax(jnp.where(greedy_B[:, None], penalised_BV, noisy_BV))

    # Where all are greedy, which only the host could know before, there is no noise to pay for.
    return jax.lax.cond(jnp.all(greedy_B), lambda: cpu.argmax(penalised_BV), draw)
