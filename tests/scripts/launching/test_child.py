"""What processes print comes whole, on its own stream, in lines that never mix, whoever still holds a pipe."""

import random

import pytest

from tests.scripts.launching.supervision import supervisions, wait_until

start = pytest.fixture(supervisions)
# Writes both of its streams in pieces that end anywhere.
WRITER = """
import random
rng = random.Random(INDEX)
streams = {screen: Path(f"expected-{INDEX}-{screen}").read_bytes() for screen in (1, 2)}
while any(streams.values()):
    screen = rng.choice([screen for screen in streams if streams[screen]])
    size = rng.choice([1, 3, 40, 5000])
    os.write(screen, streams[screen][:size])
    streams[screen] = streams[screen][size:]
"""


def text(rng, mark):
    """Lines that begin with `mark`, one of them longer than a pipe holds; the last does not end."""
    lengths = [rng.randrange(60) for _ in range(300)] + [200_000, 0, 0, 5]
    rng.shuffle(lengths)
    alphabet = bytes(set(range(256)) - {10})
    return b"\n".join(mark + bytes(rng.choices(alphabet, k=length)) for length in lengths)


def lines(content):
    return content.removesuffix(b"\n").split(b"\n")


def test_every_byte_arrives_on_its_stream_and_no_lines_mix(start, tmp_path):
    rng, expected = random.Random(0), {}
    for index in range(3):
        for screen, mark in ((1, b"out"), (2, b"err")):
            expected[index, screen] = content = text(rng, mark)
            (tmp_path / f"expected-{index}-{screen}").write_bytes(content)
    group = start(WRITER, WRITER, WRITER)
    out, err = group.driver.communicate(timeout=60)
    assert group.driver.returncode == 0
    for screen, shown in ((1, out), (2, err)):
        assert shown.endswith(b"\n")
        for index in range(3):
            prefix = b"[%d] " % index
            own = [line.removeprefix(prefix) for line in lines(shown) if line.startswith(prefix)]
            assert own == lines(expected[index, screen])
        assert len(lines(shown)) == sum(len(lines(expected[index, screen])) for index in range(3))
    for index in range(3):
        kept = group.log(index)
        assert len(kept) == len(expected[index, 1]) + len(expected[index, 2])
        # Neither stream's last line has an end; standard error's comes last.
        *whole, last = kept.split(b"\n")
        last_out = lines(expected[index, 1])[-1]
        assert last == last_out + lines(expected[index, 2])[-1]
        for screen, mark in ((1, b"out"), (2, b"err")):
            assert [line for line in whole if line.startswith(mark)] == lines(expected[index, screen])[:-1]


@pytest.mark.parametrize("end", ["os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_the_last_words_of_the_dead_are_kept(end, start):
    group = start(f"os.write(1, b'x' * 60000); os.write(2, b'last'); {end}")
    _, err = group.end()
    assert group.out == b"[0] " + b"x" * 60000 + b"\n"
    assert err[0] == "[0] last"
    assert group.log(0) == b"x" * 60000 + b"last"


def test_what_the_others_wrote_before_they_were_killed_is_kept(start):
    group = start("os.write(1, b'half a li'); hang()", "wait('up-0'); sys.exit(1)")
    assert group.end()[0] == 1
    assert group.out == b"[0] half a li\n"
    assert group.log(0) == b"half a li"


def test_a_process_may_close_its_streams_and_go_on(start):
    group = start("os.close(1); os.close(2); time.sleep(0.1); os._exit(4)")
    assert group.end()[0] == 4


@pytest.mark.parametrize("end", ["sys.exit(0)", "sys.exit(1)"])
@pytest.mark.parametrize("new_session", [False, True])
def test_a_grandchild_that_holds_the_pipes_holds_nothing_up(end, new_session, start):
    program = f"leave_grandchild({new_session}); print('done', flush=True); {end}"
    group = start(program, "pass")
    assert group.end()[0] == (1 if "1" in end else 0)
    assert group.out == b"[0] done\n"
    wait_until(lambda: len(group.alive()) == new_session)  # in a session of its own it is out of reach


def test_what_one_leaves_behind_is_cleared_away_while_others_go_on(start):
    group = start("leave_grandchild(False); print('done', end='')", "wait('go')")
    group.until("logs/attempt-1/process-0.log")
    wait_until(lambda: group.log(0) == b"done" and not group.alive())
    group.mark("go")
    assert group.end() == (0, [])


def test_a_grandchild_that_writes_without_end_holds_nothing_up(start):
    flood = "subprocess.Popen(['yes'], start_new_session=True).pid"
    group = start(f"mark(f'pid-{{{flood}}}'); sys.exit(1)")
    assert group.end()[0] == 1


def test_a_log_that_cannot_be_written_is_given_up_and_the_run_goes_on(start):
    group = start("for i in range(2000): print('line', i)", log_bytes=4096)
    status, err = group.end()
    assert status == 0
    assert err == ["logs/attempt-1/process-0.log is not written any more: File too large"]
    assert group.out.decode().splitlines() == [f"[0] line {i}" for i in range(2000)]
    assert len(group.log(0)) == 4096


def test_a_closed_screen_ends_all(start):
    group = start("print('line', flush=True); hang()", "wait('up-0'); wait('go'); print('more', flush=True); hang()")
    group.until("up-0")
    group.driver.stdout.close()
    group.mark("go")
    assert group.driver.stderr.read().splitlines()[-1].startswith(b"BrokenPipeError")
    wait_until(lambda: not group.alive())
