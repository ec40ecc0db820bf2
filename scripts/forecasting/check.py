"""ladder.py check: how large activations are at several widths, after a few steps: the coordinate check of µP.

Invariant: all widths see the same batches, of random tokens that follow each other by one fixed rule, so there is
something to learn.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from parallax.config import PRESETS, TrainConfig, TransformerConfig
from parallax.model.stack import list_blocks
from parallax.model.transformer import Params, TransformerLM
from parallax.storage import write_json
from parallax.training.state import TrainState
from parallelism.strategies import get_strategy
from parallelism.strategy import Layout
from scripts.common.command_line import parse
from scripts.common.layer_words import REGISTRY
from scripts.forecasting.family import at_share, with_mup
from scripts.forecasting.flags import CheckFlags
from scripts.forecasting.plot import plot_sizes
from scripts.training.flags import flag_value
from scripts.training.step import bind_state, bind_step

DESCRIPTION = "Measure activations against width after a few steps: in muP they hardly change."


def check(args: Sequence[str]) -> int:
    """Writes coordinates.json and coordinates.png. Exit status 0."""
    preset = PRESETS.get(flag_value(list(args), "--config"), PRESETS["tiny"])
    widths = tuple(preset.head_dim * 2**power for power in range(1, 6))
    default = CheckFlags(output=Path("coordinates"), widths=widths, model=preset)
    flags = parse(CheckFlags, default=default, description=DESCRIPTION, args=args, registry=REGISTRY)
    sizes: dict[str, dict[int, list[float]]] = {}
    for width in flags.widths:
        for name, values in measure(member(flags, width), flags).items():
            sizes.setdefault(name, {})[width] = values
    _show(sizes, flags)
    try:
        flags.output.mkdir(parents=True, exist_ok=True)
        write_json(flags.output / "coordinates.json", {"steps": list(flags.steps), "sizes": sizes})
        plot_sizes(sizes, flags.steps, flags.output / "coordinates.png")
    except OSError as error:
        raise ValueError(f"--output {flags.output} cannot be written: {error.strerror}; choose another") from None
    return 0


def member(flags: CheckFlags, width: int) -> TransformerConfig:
    """The model at a width, as deep as ever."""

    def of(width: int) -> TransformerConfig:
        model = at_share(flags.model, width / flags.model.embed_dim)
        return dataclasses.replace(model, embed_dim=width, num_layers=flags.model.num_layers)

    model = of(width)
    return with_mup(model, of(flags.widths[0])) if flags.parametrization == "mup" else model


def measure(model: TransformerConfig, flags: CheckFlags) -> dict[str, list[float]]:
    """Root mean squares of what `activations` gives, by name, after each of the numbers of steps."""
    # The rate is the same from the first step on, as the table of µP has it.
    learning = dataclasses.replace(flags.learning, warmup_steps=0, final_rate=1.0)
    train = TrainConfig(batch_size=flags.batch_size, seq_len=flags.seq_len, seed=flags.seed, steps=max(flags.steps))
    layout = Layout(strategy="single", accumulate=1, batch_size=flags.batch_size, seq_len=flags.seq_len)
    strategy = get_strategy(layout, *bind_state(model, train, learning))
    step = strategy.compile(bind_step(model, train, learning, strategy.gradients))
    state, found = strategy.init(), {}
    look = jax.jit(lambda params, tokens: activations(model, params, tokens))
    for number in range(1, max(flags.steps) + 1):
        batch = _batch(model, flags, number)
        state, _ = step(state, batch)
        if number in flags.steps:
            held: TrainState = strategy.canonical(state)
            for name, size in look(held.params, batch["inputs"]).items():
                found.setdefault(name, []).append(float(size))
    return found


def activations(model: TransformerConfig, params: Params, tokens_BT: jax.Array) -> dict[str, jax.Array]:
    """Root mean squares of the embedding, of what each branch adds, of the stream behind each block and of logits."""
    listed = TransformerLM.from_params(model, params | {"blocks": list_blocks(model, params["blocks"])})
    blocks: Any = listed.blocks
    x_BTD = listed.embedding.embed(tokens_BT)
    found = {"embedding": _size(x_BTD)}
    for number, block in enumerate(blocks):
        attended_BTD, _ = block.attention(_normed(block.attention_norm, x_BTD))
        attended_BTD = _normed(block.attention_post_norm, attended_BTD)
        fed_BTD, _ = block.mlp(_normed(block.mlp_norm, x_BTD + attended_BTD))
        fed_BTD = _normed(block.mlp_post_norm, fed_BTD)
        x_BTD = x_BTD + attended_BTD + fed_BTD
        branches = {"attention": attended_BTD, "feed-forward": fed_BTD, "stream": x_BTD}
        found |= {f"{name} {number}": _size(x) for name, x in branches.items()}
    logits_BTV = listed.unembed(listed.final_norm(x_BTD))[..., : model.vocab_size]
    return found | {"logits": _size(logits_BTV)}


def _normed(norm: Callable | None, x_BTD: jax.Array) -> jax.Array:
    return x_BTD if norm is None else norm(x_BTD)


def _size(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))


def _batch(model: TransformerConfig, flags: CheckFlags, number: int) -> dict[str, jax.Array]:
    """Each token is the one before it times 5 plus 1 or 2, by chance."""
    first, chance = jax.random.split(jax.random.fold_in(jax.random.key(flags.seed), number))
    start_B = jax.random.randint(first, (flags.batch_size,), 0, model.vocab_size)
    added_TB = jax.random.randint(chance, (flags.seq_len, flags.batch_size), 1, 3)

    def follow(token_B: jax.Array, added_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        token_B = (5 * token_B + added_B) % model.vocab_size
        return token_B, token_B

    _, tokens_TB = jax.lax.scan(follow, start_B, added_TB)
    whole_BT = jnp.concatenate([start_B[None], tokens_TB]).T.astype(jnp.int32)
    return {"inputs": whole_BT[:, :-1], "targets": whole_BT[:, 1:]}


def _show(sizes: dict[str, dict[int, list[float]]], flags: CheckFlags) -> None:
    """Sizes at the last step, and by how much those of the largest width differ from those of the smallest."""
    table = Table(title=f"root mean squares after {flags.steps[-1]} steps, {flags.parametrization}")
    for name in ("activation", *map(str, flags.widths), "change"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, by_width in sizes.items():
        last = [by_width[width][-1] for width in flags.widths]
        table.add_row(name, *(f"{size:.3g}" for size in last), f"{last[-1] / last[0] - 1:+.0%}")
    Console(width=None if Console().is_terminal else 140).print(table)
