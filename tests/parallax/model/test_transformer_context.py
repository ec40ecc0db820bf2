"""Which tokens a logit may depend on, read off exact gradients: earlier ones, of its document, within the window."""

import functools

import jax
import numpy as np
import pytest

from parallax.layers import attention
from parallax.model.transformer import TransformerLM
from tests.parallax.inference.models import CONFIG, draw_params

T = 10
SMALL = CONFIG.replace(vocab_size=T, embed_dim=16, head_dim=4, mlp_dim=24)
weights = functools.cache(functools.partial(draw_params, scale=0.4))
# Each token once, so that a row of the table is the vector of one position.
TOKENS = np.random.default_rng(3).permutation(T)[None]
DOCUMENTS = np.array([[1] * 4 + [2] * 5 + [0]])


def reached(segments=None, layers=2, window=0):
    """Whether the logits at t have a gradient with regard to the embedding of the token at s: [T, T] booleans."""
    config = SMALL.replace(num_layers=layers, sliding_window=window)
    params = weights(SMALL.replace(num_layers=layers))
    mixture = np.random.default_rng(4).normal(size=T).astype(np.float32)  # no logit may cancel another

    def outputs(table):
        model = TransformerLM.from_params(config, {**params, "embedding": {"table": table}})
        return model(TOKENS, segments=segments)[0][0] @ mixture

    jacobian = jax.jit(jax.jacrev(outputs))(params["embedding"]["table"])
    return np.asarray(jacobian != 0)[:, TOKENS[0]].any(-1)


LATER = np.arange(T)[:, None] - np.arange(T)


@pytest.fixture(params=[None, 2], ids=["dense", "chunked"])
def chunk(request, monkeypatch):
    """Whether scores are taken all at once or, as those of long sequences, in chunks."""
    if request.param:
        monkeypatch.setattr(attention, "CHUNK", request.param)


@pytest.mark.usefixtures("chunk")
def test_a_logit_depends_on_all_earlier_tokens_and_no_later_one():
    np.testing.assert_array_equal(reached(), LATER >= 0)


@pytest.mark.usefixtures("chunk")
def test_a_logit_depends_on_its_own_document_alone():
    same = DOCUMENTS.T == DOCUMENTS
    np.testing.assert_array_equal(reached(segments=DOCUMENTS), same & (LATER >= 0))


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize(("window", "layers"), [(1, 2), (2, 3)])
def test_windows_add_up_over_the_layers(window, layers):
    """Each layer reaches window - 1 tokens further back."""
    expected = (LATER >= 0) & (layers * (window - 1) >= LATER)
    np.testing.assert_array_equal(reached(layers=layers, window=window), expected)


def test_packed_documents_have_the_logits_of_each_alone():
    model = TransformerLM.from_params(SMALL, weights(SMALL))
    forward = jax.jit(lambda tokens, segments: model(tokens, segments=segments)[0])
    packed = np.asarray(forward(TOKENS, DOCUMENTS))
    for document in (1, 2):
        own = DOCUMENTS[0] == document
        alone = forward(TOKENS[:, own], None)
        np.testing.assert_allclose(packed[:, own], alone, rtol=1e-4, atol=1e-4)  # turned from other positions
    together = np.asarray(forward(TOKENS, None))
    assert np.abs(together - packed)[:, 4:].max() > 0.1


def test_only_distances_between_positions_matter():
    model = TransformerLM.from_params(SMALL, weights(SMALL))
    forward = jax.jit(lambda positions: model(TOKENS, positions)[0])
    plain, shifted = (forward(np.arange(T)[None] + start) for start in (0, 100))
    np.testing.assert_array_equal(jax.jit(lambda: model(TOKENS)[0])(), plain)
    np.testing.assert_allclose(shifted, plain, rtol=1e-3, atol=1e-3)  # float32 angles of up to 100
