"""ladder.py check: how large activations are at several widths, after a few steps: the coordinate check of µP.

Invariant: what is measured does not depend on the width beside what µP changes. An update adds to its own direction as
the width D, and at random to others, of which there are R, as √(R D), so at small widths this hides that. A run hence
sees one batch of few tokens, again and again, and of logits those of its targets are measured: with all of them R would
be the vocabulary. Only their change is taken: the first ones are random and fall with √D to nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from parallax.config import TrainConfig, TransformerConfig
from parallax.model.stack import list_blocks
from parallax.model.transformer import Params, TransformerLM, parameters
from parallax.storage import write_json
from parallax.training.optimizer import make_optimizer
from parallax.training.state import make_init
from parallelism.strategies import get_strategy
from parallelism.strategy import Layout
from scripts.common.command_line import parse, writing
from scripts.common.layer_words import REGISTRY
from scripts.common.tables import show_numbers
from scripts.forecasting.family import at_share, with_mup
from scripts.forecasting.flags import CheckFlags
from scripts.forecasting.plot import plot_sizes
from scripts.training.flags import preset_of
from scripts.training.step import bind_state, bind_step

DESCRIPTION = "Measure activations against width after a few steps: in muP they hardly change."


def check(args: Sequence[str]) -> int:
    """Writes coordinates.json and coordinates.png. Exit status 0."""
    preset = preset_of(args)
    widths = tuple(preset.head_dim * 2**power for power in range(1, 6))
    default = CheckFlags(output=Path("coordinates"), widths=widths, model=preset)
    flags = parse(CheckFlags, default=default, description=DESCRIPTION, args=args, registry=REGISTRY)
    sizes: dict[str, dict[int, list[float]]] = {}
    for width in flags.widths:
        for name, values in measure(member(flags, width), flags).items():
            sizes.setdefault(name, {})[width] = values
    _show(sizes, flags)
    with writing(f"--output {flags.output}"):
        flags.output.mkdir(parents=True, exist_ok=True)
        write_json(flags.output / "coordinates.json", {"steps": list(flags.steps), "sizes": sizes})
        plot_sizes(sizes, flags.steps, flags.output / "coordinates.png")
    return 0


def member(flags: CheckFlags, width: int) -> TransformerConfig:
    """The model at a width, as deep as ever."""

    def of(width: int) -> TransformerConfig:
        model = at_share(flags.model, width / flags.model.embed_dim)
        return dataclasses.replace(model, embed_dim=width, num_layers=flags.model.num_layers)

    model = of(width)
    return with_mup(model, of(flags.widths[0])) if flags.parametrization == "mup" else model


def measure(model: TransformerConfig, flags: CheckFlags) -> dict[str, list[float]]:
    """Root mean squares of `activations`, by name, after each of the numbers of steps; of logits those of the change of
    targets' own."""
    # The rate is the same from the first step on, as the table of µP has it.
    learning = dataclasses.replace(flags.learning, warmup_steps=0, final_rate=1.0)
    train = TrainConfig(batch_size=flags.batch_size, seq_len=flags.seq_len, seed=flags.seed, steps=max(flags.steps))
    layout = Layout(strategy="single", accumulate=1, batch_size=flags.batch_size, seq_len=flags.seq_len)
    strategy = get_strategy(layout, *bind_state(model, train, learning))
    step = strategy.compile(bind_step(model, train, learning, strategy.gradients))
    optimizer = make_optimizer(learning, parameters(model))
    begin = jax.jit(lambda seed: make_init(model, optimizer, seed)())
    look = jax.jit(functools.partial(_look, model))

    squares: dict[str, list[float]] = {}
    for seed in range(flags.seed, flags.seed + flags.runs_of(model.embed_dim)):
        state, batch = begin(seed), _batch(model, flags, seed)
        first = look(state.params, batch)
        for number in range(1, max(flags.steps) + 1):
            state, _ = step(state, batch)
            if number in flags.steps:
                seen = look(state.params, batch)
                seen["target logits"] -= first["target logits"]
                for name, x in seen.items():
                    squares.setdefault(name, []).append(float(jnp.mean(jnp.square(x.astype(jnp.float32)))))
    count = len(flags.steps)
    return {name: np.sqrt(np.reshape(each, (-1, count)).mean(axis=0)).tolist() for name, each in squares.items()}


def _look(model: TransformerConfig, params: Params, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """`activations`, with the logits of targets [B, T] in place of all."""
    found = activations(model, params, batch["inputs"])
    logits_BTV = found.pop("logits")
    return found | {"target logits": jnp.take_along_axis(logits_BTV, batch["targets"][..., None], axis=-1)[..., 0]}


def activations(model: TransformerConfig, params: Params, tokens_BT: jax.Array) -> dict[str, jax.Array]:
    """The embedding, what each branch adds, the stream behind each block [B, T, D], and logits [B, T, V], by name."""
    listed = TransformerLM.from_params(model, params | {"blocks": list_blocks(model, params["blocks"])})
    blocks: Any = listed.blocks
    x_BTD = listed.embedding.embed(tokens_BT)
    found = {"embedding": x_BTD}
    for number, block in enumerate(blocks):
        attended_BTD, _ = block.attention(_normed(block.attention_norm, x_BTD))
        attended_BTD = _normed(block.attention_post_norm, attended_BTD)
        fed_BTD, _ = block.mlp(_normed(block.mlp_norm, x_BTD + attended_BTD))
        fed_BTD = _normed(block.mlp_post_norm, fed_BTD)
        x_BTD = x_BTD + attended_BTD + fed_BTD
        found |= {f"attention {number}": attended_BTD, f"feed-forward {number}": fed_BTD, f"stream {number}": x_BTD}
    return found | {"logits": listed.unembed(listed.final_norm(x_BTD))[..., : model.vocab_size]}


def _normed(norm: Callable | None, x_BTD: jax.Array) -> jax.Array:
    return x_BTD if norm is None else norm(x_BTD)


def _batch(model: TransformerConfig, flags: CheckFlags, seed: int) -> dict[str, jax.Array]:
    """Tokens that differ, so that batches are alike: one token more often moves its logit further."""
    shape = flags.batch_size, flags.seq_len + 1
    tokens_BT = jax.random.choice(jax.random.key(seed), model.vocab_size, shape, replace=False).astype(jnp.int32)
    return {"inputs": tokens_BT[:, :-1], "targets": tokens_BT[:, 1:]}


def _show(sizes: dict[str, dict[int, list[float]]], flags: CheckFlags) -> None:
    """Sizes at the last step, and by how much those of the largest width differ from those of the smallest."""
    title = f"root mean squares after {flags.steps[-1]} steps, {flags.parametrization}; changes of logits"
    last = {name: [by_width[width][-1] for width in flags.widths] for name, by_width in sizes.items()}
    rows = ((name, *(f"{x:.3g}" for x in found), f"{found[-1] / found[0] - 1:+.0%}") for name, found in last.items())
    show_numbers(title, ("activation", *map(str, flags.widths), "change"), rows)
