"""An error of the device ends the answers in its slots and no others, and the engine goes on."""

import asyncio
import functools

import pytest

from parallax.model.stack import prepare
from parallax.serving import engine as engines
from parallax.serving.engine import Engine
from parallax.serving.errors import Refusal
from tests.parallax.inference.models import CONFIG, by_generator, completion, draw_params
from tests.parallax.serving.failing import FailingBatcher

SHORT = CONFIG.replace(num_layers=1)
SLOTS, ANSWERS = 2, 5


@functools.cache
def params():
    return prepare(SHORT, draw_params(SHORT))


async def answer(job):
    """Its tokens, or the refusal that ended it."""
    try:
        return [token.token_id async for _, token in job.tokens()]
    except Refusal as refusal:
        return refusal
    finally:
        job.close()


@pytest.fixture
def run(monkeypatch):
    """Answers `ANSWERS` requests, all submitted at once, on an engine whose device fails; then as many again."""
    monkeypatch.setattr(engines, "PAUSES", (0.0, 0.0, 0.0))

    def run(fails_in, broken):
        seen = []

        class Watched(FailingBatcher):
            def rebuild(self):
                seen.append((engine.degraded, sorted(self.under_way)))
                super().rebuild()

        def make():
            batcher = Watched(SHORT, params(), slots=SLOTS, capacity=32, tokens_per_step=1)
            batcher.fails_in, batcher.broken = fails_in, broken
            return batcher

        engine = Engine(make, max_waiting=100)
        engine.warm_up()

        async def ask():
            engine.attach(asyncio.get_running_loop())
            rounds = []
            for _ in range(2):
                if engine.failure:
                    break
                jobs = [engine.submit([completion(number, max_tokens=15)]) for number in range(ANSWERS)]
                rounds.append(await asyncio.gather(*map(answer, jobs)))
            assert (engine.under_way, engine.waiting) == (0, 0)
            await engine.stop()
            return rounds

        return engine, asyncio.run(asyncio.wait_for(ask(), 120)), seen

    return run


@pytest.mark.parametrize(("fails_in", "broken"), [("step", 2), ("admit", 0), ("keep", 0)])
def test_answers_in_slots_end_and_all_others_are_whole(run, capfd, fails_in, broken):
    engine, (first, second), seen = run(fails_in, broken)
    whole = [by_generator(SHORT, params(), completion(number, max_tokens=15)) for number in range(ANSWERS)]
    assert [(refusal.status, refusal.body()["error"]["code"]) for refusal in first[:SLOTS]] == [
        (500, "step_failed")
    ] * SLOTS
    assert first[SLOTS:] == whole[SLOTS:]
    assert second == whole
    assert [degraded for degraded, _ in seen] == [True] * (broken + 1)
    assert (engine.degraded, engine.failure) == (False, None)
    said = capfd.readouterr().err
    assert said.count("JaxRuntimeError: RESOURCE_EXHAUSTED") == 1
    assert said.count("JaxRuntimeError: INTERNAL") == broken


def test_a_device_that_stays_away_ends_every_answer_and_the_engine(run):
    engine, (answers,), seen = run("step", 3)
    assert [refusal.status for refusal in answers] == [500] * ANSWERS
    codes = {refusal.body()["error"]["code"] for refusal in answers}
    assert codes == {"step_failed", "engine_failed"}
    assert len(seen) == 3
    assert "the device is gone" in str(engine.failure)
    assert engine.degraded
