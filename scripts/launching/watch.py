"""One run on the hosts of a TPU: shipped to them, started on all, and watched until it ends.

Invariant: a run counts as finished only when every host says that its train.py exited with 0 by itself.
"""

import dataclasses
import re
import shlex
import signal
import time
from collections.abc import Mapping, Sequence

from parallelism.exit_status import FAILED, OUTSIDE_FAILURE
from scripts.launching.gcloud import ANSWER_SECONDS, GcloudError, Node, find_node, run_all
from scripts.launching.supervisor import Death, describe_status, first_to_fail, last_step
from scripts.launching.tpu_lifecycle import Keeper

PATIENCE = 5
"""How many looks in a row may fail before hosts that cannot be seen count as lost."""
CONNECTIONS = 3
"""How often hosts are called before a start; gcloud itself tries ten times each."""


PREPARE_SECONDS = 1800
"""How long all hosts together may take to install what a commit needs; ssh would wait for a dead one for ever."""
START_SECONDS = 600
"""How long they may take to end what runs, which systemd gives 180 s, to free the chips and to start train.py."""
STOP_SECONDS = 400
"""How long they may take to save and stop; systemd gives each 180 s."""


@dataclasses.dataclass(frozen=True)
class HostCommands:
    """The lines of bash that a run takes on each host.

    Args:
      archive: gs:// address of the commit.
      commit: its name.
    """

    archive: str
    commit: str

    def prepare(self) -> str:
        """Unpacks the commit, beside any other, and makes its environment."""
        folder = f"parallax/{self.commit}"
        unpack = f"gcloud storage cp {shlex.quote(self.archive)} - --quiet | tar -xz -C {folder}"
        current = f"ln -sfn {self.commit} parallax/current"
        return f"set -euo pipefail; mkdir -p {folder}; {unpack}; {current}; {self._host('prepare')}"

    def start(self, logs: str, first: int, flags: Sequence[str]) -> str:
        """On the hosts of a slice, the first of which is that number among the hosts of all."""
        return self._host("start", logs, str(first), *flags)

    def report(self) -> str:
        return self._host("report")

    def stop(self) -> str:
        return f"{self._host('stop')} && {self._host('report')}"

    def _host(self, *words: str) -> str:
        return shlex.join(["bash", f"parallax/{self.commit}/scripts/launching/host.sh", *words])


@dataclasses.dataclass(frozen=True)
class Report:
    """What one host says of its train.py."""

    state: str
    """running, exited, stopped or lost."""
    code: int = 0

    @property
    def status(self) -> int | None:
        """As `first_to_fail` takes it."""
        if self.state == "running":
            return None
        if self.state == "lost":
            return -signal.SIGKILL
        if self.state == "stopped" and self.code == 0:
            return OUTSIDE_FAILURE  # not asked by us: by a host that is going down
        return 128 - self.code if self.code > 128 else self.code

    def describe(self) -> str:
        if self.state == "lost":
            return "ended without a word"
        if self.state == "stopped" and self.code == 0:
            return "was stopped by its host"
        return describe_status(self.status or 0)


def read_reports(text: str) -> tuple[dict[int, Report], list[str]]:
    """The reports by worker, and the lines of output beside them."""
    found = re.findall(r"^parallax (\d+) (running|exited|stopped|lost) ?(\d*)$", text, re.MULTILINE)
    reports = {int(worker): Report(state, int(code or 0)) for worker, state, code in found}
    return reports, [line for line in text.splitlines() if re.match(r"\[\d+\] ", line)]


class Training:
    """A run on one TPU, over all of its attempts.

    Args:
      keeper: who creates the TPU.
      train_flags: those of train.py, with --output-dir.
      logs: gs:// folder for attempt-K/process-I.log.
    """

    def __init__(self, keeper: Keeper, commands: HostCommands, train_flags: Sequence[str], logs: str):
        self._keeper, self._commands = keeper, commands
        self._train_flags, self._logs = train_flags, logs
        self._say = keeper.say
        self._spoilt = self._reached = False
        self._shown, self._step = "", None
        self.started = False
        """Whether there is anything to stop."""

    def attempt(self, number: int) -> Death | None:
        """One attempt, with a TPU for it; None if the run finished.

        Raises:
          GcloudError: the TPU is not to be had, or not to be deleted.
          ValueError: there is another one of that name.
        """
        if self._spoilt:
            self._say(f"deleting {self._keeper.tpu.name} before another is created")
            self._keeper.delete()
            self._spoilt = False
        node, self._step = self._keeper.ensure(), None
        logs = f"{self._logs}/attempt-{number}"
        try:
            self._call(self._on_each(self._commands.prepare()), "preparing", PREPARE_SECONDS)
            self.started = True
            resume = ["--resume"] if number > 1 and "--resume" not in self._train_flags else []
            hosts, flags = node.hosts // self._keeper.tpu.slices, [*self._train_flags, *resume]
            starts = [self._commands.start(logs, i * hosts, flags) for i in range(self._keeper.tpu.slices)]
            self._call(starts, "starting train.py on", START_SECONDS)
            self._say(f"train.py runs on {node.hosts} host(s); its output: {logs}")
        except GcloudError as error:
            self._spoilt = error.unreachable
            may_pass = error.unreachable and self._reached
            death = Death(OUTSIDE_FAILURE if may_pass else FAILED, str(error))
        else:
            death = self._watch()
        if death is not None:
            self._say(death.what)
        return death

    def stop(self) -> int:
        """Lets train.py save and stop on every host: 0 if it did, else OUTSIDE_FAILURE."""
        try:
            reports, _ = read_reports(self._ssh(self._on_each(self._commands.stop()), STOP_SECONDS))
        except GcloudError as error:
            self._say(str(error))
            return OUTSIDE_FAILURE
        saved = bool(reports) and all(report.code == 0 for report in reports.values())
        return 0 if saved and all(report.state != "lost" for report in reports.values()) else OUTSIDE_FAILURE

    def _on_each(self, command: str) -> list[str]:
        return [command] * self._keeper.tpu.slices

    def _ssh(self, commands: Sequence[str], seconds: float) -> str:
        """A line of bash for each slice, on all of its hosts; all at the same time. What all printed."""
        nodes = self._keeper.tpu.nodes()
        return run_all([node.ssh(line) for node, line in zip(nodes, commands, strict=True)], seconds=seconds)

    def _call(self, commands: Sequence[str], what: str, seconds: float) -> None:
        self._say(f"{what} all hosts of {self._keeper.tpu.name}")
        for tries_left in reversed(range(CONNECTIONS)):
            try:
                self._ssh(commands, seconds)
                self._reached = True
                return
            except GcloudError as error:
                if not error.unreachable or not tries_left:
                    raise
                self._say(f"{error}; trying again")
            time.sleep(self._keeper.pause)

    def _watch(self) -> Death | None:
        misses, name = 0, self._keeper.tpu.name
        while True:
            time.sleep(self._keeper.poll)
            try:
                node = find_node(self._keeper.tpu)
            except GcloudError as error:
                trouble = str(error)
            else:
                if node is not None and node.returning:
                    return Death(OUTSIDE_FAILURE, f"TPU {name} is {node.state}: its hosts are down, and will be back")
                if node is None or not node.ready:
                    self._spoilt = True
                    state = "gone" if node is None else node.state
                    return Death(OUTSIDE_FAILURE, f"TPU {name} is {state}: it was preempted, or deleted")
                reports, trouble = self._look(node)
                failed = first_to_fail({worker: report.status for worker, report in reports.items()})
                if failed is not None:
                    return self._death(failed, reports)
                if reports and not trouble and all(report.state == "exited" for report in reports.values()):
                    return None
            misses = misses + 1 if trouble else 0
            if trouble:
                self._say(f"{trouble} ({misses} of {PATIENCE})")
            if misses == PATIENCE:
                self._spoilt = True
                return Death(OUTSIDE_FAILURE, f"TPU {name} or a host of it cannot be reached any more")

    def _look(self, node: Node) -> tuple[dict[int, Report], str]:
        """What the hosts say, and what is wrong if some say nothing."""
        trouble = ""
        try:
            text = self._ssh(self._on_each(self._commands.report()), ANSWER_SECONDS)
        except GcloudError as error:
            text, trouble = error.out, str(error)
        reports, lines = read_reports(text)
        step = last_step("\n".join(lines))
        self._step = self._step if step is None else step
        silent = [str(worker) for worker in range(node.hosts) if worker not in reports]
        if lines and lines[-1] != self._shown:
            dead = any(report.status for report in reports.values())
            for line in lines if dead else lines[-1:]:
                self._say(line)
            self._shown = lines[-1]
        return reports, trouble or (f"no word from worker {', '.join(silent)}" if silent else "")

    def _death(self, worker: int, reports: Mapping[int, Report]) -> Death:
        running = sum(report.state == "running" for report in reports.values())
        others = f"; ending the other {running}" if running else ""
        return Death(reports[worker].status or 0, f"worker {worker} {reports[worker].describe()}{others}", self._step)
