"""Saves a run's state in the background and restores it anywhere: Orbax behind a thin module.

Invariant: nothing is restored whose checksums do not hold, and arrays arrive as the caller's abstract tree
describes them, whatever devices and processes saved them. Each byte is hashed by who writes it, in memory, and compared
by who reads it, once. It knows trees of arrays and JSON, but no model.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from parallax.training.checkpoint_arrays import array_handler, read_arrays
from parallax.training.checkpoint_folder import CheckpointFolder, damaged, read_manifest
from parallax.training.checkpoint_hashes import DamageError
from parallax.training.checkpoint_together import Together

Documents = dict[str, dict[str, Any]]
PATIENCE_MS = 20 * 60_000
"""How long processes that save wait for each other; Orbax's own default too."""


def to_stderr(line: str) -> None:
    """What takes a line about a checkpoint where nobody else does."""
    print(line, file=sys.stderr)


class Restored(NamedTuple):
    """A checkpoint's contents: arrays as they were asked for, and the JSON documents by name."""

    step: int
    state: Any
    documents: Documents
    eval_loss: float | None
    """Its evaluation loss; None if it was not evaluated, or that was not finite."""


class Checkpointer:
    """The checkpoints of one run: in each, one pytree of global arrays and some JSON documents.

    Every process of a run makes one and calls the same methods in the same order. Only the writer writes
    manifests, renames and deletes, and only in `save`, `measured`, `restore` and `set_aside`: other methods leave the
    folder as it is.

    Orbax's AsyncCheckpointer is used without its CheckpointManager. That one tells JAX's preemption service a
    stale step from a background thread, after which a SIGTERM can go unseen, and it deletes old steps before
    the new one can be trusted.

    Args:
      directory: a local folder or a gs:// address; made by the first save.
      keep: how many of the newest trusted steps stay, beside the one with the lowest evaluation loss.
      is_writer: whether this process may change the folder; in a training run, true of process 0 alone.
      notify: takes one line about a checkpoint that cannot be trusted.
    """

    def __init__(
        self, directory: epath.PathLike, *, keep: int, is_writer: bool = True, notify: Callable[[str], None] = to_stderr
    ):
        if keep < 1:
            raise ValueError(f"keep={keep} must be at least 1; try 3")
        self._folder = CheckpointFolder(directory, notify)
        self._notify = notify
        self._keep = keep
        self._is_writer = is_writer
        self._saver: Any = None
        self._saves: list[Together] = []  # the last two
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future] | None = None

    def save(
        self,
        step: int,
        state: Any,
        documents: Documents,
        eval_loss: float | None = None,
        before: Callable[[], None] = lambda: None,
    ) -> bool:
        """Starts a save, and returns once the arrays are safe: the caller may donate them at once.

        Waits for the save before it. Returns False, with nothing done, if that step is trusted already. `before` is
        called in the writer first; if it raises, the save has failed in all processes.

        Raises:
          ValueError: the folder is a file, or the documents are not JSON.
          OSError: the folder cannot be made, this save could not start, or the one before failed in the background;
            of a failure in one process all hear, though some only at the next `wait`.
        """
        import orbax.checkpoint as ocp

        self.wait()
        with contextlib.suppress(Exception):  # of a save that has failed already
            self._settle()
        if _agree(lambda: step in self.steps()):
            return False
        snapshot = json.loads(json.dumps(documents, allow_nan=False))
        # Numbers of the host are written as arrays too.
        state = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jnp.asarray(x), state)
        together = self._begin()
        with self._saving(step):
            with together.shared():
                if self._is_writer:
                    before()
                    self._folder.make_room(step)
            together.wait("room", PATIENCE_MS)
        if self._saver is None:
            _silence()
            handlers = {"state": array_handler(), "documents": ocp.JsonCheckpointHandler()}
            waiting = ocp.AsyncOptions(barrier_sync_fn=lambda **point: self._saves[-1].wait(**point))
            self._saver = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**handlers), async_options=waiting)
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), documents=ocp.args.JsonSave(snapshot))
        with self._saving(step), together.shared():
            self._saver.save(self._folder.path(step), args=items)
        measured = None if eval_loss is None or not math.isfinite(eval_loss) else float(eval_loss)
        facts = {"eval_loss": measured, "arrays": _signature(state)}
        self._pending = step, self._background.submit(self._finish, step, facts, together)
        return True

    def measured(self, step: int, eval_loss: float) -> None:
        """Records the evaluation loss of a trusted step that was saved without one; the writer does.

        Raises OSError if it cannot be written, or the last save failed.
        """
        self.wait()
        together = self._begin()
        with self._saving(step):
            with together.shared():
                if self._is_writer and math.isfinite(eval_loss):
                    self._folder.measure(step, float(eval_loss))
            together.wait("measured", PATIENCE_MS)

    def wait(self) -> None:
        """Blocks until the last save is trusted and older steps are gone. Raises OSError if that failed."""
        if self._pending is not None:
            (step, future), self._pending = self._pending, None
            with self._saving(step):
                future.result()

    def close(self) -> None:
        """`wait`, then ends the background threads. Raises OSError if the last save failed."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            if self._saver is not None:
                self._saver.close()

    def set_aside(self, step: int, why: str) -> None:
        """Renames a trusted step to STEP.WHY, so that nothing goes on from it; the writer does, after `close`."""
        if self._is_writer:
            self._notify(f"checkpoint {step} is now {self._folder.set_aside(step, why)}")

    def steps(self) -> list[int]:
        """The steps that have a manifest, oldest first. Their other files are not read."""
        return sorted(self._folder.best_first())

    def best_first(self) -> list[int]:
        """`steps` by evaluation loss, lowest first, then those without one, newest first."""
        return self._folder.best_first()

    def latest_step(self) -> int | None:
        """The newest of `steps`, or None."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The one of `steps` with the lowest evaluation loss, the newest where none has one, or None."""
        return next(iter(self._folder.best_first()), None)

    def restore(self, abstract_state: Any, step: int | None = None) -> Restored | None:
        """The newest checkpoint whose checksums hold, or None where there is no checkpoint at all.

        A damaged one on the way is named, the writer renames it to `STEP.damaged`, and the one before it is
        tried. With `step`, it is that checkpoint or an error.

        Args:
          abstract_state: the tree to fill, of jax.ShapeDtypeStruct with shardings.
          step: which checkpoint; by default the newest.

        Raises:
          ValueError: no checkpoint is intact, `step` is not there, or its arrays are not those asked for.
        """
        self.wait()
        if self._is_writer:
            self._folder.remove_unfinished()
        return self._restore(step, self._folder.newest_first, abstract_state, set_aside=self._is_writer)

    def restore_params(
        self, abstract_params: Any, step: int | None = None, *, as_saved: bool = False
    ) -> tuple[int, Any]:
        """(step, params) of the best intact checkpoint, or of `step`; no other array is read.

        They are read straight into the dtypes of `abstract_params`, whatever they were saved in, or `as_saved`.

        Raises ValueError if no checkpoint is intact, `step` is not there, or its params have other names or shapes.
        """
        self.wait()
        folder, wanted = self._folder, {"params": abstract_params}
        found = self._restore(step, lambda: folder.best_first() or folder.newest_first(), wanted, "params", as_saved)
        if found is None:
            raise folder.missing(None)
        return found.step, found.state["params"]

    def identity(self, step: int) -> str:
        """The sha256 of what a trusted step holds: all of its files, by their own sha256, but not its evaluation."""
        manifest = read_manifest(self._folder.path(self._folder.require(step)))
        held = json.dumps({name: manifest[name] for name in ("arrays", "files")}, sort_keys=True)
        return hashlib.sha256(held.encode()).hexdigest()

    def _restore(
        self,
        step: int | None,
        order: Callable[[], list[int]],
        abstract: Any,
        part: str = "",
        as_saved: bool = False,
        set_aside: bool = False,
    ) -> Restored | None:
        """`step`, or the first one in that order that is found intact when it is read; None where there is none."""
        refused: list[int] = []
        while (chosen := self._choose(step, order, refused, set_aside)) is not None:
            restored, damage = None, "another process read other contents than were saved"
            try:
                restored = Restored(chosen, *self._read(chosen, abstract, part, as_saved))
            except DamageError as error:
                damage = str(error)
            if not _any(restored is None):
                return restored
            del restored
            if step is not None:
                raise damaged(step, damage)
            refused.append(chosen)
            self._folder.refuse(chosen, damage, set_aside)
        return None

    def _choose(
        self, step: int | None, order: Callable[[], list[int]], refused: list[int], set_aside: bool
    ) -> int | None:
        """`step`, or else the first step in that order whose files are intact; None where there is none."""
        if step is not None:
            self._folder.check(self._folder.require(step))
            return step
        none_there, none_intact = -1, -2

        def decide() -> int:
            candidates = [step for step in order() if step not in refused]
            intact = self._folder.first_intact(candidates, set_aside)
            return intact if intact is not None else none_intact if candidates or refused else none_there

        chosen = _agree(decide)
        if chosen == none_intact:
            raise ValueError(f"no checkpoint in {self._folder.root} is intact; start again in another folder")
        return None if chosen == none_there else chosen

    def _read(self, step: int, abstract: Any, part: str, as_saved: bool) -> tuple[Any, Documents, float | None]:
        """The arrays of an intact step, all of them or those of one part in any dtype, its documents and its loss.

        Raises DamageError if an array is not as it was saved, ValueError if it is none that was asked for.
        """
        import orbax.checkpoint as ocp

        folder = self._folder.path(step)
        manifest, wanted = read_manifest(folder), _signature(abstract)
        saved = manifest["arrays"]
        for name in sorted(saved.keys() | wanted.keys()):
            there, here = saved.get(name, "absent"), wanted.get(name, "absent")
            if part and (name.split("/")[0] != part or there.partition("[")[2] == here.partition("[")[2]):
                continue
            if there != here:
                raise ValueError(
                    f"{name} is {there} in checkpoint {step} but {here} here; use the config saved with it"
                )
        arrays = read_arrays(folder / "state", abstract, as_saved)
        return arrays, dict(ocp.JsonCheckpointHandler().restore(folder / "documents")), manifest["eval_loss"]

    def _finish(self, step: int, facts: dict[str, Any], together: Together) -> None:
        """Runs in the background: Orbax's commit, then the manifest, then the deletion of older steps."""
        with together.shared():
            self._settle()
            if self._is_writer:
                self._folder.trust(step, facts, self._keep)
        together.wait("trusted", PATIENCE_MS)

    def _settle(self) -> None:
        """Waits for all that Orbax has begun. Raises the first failure, and leaves none of the others.

        Orbax raises one at a time: the next would end the next save, between two points at which the others wait.
        """
        failures = []
        while self._saver is not None:
            try:
                self._saver.wait_until_finished()
                break
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def _begin(self) -> Together:
        """For a save or a change of one. The one before has ended in this process, and those before that in all."""
        while len(self._saves) > 1:
            self._saves.pop(0).forget()
        self._saves.append(Together())
        return self._saves[-1]

    @contextlib.contextmanager
    def _saving(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0].partition(" [tensorstore_spec=")[0]
            raise OSError(f"checkpoint {step} could not be saved in {self._folder.root}: {reason}") from error


@functools.cache
def _silence() -> None:
    """A save that fails raises that: no tracebacks in Orbax's log, nor of writes that its event loop leaves behind."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine 'async_serialize_from_host", RuntimeWarning)
    hook = sys.unraisablehook

    def unraisable(unraised: Any) -> None:
        if str(unraised.exc_value) != "Event loop is closed":
            hook(unraised)

    sys.unraisablehook = unraisable


def _agree(decide: Callable[[], int]) -> int:
    """Process 0 decides and tells the others, who may see a shared folder at another moment.

    Raises OSError if it cannot read the folder; in every process alike.
    """
    if jax.process_count() == 1:
        return decide()
    from jax.experimental import multihost_utils

    decision, failure = 0, None
    if jax.process_index() == 0:
        try:
            decision = decide()
        except OSError as error:
            failure = error
    sent = np.array([decision, failure is not None], np.int32)
    decision, failed = multihost_utils.broadcast_one_to_all(sent).tolist()
    if failed:
        raise failure or OSError("process 0 cannot read what is saved")
    return decision


def _any(flag: bool) -> bool:
    """Whether it is true in any process. All must call it."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.bool_(flag))))


def _signature(tree: Any) -> dict[str, str]:
    """Dtype and shape of every array by its path, as `params/embed: float32[65, 128]`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = ((jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves)
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in named}
