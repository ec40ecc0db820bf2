"""The whole model: where it starts, what its switches may not change, and how it is laid out and compiled."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from parallax.axes import PARAM_AXES
from parallax.config import NANO_CONFIG, PRESETS, TransformerConfig
from parallax.layers.cache import KVCache
from parallax.layers.dropout import dropout, split
from parallax.model.stack import TransformerBlock
from parallax.model.transformer import TransformerLM, init_params, param_axes
from parallax.pattern import stacks
from tests.parallax.inference.models import CONFIG, draw_params

B, T, V, W = 2, 8, 13, 16
SMALL = CONFIG.replace(vocab_size=V, embed_dim=16, num_layers=3, head_dim=4, mlp_dim=24, tie_embeddings=True)
weights = functools.partial(draw_params, scale=0.3)
TOKENS = np.random.default_rng(1).integers(0, V, (B, T))


def forward(config, params, tokens, key=None):
    return TransformerLM.from_params(config, params)(tokens, dropout_key=key)[0]


logits = jax.jit(forward, static_argnums=0)


def loss(config, params, tokens):
    """Mean cross-entropy of the next token."""
    predicted = jax.nn.log_softmax(forward(config, params, tokens[:, :-1]))
    return -jnp.mean(jnp.take_along_axis(predicted, tokens[:, 1:, None], axis=-1))


loss_and_gradients = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)


@pytest.mark.parametrize(
    ("config", "length"),
    [(NANO_CONFIG, 64), (TransformerConfig(vocab_size=1000, embed_dim=48, num_layers=2, tie_embeddings=False), 64)],
    ids=["nano", "another vocabulary"],
)
def test_first_loss_is_that_of_a_uniform_guess(config, length):
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, (4, length))
    first = jax.jit(lambda key: loss(config, init_params(config, key), tokens))(jax.random.key(0))
    assert first == pytest.approx(math.log(config.vocab_size), rel=0.02)


def test_seed_decides_the_weights_and_layers_differ():
    initialise = jax.jit(functools.partial(init_params, SMALL))
    first, again, other = (jax.device_get(initialise(jax.random.key(seed))) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    matrices = [
        (a, b)
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(first), jax.tree.leaves(other), strict=True)
        if "norm" not in jax.tree_util.keystr(path)
    ]
    assert all((a != b).mean() > 0.99 for a, b in matrices)
    query = first["blocks"]["attention"]["query"]
    assert (query[0] != query[1]).mean() > 0.99


def test_scan_equals_a_loop_over_the_blocks():
    config = SMALL.replace(num_layers=2, dropout_rate=0.3, qk_norm=True, attention_bias=True)
    params, key = weights(config), jax.random.key(4)
    graph, _ = nnx.split(nnx.eval_shape(lambda: TransformerBlock(config, rngs=nnx.Rngs(0))))

    @jax.jit
    def looped(params):
        model = TransformerLM.from_params(config, params)
        stacked = nnx.state(model.blocks)
        keys = split(split(key, B), config.num_layers + 1).T
        x = dropout(model.embedding.embed(TOKENS), config.dropout_rate, keys[-1])
        for n in range(config.num_layers):
            block = nnx.merge(graph, jax.tree.map(lambda leaf, n=n: leaf[n], stacked))
            x, _, _ = block(x, jnp.arange(T)[None], dropout_keys_B=keys[n])
        return model.unembed(model.final_norm(x))[..., :V]

    compare = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)  # fused in another way
    compare(logits(config, params, TOKENS, key), looped(params))


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_program_does_not_grow_with_depth(remat):
    def size(depth):
        config = SMALL.replace(num_layers=depth, remat=remat)
        params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
        return len(loss_and_gradients.lower(config, params, TOKENS).as_text())

    assert size(12) < 1.01 * size(2)  # numbers in shapes get a digit longer


def test_unrolled_layers_compute_what_scanned_ones_do():
    """With dropout, test_pattern.py compares them."""
    config = SMALL.replace(num_layers=2)
    params = weights(config)
    scanned, unrolled = (
        loss_and_gradients(config.replace(layer_loop=loop), params, TOKENS) for loop in ("scan", "unroll")
    )
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)  # fused in another way
    jax.tree.map(compare, unrolled, scanned)


def test_rematerialisation_changes_memory_and_nothing_else():
    """Values saved for the backward pass shrink from none over dots to full; loss and gradients stay."""
    results, memory = {}, {}
    for remat in ("none", "dots", "full"):
        config = SMALL.replace(remat=remat, num_layers=6)
        params, tokens = weights(config), np.tile(TOKENS, (4, 8))
        compiled = loss_and_gradients.lower(config, params, tokens).compile()
        memory[remat] = compiled.memory_analysis().temp_size_in_bytes
        results[remat] = compiled(params, tokens)
    assert memory["none"] > 1.2 * memory["dots"] > 1.2 * 1.2 * memory["full"]
    for remat in ("dots", "full"):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),  # fused in another way
            results[remat],
            results["none"],
        )


@pytest.mark.parametrize("remat", ["none", "full"])
def test_scores_in_chunks_take_memory_linear_in_the_tokens_whatever_is_rematerialised(remat):
    length = 4096
    config = SMALL.replace(remat=remat, attention="xla", num_layers=1, max_seq_len=length)
    params, tokens = weights(config), np.zeros((1, length), np.int32)
    compiled = loss_and_gradients.lower(config, params, tokens).compile()
    scores = 4 * config.num_heads * length**2
    # A mask of all pairs, in bytes, would be a sixteenth of them by itself.
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 8


def test_bfloat16_gives_float32_logits_close_to_those_of_float32():
    config = SMALL.replace(tie_embeddings=False)
    params = weights(config)
    exact = logits(config, params, TOKENS)
    low = logits(SMALL.replace(tie_embeddings=False, dtype="bfloat16"), params, TOKENS)
    assert exact.dtype == low.dtype == jnp.float32
    assert np.abs(low - exact).max() < 0.05 * np.abs(exact).max()  # a dozen roundings of 2⁻⁸ in sequence
    assert np.abs(low - exact).max() > 1e-4  # bfloat16 was used at all


def test_bfloat16_compute_leaves_gradients_float32():
    config = SMALL.replace(dtype="bfloat16")
    _, gradients = jax.eval_shape(
        functools.partial(jax.value_and_grad(loss, argnums=1), config), weights(config), TOKENS
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}


def test_dropout_follows_its_key_and_only_a_key():
    params, config = weights(SMALL), SMALL.replace(dropout_rate=0.4)
    plain = logits(SMALL, params, TOKENS)
    first, again, other = (logits(config, params, TOKENS, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    np.testing.assert_array_equal(logits(config, params, TOKENS), plain)
    np.testing.assert_array_equal(logits(SMALL, params, TOKENS, jax.random.key(1)), plain)


def test_rows_of_a_batch_drop_different_values():
    params, config = weights(SMALL), SMALL.replace(dropout_rate=0.4)
    same = logits(config, params, np.tile(TOKENS[:1], (2, 1)), jax.random.key(3))
    assert np.abs(same[0] - same[1]).max() > 0.1


def test_what_is_dropped_of_a_row_follows_from_its_own_key():
    """Whatever stands beside it."""
    params, config = weights(SMALL), SMALL.replace(dropout_rate=0.4)
    keys = jax.random.split(jax.random.key(3), B)
    together = logits(config, params, TOKENS, keys)
    for row in range(B):
        alone = logits(config, params, TOKENS[row : row + 1], keys[row : row + 1])
        np.testing.assert_allclose(alone[0], together[row], rtol=1e-5, atol=1e-5)  # fused in another way


def test_tied_and_untied_trees_differ_by_the_output_table():
    def paths(tie):
        leaves = jax.tree_util.tree_leaves_with_path(weights(SMALL.replace(tie_embeddings=tie)))
        return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}

    tied, untied = paths(True), paths(False)
    assert set(untied.items()) - set(tied.items()) == {("output/table", (W, 16))}
    assert set(tied) <= set(untied)


def test_untied_output_is_the_table_that_makes_the_logits():
    params = weights(SMALL.replace(tie_embeddings=False))
    tied = {name: tree for name, tree in params.items() if name != "output"}
    equal = {**tied, "output": tied["embedding"]}
    expected = logits(SMALL, tied, TOKENS)
    np.testing.assert_array_equal(logits(SMALL.replace(tie_embeddings=False), equal, TOKENS), expected)
    silent = {**tied, "output": jax.tree.map(np.zeros_like, tied["embedding"])}
    assert not logits(SMALL.replace(tie_embeddings=False), silent, TOKENS).any()


@pytest.mark.parametrize(
    "config",
    [*PRESETS.values(), SMALL.replace(qk_norm=True, attention_bias=True, tie_embeddings=False)],
    ids=[*PRESETS, "switched"],
)
def test_every_dim_of_every_parameter_has_one_known_name(config):
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    of_stack = {stack.name: len(stack.numbers) for stack in stacks(config)}
    sizes = {
        "layers": of_stack.get(""),
        "experts": config.experts.num_experts,
        "vocab": -(-config.vocab_size // 8) * 8,
        "embed": config.embed_dim,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "mlp": config.mlp_dim,
        "rank": config.lora.rank,
    }
    assert set(sizes) == PARAM_AXES

    def check(path, leaf, names):
        assert leaf.dtype == jnp.float32
        named = [name for name in names if name]
        assert len(set(named)) == len(named)
        own = sizes | {"layers": of_stack.get(path[1].key, sizes["layers"])}
        if "experts" in names:
            own["mlp"] = config.expert_dim
        whole = path[-1].key in ("router", "router_bias", "balance_bias", "down_bias")
        assert (len(named) < len(names)) == whole, "each device chooses among all experts, and adds their last biases"
        assert leaf.shape == tuple(own[name] if name else sizes["experts"] for name in names)
        assert (names[0] == "layers") == (path[0].key == "blocks")

    jax.tree_util.tree_map_with_path(check, shapes, param_axes(config))


def some(*shape, dtype=np.int32):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("tokens", "given", "message"),
    [
        (some(1, 129), {}, "129 tokens must not exceed max_seq_len=128; give 128, or set max_seq_len=129"),
        (some(T), {}, r"tokens=int32\[8\] must be integers \[B, T\]; give ids"),
        (some(B, T, dtype=np.float32), {}, r"tokens=float32\[2, 8\] must be integers"),
        (some(B, T), {"segments": some(1, T)}, r"segments=\[1, 8\] must be \[2, 8\]; give one a token"),
        (some(B, T), {"positions": some(B, 1)}, r"positions=\[2, 1\] must be \[2, 8\] or \[1, 8\]; give one a token"),
        (some(B, T), {"positions": some(T)}, r"positions=\[8\] must be \[2, 8\]"),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(tokens, given, message):
    model = TransformerLM.from_params(SMALL, weights(SMALL))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: model(tokens, **given))


@pytest.mark.parametrize(
    ("changes", "rows", "capacity", "message"),
    [
        (
            {"num_layers": 2},
            B,
            9,
            r"cache of 2 arrays \(\(2, 2, 2, 9, 4\), 'float32'\) must be of 2 arrays \(\(3, 2, 2",
        ),
        ({"num_kv_heads": 1}, B, 9, "make it with empty_cache"),
        ({"dtype": "bfloat16"}, B, 9, "make it with empty_cache"),
        ({}, 1, 9, "make it with empty_cache"),
        ({}, B, 7, "8 tokens must not exceed the 7 of the cache; make it larger"),
    ],
)
def test_a_cache_of_another_form_is_refused(changes, rows, capacity, message):
    """A row or layer too few was written nowhere, with finite logits."""
    model = TransformerLM.from_params(SMALL, weights(SMALL))
    cache = KVCache.create(SMALL.replace(**changes), rows, capacity)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: model(some(B, T), np.arange(T)[None], cache=cache))
    with pytest.raises(ValueError, match="make it with empty_cache"):
        model(some(B, T), np.arange(T)[None], cache=KVCache.create(SMALL, B, 9, listed=True))


@pytest.mark.parametrize("token", [-1, V, W - 1, W, 99])
def test_a_row_with_an_id_that_no_token_has_is_nan(token):
    """−1 read the last row of the table, ids up to its rows one that nothing trains."""
    tokens = TOKENS.copy()
    tokens[0, 3] = token
    found = logits(SMALL, weights(SMALL), tokens)
    assert np.isnan(found[0]).all()
    np.testing.assert_array_equal(found[1], logits(SMALL, weights(SMALL), TOKENS)[1])


@pytest.mark.parametrize("position", [-1, 9, 200])
def test_a_position_beyond_the_cache_is_nan(position):

    @jax.jit
    def step(params, positions):
        model = TransformerLM.from_params(SMALL, params)
        return model(TOKENS[:, :1], positions, cache=model.empty_cache(B, 9))[0]

    found = step(weights(SMALL), np.array([[0], [position]], np.int32))
    assert np.isfinite(found[0]).all()
    assert np.isnan(found[1]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda params: {k: v for k, v in params.items() if k != "final_norm"},
            "params lack final_norm/scale; give those",
        ),
        (lambda params: params | {"more": {"scale": some(3)}}, "params hold more/scale; give those that init_params"),
        (
            lambda params: params | {"final_norm": {"scale": some(3)}},
            r"params/final_norm/scale of \[3\] must be \[16\]",
        ),
        (lambda _: weights(SMALL.replace(vocab_size=V - 6)), r"params/embedding/table of \[8, 16\] must be \[16, 16\]"),
        (lambda _: weights(SMALL.replace(num_layers=2)), r"params/blocks/.* of \[2, .*\] must be \[3, "),
    ],
)
def test_parameters_of_another_config_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TransformerLM.from_params(SMALL, change(weights(SMALL)))


def test_a_model_is_made_afresh_from_each_tree_of_parameters():
    """The structure is remembered between calls; the arrays must not be."""
    config = SMALL
    ones, twos = (jax.tree.map(lambda leaf, n=n: np.full_like(leaf, n), weights(config)) for n in (1, 2))
    models = [TransformerLM.from_params(config, params) for params in (ones, twos)]
    for n, model in enumerate(models, start=1):
        assert {float(x) for leaf in jax.tree.leaves(nnx.state(model)) for x in np.unique(leaf)} == {n}
