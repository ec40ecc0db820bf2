"""Chat requests by their schema."""

import subprocess
import sys

from tests.parallax.serving.server import eventually, serving

# What no schema can state: the template takes the conversation, and its prompt leaves room for an answer.
CONFIG = """
[checks.positive_data_acceptance]
expected-statuses = ["200", "400"]
"""


def test_the_schema_says_what_is_taken(small_run, tmp_path):
    """Schemathesis makes requests that the schema allows, and others, which must be refused."""
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}!")
    lengths = ("--max-prompt-tokens", "64", "--max-tokens", "8", "--max-answers", "1", "--capacity", "96")
    with serving(small_run, *lengths, "--chat-template", str(tmp_path / "mine.jinja")) as served:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{served.address}/openapi.json"]
        command += ["--include-path", "/v1/chat/completions", "--checks", "all"]
        command += ["--phases", "examples,coverage,fuzzing"]
        command += ["--max-examples", "10", "--generation-deterministic", "--no-color"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert eventually(served.is_idle)
