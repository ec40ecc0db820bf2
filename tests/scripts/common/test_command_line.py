"""Input for which Python raises no ValueError: one line, as for other input."""

import pytest

from scripts import convert, evaluate, plan, prepare, train

DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("script", "args", "file"),
    [
        (train, "--dataset text.txt --strategy mesh --rules deep/rules.json", "rules.json"),
        (train, "--resume --output-dir deep", "config.json"),
        (evaluate, "--dataset text.txt --checkpoint deep", "config.json"),
        (convert, "import deep run", "config.json"),
        (convert, "export deep hf", "config.json"),
        (prepare, "text.txt --output store --tokenizer deep", "tokenizer.json"),
        (plan, "--hf deep", "config.json"),
        (plan, "--maxtext deep/model.yml", "model.yml"),
    ],
)
def test_a_file_that_is_nested_too_deeply_is_refused_by_its_name(refuses, tmp_path, script, args, file):
    (tmp_path / "text.txt").write_text("to be, or not to be. " * 500)
    (tmp_path / "deep").mkdir()
    for name in ("config.json", "rules.json", "tokenizer.json", "model.yml"):
        (tmp_path / "deep" / name).write_text(DEEP)
    refuses(script, args.split(), f"deep/{file}")


@pytest.mark.parametrize(
    ("script", "args"),
    [
        (train, "--dataset text.txt --strategy mesh --rules LONG"),
        (train, "--dataset LONG"),
        (train, "--dataset text.txt --output-dir LONG"),
        (evaluate, "--dataset text.txt --checkpoint LONG"),
        (convert, "import LONG run"),
        (plan, "--hf LONG"),
        (prepare, "LONG --output store --tokenizer byte"),
    ],
)
def test_a_name_that_no_file_can_have_is_refused(refuses, tmp_path, script, args):
    (tmp_path / "text.txt").write_text("to be, or not to be. " * 500)
    refuses(script, args.replace("LONG", "long" * 2000).split(), "longlong")
