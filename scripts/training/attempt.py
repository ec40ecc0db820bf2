"""One attempt at a run: from its newest checkpoint, or from nothing, to its last step, a stop or a failure.

Invariant: a run goes on from its folder alone, and always leaves word there of how it ended.
"""

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data.pipeline import evaluation_batches, training_batches
from parallax.inference.generate import Generator
from parallax.inference.request import Request
from parallax.inference.sampling import SamplingSettings
from parallax.model.cost import step_flops
from parallax.model.stack import prepare
from parallax.model.transformer import Params
from parallax.storage import open_folder, reason_of, write_json
from parallax.tokenizers.registry import save_tokenizer
from parallax.training.checkpoint import Checkpointer
from parallax.training.loop import Diverged, Observer, Row, Stopwatch, train
from parallax.training.metrics import MetricsWriter
from parallax.training.plot import plot_loss
from parallax.training.progress import Profiler, Terminal
from parallax.training.state import TrainState, params_sha256
from parallelism import sentinel
from parallelism.exit_status import FAILED, OUTSIDE_FAILURE
from parallelism.hosts import fetch
from parallelism.planning.hardware import peak_flops
from scripts.training.choices import choose_eval_tokens
from scripts.training.flags import flags_to_dict
from scripts.training.job import Job, say
from scripts.training.output_dir import Workspace
from scripts.training.summary import Summary, describe_time

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
        self._stopwatch = Stopwatch()
        self._start = self._step = 0

    def prepare(self) -> TrainState:
        """The state to go on from; makes the run folder.

        Raises ValueError if the folder's checkpoints are all damaged, or it cannot be written.
        """
        job, strategy = self._job, self._job.strategy
        restored = self._checkpoints.restore(strategy.abstract()) if job.flags.resume else None
        if restored is not None:
            say(f"resume    from step {restored.step} of {job.folder}")
            state, self._start = strategy.adopt(restored.state), restored.step
        else:
            state = strategy.init() if job.flags.init_from is None else self._begin_from(job.flags.init_from)
        self._step = self._start
        if strategy.is_writer:
            try:
                self._workspace.fetch()
                save_tokenizer(job.tokenizer, self._workspace.path / "tokenizer.json")
                write_json(self._workspace.path / "config.json", describe_run(job))
                self._workspace.send()
            except OSError as error:
                raise ValueError(
                    f"--output-dir {job.folder} cannot be written: {reason_of(error)}; choose another"
                ) from None
        return state

    def _begin_from(self, run: str) -> TrainState:
        """The first state, with the parameters of another run's best checkpoint in it.

        Raises ValueError if it has no intact checkpoint, or one of other shapes.
        """
        strategy = self._job.strategy
        # Moments begin at zero, whatever the parameters; these go before the others come.
        first = dataclasses.replace(strategy.canonical(strategy.init()), params=None)
        checkpoints = Checkpointer(open_folder(run) / "checkpoints", keep=1, is_writer=False, notify=say)
        try:
            step, params, _ = checkpoints.restore_params(strategy.abstract().params)
        finally:
            checkpoints.close()
        say(f"from      step {step} of {run}")
        return strategy.adopt(dataclasses.replace(first, params=params))

    def run(self, state: TrainState) -> int:
        """Trains to the last step, a request to stop, or a failure; returns the exit status."""
        self._summary = Summary(self._workspace.path, self._began, self._start, self._stopwatch, self._sources)
        self._stopwatch.seconds["startup"] = time.time() - self._began
        self._job.strategy.stop_requested.listen()
        observers: list[Any] = []
        failures: list[Exception] = []

        @contextlib.contextmanager
        def noted() -> Iterator[None]:
            try:
                yield
            except (Diverged, sentinel.Divergence, OSError) as error:
                failures.append(error)

        with noted():
            if self._job.strategy.is_writer:
                self._summary.write(self._start, self._checkpoints.best_step())
            observers += self._observers()
            state, self._step = self._train(state, observers)
        for observer in observers:
            with noted():
                observer.close()
        if not failures or jax.process_count() == 1:  # a save in the background may wait for a peer for ever
            with noted(), self._stopwatch.timing("checkpoint"):
                self._checkpoints.close()
        with noted():
            self._write_summary(failures)
            self._workspace.send()
        self._workspace.release()
        return self._end(state, failures)

    def _observers(self) -> list[Any]:
        folder, flags = self._workspace.path, self._job.flags
        observers: list[Any] = []
        if self._job.strategy.is_writer:
            observers += [Files(folder, self._start), Terminal(self._start, flags.train.steps)]
        if flags.profile:
            observers.append(Profiler(folder / "profile", self._start))
        return observers

    def _train(self, state: TrainState, observers: list[Observer]) -> tuple[TrainState, int]:
        job, settings, strategy = self._job, self._job.flags.train, self._job.strategy
        evaluate = strategy.compile_evaluation(job.evaluate)
        rows = strategy.rows(settings.batch_size)
        batches = training_batches(
            job.training, batch_size=settings.batch_size, seed=settings.seed, rows=rows, start=self._start
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
            check=self._check,
            observers=observers,
            stopwatch=self._stopwatch,
            step_flops=step_flops(job.flags.model, settings.batch_size, settings.seq_len),
            peak_flops=sum(peak_flops(device.device_kind) or 0.0 for device in strategy.devices) or None,
        )

    def _save(self, step: int, state: TrainState, eval_loss: float | None) -> None:
        documents = {
            "config": describe_run(self._job),
            "tokenizer": self._job.tokenizer.to_json(),
            "progress": {"next_batch": step},
        }
        self._workspace.send()  # before: a run that goes on from this step finds all rows up to it
        self._checkpoints.save(step, self._job.strategy.canonical(state), documents, eval_loss)
        self._step = step
        if self._job.strategy.is_writer:
            self._summary.write(step, self._checkpoints.best_step())
            self._workspace.send()

    def _check(self, step: int, state: TrainState, batch: Any) -> None:
        """Compares replicas and hosts. Raises Divergence."""
        job, strategy = self._job, self._job.strategy
        if len(strategy.devices) == 1:
            return
        settings = job.flags.train
        ids = job.training.draw(settings.batch_size, settings.seed, step - 1)
        facts = {"corpus": job.corpus.sha256.encode(), "sample ids": ids.tobytes()}
        trees = [{"params": state.params, "opt_state": state.opt_state}]
        if not strategy.is_stacked:  # where they are, no two devices hold the same rows
            trees.append({"sample_ids": batch["sample_ids"]})
        sentinel.check(step, trees, facts, stacked=strategy.is_stacked)

    def _evaluate(self, evaluate: Callable, state: TrainState) -> Row:
        """Mean cross-entropy over the held-out targets, in nats a token, of all and by source, and what was learned."""
        job, settings = self._job, self._job.flags.train
        # Whole training batches, so that the rows can be dealt; several at once where they are small.
        size = settings.batch_size * max(1, EVALUATED_TOKENS // (settings.batch_size * settings.seq_len))
        canonical = job.strategy.canonical(state)
        most = choose_eval_tokens(job.flags, of_store=job.corpus.stores is not None)
        rows, stores = job.strategy.rows(size), job.corpus.stores
        parts = {"": job.held_out} if stores is None else stores.by_source(job.held_out)
        row, nats, tokens = Row(), 0.0, 0
        for name, part in parts.items():
            share = None if most is None else most // len(parts)
            batches = evaluation_batches(part, batch_size=size, rows=rows, most_tokens=share)
            # One at a time: simulated devices may lock up when many programs with collectives are queued.
            results = [jax.device_get(evaluate(canonical.params, batch)) for batch in batches]
            loss, count = sum(float(loss) for loss, _ in results), sum(int(count) for _, count in results)
            nats, tokens = nats + loss, tokens + count
            row |= {f"eval_loss/{name}": loss / count} if name else {}
        for name, facts in self._sources(int(jax.device_get(canonical.step))).items():
            row |= {f"{fact}/{name}": value for fact, value in facts.items() if len(parts) > 1}
        return {"eval_loss": nats / tokens, **row}

    def _sources(self, step: int) -> dict[str, dict[str, float]]:
        """Of each store: its weight at this step, and the tokens and epochs of it that were learned from."""
        job, settings = self._job, self._job.flags.train
        if job.corpus.stores is None:
            return {}
        return job.corpus.stores.seen(job.training, settings.batch_size, settings.seed, step)

    def _write_summary(self, failures: list[Exception]) -> None:
        if self._job.strategy.is_writer:
            finished = self._step >= self._job.flags.train.steps
            end = "failed" if failures else "finished" if finished else "stopped"
            failure = _one_line(failures[0]) if failures else None
            self._summary.write(self._step, self._checkpoints.best_step(), end, failure)

    def _end(self, state: TrainState, failures: list[Exception]) -> int:
        """Says how the run ended, and returns the exit status."""
        job, steps, step = self._job, self._job.flags.train.steps, self._step
        if failures:
            latest = self._checkpoints.latest_step()
            print(
                f"error: stopped: {_one_line(failures[0])}; the last good checkpoint is step {latest} of {job.folder}",
                file=sys.stderr,
                flush=True,
            )
            return FAILED if isinstance(failures[0], Diverged) else OUTSIDE_FAILURE
        finished, best = step >= steps, self._checkpoints.best_step()
        how = "finished" if finished else "stopped "
        say(f"{how}  at step {step} of {steps}; best checkpoint: step {best}; run folder: {job.folder}")
        if job.strategy.is_writer:
            say(f"time      {describe_time(self._workspace.path)}")
        if not finished:
            say(f"go on     python scripts/train.py --resume --output-dir {job.folder}")
            return 0
        return self._report(state)

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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class Files:
    """metrics.jsonl, TensorBoard events and, at each evaluation, loss.png."""

    def __init__(self, folder: Path, start: int):
        self._folder = folder
        self._writer = MetricsWriter(folder, resume_step=start)

    def step(self, step: int, metrics: Row) -> None:
        pass

    def row(self, row: Row) -> None:
        self._writer.write(int(row["step"]), {name: value for name, value in row.items() if name != "step"})
        if "eval_loss" in row:
            plot_loss(self._folder)

    def close(self) -> None:
        self._writer.close()
        plot_loss(self._folder)


def describe_run(job: Job) -> dict[str, Any]:
    """What config.json holds."""
    corpus = {"edition": job.corpus.edition, "sha256": job.corpus.sha256}
    versions = {"python": sys.version.split()[0], "jax": jax.__version__}
    return flags_to_dict(job.flags) | {"corpus": corpus, "versions": versions}


def report_overfit(job: Job, params: Params) -> int:
    """Prints the verdict; returns 0 if the sentence was learned, 1 if not."""
    model, ids = job.flags.model, job.tokenizer.encode(job.corpus.documents[0])
    request = Request(
        prompts=[ids[:1]], settings=SamplingSettings.create(1, temperature=0.0), seeds=[0], max_tokens=len(ids) - 1
    )
    written = np.concatenate([ids[:1], *Generator(model).generate(prepare(model, params), request)])
    print(f"sentence: {job.corpus.documents[0]}\nwritten:  {job.tokenizer.decode(written)}")
    if np.array_equal(written, ids):
        print("✅ OVERFIT TEST PASSED - Model is mathematically correct!", flush=True)
        return 0
    right = int(np.sum(written == ids))
    print(
        f"❌ OVERFIT TEST FAILED - {right} of {len(ids)} characters are right after {job.flags.train.steps} steps",
        flush=True,
    )
    return 1
