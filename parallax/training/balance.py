"""The bias by which routers choose experts, moved by their load instead of by a gradient.

Invariant: it follows from the counts of the global batch alone, which are whole numbers, so it has the same bits on
every layout.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from parallax.config import TransformerConfig
from parallax.model.stack import Params
from parallax.pattern import stacks


def make_balance(config: TransformerConfig) -> Callable[[Params, jax.Array], Params] | None:
    """(params, load [layers with experts, E]) to params with other biases; None for a model without them, or whose
    routers are frozen.

    b_e + rate · sign(mean load − load_e) (Wang et al. 2024, arXiv:2408.15664, algorithm 1).
    """
    rate = config.experts.balance_bias_rate
    numbers = [number for number, layer in enumerate(config.layers) if layer.feed_forward == "experts"]
    if not rate or not numbers or config.lora.rank:  # beside adapters all else is frozen
        return None

    def balance(params: Params, load_NE: jax.Array) -> Params:
        load_NE = load_NE.astype(jnp.float32)
        # Of E times what is missing: for the mean XLA multiplies by 1/E, rounded, and equal loads would differ from it.
        missing_NE = jnp.sum(load_NE, axis=1, keepdims=True) - load_NE.shape[1] * load_NE
        move_NE = rate * jnp.sign(missing_NE)
        blocks = params["blocks"]
        for stack in stacks(config):
            if stack.config.feed_forward == "experts":
                block = stack.of(blocks)
                rows = jnp.array([numbers.index(number) for number in stack.numbers])
                mlp = block["mlp"] | {"balance_bias": block["mlp"]["balance_bias"] + move_NE[rows]}
                moved = block | {"mlp": mlp}
                blocks = blocks | {stack.name: moved} if stack.name else moved
        return params | {"blocks": blocks}

    return balance
