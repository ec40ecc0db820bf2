"""Small checkpoints for the tests: a state to save, ways to save, read and damage it, and what is on disk."""

import pathlib
import random

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from parallax.training.checkpoint import Checkpointer

DOCUMENTS = {"config": {"embed_dim": 8}, "progress": {"next_batch": 7}}


@chex.dataclass
class State:
    """The shape of a training state: params, an optax state with NamedTuples and counters, scalars."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    bad_steps: jax.Array


@jax.jit
def make_state(seed: int) -> State:
    key = jax.random.key(seed)
    params = {
        "embed": jax.random.normal(key, (16, 8)),
        "layers": {"w": jax.random.normal(key, (4, 8, 8)).astype(jnp.bfloat16), "scale": jnp.full(8, 1.0 * seed)},
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    _, opt_state = optimizer.update(params, optimizer.init(params), params)
    return State(step=jnp.int32(seed), params=params, opt_state=opt_state, bad_steps=jnp.int32(0))


def abstract(tree, sharding_of=lambda leaf: None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(x)), tree)


ABSTRACT = abstract(jax.eval_shape(make_state, 0))


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def saved(directory, steps, keep=10, losses=None) -> list[str]:
    """Saves make_state(step) for each step, and returns what was notified."""
    lines: list[str] = []
    checkpointer = Checkpointer(directory, keep=keep, notify=lines.append)
    for step in steps:
        checkpointer.save(step, make_state(step), DOCUMENTS, eval_loss=(losses or {}).get(step))
    checkpointer.close()
    return lines


def reader(directory, **options):
    lines: list[str] = []
    return Checkpointer(directory, keep=10, notify=lines.append, **options), lines


def listing(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def damage(file: pathlib.Path, how: str):
    content = bytearray(file.read_bytes())
    if how == "delete":
        file.unlink()
    elif how == "truncate":
        file.write_bytes(content[: len(content) // 2])
    elif how == "add":
        file.with_name(f"{file.name}.extra").write_text("")
    elif how == "extend":
        file.write_bytes(content + b"x")
    else:
        position = random.Random(how + file.name).randrange(len(content))
        content[position] ^= 1 << random.Random(how).randrange(8)
        file.write_bytes(content)


def flip_a_bit(folder: pathlib.Path, value: bytes):
    """In the middle of a value that stands in the files of arrays below."""
    for file in folder.rglob("d/*"):
        content = bytearray(file.read_bytes())
        if (position := content.find(value)) >= 0:
            content[position + len(value) // 2] ^= 8
            file.write_bytes(content)
            return
    raise LookupError("no file holds that value")
