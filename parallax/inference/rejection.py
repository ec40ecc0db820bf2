"""Which proposed tokens pass, and what stands in place of the first that does not.

Invariant: the tokens that pass and the one after them are distributed as p has it, whatever q is (Leviathan et al.
2023, arXiv:2211.17192, appendix A.1). Where p has one token only, that token it is.
"""

import jax
import jax.numpy as jnp


def check_proposals(
    tokens_RB: jax.Array, q_RBV: jax.Array, p_TBV: jax.Array, accept_RB: jax.Array, replace_TB: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """How many proposals of each row pass, int32 [B], and the token after these, int32 [B].

    A proposal x passes with probability min(1, p(x) / q(x)). In place of the first that does not, a token is drawn from
    max(0, p - q); after the last, if all pass, one from p (algorithm 1).

    Args:
      tokens_RB: R proposals a row, the first drawn from q[0], the next from q[1] and so on.
      q_RBV: by which distributions they were proposed.
      p_TBV: those that are wanted at the places of the proposals and, T = R + 1, behind them.
      accept_RB: keys for the first draw.
      replace_TB: keys for the second.
    """
    q_TBV, at_RB1 = jnp.pad(q_RBV, ((0, 1), (0, 0), (0, 0))), tokens_RB[:, :, None]
    p_RB, q_RB = (jnp.take_along_axis(probs_TBV[:-1], at_RB1, axis=2)[:, :, 0] for probs_TBV in (p_TBV, q_TBV))
    passes_RB = jax.vmap(jax.vmap(jax.random.uniform))(accept_RB) * q_RB < p_RB
    passed_B = jnp.sum(jnp.cumprod(passes_RB.astype(jnp.int32), axis=0), axis=0)
    rows = jnp.arange(len(passed_B))
    p_BV = p_TBV[passed_B, rows]
    excess_BV = jnp.maximum(p_BV - q_TBV[passed_B, rows], 0)
    # Where p and q differ by rounding alone, a proposal that was rejected may leave no excess at all.
    weights_BV = jnp.where(jnp.any(excess_BV > 0, axis=1, keepdims=True), excess_BV, p_BV)
    return passed_B, draw(weights_BV, replace_TB[passed_B, rows])


def draw(weights_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
    """A token a row with probability proportional to its weight, never one of weight 0, int32 [B]."""
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, weights_BV.shape[1:], weights_BV.dtype))(keys_B)
    return jnp.argmax(jnp.log(weights_BV) + noise_BV, axis=1).astype(jnp.int32)
