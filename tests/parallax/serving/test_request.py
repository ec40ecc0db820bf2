"""Requests that cannot be served: each gets a status 4xx, OpenAI's error shape and a message that names the rule."""

import json
import socket
import subprocess
import sys

import pytest

from parallax.serving.access import Limits
from parallax.serving.errors import Refusal
from parallax.serving.request import CompletionForm
from parallax.tokenizers.hugging_face import HuggingFaceTokenizer
from parallax.tokenizers.plain import ByteTokenizer
from tests.parallax.interop.tokenizers import byte_level
from tests.parallax.serving.server import eventually

NAN, INFINITY = float("nan"), float("inf")
FIELDS = [
    *(("model", value) for value in (None, 7, [], {})),
    *(("prompt", value) for value in (None, "", [], [""], ["a", ""], [[]], [[1], []], 5, 1.5, True, {"a": 1})),
    *(("prompt", value) for value in ("z9", "ж", ["a", "9"], "\ud800", "a" * 97, ["a"] * 33)),
    *(("prompt", value) for value in ([-1], [59], [1.5], ["a", 1], [[1], "a"], [[[1]]], [2**70], [None], [True])),
    *(("max_tokens", value) for value in (-1, 97, 1.5, "5", True, [1], 2**70, 96)),
    *(("temperature", value) for value in (-0.1, 1e7, "1", True, [1], NAN, INFINITY, -INFINITY)),
    *(("top_p", value) for value in (0, 1.1, -1, "1")),
    *(("top_k", value) for value in (-1, 2**31, 1.5)),
    *(("min_p", value) for value in (-0.1, 1, "0")),
    *(("repetition_penalty", value) for value in (0, -1, 1e7)),
    *(("n", value) for value in (0, -1, 33, 1.5, "2", True)),
    *(("stream", value) for value in (1, "true", [])),
    *(("stream_options", value) for value in (1, [], {"include_usage": 1}, {"other": True})),
    *(("logprobs", value) for value in (-1, 11, True, 1.5)),
    *(("echo", value) for value in (1, "yes")),
    *(("stop", value) for value in ("", [""], ["a"] * 5, 1, [1], {"a": 1}, "a" * 257)),
    *(("seed", value) for value in (-1, 2**32, 1.5, "1", True)),
    *(("user", value) for value in (1, [])),
    *(("best_of", value) for value in (2, 0, True)),
    *(("suffix", value) for value in ("a", 1)),
    *(("presence_penalty", value) for value in (0.1, False)),
    *(("frequency_penalty", value) for value in (-1, "0")),
    *((name, json.loads("[" * 300 + "]" * 300)) for name in ("prompt", "stop", "user", "seed")),
    *(("logit_bias", value) for value in ({"1": 1}, [])),
    *(("messages", value) for value in ([], None)),
]
BODIES = [
    b"", b"{", b"[]", b"null", b"1", b'"a"', b"\xff\xfe", b'{"model": "\xff"}', b"[" * 100_000, b'{"a": 1e999}',
    b'{"a": ' + b"9" * 5000 + b"}", b"{} {}", b"{'a': 1}", b'{"model": "small-run"}', b'{"prompt": "a"}',
    b'{"\\ud800": 1}',
]  # fmt: skip
NEUTRAL = {
    "best_of": 1, "suffix": "", "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "me",
    "stop": [], "max_tokens": 2.0, "logprobs": None, "stream_options": {}, "seed": None, "temperature": None,
}  # fmt: skip

# What no schema can state: the template takes the conversation, and its prompt leaves room for an answer. Bodies of too
# many messages are too large.
CHATS = """
[[operations]]
include-path = "/v1/chat/completions"
generation.max-examples = 10
checks.positive_data_acceptance.expected-statuses = ["200", "400"]
checks.negative_data_rejection.expected-statuses = ["4xx"]
"""


def assert_refused(response, status):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert "; " in error["message"]  # rule and value, then a remedy
    return error


@pytest.mark.parametrize(("name", "value"), FIELDS, ids=lambda value: str(value)[:20])
def test_a_bad_field(server, name, value):
    body = {"model": server.model, "prompt": "a", name: value}
    error = assert_refused(server.http.post("/v1/completions", **json_of(body)), 400)
    finite = value not in (INFINITY, -INFINITY) and value == value
    assert error["param"] == (name if finite and (name, value) != ("max_tokens", 96) else error["param"])


def json_of(body):
    """As a client might send it that knows no rules: with NaN, and with half of a surrogate pair."""
    return {"content": json.dumps(body), "headers": {"Content-Type": "application/json"}}


def test_an_empty_prompt_is_taken_where_the_model_begins_a_text():
    definition, begin, end, _ = byte_level()
    body = json.dumps({"model": "m", "prompt": ""}).encode()
    ask = CompletionForm(["m"], HuggingFaceTokenizer(definition, 300, [end]), Limits()).read(body)
    assert [ids.tolist() for ids in ask.prompts] == [[begin]]
    with pytest.raises(Refusal, match="prompt"):
        CompletionForm(["m"], ByteTokenizer(), Limits()).read(body)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:16]))
def test_a_bad_body(server, body):
    response = server.http.post(
        "/v1/completions", content=body, headers={"Content-Type": "application/json; charset=utf-8"}
    )
    assert_refused(response, 400)


def test_what_asks_for_nothing_is_taken(server):
    assert server.post(prompt="a", **NEUTRAL).json()["usage"]["completion_tokens"] <= 2


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonp"])
def test_another_type(server, kind):
    body = json.dumps({"model": server.model, "prompt": "a"})
    response = server.http.post("/v1/completions", content=body, headers={"Content-Type": kind})
    assert_refused(response, 415)


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_too_large(strict, announced):
    body = b"[" + b" " * 90000 + b"]"
    content = body if announced else (body[start : start + 9000] for start in range(0, 90000, 9000))
    response = strict.http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert "50000" in assert_refused(response, 413)["message"]
    assert strict.post(prompt="a", max_tokens=1).status_code == 200


def test_a_body_too_slow(strict):
    """One that stops on its way: the connection is closed, and others are served meanwhile and afterwards."""
    host, port = strict.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as client:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: 100\r\n\r\n[1, 2".encode())
        assert strict.post(prompt="a", max_tokens=1).status_code == 200
        answer = b"".join(iter(lambda: client.recv(4096), b""))  # up to the end of the connection
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"body must arrive within 2 s, and 5 bytes did; send it faster" in answer
    assert strict.post(prompt="a", max_tokens=1).status_code == 200


def test_another_model(server):
    error = assert_refused(server.http.post("/v1/completions", json={"model": "gpt", "prompt": "a"}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")


@pytest.mark.parametrize("path", ["/v1", "/v1/completions/", "/v1/chat", "/../etc/passwd", "/page", "/%00"])
def test_another_address(server, path):
    assert_refused(server.http.get(path), 404)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", "/v1/completions", "POST"), ("POST", "/run", "GET, HEAD"), ("OPTIONS", "/v1/completions", "POST"),
     ("DELETE", "/", "GET, HEAD"), ("PUT", "/v1/models/small-run", "GET, HEAD")],
)  # fmt: skip
def test_another_method(server, method, path, allowed):
    response = server.http.request(method, path)
    assert_refused(response, 405)
    assert sorted(response.headers["allow"].split(", ")) == allowed.split(", ")


def test_the_schema_says_what_is_taken(strict, tmp_path):
    """Schemathesis makes requests that the schema allows, which must be served, and others, which must be refused."""
    (tmp_path / "schemathesis.toml").write_text(CHATS)
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{strict.address}/openapi.json"]
    command += ["--checks", "all", "--phases", "examples,coverage,fuzzing", "--max-examples", "20"]
    command += ["--generation-deterministic", "--no-color"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert eventually(strict.is_idle)
    assert strict.post(prompt="a", max_tokens=1).status_code == 200
