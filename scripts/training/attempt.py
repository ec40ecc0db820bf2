"""One attempt at a run: from its newest checkpoint, or from nothing, to its last step, a stop or a failure.

Invariant: a run goes on from its folder alone, and always leaves word there of how it ended.
"""

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import numpy as np

from data.pipeline import evaluation_batches, training_batches
from data.samples import Samples
from data.stores.mixture import by_source
from parallax.model.flops import step_flops
from parallax.storage import is_of_storage, write_json
from parallax.tokenizers.chat_template import FILE, write_chat_template
from parallax.tokenizers.registry import save_tokenizer
from parallax.training.checkpoint import Checkpointer
from parallax.training.loop import Best, Diverged, Observer, Row, train
from parallax.training.progress import Profiler, Terminal
from parallax.training.state import TrainState, params_sha256
from parallelism import sentinel
from parallelism.exit_status import FAILED, LOST_PEER, OUTSIDE_FAILURE, status_of
from parallelism.hosts import explain, fetch, has_peers
from parallelism.planning.hardware import peak_flops
from scripts.common.command_line import writing
from scripts.common.ending import end_without_main_thread
from scripts.training.base import Base
from scripts.training.flags import flags_to_dict
from scripts.training.job import Job, say, say_stopped
from scripts.training.output_dir import Workspace
from scripts.training.overfit import report_overfit
from scripts.training.record import Files
from scripts.training.references import Referred, keep, refer
from scripts.training.resuming import Earlier, describe_remedy, resume_command
from scripts.training.summary import Summary, describe_time
from scripts.training.watchdog import Watchdog
from scripts.training.weights_and_biases import WeightsAndBiases

EVALUATED_TOKENS = 8192
"""Tokens evaluated at a time, unless a training batch has more."""


class Attempt:
    """A job with its checkpoints and its clock.

    Args:
      job: what to train.
      began: when this process began, in seconds since 1970.

    Raises:
      ValueError: another process writes the run folder.
    """

    def __init__(self, job: Job, began: float):
        self._job, self._began = job, began
        self._workspace = Workspace(job.folder)
        if job.strategy.is_writer:
            self._workspace.hold()  # before the checkpoints, of which the writer removes what is half-written
        self._checkpoints = Checkpointer(
            job.folder / "checkpoints", keep=job.flags.train.keep, is_writer=job.strategy.is_writer, notify=say
        )
        self._stopwatch = Watchdog(job.flags.step_timeout)
        self._start = self._step = 0
        self._changed: dict[str, Any] = {}
        self._evaluation_due = False  # that of the last step, which a stop cut short
        self._best = Best()
        self._base = Base(job)
        self._references: dict[str, np.ndarray] = {}  # of pairs
        self._texts: dict[str, str] = {}  # of the last evaluation
        self._unsaved: Exception | None = None
        self._terminal: Terminal | None = None
        self._summary: Summary | None = None

    def leave(self) -> None:
        """Ends a run that has not begun to train."""
        self._workspace.release()
        say_stopped()

    def prepare(self) -> TrainState:
        """The state to go on from; makes the run folder.

        Raises ValueError if the folder's checkpoints are all damaged, or it cannot be written.
        """
        job, strategy = self._job, self._job.strategy
        restored = self._checkpoints.restore(self._base.without(strategy.abstract())) if job.flags.resume else None
        if strategy.is_writer and (job.folder / "config.json").exists():
            earlier = Earlier(job.folder)
            self._changed = earlier.changes(job.flags)
            say(f"before    {earlier.describe_layout()}")
            for flag, (before, after) in self._changed.items():
                say(f"changed   {flag} {after}, before {before}")
        if restored is not None:
            done, steps = restored.step, job.flags.train.steps
            if done > steps:
                raise ValueError(
                    f"--steps {steps} must be at least {done}, the steps that {job.folder} has done; try --steps {done}"
                )
            say(f"resume    from step {done} of {job.folder}")
            state, self._start = strategy.adopt(self._base.restore(restored)), done
            progress = restored.documents["progress"]
            found = Best() if restored.eval_loss is None else Best(done, restored.eval_loss)
            # The documents know nothing of an evaluation that was made up for, older ones of no best checkpoint.
            self._evaluation_due = restored.eval_loss is None and progress.get("evaluation_due", False)
            self._best = min(Best(**progress.get("best", {})), found, key=lambda best: best.loss)
        else:
            state = strategy.init() if job.flags.init_from is None else self._base.begin(job.flags.init_from)
        self._step = self._start
        self._references = refer(job, state, self._start) if job.has_pairs else {}
        if strategy.is_writer:
            description = describe_run(job)
            with writing(f"--output-dir {job.folder}"):
                self._workspace.fetch()
                # In this order: --resume takes a folder with a config, and makes the tokenizer that is not there yet.
                write_json(self._workspace.path / "config.json", description | self._base.describe())
                save_tokenizer(job.tokenizer, self._workspace.path / "tokenizer.json")
                if self._references and not self._start:
                    keep(self._references, self._workspace.path)
                if job.chat_template and not (self._workspace.path / FILE).exists():
                    write_chat_template(job.chat_template, self._workspace.path)
                self._workspace.send()
        return state

    def run(self, state: TrainState) -> int:
        """Trains to the last step, a request to stop, or a failure; returns the exit status."""
        self._summary = Summary(
            self._workspace.path, self._began, self._start, self._stopwatch, self._changed, self._sources
        )
        self._stopwatch.seconds["startup"] = time.time() - self._began
        self._job.strategy.stop_requested.listen(self._end_at_once)
        observers: list[Any] = []
        failures: list[Exception] = []

        @contextlib.contextmanager
        def noted() -> Iterator[None]:
            try:
                yield
            except jax.errors.JaxRuntimeError as error:
                if status_of(error, has_peers()) == LOST_PEER:
                    raise  # the others are gone or being ended, and nothing is left to say
                failures.append(error)
            except Exception as error:
                if not isinstance(error, (Diverged, sentinel.Divergence)) and not is_of_storage(error):
                    raise
                failures.append(error)

        try:
            with noted():
                self._write_summary()
                observers += self._observers()
                with self._stopwatch.watching():
                    state, self._step = self._train(state, observers)
        except BaseException:
            self._leave_terminal()
            raise
        for observer in observers:
            with noted():
                observer.close()
        diverged = failures[0] if failures and isinstance(failures[0], Diverged) else None
        if not failures or diverged or jax.process_count() == 1:  # else a save may wait for a peer for ever
            with noted(), self._stopwatch.timing("checkpoint"):
                self._checkpoints.close()
        if diverged:
            with noted():
                self._set_aside(diverged.last_finite)
        if self._unsaved is not None:
            failures.append(self._unsaved)
        with noted():
            end = "failed" if failures else "finished" if self._finished else "stopped"
            self._write_summary(end, _verdict(failures[0])[1] if failures else None)
            self._workspace.send()
        self._workspace.release()
        return self._end(state, failures)

    def _set_aside(self, last_finite: int) -> None:
        """What this attempt saved and no finite step came from, so that the run does not go on from it."""
        for step in self._checkpoints.steps():
            if step >= last_finite and step > self._start:
                self._checkpoints.set_aside(step, "diverged")
        self._step = self._checkpoints.latest_step() or 0

    def _end_at_once(self) -> None:
        """At a signal while the step is compiled, which nothing interrupts: no step is done that could be lost.

        Several processes end so at any moment before they first ask whether to stop.
        """
        if has_peers() or self._stopwatch.current == "compile":
            end_without_main_thread(self._say_stopped)

    def _say_stopped(self) -> None:
        self._leave_terminal()
        self._write_summary("stopped")
        self._workspace.send()
        self._say_end()
        self._workspace.release()

    def _leave_terminal(self) -> None:
        """Gives it its cursor back."""
        if self._terminal is not None:
            self._terminal.close()

    def _observers(self) -> list[Any]:
        folder, flags = self._workspace.path, self._job.flags
        observers: list[Any] = []
        if self._job.strategy.is_writer:
            self._terminal = Terminal(self._start, flags.train.steps)
            files = Files(folder, self._start, lambda: self._texts)
            observers += [files, self._terminal]
            if flags.wandb:
                observers.append(WeightsAndBiases(flags.wandb, folder, self._job.folder.name, describe_run(self._job)))
        if flags.profile:
            observers.append(Profiler(folder / "profile", self._start))
        return observers

    def _train(self, state: TrainState, observers: list[Observer]) -> tuple[TrainState, int]:
        job, settings, strategy = self._job, self._job.flags.train, self._job.strategy
        evaluate = strategy.compile_evaluation(job.evaluate)
        rows = strategy.rows(settings.batch_size)
        batches = training_batches(
            self._samples("training"), batch_size=settings.batch_size, seed=settings.seed, rows=rows, start=self._start
        )
        return train(
            state,
            start=self._start,
            step=strategy.compile(job.step),
            batches=batches,
            placement=strategy,
            config=settings,
            evaluate=functools.partial(self._evaluate, evaluate),
            save=self._save,
            measured=self._unsaved_noted()(self._checkpoints.measured),
            check=self._check,
            observers=observers,
            stopwatch=self._stopwatch,
            evaluation_due=self._evaluation_due,
            best=self._best,
            step_flops=step_flops(job.flags.model, settings.batch_size, settings.seq_len),
            peak_flops=sum(peak_flops(device.device_kind) or 0.0 for device in strategy.devices) or None,
        )

    def _save(self, step: int, state: TrainState, eval_loss: float | None, best: Best) -> None:
        """Starts a save, when the one before has ended. Where that failed, or this one does, the next tries again."""
        self._workspace.check()
        with self._unsaved_noted():
            self._checkpoints.wait()
        with self._unsaved_noted():
            self._start_save(step, state, eval_loss, best)

    @contextlib.contextmanager
    def _unsaved_noted(self) -> Iterator[None]:
        """Keeps the failure of the newest save, of which all processes hear, and says it."""
        self._unsaved = None
        try:
            yield
        except Exception as error:
            if not is_of_storage(error):
                raise
            self._unsaved = error
            say(f"unsaved   {_verdict(error)[1]}; the next save tries again")

    def _start_save(self, step: int, state: TrainState, eval_loss: float | None, best: Best) -> None:
        settings = self._job.flags.train
        self._evaluation_due = eval_loss is None and (step == settings.steps or step % settings.eval_interval == 0)
        progress = {"next_batch": step} | ({"best": best._asdict()} if best.step else {})
        documents = {
            "config": describe_run(self._job) | self._base.describe(),
            "tokenizer": self._job.tokenizer.to_json(),
            "progress": progress | ({"evaluation_due": True} if self._evaluation_due else {}),
        }
        kept = self._base.without(self._job.strategy.canonical(state))
        self._checkpoints.save(step, kept, documents, eval_loss, before=self._workspace.send)  # all rows go first
        self._write_summary()
        self._workspace.send()

    def _check(self, step: int, state: TrainState, batch: Any) -> None:
        """Compares replicas and hosts. Raises Divergence."""
        job, strategy = self._job, self._job.strategy
        if len(strategy.devices) == 1:
            return
        settings = job.flags.train
        ids = job.training.draw(settings.batch_size, settings.seed, step - 1)
        facts = {"corpus": job.corpus.sha256.encode(), "sample ids": ids.tobytes()}
        held = strategy.canonical(state)
        trees = [{"params": held.params, "opt_state": held.opt_state}, {"sample_ids": batch["sample_ids"]}]
        sentinel.check(step, trees, facts)

    def _evaluate(self, evaluate: Callable, state: TrainState) -> Row | None:
        """Mean cross-entropy over the held-out targets, in nats a token, of all and by source, and what was learned.

        None if a stop is requested meanwhile.
        """
        job, settings = self._job, self._job.flags.train
        # Whole training batches, so that the rows can be dealt; several at once where they are small.
        size = settings.batch_size * max(1, EVALUATED_TOKENS // (settings.batch_size * settings.seq_len))
        canonical = job.strategy.canonical(state)
        most = job.flags.eval_tokens
        rows, parts = job.strategy.rows(size), by_source(self._samples("held_out"))
        row, nats, tokens = Row(), 0.0, 0
        for name, part in parts.items():
            share = None if most is None else most // len(parts)
            batches = evaluation_batches(part, batch_size=size, rows=rows, most_tokens=share)
            results = []
            for batch in batches:
                if job.strategy.stop_requested():
                    return None
                # One at a time: simulated devices may lock up when many programs with collectives are queued.
                results.append(jax.device_get(evaluate(canonical.params, batch)))
                self._stopwatch.beat()
            loss, count = sum(float(loss) for loss, _ in results), sum(int(count) for _, count in results)
            nats, tokens = nats + loss, tokens + count
            row |= {f"eval_loss/{name}": loss / count} if name else {}
        sources = self._sources(int(jax.device_get(canonical.step)))
        for name, facts in sources.items():
            row |= {f"{fact}/{name}": value for fact, value in facts.items() if len(sources) > 1}
        if job.prompts is not None:
            self._texts = job.prompts.texts(canonical.params)
            self._stopwatch.beat()
        self._evaluation_due = False
        return {"eval_loss": nats / tokens, **row}

    def _samples(self, side: Literal["training", "held_out"]) -> Samples:
        """Those of a side, pairs with what the reference has for them."""
        own = getattr(self._job, side)
        return Referred(own, self._references[side]) if self._references else own

    def _sources(self, step: int) -> dict[str, dict[str, float]]:
        """Of each store: its weight at this step, and the tokens and epochs of it that were learned from."""
        job, settings = self._job, self._job.flags.train
        if job.corpus.stores is None:
            return {}
        return job.corpus.stores.seen(job.training, settings.batch_size, settings.seed, step)

    def _write_summary(self, end: str = "", failure: str | None = None) -> None:
        """With what is saved by now: a save that is under way is in the next one."""
        if self._summary is not None and self._job.strategy.is_writer:
            saved = self._checkpoints.best_first()
            self._summary.write(max(saved, default=0), next(iter(saved), None), end, failure)

    def _end(self, state: TrainState, failures: list[Exception]) -> int:
        """Says how the run ended, and returns the exit status."""
        if failures:
            status, words = _verdict(failures[0])
            remedy = describe_remedy(self._job, self._checkpoints, failures[0])
            print(f"error: stopped: {words}; {remedy}", file=sys.stderr, flush=True)
            return status
        self._say_end()
        return self._report(state) if self._finished else 0

    @property
    def _finished(self) -> bool:
        return self._step >= self._job.flags.train.steps and not self._evaluation_due

    def _say_end(self) -> None:
        """How the run ended where nothing failed, and how to go on."""
        job, best = self._job, self._checkpoints.best_step()
        how = "finished" if self._finished else "stopped "
        saved = "no checkpoint" if best is None else f"best checkpoint: step {best}"
        say(f"{how}  at step {self._step} of {job.flags.train.steps}; {saved}; run folder: {job.folder}")
        if job.strategy.is_writer:
            say(f"time      {describe_time(self._workspace.path)}")
        if not self._finished:
            say(f"go on     {resume_command(job.flags, job.folder)}")

    def _report(self, state: TrainState) -> int:
        """What a finished run was asked to print; the first process does."""
        job, flags = self._job, self._job.flags
        if flags.mode != "overfit" and not flags.print_param_hash:
            return 0
        params = fetch(job.strategy.canonical(state).params)
        if not job.strategy.is_writer:
            return 0
        status = report_overfit(job, params) if flags.mode == "overfit" else 0
        if flags.print_param_hash:
            print(f"params sha256 {params_sha256(params)}", flush=True)
        return status


def _verdict(failure: Exception) -> tuple[int, str]:
    """The exit status for what ended a run, and a line that says it."""
    for error in (failure, failure.__cause__):  # of a save, a device that failed decides, and no disk
        if error is not None and isinstance(error, jax.errors.JaxRuntimeError):
            return explain(error)
    return FAILED if isinstance(failure, Diverged) else OUTSIDE_FAILURE, " ".join(str(failure).split())


def describe_run(job: Job) -> dict[str, Any]:
    """What config.json holds."""
    corpus = {"edition": job.corpus.edition, "sha256": job.corpus.sha256}
    versions = {"python": sys.version.split()[0], "jax": jax.__version__}
    facts = {"corpus": corpus, "versions": versions, "layout": job.strategy.describe()}
    return flags_to_dict(job.flags) | facts | {"trained_length": job.trained_length}
