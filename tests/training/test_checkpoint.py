"""Checkpoints on a real disk: what was saved comes back to the bit, and what was damaged never does."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import textwrap
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from parallax.training.checkpoint import Checkpointer

ROOT = pathlib.Path(__file__).parents[2]
DOCUMENTS = {"config": {"embed_dim": 8}, "progress": {"next_batch": 7}}


@chex.dataclass
class State:
    """The shape of a training state: params, an optax state with NamedTuples and counters, scalars."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    bad_steps: jax.Array


def make_state(seed: int) -> State:
    key = jax.random.key(seed)
    params = {
        "embed": jax.random.normal(key, (16, 8)),
        "layers": {
            "w": jax.random.normal(key, (4, 8, 8)).astype(jnp.bfloat16),
            "scale": jnp.full(8, float(seed)),
        },
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    _, opt_state = optimizer.update(params, optimizer.init(params), params)
    return State(step=jnp.int32(seed), params=params, opt_state=opt_state, bad_steps=jnp.int32(0))


def abstract(tree, sharding_of=lambda leaf: None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(x)), tree)


ABSTRACT = abstract(make_state(0))


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def saved(directory, steps, keep=10, losses=None) -> list[str]:
    """Saves make_state(step) for each step, and returns what was notified."""
    lines: list[str] = []
    checkpointer = Checkpointer(directory, keep=keep, notify=lines.append)
    for step in steps:
        checkpointer.save(step, make_state(step), DOCUMENTS, eval_loss=(losses or {}).get(step))
    checkpointer.close()
    return lines


def reader(directory, **options):
    lines: list[str] = []
    return Checkpointer(directory, keep=10, notify=lines.append, **options), lines


def listing(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_restores_the_bits_the_structure_and_the_documents(tmp_path):
    saved(tmp_path / "run" / "checkpoints", [3, 12])
    restored = reader(tmp_path / "run" / "checkpoints")[0].restore(ABSTRACT)
    assert restored.step == 12
    assert restored.documents == DOCUMENTS
    assert_same_bits(restored.state, make_state(12))
    assert_same_bits(
        reader(tmp_path / "run" / "checkpoints")[0].restore(ABSTRACT, step=3).state, make_state(3)
    )


def test_nothing_saved_restores_nothing(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        checkpointer, lines = reader(folder)
        assert checkpointer.restore(ABSTRACT) is None
        assert (checkpointer.steps(), checkpointer.latest_step(), checkpointer.best_step()) == (
            [],
            None,
            None,
        )
        assert lines == []
        with pytest.raises(ValueError, match="has no checkpoint"):
            checkpointer.restore_params(ABSTRACT.params)
    assert not (tmp_path / "absent").exists()


def placements():
    flat = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    square = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def on(mesh, matrix):
        return lambda x: NamedSharding(mesh, matrix if x.ndim > 1 else PartitionSpec())

    return {
        "single": lambda x: jax.sharding.SingleDeviceSharding(jax.devices()[3]),
        "replicated": on(flat, PartitionSpec()),
        "fsdp": on(flat, PartitionSpec(None, "data")),
        "two axes": on(square, PartitionSpec("data", "tensor")),
    }


@pytest.mark.parametrize("source", ["single", "replicated", "fsdp", "two axes"])
def test_restores_onto_any_sharding(tmp_path, source):
    state, ways = make_state(1), placements()
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(1, jax.tree.map(lambda x: jax.device_put(x, ways[source](x)), state), DOCUMENTS)
    for target in ways.values():
        wanted = abstract(state, target)
        restored = checkpointer.restore(wanted).state
        assert_same_bits(restored, state)
        for leaf, want in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
            assert leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim)
    checkpointer.close()


def test_a_save_holds_the_values_of_its_moment_though_buffers_are_donated(tmp_path):
    # Large enough (2 x 16 MB a save) that the background write is still running when the buffers are reused.
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    advance = jax.jit(lambda x: x * 3 + 1, donate_argnums=0)
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    state = {
        "one": jnp.arange(2.0**22),
        "sharded": jax.device_put(np.arange(2**22, dtype=np.float32), sharding),
    }
    documents = {"progress": {"next_batch": 0}}
    checkpointer, _ = reader(tmp_path)
    expected = {}
    for step in range(3):
        expected[step] = jax.tree.map(np.array, state)
        documents["progress"]["next_batch"] = step
        checkpointer.save(step, state, documents)
        documents["progress"]["next_batch"] = -1
        for _ in range(3):
            state = jax.tree.map(advance, state)
    checkpointer.wait()
    for step, values in expected.items():
        restored = checkpointer.restore(abstract(values), step=step)
        assert_same_bits(restored.state, values)
        assert restored.documents["progress"]["next_batch"] == step
    checkpointer.close()


def damage(file: pathlib.Path, how: str):
    content = bytearray(file.read_bytes())
    if how == "delete":
        file.unlink()
    elif how == "truncate":
        file.write_bytes(content[: len(content) // 2])
    elif how == "extend":
        file.write_bytes(content + b"x")
    else:
        position = random.Random(how + file.name).randrange(len(content))
        content[position] ^= 1 << random.Random(how).randrange(8)
        file.write_bytes(content)


def test_any_damaged_file_is_named_and_the_one_before_is_used(tmp_path):
    saved(tmp_path, [10, 20])
    names = list(listing(tmp_path / "20"))
    assert any("/d/" in name for name in names)
    (tmp_path / "20").rename(tmp_path / "intact")
    for count, name in enumerate(names):
        for how in ("flip a byte", "flip another", "truncate", "extend", "delete"):
            pathlib.Path(tmp_path / "20").mkdir()
            for file, content in listing(tmp_path / "intact").items():
                (tmp_path / "20" / file).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / "20" / file).write_bytes(content)
            damage(tmp_path / "20" / name, how)
            checkpointer, lines = reader(tmp_path)
            # The arrays are restored for a few of these combinations only: verification is what differs.
            if count % 5 == 0 and how == "flip a byte":
                restored = checkpointer.restore(ABSTRACT)
                assert restored.step == 10
                assert_same_bits(restored.state, make_state(10))
            else:
                assert checkpointer._choose(None, checkpointer._folder.newest_first, set_aside=True) == 10
            assert len(lines) == 1
            assert lines[0].startswith(f"checkpoint 20 is damaged: {name} ")
            assert "it is now 20.damaged" in lines[0]
            assert not (tmp_path / "20").exists()
    assert len(list(tmp_path.glob("20.damaged*"))) == 5 * len(names)


def test_a_file_that_was_not_saved_is_damage(tmp_path):
    saved(tmp_path, [10, 20])
    (tmp_path / "20" / "state" / "extra").write_text("")
    checkpointer, lines = reader(tmp_path)
    assert checkpointer.restore(ABSTRACT).step == 10
    assert "state/extra was not saved with it" in lines[0]


def test_damage_everywhere_is_an_error_and_is_set_aside_once(tmp_path):
    saved(tmp_path, [10, 20])
    for step in (10, 20):
        damage(next((tmp_path / str(step)).rglob("_METADATA")), "truncate")
    checkpointer, lines = reader(tmp_path)
    with pytest.raises(ValueError, match=r"no checkpoint in .* is intact; start anew") as error:
        checkpointer.restore(ABSTRACT)
    assert "\n" not in str(error.value)
    assert [line.split(":")[0] for line in lines] == ["checkpoint 20 is damaged", "checkpoint 10 is damaged"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["10.damaged", "20.damaged"]
    assert checkpointer.restore(ABSTRACT) is None


def test_a_damaged_step_that_was_asked_for_is_an_error_and_stays(tmp_path):
    saved(tmp_path, [10, 20])
    damage(next((tmp_path / "20").rglob("_METADATA")), "truncate")
    before = listing(tmp_path)
    for restore in (
        lambda c: c.restore(ABSTRACT, step=20),
        lambda c: c.restore_params(ABSTRACT.params, step=20),
    ):
        with pytest.raises(ValueError, match="checkpoint 20 is damaged: state/_METADATA has"):
            restore(reader(tmp_path)[0])
    with pytest.raises(ValueError, match=r"checkpoint 15 is asked for, .* has steps 10, 20"):
        reader(tmp_path)[0].restore(ABSTRACT, step=15)
    assert listing(tmp_path) == before


def test_saving_goes_on_after_a_fall_back(tmp_path):
    saved(tmp_path, [10, 20])
    damage(tmp_path / "20" / "manifest.json", "delete")
    checkpointer, lines = reader(tmp_path)
    assert checkpointer.restore(ABSTRACT).step == 10
    assert "manifest.json is missing, so its save was cut off" in lines[0]
    assert checkpointer.save(20, make_state(20), DOCUMENTS)
    assert_same_bits(checkpointer.restore(ABSTRACT).state, make_state(20))
    assert not checkpointer.save(20, make_state(99), DOCUMENTS)
    assert_same_bits(checkpointer.restore(ABSTRACT).state, make_state(20))
    checkpointer.close()


def test_a_save_over_an_unfinished_step_sets_that_aside(tmp_path):
    saved(tmp_path, [10, 20])
    damage(tmp_path / "20" / "manifest.json", "delete")
    assert "it is now 20.damaged" in saved(tmp_path, [20])[0]
    assert reader(tmp_path)[0].steps() == [10, 20]


@pytest.mark.parametrize(
    ("keep", "losses", "expected"),
    [
        (1, {}, [6]),
        (3, {}, [4, 5, 6]),
        (1, {1: 2.0, 3: 1.0, 5: 1.5}, [3, 6]),
        (2, {1: 2.0, 2: 1.0, 6: 0.5}, [5, 6]),
        (2, {2: 1.0, 3: 1.0, 4: float("nan"), 5: float("-inf")}, [3, 5, 6]),
    ],
)
def test_keeps_the_newest_and_the_best(tmp_path, keep, losses, expected):
    saved(tmp_path, range(1, 7), keep=keep, losses=losses)
    checkpointer, _ = reader(tmp_path)
    assert checkpointer.steps() == expected
    assert sorted(int(entry.name) for entry in tmp_path.iterdir()) == expected
    finite = {step: loss for step, loss in losses.items() if step in expected and np.isfinite(loss)}
    best = min(finite, key=finite.get) if finite else 6
    assert checkpointer.best_step() == best
    step, params, documents = checkpointer.restore_params(ABSTRACT.params)
    assert (step, documents) == (best, DOCUMENTS)
    assert_same_bits(params, make_state(best).params)


def test_reading_changes_nothing(tmp_path):
    saved(tmp_path, [10, 20], losses={10: 1.0, 20: 2.0})
    (tmp_path / "30.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "30.orbax-checkpoint-tmp" / "part").write_text("half")
    damage(next((tmp_path / "10").rglob("_METADATA")), "flip a byte")
    before = listing(tmp_path)
    checkpointer, lines = reader(tmp_path)
    assert checkpointer.restore_params(ABSTRACT.params)[0] == 20
    assert checkpointer.read_documents(10) == checkpointer.read_documents() == DOCUMENTS
    assert checkpointer.best_step() == 10
    assert "checkpoint 10 is damaged: state/_METADATA" in lines[0]
    assert reader(tmp_path, is_writer=False)[0].restore(ABSTRACT, step=20).step == 20
    checkpointer.close()
    assert listing(tmp_path) == before


def test_the_writer_removes_what_a_killed_save_left(tmp_path):
    saved(tmp_path, [10])
    for act in (lambda: reader(tmp_path)[0].restore(ABSTRACT), lambda: saved(tmp_path, [11])):
        (tmp_path / "30.orbax-checkpoint-tmp").mkdir()
        (tmp_path / "30.orbax-checkpoint-tmp" / "part").write_text("half")
        act()
        assert not (tmp_path / "30.orbax-checkpoint-tmp").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: {**p, "embed": jnp.zeros((8, 8))},
            r"params/embed is float32\[16, 8\] .* float32\[8, 8\] here",
        ),
        (
            lambda p: {**p, "embed": p["embed"].astype(jnp.bfloat16)},
            r"params/embed .* bfloat16\[16, 8\] here",
        ),
        (lambda p: {"embed": p["embed"]}, r"params/layers/scale is float32\[8\] .* absent here"),
        (
            lambda p: {**p, "more": jnp.zeros(3)},
            r"params/more is absent in checkpoint 10 but float32\[3\] here",
        ),
    ],
)
def test_another_shape_of_model_is_refused(tmp_path, change, message):
    saved(tmp_path, [10])
    params = abstract(change(make_state(0).params))
    with pytest.raises(ValueError, match=message):
        reader(tmp_path)[0].restore_params(params)
    with pytest.raises(ValueError, match=message):
        reader(tmp_path)[0].restore(ABSTRACT.replace(params=params))


def test_user_errors_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="keep=0 must be at least 1"):
        Checkpointer(tmp_path, keep=0)
    with pytest.raises(ValueError, match="is a file; name a folder"):
        reader(tmp_path / "file")[0].restore(ABSTRACT)
    with pytest.raises(ValueError, match=r"cannot be made: Not a directory; choose another folder") as error:
        reader(tmp_path / "file" / "below")[0].save(1, make_state(1), DOCUMENTS)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="not JSON compliant"):
        reader(tmp_path)[0].save(1, make_state(1), {"progress": {"loss": float("nan")}})


def run_python(script: str, *arguments, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


SAVE_FOR_EVER = """
    import os, sys, warnings
    import jax, jax.numpy as jnp, numpy as np
    import orbax.checkpoint  # once, before the forks: each child starts at once
    from parallax.training.checkpoint import Checkpointer

    def save_for_ever():
        checkpointer = Checkpointer(sys.argv[1], keep=1)
        shapes = jax.eval_shape(lambda: {"w": jnp.zeros(1 << 18, jnp.float32), "step": jnp.int32(0)})
        restored = checkpointer.restore(shapes)
        step = restored.step if restored else 0
        while True:
            step += 1
            state = {"w": jnp.full(1 << 18, step, jnp.float32), "step": jnp.int32(step)}
            checkpointer.save(step, state, {"progress": {"next_batch": step}})
            checkpointer.wait()
            os.write(1, f"trusted {step}\\n".encode())

    warnings.simplefilter("ignore")  # JAX warns of any fork; no backend exists yet here
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            save_for_ever()
        os.write(1, f"started {pid}\\n".encode())
        os.waitpid(pid, 0)
        os.write(1, b"killed 0\\n")
"""


def test_a_kill_at_any_moment_leaves_the_newest_trusted_step(tmp_path):
    shapes = {"w": jax.ShapeDtypeStruct((1 << 18,), jnp.float32), "step": jax.ShapeDtypeStruct((), jnp.int32)}
    moments = random.Random(0)
    reached = 0
    with run_python(SAVE_FOR_EVER, tmp_path, stdin=subprocess.PIPE) as server:
        for _ in range(5):
            server.stdin.write("go\n")
            server.stdin.flush()
            told = {}
            while "killed" not in told:
                word, number = server.stdout.readline().split()
                told[word] = int(number)
                if told.keys() == {"started", "trusted"}:
                    time.sleep(moments.uniform(0.0, 0.1))
                    os.kill(told["started"], signal.SIGKILL)
                    told["struck"] = 1
            notes: list[str] = []
            restored = Checkpointer(tmp_path, keep=1, is_writer=False, notify=notes.append).restore(shapes)
            assert restored.step >= told["trusted"] > reached
            np.testing.assert_array_equal(restored.state["w"], np.full(1 << 18, restored.step, np.float32))
            assert restored.documents["progress"]["next_batch"] == restored.state["step"] == restored.step
            assert all("manifest.json is missing" in note for note in notes)
            reached = restored.step
        server.stdin.close()


def test_a_deletion_cut_short_is_not_trusted_and_is_completed_by_the_next_save(tmp_path, monkeypatch):
    saved(tmp_path, [10])
    files = [file for file in (tmp_path / "10").rglob("*") if file.is_file()]
    checkpointer, _ = reader(tmp_path)
    checkpointer._keep = 1
    folder_type = type(checkpointer._folder.root)
    for step, cut in enumerate((0, 1, len(files) // 2), start=11):
        newest = checkpointer.latest_step()

        def dies(path, cut=cut):
            for file in sorted(file for file in pathlib.Path(path).rglob("*") if file.is_file())[:cut]:
                file.unlink()
            raise OSError("killed here")

        with monkeypatch.context() as patch:
            patch.setattr(folder_type, "rmtree", dies)
            checkpointer.save(step, make_state(step), DOCUMENTS)
            with pytest.raises(OSError, match=f"checkpoint {step} could not be saved in .*: killed here"):
                checkpointer.wait()
        assert (tmp_path / str(newest)).exists()
        assert reader(tmp_path)[0].steps() == [step]
        assert_same_bits(reader(tmp_path)[0].restore(ABSTRACT).state, make_state(step))
    checkpointer.save(20, make_state(20), DOCUMENTS)
    checkpointer.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["20"]


def test_nothing_is_deleted_before_the_new_step_is_trusted(tmp_path, monkeypatch):
    saved(tmp_path, [10])
    before = listing(tmp_path / "10")

    def dies(folder, facts):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("parallax.training.checkpoint_folder.write_manifest", dies)
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(20, make_state(20), DOCUMENTS)
    with pytest.raises(OSError, match=r"checkpoint 20 could not be saved in .* No space left on device"):
        checkpointer.save(30, make_state(30), DOCUMENTS)
    checkpointer.close()
    assert listing(tmp_path / "10") == before
    assert checkpointer.steps() == [10]


FULL_DISK = """
    import resource, signal, sys
    import jax.numpy as jnp
    from parallax.training.checkpoint import Checkpointer

    checkpointer = Checkpointer(sys.argv[1], keep=1)
    checkpointer.save(1, {"w": jnp.ones(1000)}, {})
    checkpointer.wait()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        checkpointer.save(2, {"w": jnp.arange(1e6)}, {})
        checkpointer.close()
    except OSError as error:
        print(error)
    print(checkpointer.steps())
"""


def test_a_write_that_fails_is_an_exception_and_the_last_step_stays(tmp_path):
    out, err = run_python(FULL_DISK, tmp_path).communicate()
    message, steps = out.splitlines()
    assert message.startswith(f"checkpoint 2 could not be saved in {tmp_path}: "), err
    assert steps == "[1]"


QUIET = """
    import sys, warnings
    warnings.simplefilter("error")
    import jax, jax.numpy as jnp
    assert "orbax.checkpoint" not in sys.modules
    from parallax.training.checkpoint import Checkpointer
    assert "orbax.checkpoint" not in sys.modules
    state = {"params": {"w": jnp.ones((8, 8))}, "step": jnp.int32(1)}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    checkpointer = Checkpointer(sys.argv[1], keep=1)
    for step in (1, 2):
        checkpointer.save(step, state, {"config": {}}, eval_loss=1.0)
    checkpointer.restore(shapes)
    checkpointer.restore_params(shapes["params"])
    checkpointer.close()
"""


def test_normal_operation_is_silent_and_orbax_is_imported_late(tmp_path):
    process = run_python(QUIET, tmp_path)
    assert process.communicate() == ("", "")
    assert process.returncode == 0
    json.loads((tmp_path / "2" / "manifest.json").read_text())
