import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallax.config import NANO_CONFIG, NANO_MOE_CONFIG, OptimizerConfig, config_from_dict, config_to_dict
from parallax.layer_config import LoraConfig
from parallax.model.adapters import take_adapters
from parallax.model.transformer import TransformerLM, init_params, parameters
from parallax.mup import muon_rate
from parallax.parametrization import Parametrization
from parallax.training.optimizer import make_optimizer

BASE = dataclasses.replace(
    NANO_CONFIG, embed_dim=32, num_heads=2, num_kv_heads=2, head_dim=16, mlp_dim=64, num_layers=2
)
MUP = Parametrization(kind="mup", base_width=32, base_depth=2)
init = jax.jit(init_params, static_argnums=0)


def of_width(config, times, deeper=1):
    return dataclasses.replace(
        config,
        embed_dim=times * config.embed_dim,
        num_heads=times * config.num_heads,
        num_kv_heads=times * config.num_kv_heads,
        mlp_dim=times * config.mlp_dim,
        num_layers=deeper * config.num_layers,
        parametrization=MUP,
    )


LARGE = dataclasses.replace(of_width(BASE, 4, deeper=2), tie_embeddings=False)


def test_at_the_base_nothing_differs():
    standard, mup = BASE, dataclasses.replace(BASE, parametrization=MUP)
    first, second = (init(config, jax.random.key(0)) for config in (standard, mup))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert all(parameter.rate == 1 for parameter in jax.tree.leaves(parameters(mup)))


def test_rates_and_deviations_follow_the_role():
    """Four times as wide and twice as deep: the table of `mup`, worked out."""
    config = LARGE
    known, values = parameters(config), init(config, jax.random.key(0))
    block, base = known["blocks"], init(dataclasses.replace(BASE, tie_embeddings=False), jax.random.key(0))
    assert block["attention"]["query"].rate == block["mlp"]["up"].rate == 1 / 4
    assert block["attention"]["out"].rate == block["mlp"]["down"].rate == 1 / 8
    assert known["output"]["table"].rate == 1 / 4
    assert known["embedding"]["table"].rate == block["mlp_norm"]["scale"].rate == known["final_norm"]["scale"].rate == 1

    def shrunk(*path):
        large, small = values, base
        for name in path:
            large, small = large[name], small[name]
        return np.std(np.asarray(small)) / np.std(np.asarray(large))

    assert shrunk("embedding", "table") == pytest.approx(1, rel=0.05)
    assert shrunk("output", "table") == pytest.approx(4, rel=0.05)
    assert shrunk("blocks", "mlp", "up") == pytest.approx(2, rel=0.05)
    assert shrunk("blocks", "mlp", "down") == pytest.approx(2 * 2, rel=0.05)


def test_a_tied_table_is_divided_in_the_final_norm():
    config = of_width(BASE, 4)
    assert parameters(config)["embedding"]["table"].rate == 1
    assert parameters(config)["final_norm"]["scale"].rate == 1 / 4
    assert np.allclose(init(config, jax.random.key(0))["final_norm"]["scale"], 1 / 4)


def test_branches_of_post_norms_are_divided_behind_the_norm():
    config = dataclasses.replace(of_width(BASE, 1, deeper=4), norms="after")
    block = parameters(config)["blocks"]
    assert block["attention_post_norm"]["scale"].rate == block["mlp_post_norm"]["scale"].rate == 1 / 4


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_updates_are_those_of_the_standard_one_times_the_rate_and_decay_is_not(optimizer):
    config = LARGE
    params, known = init(config, jax.random.key(0)), parameters(config)
    standard = jax.tree.map(lambda parameter: dataclasses.replace(parameter, rate=1.0, multiplier=1.0), known)
    grads = jax.tree.map(lambda x: np.cos(np.arange(x.size, dtype=np.float32)).reshape(x.shape), params)

    def update(labels, decay):
        made = make_optimizer(OptimizerConfig(optimizer=optimizer, weight_decay=decay), labels)
        return jax.jit(lambda grads, params: made.update(grads, made.init(params), params)[0])(grads, params)

    own, usual = update(known, 0.0), update(standard, 0.0)
    wanted = {"adamw": {"up": 1 / 4, "down": 1 / 8}, "muon": {"up": 1 / 2, "down": 1 / 4}}[optimizer]
    for name, rate in wanted.items():
        np.testing.assert_allclose(own["blocks"]["mlp"][name], rate * usual["blocks"]["mlp"][name], rtol=1e-6)
    np.testing.assert_array_equal(own["embedding"]["table"], usual["embedding"]["table"])
    decayed = jax.tree.map(lambda x, y: x - y, update(known, 0.1)["blocks"]["mlp"], own["blocks"]["mlp"])
    np.testing.assert_allclose(decayed["down"], -0.1 * params["blocks"]["mlp"]["down"], atol=1e-6)


def test_experts_and_their_router():
    config = dataclasses.replace(of_width(BASE, 4, deeper=2), experts=NANO_MOE_CONFIG.experts)
    mlp = parameters(config)["blocks"]["mlp"]
    rates = mlp["router"].rate, mlp["gate"].rate, mlp["up"].rate, mlp["down"].rate
    assert rates == (1 / 4, 1 / 4, 1 / 4, 1 / 8)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_is_not_learned_has_no_update_to_scale(optimizer):
    experts = dataclasses.replace(NANO_MOE_CONFIG.experts, balance_bias_rate=1e-3)
    config = dataclasses.replace(of_width(BASE, 4), experts=experts)
    made, known = make_optimizer(OptimizerConfig(optimizer=optimizer), parameters(config)), parameters(config)
    assert not known["blocks"]["mlp"]["balance_bias"].learned
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    updates, _ = jax.eval_shape(lambda params: made.update(params, made.init(params), params), params)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rates_of_adapters(optimizer):
    """One side alone of their matrices grows, so A has 1/n and B 1 under both; B has the branch's 1/m too."""
    config = dataclasses.replace(of_width(BASE, 4, deeper=2), lora=LoraConfig(rank=2, alpha=2.0))
    known = take_adapters(parameters(config))["blocks"]
    query, down = known["attention"]["adapters"]["query"], known["mlp"]["adapters"]["down"]
    rate = {"adamw": lambda parameter: parameter.rate, "muon": muon_rate}[optimizer]
    assert (rate(query["down"]), rate(query["up"])) == (1 / 4, 1)
    assert (rate(down["down"]), rate(down["up"])) == (1 / 4, 1 / 2)


def test_the_config_keeps_it():
    config = of_width(BASE, 4)
    assert config_from_dict(config_to_dict(config)) == config
    with pytest.raises(ValueError, match="base_width=0 must be at least 1"):
        Parametrization(kind="mup", base_width=0)


@functools.cache
def change_after(config, optimizer):
    """Root mean square of what five steps on one batch of four tokens change of the logits of its targets, over four
    runs."""
    made = make_optimizer(OptimizerConfig(optimizer=optimizer, weight_decay=0.0), parameters(config))

    def losses(params, tokens):
        logits, _ = TransformerLM.from_params(config, params)(tokens[:, :-1])
        own = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - own), own

    @jax.jit
    @jax.vmap
    def mean_square(first, tokens):
        def step(carry, _):
            params, state = carry
            grads, own = jax.grad(losses, has_aux=True)(params, tokens)
            updates, state = made.update(grads, state, params)
            return (jax.tree.map(lambda x, y: x + 1e-2 * y, params, updates), state), own

        _, owns = jax.lax.scan(step, (first, made.init(first)), length=6)  # logits before each step
        return jnp.mean(jnp.square(owns[-1] - owns[0]))

    params = [jax.device_get(init(config, jax.random.key(seed))) for seed in range(4)]
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (len(params), 1, 5))
    return float(np.sqrt(np.mean(mean_square(jax.tree.map(lambda *each: np.stack(each), *params), tokens))))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_logits_change_alike_at_all_widths(optimizer):
    """Four times as wide. Few tokens, and their targets' logits alone: an update adds to its own direction as the
    width D, and at random to R others as √(R D), so 128 tokens, or all of a vocabulary, hide it at a width of 32."""
    small, large = (change_after(of_width(BASE, times), optimizer) for times in (1, 4))
    assert large == pytest.approx(small, rel=0.15)


def test_in_the_standard_parametrization_they_do_not():
    """From the base on, where both are one."""
    standard = dataclasses.replace(of_width(BASE, 4), parametrization=Parametrization())
    assert change_after(standard, "adamw") > 2 * change_after(of_width(BASE, 1), "adamw")
