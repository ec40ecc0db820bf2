"""The loop against a plain account of when things are due, and of its speed on a clock that only the test moves."""

import contextlib
import dataclasses

import numpy as np
import pytest

from parallax.config import TrainConfig
from parallax.training import loop
from parallax.training.loop import Best, Diverged, Stopwatch
from tests.parallax.training.harness import TIMING, TOKENS, Harness, fresh_state


def without_timing(rows):
    return [{name: value for name, value in row.items() if name not in TIMING} for row in rows]


def draw_config(seed):
    rng = np.random.default_rng(seed)
    names = ("steps", "log_interval", "eval_interval", "checkpoint_interval", "check_interval")
    return TrainConfig(**dict(zip(names, rng.integers(1, [20, 9, 12, 12, 9]).tolist(), strict=True)))


def due_saves(config, losses):
    """Every interval, at the end, and at an evaluation that is the best when the best checkpoint is an interval old."""
    saved, best = [], 0
    for n in range(1, config.steps + 1):
        better = n in losses and losses[n] < losses.get(best, np.inf)
        due = n % config.checkpoint_interval == 0 or n == config.steps
        if due or (better and n - best >= config.checkpoint_interval):
            saved.append(n)
            best = n if better else best
    return saved


@pytest.mark.parametrize("seed", range(12))
def test_everything_happens_when_it_is_due_and_only_then(seed):
    config, run = draw_config(seed), Harness()
    state, done = run.train(config)
    every = range(1, config.steps + 1)
    last = {config.steps}
    assert done == state.step == config.steps == run.dispatched
    assert run.of("step") == list(every)
    assert run.logged == [n for n in every if n % config.log_interval == 0 or n in {1, *last}]
    evaluated = [n for n in every if n % config.eval_interval == 0 or n in last]
    assert run.of("evaluate") == evaluated
    assert [row["step"] for row in run.rows if "eval_loss" in row] == evaluated
    saved = due_saves(config, {row["step"]: row["eval_loss"] for row in run.rows if "eval_loss" in row})
    assert run.of("save") == saved
    assert run.of("check") == [n for n in every if n % config.check_interval == 0 or n in {*saved, *evaluated}]


@pytest.mark.parametrize(
    ("intervals", "losses", "expected"),
    [
        ((1, 10), {}, [10, 20, 30]),  # falling
        ((15, 10), {}, [10, 15, 20, 30]),
        ((15, 100), {}, [30]),
        ((1, 10), {14: 1.0, 16: 0.5, 21: 0.2, 22: 0.1, 28: 0.05}, [10, 20, 21, 30]),  # else rising
        ((1, 100), {20: float("nan"), 30: float("nan")}, [30]),
    ],
)
def test_an_evaluation_is_saved_if_it_is_the_best_and_the_best_checkpoint_an_interval_old(intervals, losses, expected):
    config, run = TrainConfig(steps=30, eval_interval=intervals[0], checkpoint_interval=intervals[1]), Harness()
    rises = bool(losses)

    def evaluate(state):
        step = int(state.step)
        return {"eval_loss": losses.get(step, 1 + (step if rises else -step) / 100)}

    run.evaluate = evaluate
    run.train(config)
    assert run.of("save") == expected


@pytest.mark.parametrize("seed", range(5))
def test_what_happens_after_a_step_happens_in_order(seed):
    """Observed, logged, checked, evaluated, recorded, saved: each of its own step, before the next."""
    config, run = draw_config(seed), Harness()
    run.train(config)
    order = {"step": 0, "row": 1, "check": 2, "evaluate": 3, "save": 5}

    def place(what, step, detail):
        return step, 4 if what == "row" and "eval_loss" in detail else order[what]

    places = [place(*event) for event in run.events]
    assert places == sorted(set(places))


def test_rows_hold_the_metrics_of_their_step_and_saves_its_state_and_held_out_loss():
    config, run = TrainConfig(steps=9, log_interval=1, eval_interval=3, checkpoint_interval=2), Harness()
    run.train(config)
    w, states, losses = np.float32(1), {}, {}
    for k in range(9):
        w = np.float32(0.5) * w + np.float32(np.sin(3.0 * k))
        states[k + 1], losses[k + 1] = w, np.sin(w)
    for row in run.rows:
        if "loss" in row:
            np.testing.assert_allclose(row["loss"], losses[row["step"]], rtol=1e-5, atol=1e-6)  # float32
            assert {"step", "loss", "bad_steps"} <= set(row) <= {"step", "loss", "bad_steps", *TIMING}
        else:
            np.testing.assert_allclose(row["eval_loss"], states[row["step"]] + 1, rtol=1e-5)
            assert set(row) == {"step", "eval_loss"}
    evaluated = {row["step"]: row["eval_loss"] for row in run.rows if "eval_loss" in row}
    for what, step, eval_loss in run.events:
        if what == "save":
            assert eval_loss == evaluated.get(step)
            assert run.saved[step].step == step
            np.testing.assert_allclose(run.saved[step].params["w"], states[step], rtol=1e-5)


def test_observers_get_host_numbers_one_after_the_other():
    first, second, calls = Harness(), Harness(), []
    for name, observer in (("first", first), ("second", second)):
        observer.step = lambda step, metrics, name=name: calls.append((name, step, metrics))
        observer.row = lambda row, name=name: calls.append((name, row["step"], row))
    Harness().train(TrainConfig(steps=3, log_interval=2), observers=[first, second])
    assert [name for name, _, _ in calls] == ["first", "second"] * (len(calls) // 2)
    assert all(a[1:] == b[1:] for a, b in zip(calls[::2], calls[1::2], strict=True))
    assert all(type(value) in (int, float) for _, _, numbers in calls for value in numbers.values())


@pytest.mark.parametrize("seed", range(5))
def test_a_resumed_run_writes_the_rows_of_the_uninterrupted_one(seed):
    """From every checkpoint: the same rows, evaluations, saves and final state, timing aside."""
    config, whole = draw_config(seed), Harness()
    end, _ = whole.train(config)
    for step, state in whole.saved.items():
        rest = Harness()
        resumed, done = rest.train(config, start=step, state=state, best=whole.best[step])
        assert done == config.steps
        assert without_timing(rest.rows) == without_timing(row for row in whole.rows if row["step"] > step)
        for what in ("check", "save"):
            assert rest.of(what) == [n for n in whole.of(what) if n > step]
        assert rest.of("step") == list(range(step + 1, config.steps + 1))
        assert resumed.params["w"] == end.params["w"]


@pytest.mark.parametrize("stop_at", [1, 2, 5, 8, 10, 12])
def test_a_request_to_stop_saves_and_leaves_without_a_row_of_its_own(stop_at):
    """Stopping and going on leaves the rows of the run that was not stopped; an evaluation waits for that."""
    config = TrainConfig(steps=12, log_interval=4, eval_interval=5, checkpoint_interval=100)
    whole, run = Harness(), Harness(stop_at=stop_at)
    whole.train(config)
    state, done = run.train(config)
    assert done == state.step == stop_at == run.dispatched
    assert run.of("step") == list(range(1, stop_at + 1))
    assert run.events[-1][:2] == ("save", stop_at)
    assert run.of("save").count(stop_at) == 1
    due = stop_at in (5, 10)  # of the last step it is made: the run is over before it is asked
    assert stop_at not in run.of("evaluate") or stop_at == 12
    rest = Harness()
    rest.train(config, start=stop_at, state=run.saved[stop_at], evaluation_due=due)
    assert without_timing(run.rows + rest.rows) == without_timing(whole.rows)


@pytest.mark.parametrize("cut_at", [5, 10, 12])
@pytest.mark.parametrize("checkpoint_interval", [1, 100])
def test_a_request_to_stop_cuts_an_evaluation_short_and_the_state_is_saved(cut_at, checkpoint_interval):
    config = TrainConfig(steps=12, log_interval=4, eval_interval=5, checkpoint_interval=checkpoint_interval)
    whole, run = Harness(), Harness(cut_at=cut_at)
    whole.train(config)
    state, done = run.train(config)
    assert done == state.step == cut_at
    assert run.events[-1] == ("save", cut_at, None)
    for again in (cut := Harness(cut_at=cut_at), rest := Harness()):
        again.train(config, start=cut_at, state=run.saved[cut_at], evaluation_due=True, best=run.best[cut_at])
    assert without_timing(run.rows + rest.rows) == without_timing(whole.rows)
    (eval_loss,) = (row["eval_loss"] for row in whole.rows if row["step"] == cut_at and "eval_loss" in row)
    assert (cut.measured, rest.measured) == ({}, {cut_at: eval_loss})


@pytest.mark.parametrize(("made_up", "expected"), [(1.0, [20, 30]), (3.0, [15, 20, 30])])
def test_an_evaluation_that_is_made_up_for_counts_for_the_best_checkpoint(made_up, expected):
    """Step 15 is saved for its evaluation if no checkpoint that is less than an interval old is better."""
    config, run = TrainConfig(steps=30, eval_interval=5, checkpoint_interval=10), Harness()
    losses = {10: made_up, 15: 2.0}
    run.evaluate = lambda state: {"eval_loss": losses.get(int(state.step), 9.0)}
    state = Harness()
    state.train(TrainConfig(steps=10))
    run.train(config, start=10, state=state.saved[10], evaluation_due=True, best=Best(5, 2.5))
    assert run.of("save") == expected
    assert run.measured == {10: made_up}
    best = run.best[run.of("save")[0]]
    assert best == (Best(10, 1.0) if made_up == 1.0 else Best(15, 2.0))


@pytest.mark.parametrize(("log_interval", "first_bad"), [(1, 0), (1, 4), (100, 4), (7, 4), (7, 5), (3, 9)])
def test_too_many_bad_steps_in_a_row_end_the_run(log_interval, first_bad):
    """It is noticed at once or, where the host runs ahead, one step later; the bad state is not saved."""
    config = TrainConfig(steps=50, log_interval=log_interval, eval_interval=10, checkpoint_interval=1, max_bad_steps=3)
    for checkpoint_interval in (1, 100):
        run = Harness(bad=range(first_bad, 50))
        with pytest.raises(Diverged, match=f"3 steps in a row up to step {first_bad + 3}") as caught:
            run.train(dataclasses.replace(config, checkpoint_interval=checkpoint_interval))
        assert "\n" not in str(caught.value)
        assert caught.value.last_finite == first_bad
        assert run.dispatched <= first_bad + 4
        assert max(run.of("save"), default=0) < first_bad + 3
        assert run.of("step")[-1] == first_bad + 3


@pytest.mark.parametrize("seed", range(4))
def test_a_state_that_fails_its_check_is_neither_evaluated_nor_saved(seed):
    """Nor is any later one; what was done before stays."""
    config, whole = draw_config(seed), Harness()
    whole.train(config)
    for step in whole.of("check"):
        run = Harness(differs_at=step)
        with pytest.raises(RuntimeError, match="replicas differ"):
            run.train(config)
        assert run.dispatched == step
        assert run.events[-1][:2] == ("check", step)
        for what in ("evaluate", "save"):
            assert run.of(what) == [n for n in whole.of(what) if n < step]


def test_a_state_is_checked_before_it_is_saved_on_request():
    config = TrainConfig(steps=9, log_interval=100, eval_interval=100, checkpoint_interval=100)
    run = Harness(stop_at=4, differs_at=4)
    with pytest.raises(RuntimeError, match="replicas differ"):
        run.train(config)
    assert run.of("check") == [4]
    assert run.of("save") == []


def test_bad_steps_that_end_in_time_do_not_end_the_run():
    config = TrainConfig(steps=12, log_interval=1, max_bad_steps=3)
    run = Harness(bad={2, 3, 5, 6, 10})
    run.train(config)
    assert [row["bad_steps"] for row in run.rows if "loss" in row] == [0, 0, 1, 2, 0, 1, 2, 0, 0, 0, 1, 0]


def test_a_run_that_is_over_takes_no_step():
    run = Harness()
    state, done = run.train(TrainConfig(steps=5), start=5, state=fresh_state())
    assert done == 5
    assert run.events == []
    assert state.params["w"] == 1


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(loop.time, "perf_counter", clock)
    return clock


def test_stopwatch_knows_what_the_time_went_to(clock):
    """A step of 1 s after a first of 100 s, data of 0.25 s, checks of 0.5 s, evaluations of 30 s, saves of 7 s."""
    config = TrainConfig(steps=10, log_interval=4, eval_interval=5, checkpoint_interval=3, check_interval=4)
    run = Harness(clock=clock)
    run.train(config)
    expected = {"compile": 100.0, "step": 9.0, "data": 2.5, "check": 7 * 0.5}
    expected |= {"evaluation": 2 * 30.0, "checkpoint": 5 * 7.0}
    assert run.stopwatch.seconds == expected
    assert sum(expected.values()) == clock.now


def test_speed_is_of_steps_and_data_and_not_of_compiling_checking_evaluating_or_saving(clock):
    config = TrainConfig(steps=10, log_interval=4, eval_interval=5, checkpoint_interval=3)
    run = Harness(clock=clock)
    run.train(config, step_flops=20.0, peak_flops=32.0)
    first, *later = [row for row in run.rows if "loss" in row]
    assert not TIMING & set(first)
    assert [row["step"] for row in later] == [4, 8, 10]
    for row in later:
        assert row["step_time"] == 1.25
        assert row["tokens_per_second"] == TOKENS / 1.25
        assert row["mfu"] == 0.5


def test_without_a_known_peak_there_is_no_utilisation():
    run = Harness()
    run.train(TrainConfig(steps=4, log_interval=1), step_flops=20.0, peak_flops=None)
    assert not any("mfu" in row for row in run.rows)
    assert all(row["tokens_per_second"] > 0 for row in run.rows[1:] if "loss" in row)


def test_stopwatch_adds_up_and_counts_what_failed(clock):
    stopwatch = Stopwatch()
    for seconds in (2.0, 3.0):
        with stopwatch.timing("step"):
            clock.now += seconds
    with contextlib.suppress(KeyError), stopwatch.timing("data"):
        clock.now += 5.0
        raise KeyError
    assert stopwatch.seconds == {"step": 5.0, "data": 5.0}
