"""Exact reduction gives one set of parameters on every layout: docs/evidence/equivalence.md has more of them."""

from tests.scripts.runs import Training, mesh, single


def test_one_device_and_four_end_with_the_same_bits(tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 100)
    flags = [
        "--dataset",
        "text.txt",
        "--config",
        "tiny",
        "--steps",
        "5",
        "--batch-size",
        "16",
        "--seq-len",
        "32",
    ]
    flags += ["--reduction", "exact", "--print-param-hash"]
    ends = [
        Training(tmp_path, str(number), layout, flags).finish()
        for number, layout in enumerate([single(), mesh("data=2,fsdp=2")])
    ]
    assert ends[0] == ends[1]
    assert ends[0].startswith("params sha256 ")
