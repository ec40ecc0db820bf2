"""Preference optimisation: the loss is the paper's, and a pair in one row is the two answers apart."""

import dataclasses

import jax
import numpy as np
import pytest

from parallax.config import TransformerConfig
from parallax.layer_config import ExpertsConfig, LoraConfig
from parallax.model.transformer import TransformerLM, init_params
from parallax.training import loss, preference
from parallax.training.preference import (
    PreferenceConfig,
    make_log_probs,
    make_preference_evaluation,
    make_preference_loss,
)
from parallelism import reduction
from tests.parallax.inference.models import draw_params

CONFIG = TransformerConfig(
    vocab_size=13, embed_dim=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=12, max_seq_len=16
)
PROMPT, CHOSEN, REJECTED = [1, 2, 3], [4, 5], [6, 7, 8]


def pair_row():
    """A row of a pair: inputs, targets and segments, of answers behind the same prompt; and a row of padding."""
    rows = {name: np.full((2, 14), fill, np.int32) for name, fill in (("inputs", 0), ("targets", -1), ("segments", 0))}
    at = 0
    for segment, answer in enumerate((CHOSEN, REJECTED), start=1):
        ids = PROMPT + answer
        end = at + len(ids) - 1
        rows["inputs"][0, at:end], rows["segments"][0, at:end] = ids[:-1], segment
        rows["targets"][0, end - len(answer) : end] = answer
        at = end
    return rows


@pytest.fixture(scope="module")
def params():
    return draw_params(CONFIG, scale=0.5)


@jax.jit
def log_probs_of_all(params, tokens):
    return jax.nn.log_softmax(TransformerLM.from_params(CONFIG, params)(tokens)[0])


def alone(params, answer):
    """log p(answer | prompt), by the definition."""
    ids = PROMPT + answer
    log_probs_TV = np.asarray(log_probs_of_all(params, np.array([ids[:-1]], np.int32))[0])
    log_probs = log_probs_TV[np.arange(len(ids) - 1), ids[1:]]
    return float(log_probs[-len(answer) :].sum())


@pytest.mark.parametrize("chunks", [1, 5])
def test_a_pair_in_one_row_is_the_two_answers_apart(params, chunks, monkeypatch):
    monkeypatch.setattr(loss, "ROW_LOGITS", 1)
    monkeypatch.setattr(loss, "CHUNKS", chunks)
    *found, _ = jax.jit(make_log_probs(CONFIG))(params, pair_row(), None)
    expected = [alone(params, CHOSEN), alone(params, REJECTED)]
    np.testing.assert_allclose([float(each[0]) for each in found], expected, rtol=1e-5)
    *means, _ = jax.jit(make_log_probs(CONFIG, length_normalized=True))(params, pair_row(), None)
    np.testing.assert_allclose([float(each[0]) for each in means], np.divide(expected, [2, 3]), rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_the_paper_s(params, smoothing):
    references = np.array([-4.0, 0.0], np.float32), np.array([-7.0, 0.0], np.float32)
    batch = pair_row() | dict(zip(preference.REFERENCES, references, strict=True))
    loss_fn = make_preference_loss(CONFIG, PreferenceConfig(beta=0.3, label_smoothing=smoothing))
    sums, pairs = jax.jit(loss_fn)(params, batch, None)
    chosen, rejected = 0.3 * (alone(params, CHOSEN) + 4), 0.3 * (alone(params, REJECTED) + 7)
    margin = chosen - rejected
    expected = (1 - smoothing) * np.log1p(np.exp(-margin)) + smoothing * np.log1p(np.exp(margin))
    assert int(pairs) == 1
    np.testing.assert_allclose(float(sums["loss"]), expected, rtol=1e-4)
    got = [float(sums[name]) for name in ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy")]
    np.testing.assert_allclose(got, [chosen, rejected, margin, float(margin > 0)], rtol=1e-4)


def test_losses_of_routers_are_added_of_each_pair_their_mean_over_its_targets():
    """By what routers report of the row alone, where each target counts as one token; the held-out loss has none."""
    experts = ExpertsConfig(num_experts=4, mlp_dim=6, balance_loss=0.02, router_z_loss=0.01, balance_bias_rate=0.1)
    config = dataclasses.replace(CONFIG, experts=experts)
    params = draw_params(config, scale=0.5)
    batch = pair_row() | dict.fromkeys(preference.REFERENCES, np.zeros(2, np.float32))
    for name in ("inputs", "targets", "segments"):  # an answer alone is no pair
        batch[name][1] = np.where(batch["segments"][0] == 1, batch[name][0], {"targets": -1}.get(name, 0))
    targets = batch["targets"][:1] != -1

    @jax.jit
    def all_of_them(params):
        model = TransformerLM.from_params(config, params)
        _, _, alone = model.hidden(batch["inputs"][:1], segments=batch["segments"][:1], counted_BT=targets)
        losses = make_preference_loss(config, PreferenceConfig())(params, batch, None)
        return losses, make_preference_evaluation(config, PreferenceConfig())(params, batch)[0], alone

    (sums, pairs), held_out, alone = all_of_them(params)
    added = {name: float(alone[name].sum()) / targets.sum() for name in ("balance_loss", "router_z_loss")}
    assert int(pairs) == 1
    for name, value in added.items():
        np.testing.assert_allclose(float(sums[name]), value, rtol=1e-5)
    np.testing.assert_allclose(float(sums["loss"]), float(held_out) + sum(added.values()), rtol=1e-5)
    assert sums["expert_load"].tolist() == alone["expert_load"].tolist()
    assert sums["expert_load"].sum() == 2 * targets.sum()


def test_only_adapters_learn_where_there_are_some(params):
    config = dataclasses.replace(CONFIG, lora=LoraConfig(rank=2))
    whole = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    zero = np.zeros(2, np.float32)
    batch = pair_row() | dict.fromkeys(preference.REFERENCES, zero)
    gradients = reduction.mean()(make_preference_loss(config, PreferenceConfig()))
    _, _, grads = jax.eval_shape(gradients, whole, batch, jax.random.key(0))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(grads)]
    assert paths
    assert all("adapters" in jax.tree_util.keystr(path) for path in paths)


@pytest.mark.parametrize(("settings", "rule"), [({"beta": 0.0}, "positive"), ({"label_smoothing": 0.5}, r"\[0, 0.5\)")])
def test_bad_values_are_refused(settings, rule):
    with pytest.raises(ValueError, match=rule):
        PreferenceConfig(**settings)
