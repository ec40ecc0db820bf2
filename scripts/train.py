"""Trains a model on text: `python scripts/train.py --help`.

Invariant: a run goes on from its folder alone, and always leaves word there of how it ended.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs, installed or not

import jax

from data.pipeline import evaluation_batches, training_batches
from data.tokenizer import save_tokenizer
from parallax.model.cost import step_flops
from parallax.model.overview import parameter_overview
from parallax.training.checkpoint import Checkpointer
from parallax.training.fingerprint import params_sha256
from parallax.training.loop import Diverged, Observer, Stopwatch, train
from parallax.training.profile import Profiler
from parallax.training.state import TrainState
from parallelism.hardware import peak_flops
from scripts.allocator import keep_large_buffers
from scripts.command_line import errors_in_one_line
from scripts.job import Job, prepare_job, say
from scripts.new_run import write_json
from scripts.observers import Files, Terminal
from scripts.overfit import report_overfit
from scripts.train_flags import flags_to_dict, read_flags


def main() -> int:
    """Exit status: 0 finished, or stopped as asked; 1 failed; 2 bad input."""
    keep_large_buffers()
    with errors_in_one_line():
        flags = read_flags()
        job = prepare_job(flags)
        job.describe()
        if flags.lower_only:
            return show_costs(job)
        checkpoints = Checkpointer(
            job.folder / "checkpoints", keep=flags.train.keep, is_writer=job.strategy.is_writer, notify=say
        )
        state, start = first_state(job, checkpoints)
    return run(job, checkpoints, state, start)


def show_costs(job: Job) -> int:
    """Compiles the step without running it; prints the parameters and what a step takes of a device."""
    settings = job.flags.train
    rows = job.strategy.rows(settings.batch_size)
    batch = next(
        training_batches(job.training, batch_size=settings.batch_size, seed=settings.seed, rows=rows)
    )
    memory = job.strategy.lower(job.step, batch).compile().memory_analysis()
    print(parameter_overview(job.flags.model))
    print(
        f"A step takes {step_flops(job.flags.model, settings.batch_size, settings.seq_len):.4g} FLOPs in all."
    )
    if memory is not None:  # a backend may not say
        print(
            f"A device holds {memory.argument_size_in_bytes:,} bytes of state and batch, "
            f"and needs {memory.temp_size_in_bytes:,} bytes beside them while it computes."
        )
    return 0


def first_state(job: Job, checkpoints: Checkpointer) -> tuple[TrainState, int]:
    """The state to go on from, and its step; makes the run folder.

    Raises:
      ValueError: the folder's checkpoints are all damaged, or it cannot be written.
    """
    restored = checkpoints.restore(job.strategy.abstract()) if job.flags.resume else None
    if restored is not None:
        say(f"resume    from step {restored.step} of {job.folder}")
        state, start = job.strategy.adopt(restored.state), restored.step
    else:
        state, start = job.strategy.init(), 0
    if job.strategy.is_writer:
        job.folder.mkdir(parents=True, exist_ok=True)
        save_tokenizer(job.tokenizer, job.folder / "tokenizer.json")
        write_json(job.folder / "config.json", describe_run(job))
    return state, start


def describe_run(job: Job) -> dict[str, Any]:
    """What config.json holds."""
    corpus = {"edition": job.corpus.edition, "sha256": job.corpus_sha256}
    versions = {"python": sys.version.split()[0], "jax": jax.__version__}
    return flags_to_dict(job.flags) | {"corpus": corpus, "versions": versions}


def run(job: Job, checkpoints: Checkpointer, state: TrainState, start: int) -> int:
    """Trains in the run folder to the last step, a request to stop, or a failure; returns the exit status."""
    settings, strategy, stopwatch = job.flags.train, job.strategy, Stopwatch()
    observers: list[Any] = []
    if strategy.is_writer:
        observers += [Files(job.folder, start), Terminal(start, settings.steps)]
    if job.flags.profile:
        observers.append(Profiler(job.folder / "profile", start))
    strategy.stop_requested.listen()
    failure, step = None, start
    try:
        state, step = _train(job, state, start, checkpoints, observers, stopwatch)
    except (Diverged, OSError) as error:
        failure = f"stopped: {' '.join(str(error).split())}"
    finally:
        for observer in observers:
            observer.close()
    try:
        with stopwatch.timing("checkpoint"):
            checkpoints.close()
    except OSError as error:
        failure = failure or f"stopped: {' '.join(str(error).split())}"
    return finish(job, checkpoints, state, step, stopwatch, failure)


def _train(
    job: Job,
    state: TrainState,
    start: int,
    checkpoints: Checkpointer,
    observers: list[Observer],
    stopwatch: Stopwatch,
) -> tuple[TrainState, int]:
    settings, strategy = job.flags.train, job.strategy
    documents = {"config": describe_run(job), "tokenizer": job.tokenizer.to_json()}
    evaluate = strategy.compile_evaluation(job.evaluate)

    def save(step: int, state: TrainState, eval_loss: float | None) -> None:
        progress = {"progress": {"next_batch": step}}
        checkpoints.save(step, strategy.canonical(state), documents | progress, eval_loss)

    rows = strategy.rows(settings.batch_size)
    batches = training_batches(
        job.training, batch_size=settings.batch_size, seed=settings.seed, rows=rows, start=start
    )
    return train(
        state,
        start=start,
        step=strategy.compile(job.step),
        batches=batches,
        placement=strategy,
        config=settings,
        evaluate=functools.partial(held_out_loss, job, evaluate),
        save=save,
        observers=observers,
        stopwatch=stopwatch,
        step_flops=step_flops(job.flags.model, settings.batch_size, settings.seq_len),
        peak_flops=sum(peak_flops(device.device_kind) or 0.0 for device in strategy.devices) or None,
    )


def held_out_loss(job: Job, evaluate: Callable, state: TrainState) -> float:
    """Mean cross-entropy over every held-out target, in nats a token."""
    params, size = job.strategy.canonical(state).params, job.flags.train.batch_size
    batches = evaluation_batches(job.held_out, batch_size=size, rows=job.strategy.rows(size))
    # One at a time: simulated devices may lock up when many programs with collectives are queued.
    results = [jax.device_get(evaluate(params, batch)) for batch in batches]
    return sum(float(loss) for loss, _ in results) / sum(int(count) for _, count in results)


def finish(
    job: Job,
    checkpoints: Checkpointer,
    state: TrainState,
    step: int,
    stopwatch: Stopwatch,
    failure: str | None,
) -> int:
    """Leaves summary.json, says how the run ended, and returns the exit status."""
    steps, folder = job.flags.train.steps, job.folder
    finished = failure is None and step >= steps
    best = checkpoints.best_step()
    if job.strategy.is_writer:
        seconds = {what: round(spent, 3) for what, spent in stopwatch.seconds.items()}
        write_json(
            folder / "summary.json",
            {"finished": finished, "step": step, "best_step": best, "failure": failure, "seconds": seconds},
        )
    if failure is not None:
        say(f"error: {failure}; the last good checkpoint is step {checkpoints.latest_step()} of {folder}")
        return 1
    how = "finished" if finished else "stopped "
    say(f"{how}  at step {step} of {steps}; best checkpoint: step {best}; run folder: {folder}")
    if not finished:
        say(f"go on     python scripts/train.py --resume --output-dir {folder}")
        return 0
    params = job.strategy.canonical(state).params
    status = report_overfit(job, params) if job.flags.mode == "overfit" else 0
    if job.flags.print_param_hash:
        print(f"params sha256 {params_sha256(params)}", flush=True)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
