"""ladder.py report: what of a ladder is done, and what its runs say.

Invariant: only reads.
"""

from collections.abc import Sequence

from scripts.common.command_line import parse
from scripts.common.tables import show_numbers
from scripts.forecasting.fitting import fit_ladder, show
from scripts.forecasting.flags import LadderFlags
from scripts.forecasting.ladder import Ladder, Result, read_ladder, result_of

DESCRIPTION = "Show how far the runs of a ladder are, and their fit where there are enough."


def report(args: Sequence[str]) -> int:
    """Exit status 0."""
    ladder = read_ladder(parse(LadderFlags, description=DESCRIPTION, args=args).ladder)
    results = [result_of(ladder, member) for member in ladder.members]
    _show_runs(ladder, results)
    left = sum(result.member.seconds for result in results if result.loss is None and not result.failure)
    if left:
        print(f"about {left / 60:.0f} minutes are left: python scripts/ladder.py run {ladder.folder}")
    try:
        show(fit_ladder(ladder))
    except ValueError as error:
        print(f"no law yet: {error}")
    return 0


def _show_runs(ladder: Ladder, results: Sequence[Result]) -> None:
    rows = []
    for result in results:
        done, loss = result.curve[-1] if result.curve else (0.0, None)
        state = "failed" if result.failure else "finished" if result.loss is not None else ""
        shown = "" if loss is None else f"{loss:.4f}"
        rows.append((result.member.name, f"{result.member.steps:,}", f"{done:.0%}", shown, state))
    show_numbers(str(ladder.folder), ("run", "steps", "done", "loss", ""), rows)
