import json

import pytest

from parallax.prediction import read_prediction
from scripts.forecasting.family import at_share, size_of
from scripts.forecasting.forecast import asked_model, forecast, of_another_family
from tests.scripts.forecasting.ladders import LAW, TARGET, finish_all, ladder_in


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    made = ladder_in(tmp_path_factory.mktemp("forecast") / "ladder")
    finish_all(made)
    return made


def test_tells_the_loss_of_a_larger_run(ladder, tmp_path, capsys):
    assert forecast([str(ladder.folder), "--tokens", "1e6", "--share", "2", "--output", str(tmp_path)]) == 0
    told = json.loads((tmp_path / "forecast.json").read_text())
    own = told["run"]
    truth = LAW.loss(own["params"], 1e6)
    assert own["loss"] == pytest.approx(truth, rel=0.01)
    assert own["low"] < truth < own["high"]
    assert told["cost"] is None
    assert told["best_for_its_flops"]["loss"] <= own["loss"]
    assert told["best_for_twice_its_flops"]["loss"] < told["best_for_its_flops"]["loss"]
    assert told["best_for_its_flops"]["flops"] == pytest.approx(own["flops"])
    assert (tmp_path / "forecast.png").stat().st_size > 1000
    assert "this run" in capsys.readouterr().out


def test_registers_before_the_run_alone(ladder, tmp_path):
    run = tmp_path / "run"
    first = ladder.members[0].name
    asked = [
        str(ladder.folder),
        "--tokens",
        "1e6",
        "--register",
        str(run),
        "--output",
        str(tmp_path),
        "--without",
        first,
    ]
    assert forecast(asked) == 0
    prediction = read_prediction(run)
    assert prediction.left_out == {first: "--without names it"}
    assert prediction.low < prediction.loss < prediction.high
    assert (prediction.corpus_sha256, prediction.ladder_sha256) == ("c0ffee", ladder.sha256)
    assert prediction.model["embed_dim"] == TARGET.embed_dim
    assert prediction.at(1.0) == pytest.approx((prediction.low, prediction.loss, prediction.high))
    assert prediction.at(0.5)[1] == pytest.approx(1.5 * prediction.loss, rel=0.01)
    with pytest.raises(ValueError, match="holds files already; a prediction goes before a run"):
        forecast(asked)
    assert prediction.seq_len == ladder.train.seq_len


def test_a_preset_in_place_of_the_target(ladder, tmp_path):
    """It has the ladder's vocabulary; one of another shape is warned of, and a member of the family is not."""
    asked = [str(ladder.folder), "--tokens", "1e6", "--output", str(tmp_path)]
    assert forecast([*asked, "--config", "nano"]) == 0
    told = json.loads((tmp_path / "forecast.json").read_text())
    nano = asked_model(ladder, "nano")
    assert told["run"]["params"] == size_of(nano)
    assert (nano.vocab_size, nano.parametrization) == (TARGET.vocab_size, ladder.target.parametrization)
    assert "not of the ladder's family, by its head_dim, mlp_dim, num_heads" in " ".join(told["warnings"])
    assert of_another_family(ladder, at_share(ladder.target, 2.0)) is None


def test_the_end_of_the_sizes_is_no_optimum(ladder, tmp_path):
    asked = [str(ladder.folder), "--tokens", "1e16", "--output", str(tmp_path)]
    assert forecast(asked) == 0
    said = " ".join(json.loads((tmp_path / "forecast.json").read_text())["warnings"])
    assert "the best size for its FLOPs is the largest that was compared" in said


def test_nothing_is_written_for_a_folder_that_cannot_be_registered(ladder, tmp_path):
    for folder in ("gs://bucket/run", __file__):
        with pytest.raises(ValueError, match="--register"):
            forecast([str(ladder.folder), "--tokens", "1e6", "--register", folder, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_says_what_it_needs(ladder):
    with pytest.raises(ValueError, match="tokens"):
        forecast([str(ladder.folder)])
    with pytest.raises(ValueError, match=r"level=2\.0 must be between 0 and 1"):
        forecast([str(ladder.folder), "--tokens", "1e6", "--level", "2"])
    for flag, value in (("seq-len", "0"), ("batch-size", "0"), ("price", "-3"), ("share", "1e9"), ("share", "0")):
        with pytest.raises(ValueError, match=f"{flag.replace('-', '_')}={value[0]}.* must be .*; try"):
            forecast([str(ladder.folder), "--tokens", "1e6", f"--{flag}", value])
    for flag in ("batch-size", "seq-len", "price"):
        with pytest.raises(ValueError, match=f"--{flag} needs a machine; add --topology"):
            forecast([str(ladder.folder), "--tokens", "1e6", f"--{flag}", "2"])
