"""How the server starts, whom it lets in, and how it ends."""

import contextlib
import signal
import socket
import subprocess
import sys
import threading

import httpx
import openai
import pytest

from parallax.serving import process
from scripts import serve
from tests.parallax.serving.server import SERVE, Served, eventually, serving

KEY = "a-long-secret"
FAILING = ("-m", "tests.parallax.serving.failing")


@pytest.fixture
def refuse(monkeypatch, capsys):
    """The one line with which the server does not start."""

    def refuse(*flags):
        monkeypatch.setattr(sys, "argv", ["serve.py", *flags])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        with pytest.raises(SystemExit) as end:
            serve.main()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        out, err = capsys.readouterr()
        assert (end.value.code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    return refuse


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--host", "0.0.0.0"), "needs --api-key"),
        (("--host", "::"), "needs --api-key"),
        (("--host", ""), "must be an address of this machine"),
        (("--host", "no.such.host.invalid"), "must be an address of this machine"),
        (("--port", "70000"), "must be in [0, 65535]"),
        (("--api-key", "two words"), "without spaces"),
        (("--slots", "0"), "slots"),
        (("--max-body-bytes", "0"), "at least 1"),
        (("--max-answers", "9", "--queue", "8"), "must not exceed"),
        (("--step", "7"), "7"),
        (("--nothing", "7"), "--nothing"),
    ],
    ids=str,
)
def test_bad_flags(refuse, small_run, flags, words):
    assert words in refuse("--checkpoint", str(small_run), "--port", "0", *flags)


def test_no_run(refuse, tmp_path):
    assert "config.json" in refuse("--checkpoint", str(tmp_path), "--port", "0")


def test_the_dtype_of_parameters_arrives(refuse, small_run, monkeypatch):
    def load_run(checkpoint, step, *, param_dtype):
        raise ValueError(f"{param_dtype} of {checkpoint} at {step}")

    monkeypatch.setattr(process, "load_run", load_run)
    flags = ("--checkpoint", str(small_run), "--port", "0", "--param-dtype", "bfloat16")
    assert f"bfloat16 of {small_run} at None" in refuse(*flags)


def test_a_port_in_use(refuse, small_run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "in use" in refuse("--checkpoint", str(small_run), "--port", port)


def test_a_port_that_another_takes_meanwhile(small_run):
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        command = [sys.executable, str(SERVE), "--checkpoint", str(small_run)]
        command += ["--port", str(other.getsockname()[1]), "--slots", "4", "--capacity", "32"]  # as `locked` compiles
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr
            assert "model" in process.stderr.readline()  # it is bound, and compiles before it listens
            other.listen()
            out, err = process.communicate(timeout=60)
    assert (process.returncode, out, "Traceback" in err) == (2, "", False)
    assert "in use" in err.splitlines()[-1]


def test_a_signal_ends_it_soon_and_answers_end_too(small_run):
    """SIGTERM; `locked` ends by SIGINT."""
    server = Served(small_run)
    events = []

    def listen():
        fields = {"model": server.model, "prompt": "a", "max_tokens": 90, "n": 32, "stream": True}
        with httpx.stream("POST", f"{server.address}/v1/completions", json=fields, timeout=30) as response:
            events.extend(response.iter_lines())

    client = threading.Thread(target=listen)
    client.start()
    assert eventually(lambda: events)
    status, words = server.end(signal.SIGTERM)
    assert (status, words.count("Traceback")) == (0, 0), words
    client.join(10)
    assert events[-1] == ""
    assert events[-2] == "data: [DONE]" or "shutting_down" in events[-2]


def test_a_signal_ends_it_while_it_starts(small_run):
    command = [sys.executable, str(SERVE), "--checkpoint", str(small_run), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        assert "model" in process.stderr.readline()  # it is about to compile
        process.terminate()
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, "Traceback" in err) == (0, "", False)


def test_a_server_outlives_an_error_of_the_device_and_ends_with_a_device_that_stays_away(small_run, tmp_path):
    gate = tmp_path / "gate"
    server = Served(small_run, program=(*FAILING, str(gate)))
    assert server.http.get("/healthz").json()["status"] == "ok"
    with pytest.raises(openai.APIError, match="the step that computed this answer failed"):
        for _ in server.complete("a", max_tokens=90, n=4, temperature=0, stream=True):
            pass
    health = server.http.get("/healthz")
    assert (health.status_code, health.json()["status"]) == (503, "degraded")
    gate.write_text("open")
    assert len(server.complete("a", max_tokens=9, n=4).choices) == 4
    health = server.http.get("/healthz")
    assert (health.status_code, health.json()["status"]) == (200, "ok")
    assert eventually(server.is_idle)

    gate.write_text("shut")
    failed = server.post(prompt="a", max_tokens=90, n=4, temperature=0)  # none ends before the last begins
    assert (failed.status_code, failed.json()["error"]["code"]) == (500, "step_failed")
    server.process.wait(timeout=20)
    status, words = server.end()
    assert (status, words.count("JaxRuntimeError: RESOURCE_EXHAUSTED")) == (1, 2)
    assert "the device is gone" in words
    assert words.splitlines()[-1].startswith("error: the engine failed")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:80", "[::1]:9", "LOCALHOST:1", "localhost."])
def test_a_name_of_this_machine(server, host):
    assert server.http.get("/run", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "10.0.0.1"])
def test_a_name_pointed_here_by_others(server, host):
    for path in ("/", "/run", "/v1/models"):
        refused = server.http.get(path, headers={"Host": host})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "wrong_host")


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:1", ""])
def test_a_foreign_page(server, origin):
    body = {"model": server.model, "prompt": "a"}
    refused = server.http.post("/v1/completions", json=body, headers={"Origin": origin})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "wrong_origin")
    assert not [name for name in refused.headers if name.startswith("access-control")]


def test_the_page_itself(server):
    body = {"model": server.model, "prompt": "a", "max_tokens": 1}
    served = server.http.post("/v1/completions", json=body, headers={"Origin": server.address})
    assert served.status_code == 200


@pytest.fixture(scope="module")
def locked(small_run):
    """A server with a key, open to other machines."""
    with serving(small_run, "--capacity", "32", "--host", "0.0.0.0", key=KEY, number=signal.SIGINT) as served:
        yield served


def test_a_key(locked):
    assert locked.complete("a", max_tokens=1).choices
    for path in ("/", "/page.js", "/healthz"):
        assert locked.http.get(path).status_code == 200
    for path in ("/run", "/metrics", "/openapi.json", "/v1/models", "/nothing"):
        assert locked.http.get(path).status_code == 401
        served = locked.http.get(path, headers={"Authorization": f"Bearer {KEY}"})
        assert served.status_code == (404 if path == "/nothing" else 200)


@pytest.mark.parametrize(
    "given", ["", "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY, "Bearer é"]
)
def test_a_wrong_key(locked, given):
    refused = locked.http.post("/v1/completions", json={}, headers={b"Authorization": given.encode()})
    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
    assert refused.json()["error"]["code"] == "invalid_api_key"


def test_open_to_other_machines_with_a_key(locked):
    headers = {"Authorization": f"Bearer {KEY}", "Host": "any.example"}
    assert locked.http.get("/run", headers=headers).status_code == 200
    assert locked.http.get("/run", headers=headers | {"Origin": "http://x"}).status_code == 403


def test_bytes_that_are_no_request(server):
    host, port = server.address.removeprefix("http://").split(":")
    for raw in (b"\x00\xff\r\n\r\n", b"GET\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n", b"A" * 70000):
        connection = socket.create_connection((host, int(port)), timeout=10)
        with connection, contextlib.suppress(ConnectionError):
            connection.sendall(raw)
            assert connection.recv(100).startswith(b"HTTP/1.1 4")
    assert server.http.get("/healthz").status_code == 200


def test_a_client_that_goes_away_in_the_middle_of_its_body(server):
    def gone():
        return server.gauge("requests_total", 'status="499"')

    before = gone()
    host, port = server.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
    assert eventually(lambda: gone() > before)
    assert eventually(server.is_idle)  # and the server's end must show no traceback


@pytest.mark.parametrize(("context", "capacity"), [("crop", 128), ("extend", 256)])
def test_a_slot_holds_as_many_tokens_as_the_model_learned_from(small_run, monkeypatch, context, capacity):
    class Made(Exception):
        pass

    def engine(make_batcher, queue):
        raise Made(make_batcher().capacity)

    monkeypatch.setattr(process, "SIGNALS", ())
    monkeypatch.setattr(process, "Engine", engine)
    with pytest.raises(Made, match=f"^{capacity}$"):
        process.serve(str(small_run), socket.socket(), context=context)
