"""ladder.py design: which runs a ladder has, so that they take the time or the operations that there are.

Invariant: every size is timed on this machine before anything is written, with the step that train.py will run.
"""

import dataclasses
import itertools
import time
from collections.abc import Sequence
from pathlib import Path

from data.pipeline import training_batches
from parallax.config import TransformerConfig
from parallax.training.optimizer import make_learning_rate
from scripts.common.command_line import parse, tell
from scripts.common.layer_words import REGISTRY
from scripts.common.tables import show_numbers
from scripts.forecasting.family import below, flops_of, size_of, with_mup
from scripts.forecasting.flags import DesignFlags
from scripts.forecasting.ladder import Ladder, Member, require_new
from scripts.forecasting.running import EVALUATIONS
from scripts.training.flags import Flags, preset_of
from scripts.training.job import Job, prepare_job
from scripts.training.step import TimedRun

DESCRIPTION = "Choose runs of small models from whose losses that of a large one can be told."
DATA = ("dataset", "data_dir", "tokenizer", "packing", "held_out", "eval_tokens")
"""Flags that say what is learned and evaluated, the same for all runs."""
LEAST_STEPS = 50
"""A shorter run is mostly warm-up."""
TIMED_SECONDS = 1.0
EVALUATION_COST = 1 / 3
"""A forward pass takes this share of a step."""


@dataclasses.dataclass(frozen=True)
class Timed:
    """A size of the model, and what it takes here."""

    model: TransformerConfig
    params: int
    flops: float
    """Of a step."""
    step_seconds: float
    other_seconds: float
    """Of a run, beside its steps: it starts, compiles and evaluates."""


def design(args: Sequence[str]) -> int:
    """Writes the ladder and shows it. Exit status 0."""
    default = DesignFlags(model=preset_of(args))
    flags = parse(DesignFlags, default=default, description=DESCRIPTION, args=args, registry=REGISTRY)
    flags.check_whole()
    ladder = design_ladder(flags)
    ladder.write()
    show(ladder)
    print(f"python scripts/ladder.py run {ladder.folder}")
    return 0


def design_ladder(flags: DesignFlags) -> Ladder:
    """Times each size and chooses steps. Raises ValueError if the budget is too small, or any input is wrong."""
    folder = Path(flags.output)
    require_new(folder)  # before minutes go to timing
    models, target = _family(flags)
    data = {name: getattr(flags, name) for name in DATA}
    timed, jobs = [], []
    for model in models:
        began = time.perf_counter()
        job = prepare_job(Flags(**data, config=flags.config, train=flags.train, learning=flags.learning, model=model))
        timed.append(_timed(job, began))
        jobs.append(job)
        tell(f"timed     width {model.embed_dim}: {timed[-1].step_seconds:.3g} s a step")
    job = jobs[0]
    target = dataclasses.replace(target, vocab_size=job.tokenizer.vocab_size)
    return Ladder(
        folder,
        target,
        data,
        job.corpus.sha256,
        len(job.training.all_ids()) * job.training.seq_len,
        flags.train,
        flags.learning,
        tuple(members_of(flags, timed)),
    )


def _family(flags: DesignFlags) -> tuple[list[TransformerConfig], TransformerConfig]:
    """The sizes, and the target, in one parametrization."""
    models, target = below(flags.model, flags.sizes, flags.largest), flags.model
    if flags.parametrization == "standard" or target.parametrization.kind == "mup":
        return models, target
    return [with_mup(model, models[0]) for model in models], with_mup(target, models[0])


def members_of(flags: DesignFlags, timed: Sequence[Timed]) -> list[Member]:
    """The longest runs that the budget allows. Raises ValueError if those are too short."""
    doublings, count = [2**number for number in range(flags.lengths)], flags.lengths * flags.seeds
    if flags.minutes is not None:
        left = flags.minutes * 60 - sum(count * each.other_seconds for each in timed)
        shortest = left / (flags.seeds * sum(doublings) * sum(each.step_seconds for each in timed))
    else:
        shortest = (flags.flops or 0) / (flags.seeds * sum(doublings) * sum(each.flops for each in timed))
    steps = int(shortest)
    if steps < LEAST_STEPS:
        asked = f"--minutes {flags.minutes:g}" if flags.minutes is not None else f"--flops {flags.flops:g}"
        raise ValueError(
            f"{asked} leaves {max(0, steps)} steps for the shortest run and must leave {LEAST_STEPS}; give more, "
            "fewer --sizes or a smaller --largest"
        )
    make_learning_rate(flags.learning, steps)  # refuses a warm-up that is longer than the shortest run
    found = []
    for each, times, seed in itertools.product(timed, doublings, range(flags.seeds)):
        own = steps * times
        found.append(
            Member(
                name=f"{each.model.embed_dim}x{own}" + (f"-{seed}" if flags.seeds > 1 else ""),
                model=each.model,
                steps=own,
                seed=flags.train.seed + seed,
                params=each.params,
                flops=each.flops * own,
                seconds=each.other_seconds + own * each.step_seconds,
            )
        )
    return found


def _timed(job: Job, began: float) -> Timed:
    """Runs steps of the job until they have taken a second, the first ones aside."""
    settings, rows = job.flags.train, job.strategy.rows(job.flags.train.batch_size)
    batches = training_batches(job.training, batch_size=settings.batch_size, seed=settings.seed, rows=rows)
    run = TimedRun(job.strategy, job.step, settings, batches)
    run.advance(2)
    ready, steps = time.perf_counter() - began, 4
    while (seconds := run.advance(steps)) < TIMED_SECONDS:
        steps *= 2
    model, tokens = job.flags.model, settings.batch_size * settings.seq_len
    evaluated = min(job.flags.eval_tokens or 2**62, len(job.held_out.all_ids()) * settings.seq_len) / tokens
    evaluation = EVALUATION_COST * evaluated * seconds / steps
    return Timed(
        model,
        size_of(model),
        flops_of(model, settings.seq_len) * tokens,
        seconds / steps,
        ready + EVALUATIONS * evaluation,
    )


def show(ladder: Ladder) -> None:
    """The members as a table, and what they take together."""
    columns = ("run", "width", "layers", "parameters", "tokens", "a parameter", "epochs", "FLOPs", "minutes")
    rows = []
    for member in ladder.members:
        tokens, model = ladder.tokens(member), member.model
        row = [member.name, str(model.embed_dim), str(model.num_layers), f"{member.params:,}", f"{tokens:,}"]
        row += [f"{tokens / member.params:.1f}", f"{tokens / ladder.unique_tokens:.2f}"]
        rows.append([*row, f"{member.flops:.3g}", f"{member.seconds / 60:.1f}"])
    title = f"{ladder.folder}: {len(ladder.members)} runs below {size_of(ladder.target):,} parameters"
    show_numbers(title, columns, rows)
    minutes = sum(member.seconds for member in ladder.members) / 60
    print(f"All runs take about {minutes:.0f} minutes here. Parameters are those a token uses, embedding tables aside.")
