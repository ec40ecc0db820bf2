"""The completions API as OpenAI's own client meets it, on a real server."""

import json
import math

import openai
import pytest

from parallax.tokenizers.hugging_face import HuggingFaceTokenizer
from tests.parallax.interop.tokenizers import byte_level
from tests.parallax.serving.server import LETTERS, serving, write_run

PROMPT = "a bad☃"


def test_the_same_seed_gives_the_same_text(server):
    first, again, other = (server.complete(PROMPT, max_tokens=30, seed=seed) for seed in (1, 1, 2))
    assert first.choices[0].text == again.choices[0].text != other.choices[0].text
    assert (first.object, first.model) == ("text_completion", server.model)


def test_usage_counts_tokens(server):
    answer = server.complete(PROMPT, max_tokens=7, temperature=0, n=2)
    assert answer.usage.prompt_tokens == 6
    assert answer.usage.completion_tokens == 14 == answer.usage.total_tokens - 6


def test_an_answer_says_why_it_ended(server):
    reasons = {server.complete(PROMPT, max_tokens=60, seed=seed).choices[0].finish_reason for seed in range(12)}
    assert reasons == {"stop", "length"}  # an untrained model soon draws its end of text


def test_a_stream_is_the_answer_in_pieces(server):
    asked = {"max_tokens": 40, "seed": 3, "logprobs": 2, "echo": True}
    whole = server.complete(PROMPT, **asked)
    chunks = list(server.complete(PROMPT, stream=True, stream_options={"include_usage": True}, **asked))
    *pieces, last = chunks
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        streamed = [value for piece in pieces for value in getattr(piece.choices[0].logprobs, name)]
        assert streamed == getattr(whole.choices[0].logprobs, name)
    assert [piece.choices[0].finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert (last.choices, last.usage) == ([], whole.usage)
    assert len({chunk.id for chunk in chunks}) == 1


def test_answer_i_has_seed_plus_i_whatever_stands_beside_it(server):
    together = server.openai.completions.create(
        model=server.model, prompt=["abc", "é"], n=2, seed=2**32 - 1, max_tokens=12
    )
    alone = [server.complete(text, seed=seed, max_tokens=12) for text in ("abc", "é") for seed in (2**32 - 1, 0)]
    assert [choice.text for choice in together.choices] == [answer.choices[0].text for answer in alone]
    assert [choice.index for choice in together.choices] == [0, 1, 2, 3]


def test_token_ids_are_as_good_as_text(server):
    ids = [LETTERS.encode(PROMPT).tolist(), LETTERS.encode("b").tolist()]
    for prompt, text in ((ids[0], PROMPT), (ids, [PROMPT, "b"])):
        texts = [
            [choice.text for choice in server.complete(form, seed=4, max_tokens=9).choices] for form in (prompt, text)
        ]
        assert texts[0] == texts[1]


def test_logprobs_are_of_the_tokens(server):
    logprobs = server.complete(PROMPT, max_tokens=20, seed=5, logprobs=3, temperature=0).choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs)
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert next(iter(top)) == token  # argmax, since the temperature is 0
        assert top[token] == logprob == max(top.values())
        assert len(top) == 3
        assert sum(math.exp(value) for value in top.values()) <= 1.0001


def test_a_prompt_is_scored_without_an_answer(server):
    choice = server.complete(PROMPT, max_tokens=0, echo=True, logprobs=0).choices[0]
    assert (choice.text, choice.logprobs.tokens) == (PROMPT, list(PROMPT))
    assert choice.logprobs.token_logprobs[0] is None
    assert all(logprob < 0 for logprob in choice.logprobs.token_logprobs[1:])
    assert choice.logprobs.text_offset == list(range(len(PROMPT)))
    assert server.complete(PROMPT, max_tokens=0).choices[0].text == ""


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_is_cut_across_tokens(server, stream):
    free = server.complete(PROMPT, max_tokens=40, seed=6, temperature=0.9).choices[0].text
    stop = free[4:7]
    at = free.index(stop)
    asked = {"max_tokens": 40, "seed": 6, "temperature": 0.9, "stop": ["☃☃☃☃☃☃", stop], "logprobs": 0}
    if stream:
        choices = [chunk.choices[0] for chunk in server.complete(PROMPT, stream=True, **asked)]
    else:
        choices = server.complete(PROMPT, **asked).choices
    assert "".join(choice.text for choice in choices) == free[:at]
    assert choices[-1].finish_reason == "stop"
    assert "".join(token for choice in choices for token in choice.logprobs.tokens) == free[:at]
    one = server.complete(PROMPT, **asked | {"stop": stop, "echo": True}).choices[0].text
    assert one == PROMPT + free[:at]


def test_a_text_can_go_on_from_any_of_its_tokens(server):
    asked = {"max_tokens": 20, "seed": 7, "logprobs": 1}
    first = server.complete(PROMPT, echo=True, **asked).choices[0]
    ids = first.logprobs.token_ids
    rest = server.complete(ids[:10], **asked | {"max_tokens": len(ids) - 10}).choices[0]
    assert rest.text == first.text[10:]
    assert [len(top) for top in rest.logprobs.top_token_ids] == [len(top) for top in rest.logprobs.top_logprobs]


def test_events_are_framed_as_openai_frames_them(server):
    fields = {"model": server.model, "prompt": "a", "max_tokens": 3, "stream": True, "n": 2}
    with server.http.stream("POST", "/v1/completions", json=fields) as response:
        raw = b"".join(response.iter_raw())
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = raw.decode("ascii").split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    for event in events:
        assert "\n" not in event
        assert json.loads(event.removeprefix("data: "))["object"] == "text_completion"


def test_models(server):
    assert [model.id for model in server.openai.models.list()] == [server.model]
    assert server.openai.models.retrieve(server.model).id == server.model
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        server.openai.models.retrieve("gpt-4")


def test_the_run_is_described(server):
    run = server.http.get("/run").json()
    assert (run["model"], run["step"], run["capacity"]) == (server.model, 9, 96)
    assert run["loss"][0] == [1, 4.0]
    assert run["loss"][-1] == [9, 4 / 9]
    assert run["eval_loss"] == [[9, 0.5]]
    assert run["config"]["model"]["embed_dim"] == 16


def test_the_page_and_its_parts_may_run_no_other_script(server):
    page = server.http.get("/")
    assert "script-src 'self';" in page.headers["content-security-policy"]
    for name in ("page.css", "page.js", "tokens.js", "icon.svg"):
        assert server.http.get(f"/{name}").status_code == 200
    for inline in ("<style", " style=", " onclick=", "<script>", "http://", "https://"):
        assert inline not in page.text


@pytest.fixture(scope="module")
def by_bytes(tmp_path_factory):
    """A server and its tokenizer of pairs of bytes; as a model that chats has, one id for the end of a text and another
    for the end of a turn."""
    definition, _, *ends = byte_level()
    tokenizer = HuggingFaceTokenizer(definition, 300, ends)
    with serving(write_run(tmp_path_factory.mktemp("bytes") / "chat", tokenizer), "--capacity", "32") as server:
        yield server, tokenizer


def test_no_character_is_cut_in_halves(by_bytes):
    server, tokenizer = by_bytes
    for seed in range(6):
        asked = {"max_tokens": 24, "seed": seed, "temperature": 1.5}
        whole = server.complete("☃é", **asked).choices[0].text
        pieces = [chunk.choices[0].text for chunk in server.complete("☃é", stream=True, **asked)]
        assert "".join(pieces) == whole
    # The first byte of a character may be in the prompt, and the second in the answer.
    first = tokenizer.encode_part("é").tolist()[0]
    half = server.complete([first], max_tokens=1, echo=True, logprobs=10, seed=1).choices[0]
    assert half.logprobs.tokens[0] == "bytes:\\xc3"
    expected = b"\xc3" + tokenizer.token_bytes(half.logprobs.token_ids[1])
    assert half.text == expected.decode("utf-8", "replace")


def test_each_end_of_a_text_ends_an_answer(by_bytes):
    server, tokenizer = by_bytes
    asked = {"max_tokens": 28, "n": 32, "seed": 0, "logprobs": 0, "temperature": 2}
    choices = server.complete("To be", **asked).choices
    ended = [choice for choice in choices if choice.finish_reason == "stop"]
    ends = set(tokenizer.end_ids)
    assert {choice.logprobs.token_ids[-1] for choice in ended} == ends
    assert not any(set(choice.logprobs.token_ids[:-1]) & ends for choice in choices)
    assert not any("<|" in choice.text for choice in ended)
