"""Trains a model on text: `python scripts/train.py --help`.

Invariant: nothing is written before all input is known to be good, in every process of the run.
"""

# ruff: noqa: E402 (the clock starts before the other imports, which take seconds)
import sys
import time
from pathlib import Path

BEGAN = time.time()
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs, installed or not

from scripts.common.quick_imports import quick_imports

with quick_imports():
    import jax

    from data.pipeline import training_batches
    from parallax.model.flops import step_flops
    from parallax.model.overview import parameter_overview
    from parallelism.hosts import Cluster, fix_cpu_rounding, join, run_process
    from scripts.common.command_line import errors_in_one_line
    from scripts.common.ending import ending_early
    from scripts.common.jax_process import expect_no_gpu, keep_compiled_programs, keep_large_buffers
    from scripts.training.attempt import Attempt
    from scripts.training.flags import read_flags
    from scripts.training.job import Job, prepare_job, say_stopped


def main() -> int:
    """Exit status: 0 finished, or stopped as asked; 1 failed, and would again; 2 bad input; 3 failed from
    outside; 4 lost a peer; 5 lost a device, or a step did not end; 130 interrupted twice."""
    expect_no_gpu()
    keep_large_buffers()
    keep_compiled_programs()
    with errors_in_one_line():
        flags = read_flags()
        if flags.train.reduction == "exact":
            fix_cpu_rounding()
        join(Cluster(flags.coordinator, flags.num_processes, flags.process_id, flags.local_device_ids))
        with ending_early(say_stopped):
            job = prepare_job(flags)
            job.describe()
            if flags.lower_only:
                return show_costs(job)
            attempt = Attempt(job, BEGAN)
        with ending_early(attempt.leave):
            state = attempt.prepare()
    return attempt.run(state)


def show_costs(job: Job) -> int:
    """Compiles the step without running it; prints the parameters and what a step takes of a device."""
    settings = job.flags.train
    batch = next(training_batches(job.training, batch_size=settings.batch_size, seed=settings.seed))
    memory = job.strategy.lower(job.step, batch).compile().memory_analysis()
    if not job.strategy.is_writer:
        return 0
    leaves = job.strategy.abstract().params
    placed = None
    if job.flags.strategy == "mesh":
        placed = jax.tree.map(lambda leaf: leaf.sharding.spec, leaves)
    print(parameter_overview(job.flags.model, placed))
    print(f"A step takes {step_flops(job.flags.model, settings.batch_size, settings.seq_len):.4g} FLOPs in all.")
    if memory is not None:  # a backend may not say
        print(
            f"A device holds {memory.argument_size_in_bytes:,} bytes of state and batch, "
            f"and needs {memory.temp_size_in_bytes:,} bytes beside them while it computes."
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(run_process(main))
