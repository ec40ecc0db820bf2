"""Small random models for the tests of whoever generates with one, and what a completion should be.

Invariant: weights are drawn in numpy, since compiling an initialisation takes longer than the tests, and large enough
that the logits of two tokens hardly ever come within rounding of each other.
"""

import contextlib
import functools

import jax
import numpy as np

from parallax.config import TransformerConfig
from parallax.inference.generate import Generator
from parallax.inference.request import Request
from parallax.model.transformer import TransformerLM, init_params

VOCAB = 23
CONFIG = TransformerConfig(
    vocab_size=VOCAB, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48,
    max_seq_len=128, tie_embeddings=False,
)  # fmt: skip
SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.5},
    {},
    {"temperature": 0.7, "top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.2},
    {"repetition_penalty": 1.3},
    {"temperature": 1.4, "top_k": 12, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 0.8},
]


def draw_params(config, seed=0, scale=0.2):
    rng = np.random.default_rng(seed)

    def weights(path, leaf):
        return jax.device_put(rng.normal("norm" in str(path), scale, leaf.shape).astype(leaf.dtype))

    return jax.tree_util.tree_map_with_path(weights, shapes(config))


@functools.cache
def shapes(config):
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


@functools.cache
def generator(config):
    """Compiles once for all tests."""
    return Generator(config)


def prompt(length, seed=0):
    return np.random.default_rng([length, seed]).integers(0, VOCAB, length).astype(np.int32)


def completion(number, **changes):
    """One of many, each with a prompt, a length, a setting and a seed of its own."""
    length = (5, 1, 9, 3, 17, 2, 33, 7, 12)[number % 9]
    fields = {"prompt": prompt(length, number), "max_tokens": 5 + 7 * number % 20, "seed": 100 + number}
    fields |= SETTINGS[number % len(SETTINGS)] | changes
    return Request.one(fields.pop("prompt"), **fields)


def run(batcher, completions, order=None, cancel=lambda under_way: ()):
    """The tokens of completions that are admitted in an order whenever a slot is free, a list for each."""
    waiting = list(range(len(completions)) if order is None else order)
    tokens = [[] for _ in completions]
    while waiting or batcher.under_way:
        came = []
        while waiting and batcher.free:
            came += batcher.admit(waiting[0], completions[waiting.pop(0)])
        came += batcher.step()
        for token in came:
            tokens[token.ticket].append(token)
        for ticket in cancel({token.ticket for token in came} - {token.ticket for token in came if token.finish}):
            batcher.cancel(ticket)
    return tokens


def ids(tokens):
    """The ids of those that were generated."""
    return [token.token_id for token in tokens if not token.is_prompt]


@contextlib.contextmanager
def nothing_compiled(caplog):
    """Fails where something is compiled within."""
    with jax.log_compiles(True):
        yield
    assert not [record.message for record in caplog.records if "ompil" in record.message]


def by_generator(config, params, completion):
    """Its tokens, by `Generator.generate`."""
    return generator(config).generate(params, completion)[0].tolist()


def ended(tokens, stops, eos_id):
    """What is left of a text that ends where a stop or the end of text first occurs, and why it ends."""
    for end in range(1, len(tokens) + 1):
        if tokens[end - 1] == eos_id or any(tokens[:end][-len(stop) :] == stop for stop in stops):
            return tokens[:end], "stop"
    return tokens, "length"


@functools.cache
def _full(config):
    return jax.jit(lambda params, tokens_BT: TransformerLM.from_params(config, params)(tokens_BT)[0])


def logprobs(config, params, tokens):
    """Log-probabilities [T, V] of what follows each token, from one forward pass without a cache."""
    padded = np.zeros(config.max_seq_len, np.int32)
    padded[: len(tokens)] = tokens
    logits = np.asarray(_full(config)(params, padded[None])[0, : len(tokens)], np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
