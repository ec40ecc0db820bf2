"""train.py --lora.*: adapters beside a run that is there, gone on with, merged where they are read, and refused."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest

from parallax.config import config_from_dict
from parallax.model.adapters import join, merge, take_adapters
from parallax.run_folder import abstract_params, load_adapters, load_run, read_checkpoint, read_settings
from parallax.training.checkpoint import Checkpointer
from scripts import convert, train
from tests.scripts.conftest import calling, write_text
from tests.scripts.runs import SHORT

FLAGS = ["--dataset", "text.txt", "--init-from", "run", *SHORT, "--checkpoint-interval", "6"]
ADAPTERS = ["--lora.rank", "2", "--learning-rate", "1e-2", "--sample-prompts", "prompts.txt", "--output-dir", "tuned"]


@pytest.fixture(scope="module")
def first(template, tmp_path_factory):
    """A run of adapters beside a finished run, trained once."""
    folder = tmp_path_factory.mktemp("tuned")
    write_text(folder)
    (folder / "prompts.txt").write_text("king and \n\nthe night")
    shutil.copytree(template, folder / "run")
    with pytest.MonkeyPatch.context() as patch, calling(folder, patch) as call:
        assert call(train, *FLAGS, *ADAPTERS) == 0
    return folder


@pytest.fixture
def tuned(first, call, tmp_path):
    """A copy of it, beside its base."""
    shutil.copytree(first, tmp_path, dirs_exist_ok=True)
    return tmp_path / "tuned"


def arrays_of(run):
    manifest = json.loads((run / "checkpoints/12/manifest.json").read_text())
    return manifest["arrays"]


def test_checkpoints_hold_adapters_alone_and_name_their_base(first, tuned):
    names = [name for name in arrays_of(tuned) if name.startswith(("params/", "opt_state/")) and "[]" not in name]
    assert names
    assert all("/adapters/" in name for name in names if "float32[]" not in name and not name.endswith("count"))
    base = json.loads((tuned / "config.json").read_text())["base"]
    assert base["run"] == str(first / "run")
    assert base["sha256"] == Checkpointer(tuned.parent / "run/checkpoints", keep=1).identity(base["step"])

    merged, plain = load_run("tuned"), load_run("run")
    assert merged.config == plain.config
    same = jax.tree.map(np.array_equal, merged.params, plain.params)
    assert not same["blocks"]["attention"]["query"]
    assert same["embedding"]["table"]
    assert same["blocks"]["mlp_norm"]["scale"]


def test_a_run_of_adapters_is_gone_on_with(call, tuned):
    shutil.copytree(tuned, tuned.parent / "again")
    shutil.rmtree(tuned.parent / "again/checkpoints/12")
    status, _, err = call(train, "--resume", "--output-dir", "again")
    assert status == 0, err
    assert "\nresume    from step 6" in err
    # The thread pool of this process is another than that of the first run, and with it how a matmul parts its sums.
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6)
    jax.tree.map(close, load_run("again").params, load_run("tuned").params)
    samples = (tuned / "samples.jsonl").read_text()
    assert (tuned.parent / "again/samples.jsonl").read_text() == samples
    kept = [json.loads(line) for line in samples.splitlines()]
    assert [(row["step"], row["prompt"]) for row in kept] == [
        (s, p) for s in (6, 12) for p in ("king and ", "the night")
    ]
    assert all(row["text"] for row in kept)


def test_a_merged_matrix_is_rounded_once(tuned):
    config = config_from_dict(read_settings(tuned)["model"])
    adapters, _ = read_checkpoint("tuned", take_adapters(abstract_params(config)))
    expected = merge(config, join(load_run("run", param_dtype="bfloat16").params, adapters))
    jax.tree.map(np.testing.assert_array_equal, load_run("tuned", param_dtype="bfloat16").params, expected)


def test_adapters_go_out_and_in(call, tuned):
    assert call(convert, "export", "tuned", "peft", "--adapter")[0] == 0
    assert call(convert, "import", "peft", "back", "--base", "run")[0] == 0
    jax.tree.map(np.testing.assert_array_equal, load_run("back").params, load_run("tuned").params)


def test_what_cannot_be_is_refused(refuses, tuned):
    (tuned.parent / "peft").mkdir()
    refuses(train, ["--dataset", "text.txt", "--lora.rank", "2"], "--init-from names none")
    refuses(train, ["--dataset", "text.txt", "--init-from", "tuned"], "holds adapters alone")
    refuses(convert, ["export", "run", "peft", "--adapter"], "has no adapters")
    refuses(convert, ["import", "peft", "back", "--base", "tuned"], "--base tuned holds adapters alone")
    refuses(train, ["--dataset", "text.txt", "--sample-prompts", "none.txt"], "none.txt cannot be read")
    settings = json.loads((tuned / "config.json").read_text())
    settings["base"]["run"] = str(tuned.parent / "elsewhere/run")
    (tuned / "config.json").write_text(json.dumps(settings))
    assert load_run("tuned").step == 12, "a base beside the run is found"
    (tuned.parent / "run").rename(tuned.parent / "moved")
    with pytest.raises(ValueError, match="is not there; bring back checkpoint 12"):
        load_run("tuned")
    del settings["base"]
    (tuned / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="must name the base of the adapters"):
        load_adapters("tuned", load_run("moved"))
