"""Samplers against analytic probabilities, and a row's independence of its neighbours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallax.inference.sampling import SamplingSettings, probabilities, sample

VOCAB = 12
DRAWS = 8192
SETTINGS = [
    {},
    {"temperature": 0.7},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 4},
    {"top_k": 1000},
    {"top_p": 0.6},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.6},
    {"temperature": 1.3, "top_k": 7, "top_p": 0.85, "min_p": 0.1, "repetition_penalty": 1.3},
]


@jax.jit
def draw(logits_BV, settings, seen_BV, keys_B):
    return sample(logits_BV, settings, seen_BV, keys_B, jnp.zeros(len(keys_B), jnp.int32))


def allowed_probabilities(logits, seen, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """What a row should be drawn from, written from the definitions, one token after another, in float64."""
    logits = [float(value) for value in logits]
    for token in range(len(logits)):
        if seen[token]:
            logits[token] *= 1 / repetition_penalty if logits[token] > 0 else repetition_penalty
    weights = np.exp((np.array(logits) - max(logits)) / temperature)
    ranked = sorted(range(len(logits)), key=lambda token: -weights[token])
    if top_k:
        ranked = ranked[:top_k]
    total, mass, nucleus = sum(weights[token] for token in ranked), 0.0, []
    for token in ranked:
        nucleus.append(token)
        mass += weights[token] / total
        if mass >= top_p:
            break
    kept = [token for token in nucleus if weights[token] >= min_p * weights[ranked[0]]]
    probabilities = np.zeros(len(logits))
    probabilities[kept] = weights[kept]
    return probabilities / probabilities.sum()


def random_logits(seed, num_rows):
    return 2 * jax.random.normal(jax.random.key(seed), (num_rows, VOCAB))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_frequencies_are_the_probabilities(setting):
    logits_V = random_logits(0, 1)[0]
    seen_V = jax.random.bernoulli(jax.random.key(1), 0.4, (VOCAB,))
    expected = allowed_probabilities(logits_V, seen_V, **setting)
    tokens = draw(
        jnp.broadcast_to(logits_V[None], (DRAWS, VOCAB)),
        SamplingSettings.create(DRAWS, **setting),
        jnp.broadcast_to(seen_V[None], (DRAWS, VOCAB)),
        jax.random.split(jax.random.key(2), DRAWS),
    )
    counts = np.bincount(np.asarray(tokens), minlength=VOCAB)
    assert counts[expected == 0].sum() == 0
    likely = expected > 0
    chi_square = np.sum((counts[likely] - DRAWS * expected[likely]) ** 2 / (DRAWS * expected[likely]))
    assert chi_square < 35  # for 11 degrees of freedom, chance exceeds this with probability 2e-4


DEFAULTS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


def test_probabilities_are_what_is_drawn_from():
    """Under the settings above, many combinations of filters, and temperature 0."""
    rng, combinations = np.random.default_rng(0), 256
    filters = rng.integers(0, VOCAB + 2, combinations), *rng.uniform(0.01, 0.9, (2, combinations))
    drawn = [
        dict(zip(("top_k", "top_p", "min_p"), row, strict=True))
        for row in zip(*map(np.ndarray.tolist, filters), strict=True)
    ]
    rows = [DEFAULTS | setting for setting in [*SETTINGS, *drawn, {"temperature": 0.0, "repetition_penalty": 2.0}]]
    logits_BV = random_logits(3, len(rows))
    seen_BV = jax.random.bernoulli(jax.random.key(4), 0.4, logits_BV.shape)
    columns = {name: [row[name] for row in rows] for name in DEFAULTS}
    settings = SamplingSettings.create(len(rows), **columns)
    got_BV = np.asarray(jax.jit(probabilities)(logits_BV, settings, seen_BV))
    logits_BV, seen_BV = np.asarray(logits_BV), np.asarray(seen_BV)
    for row, setting in enumerate(rows):
        setting |= {"temperature": setting["temperature"] or 1e-9}
        expected_V = allowed_probabilities(logits_BV[row], seen_BV[row], **setting)
        assert ((got_BV[row] > 0) == (expected_V > 0)).all()
        np.testing.assert_allclose(got_BV[row], expected_V, rtol=0, atol=1e-6)  # float32 against float64
    assert sorted(got_BV[-1].tolist()) == [0.0] * (VOCAB - 1) + [1.0]


@pytest.mark.parametrize("temperature", [1e-42, 1e-38, 2e-38, 1e-12, 1e-3])
def test_a_tiny_temperature_is_greedy_without_overflow(temperature):
    logits_BV = random_logits(7, 16)
    settings = SamplingSettings.create(16, temperature=temperature)
    tokens = draw(logits_BV, settings, jnp.zeros((16, VOCAB), bool), jax.random.split(jax.random.key(8), 16))
    assert (tokens == jnp.argmax(logits_BV, axis=1)).all()


def test_equal_logits_give_the_lowest_id_when_greedy_and_exactly_k_tokens_otherwise():
    logits_BV, seen_BV = jnp.zeros((512, VOCAB)), jnp.zeros((512, VOCAB), bool)
    keys_B = jax.random.split(jax.random.key(9), 512)
    greedy = draw(logits_BV, SamplingSettings.create(512, temperature=0.0), seen_BV, keys_B)
    assert (greedy == 0).all()
    drawn = draw(logits_BV, SamplingSettings.create(512, top_k=3), seen_BV, keys_B)
    assert set(np.asarray(drawn).tolist()) == {0, 1, 2}


def test_a_greedy_row_of_logits_without_bounds_ignores_its_neighbours():
    logits_BV = jnp.array([[-jnp.inf] * VOCAB, [0.0, 1.0, jnp.inf] + [0.0] * (VOCAB - 3), [jnp.nan] * VOCAB])
    seen_BV, keys_B = jnp.zeros((4, VOCAB), bool), jax.random.split(jax.random.key(15), 4)
    alone = draw(logits_BV, SamplingSettings.create(3, temperature=0.0), seen_BV[:3], keys_B[:3])
    mixed = SamplingSettings.create(4, temperature=[0.0, 0.0, 0.0, 1.0])
    together = draw(jnp.concatenate([logits_BV, jnp.zeros((1, VOCAB))]), mixed, seen_BV, keys_B)
    assert together[:3].tolist() == alone.tolist()
    assert alone[:2].tolist() == [0, 2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_token_of_logits_that_are_not_numbers_is_still_one_of_the_vocabulary(temperature):
    logits_BV = jnp.array([[jnp.nan] * VOCAB, [0.0] * (VOCAB - 1) + [jnp.nan], [-jnp.inf] * VOCAB])
    settings = SamplingSettings.create(3, temperature=temperature)
    tokens = draw(logits_BV, settings, jnp.zeros((3, VOCAB), bool), jax.random.split(jax.random.key(13), 3))
    assert tokens.dtype == jnp.int32
    assert ((tokens >= 0) & (tokens < VOCAB)).all()


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("temperature", -0.1, "temperature=-0.1 must be in [0, 1e6]"),
        ("temperature", float("nan"), "temperature=nan must be in [0, 1e6]"),
        ("top_k", -1, "top_k=-1 must be in [0, 2^31); 0 is off"),
        ("top_k", 2**31, "top_k=2147483648 must be in"),
        ("top_p", 0.0, "top_p=0.0 must be in (0, 1]; 1 is off"),
        ("top_p", 1.5, "top_p=1.5 must be in (0, 1]; 1 is off"),
        ("min_p", 1.0, "min_p=1.0 must be in [0, 1); 0 is off"),
        ("min_p", -0.5, "min_p=-0.5 must be in [0, 1); 0 is off"),
        ("repetition_penalty", 0.0, "repetition_penalty=0.0 must be in [1e-6, 1e6]; 1 is off"),
        ("top_k", [1, 2], "top_k has 2 values for 3 rows; give one, or one a row"),
    ],
)
def test_bad_settings_name_rule_value_and_remedy(name, value, rule, refused):
    with refused(rule):
        SamplingSettings.create(3, **{name: value})
