"""Many clients at once, some of which go away: nobody's answer changes, and no slot is lost.

Invariant: each answer is compared with that to the same request made alone on the same server.
"""

import asyncio
import contextlib
import json
import random

import httpx
import pytest

from tests.parallax.serving.server import eventually

CLIENTS = 200
STREAM = {"stream": True}


def request_of(number: int, model: str) -> dict:
    rng = random.Random(number)
    return {
        "model": model,
        "prompt": "".join(rng.choice("abcdef é☃\n") for _ in range(rng.randint(1, 30))),
        "max_tokens": rng.randint(1, 60),
        "temperature": rng.choice([0, 0.5, 1, 2]),
        "top_k": rng.choice([0, 5]),
        "top_p": rng.choice([1, 0.8]),
        "repetition_penalty": rng.choice([1, 1.3]),
        "n": rng.choice([1, 1, 1, 2]),  # in all 254, and 256 may wait
        "logprobs": rng.choice([None, 2]),
        "stop": rng.choice([None, "ab", ["x", "é"]]),
        "seed": number,
    }


def comparable(answer: dict) -> tuple[dict, list[float]]:
    """An answer without what names it, and its numbers apart: in another slot they may be rounded otherwise."""
    numbers: list[float] = []
    kept = {name: value for name, value in answer.items() if name not in ("id", "created")}
    for choice in kept["choices"]:
        if logprobs := choice["logprobs"]:
            numbers += logprobs.pop("token_logprobs")
            tops = logprobs["top_logprobs"]
            numbers += [number for top in tops for number in top.values()]
            logprobs["top_logprobs"] = [list(top) for top in tops]
    return kept, numbers


async def ask(client: httpx.AsyncClient, number: int, model: str) -> dict | None:
    """The answer, or None where this client goes away in the middle, as every fifth does."""
    fields, rng = request_of(number, model), random.Random(-number)
    await asyncio.sleep(rng.uniform(0, 0.5))
    if number % 5:
        response = await client.post("/v1/completions", json=fields)
        assert response.status_code == 200, response.text
        return response.json()
    fields |= {"max_tokens": 60, "stop": None, **(STREAM if number % 2 else {})}
    with contextlib.suppress(TimeoutError, httpx.ReadError):
        async with asyncio.timeout(rng.uniform(0.05, 1)):
            async with client.stream("POST", "/v1/completions", json=fields) as response:
                pieces = [piece async for piece in response.aiter_raw()]
                assert pieces
    return None


async def ask_all(address: str, model: str) -> list[dict | None]:
    limits = httpx.Limits(max_connections=CLIENTS)
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as client:
        return await asyncio.gather(*(ask(client, number, model) for number in range(CLIENTS)))


def test_company_changes_no_answer_and_leaks_no_slot(server):
    together = asyncio.run(ask_all(server.address, server.model))
    assert eventually(server.is_idle)
    finished = {number: answer for number, answer in enumerate(together) if answer}
    assert len(finished) == CLIENTS - CLIENTS // 5
    for number, answer in finished.items():
        alone = server.http.post("/v1/completions", json=request_of(number, server.model)).json()
        (kept, numbers), (expected, expected_numbers) = comparable(answer), comparable(alone)
        assert kept == expected, request_of(number, server.model)
        assert numbers == pytest.approx(expected_numbers, abs=1e-5)  # float32
    assert eventually(server.is_idle)  # a stop that ends an answer early frees its slot with the next step
    assert server.gauge("slots") == 4


def test_a_client_that_goes_away_frees_its_slots_at_once(server):
    before = server.gauge("answers_total")
    for stream in (True, False):
        fields = {"model": server.model, "prompt": ["a", "b"], "max_tokens": 90, "n": 16, "stream": stream}
        with (
            contextlib.suppress(httpx.ReadTimeout),
            server.http.stream("POST", "/v1/completions", json=fields, timeout=httpx.Timeout(60, read=0.05)),
        ):
            pass  # goes away once the answer begins, or before it does
        assert eventually(server.is_idle)
    assert server.gauge("answers_total") - before == 64


def test_a_full_queue_says_when_to_come_again(server):
    fields = {"model": server.model, "prompt": "a", "max_tokens": 90, "n": 32, "stream": True}
    with contextlib.ExitStack() as streams:  # of answers that together last much longer than it takes to ask for them
        while (asked := streams.enter_context(server.http.stream("POST", "/v1/completions", json=fields))).is_success:
            pass
        assert (asked.status_code, asked.headers["retry-after"]) == (429, "1")
        error = json.loads(asked.read())["error"]
        assert (error["code"], error["message"][:29]) == ("queue_full", "at most 256 answers may wait,")
    assert eventually(server.is_idle)
    assert server.post(prompt="a", n=32, max_tokens=1).status_code == 200
