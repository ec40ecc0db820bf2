import dataclasses
import json

import jax
import numpy as np
import pytest

from parallax.config import NANO_CONFIG, NANO_MOE_CONFIG
from parallax.model.transformer import TransformerLM, init_params
from scripts.forecasting.check import activations, check

SMALL = {"embed_dim": 32, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "mlp_dim": 48, "num_layers": 2}


@pytest.mark.parametrize(("config", "norms"), [(NANO_CONFIG, "before"), (NANO_MOE_CONFIG, "both")])
def test_activations_are_those_of_the_model(config, norms):
    model = dataclasses.replace(config, **SMALL, norms=norms)
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, 65)
    found = jax.jit(activations, static_argnums=0)(model, params, tokens)
    logits, _ = jax.jit(lambda params: TransformerLM.from_params(model, params)(tokens))(params)
    np.testing.assert_allclose(found["logits"], logits[..., : model.vocab_size], atol=1e-5)
    assert set(found) == {"embedding", "logits"} | {
        f"{name} {number}" for name in ("attention", "feed-forward", "stream") for number in (0, 1)
    }


def test_writes_a_picture_and_its_numbers(tmp_path, capsys):
    small = SMALL | {"num_layers": 1}
    words = [word for name, value in small.items() for word in (f"--model.{name.replace('_', '-')}", str(value))]
    asked = ("--widths", "32", "64", "--steps", "1", "2", "--runs", "2")
    assert check([*words, *asked, "--output", str(tmp_path)]) == 0
    sizes = json.loads((tmp_path / "coordinates.json").read_text())["sizes"]
    assert set(sizes["stream 0"]) == {"32", "64"}
    assert all(np.isfinite(values).all() for by_width in sizes.values() for values in by_width.values())
    assert (tmp_path / "coordinates.png").stat().st_size > 1000
    assert "after 2 steps, mup" in capsys.readouterr().out
    with pytest.raises(ValueError, match="width 40 must be a multiple of head_dim=16"):
        check([*words, "--widths", "32", "40", "--output", str(tmp_path)])
    with pytest.raises(ValueError, match=r"steps=\(5, 1\) must ascend from at least 1"):
        check([*words, "--steps", "5", "1", "--output", str(tmp_path)])
