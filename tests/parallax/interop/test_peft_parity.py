"""Adapters learn here as they do under transformers and PEFT, and go back and forth between them."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from parallax.config import OptimizerConfig, TrainConfig
from parallax.interop.folders import export_model, import_adapters, import_model
from parallax.interop.peft import read_adapters, write_adapters
from parallax.model.adapters import join, take_adapters
from parallax.model.transformer import TransformerLM
from parallax.run_folder import load_run
from parallax.training.preference import REFERENCES, PreferenceConfig, make_log_probs
from parallelism import reduction
from scripts.training.step import bind_state, bind_step
from tests.parallax.interop import models
from tests.parallax.interop import test_experts_parity as experts
from tests.parallax.interop.models import save

pytestmark = pytest.mark.external
FAMILIES = ("llama", "qwen3_moe", "gemma3_text")
RATE, STEPS, SHAPE, PROMPT = 1e-3, 20, (4, 33), 9
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj"]
TRAIN = TrainConfig(steps=STEPS, batch_size=4, seq_len=32, z_loss=0.0)
LEARNING = OptimizerConfig(
    learning_rate=RATE, warmup_steps=0, final_rate=1.0, weight_decay=0.0, beta2=0.999, clip_norm=0.0
)


def made(family):
    """What makes the same model of four layers, or of what the family is drawn with, each time."""
    if family in experts.FAMILIES:
        values, settings = experts.random_values(family, 0), {"experts_implementation": "eager"}
    else:
        values, settings = models.random_values(family, 0), {}
    values |= {"num_hidden_layers": 4} if family == "llama" else {}
    return lambda: models.make_model(family, values, 0, **settings)


def batches(vocabulary):
    """Rows of ids, and which of their tokens are learned: an answer behind a question."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        ids = rng.integers(0, vocabulary, SHAPE).astype(np.int32)
        yield ids, np.arange(SHAPE[1])[None] >= rng.integers(4, 24, (SHAPE[0], 1))


def our_losses(config, params):
    rows = (
        {"inputs": ids[:, :-1], "targets": np.where(learned, ids, -1)[:, 1:]}
        for ids, learned in batches(config.vocab_size)
    )
    return our_steps(config, params, rows, "ce_loss")


def our_steps(config, params, rows, name, preference=None):
    """What the metric of that name is at each step, and the parameters after them."""
    init, _ = bind_state(config, TRAIN, LEARNING)
    state = dataclasses.replace(jax.jit(init)(), params=params)
    step, losses = jax.jit(bind_step(config, TRAIN, LEARNING, reduction.mean(), preference)), []
    for batch in rows:
        state, metrics = step(state, batch)
        losses.append(float(metrics[name]))
    return losses, state.params


def their_losses(model, vocabulary):
    import torch

    def loss_of(ids, kept):
        labels = torch.tensor(np.where(kept, ids, -100)).long()
        logits = model(torch.tensor(ids[:, :-1]).long()).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)

    return their_steps(model, [functools.partial(loss_of, *batch) for batch in batches(vocabulary)])


def their_steps(model, losses):
    """What each loss is where a step of AdamW follows it."""
    import torch

    learned, found = [weight for weight in model.parameters() if weight.requires_grad], []
    optimizer = torch.optim.AdamW(learned, RATE, (0.9, 0.999), weight_decay=0.0)
    model.train()
    for loss_of in losses:
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    model.eval()
    return found


def logits_of(model, ids):
    import torch

    with torch.no_grad():
        return model(torch.tensor(ids).long()).logits.numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_all_parameters_learn_as_under_transformers(family, tmp_path):
    make = made(family)
    theirs = make()
    save(theirs, tmp_path / "hf", "float32")
    import_model(tmp_path / "hf", tmp_path / "run")
    run = load_run(tmp_path / "run")
    ours, _ = our_losses(run.config, run.params)
    np.testing.assert_allclose(ours, their_losses(theirs, run.config.vocab_size), rtol=0, atol=1e-4)


def pairs(vocabulary):
    """Chosen and rejected rows [B, S] behind the same prompts, of PROMPT tokens."""
    rng = np.random.default_rng(1)
    for _ in range(STEPS):
        chosen, rejected = rng.integers(0, vocabulary, (2, *SHAPE)).astype(np.int32)
        rejected[:, :PROMPT] = chosen[:, :PROMPT]
        yield chosen, rejected


@pytest.mark.parametrize("family", FAMILIES)
def test_preferences_are_learned_as_by_the_formula_under_transformers(family, tmp_path):
    """Of Rafailov et al. 2023, eq. 7, as TRL has it."""
    import torch

    theirs, preference = made(family)(), PreferenceConfig(beta=0.2, label_smoothing=0.1)
    save(theirs, tmp_path / "hf", "float32")
    import_model(tmp_path / "hf", tmp_path / "run")
    run = load_run(tmp_path / "run")

    def batch_of(sides):
        ids = np.concatenate([side[:, :-1] for side in sides], axis=1)
        targets = np.concatenate([np.where(np.arange(SHAPE[1]) < PROMPT, -1, side)[:, 1:] for side in sides], axis=1)
        segments = np.repeat([[1, 2]], SHAPE[1] - 1, axis=1).repeat(SHAPE[0], axis=0).astype(np.int32)
        batch = {"inputs": ids, "targets": targets.astype(np.int32), "segments": segments}
        return batch | dict(zip(REFERENCES, referred(run.params, batch, None)[:2], strict=True))

    def log_prob(ids):
        logits = theirs(torch.tensor(ids[:, :-1]).long()).logits.log_softmax(-1)
        return logits.gather(-1, torch.tensor(ids[:, 1:, None]).long())[:, PROMPT - 1 :].sum((1, 2))

    def loss_of(sides, before):
        chosen, rejected = (log_prob(ids) - each for ids, each in zip(sides, before, strict=True))
        margin = preference.beta * (chosen - rejected)
        positive, negative = (torch.nn.functional.logsigmoid(each) for each in (margin, -margin))
        return -(0.9 * positive + 0.1 * negative).mean()

    referred, rows = jax.jit(make_log_probs(run.config)), list(pairs(run.config.vocab_size))
    with torch.no_grad():
        references = [[log_prob(ids) for ids in sides] for sides in rows]
    ours, _ = our_steps(run.config, run.params, map(batch_of, rows), "loss", preference)
    found = their_steps(theirs, [functools.partial(loss_of, *each) for each in zip(rows, references, strict=True)])
    assert found[0] == pytest.approx(np.log(2), abs=1e-5)
    assert np.ptp(found) > 0.01
    np.testing.assert_allclose(ours, found, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "rslora"), [("llama", False), ("llama", True), ("qwen3_moe", True), ("gemma3_text", False)]
)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # asked by PEFT
def test_adapters_learn_as_under_peft_and_go_back_and_forth(family, rslora, tmp_path):
    import peft

    make = made(family)
    theirs = make()
    save(theirs, tmp_path / "hf", "float32")
    import_model(tmp_path / "hf", tmp_path / "run")
    run = load_run(tmp_path / "run")
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=MODULES, use_rslora=rslora, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(theirs, settings)
    adapted.save_pretrained(tmp_path / "first")

    config, adapters = read_adapters(tmp_path / "first", run.config)
    assert (config.lora.rank, config.lora.rslora) == (4, rslora)
    ours, learned = our_losses(config, join(run.params, adapters))
    np.testing.assert_allclose(ours, their_losses(adapted, config.vocab_size), rtol=0, atol=1e-4)

    ids, _ = next(batches(config.vocab_size))
    expected = logits_of(adapted, ids)
    (tmp_path / "ours").mkdir()
    write_adapters(take_adapters(learned), config, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    np.testing.assert_allclose(logits_of(back, ids), expected, rtol=0, atol=1e-3)

    import_adapters(tmp_path / "ours", tmp_path / "run", tmp_path / "with")
    served = load_run(tmp_path / "with")
    np.testing.assert_allclose(
        TransformerLM.from_params(served.config, served.params)(ids)[0], logits_of(back, ids), rtol=0, atol=1e-4
    )
    export_model(str(tmp_path / "with"), tmp_path / "merged")
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    np.testing.assert_allclose(logits_of(whole, ids), logits_of(back, ids), rtol=0, atol=1e-4)
