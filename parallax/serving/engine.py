"""The thread that owns the Batcher, what the server's event loop sees of it, and what is counted for Prometheus.

Invariant: the Batcher is touched by that one thread alone; orders go in by a queue, tokens come out by the event loop's
own. An answer that nobody waits for holds no slot longer than the step under way. If a step fails, the answers in slots
end with an error, those that wait go on waiting, and the slots are made again; if that fails too, every answer ends
with an error and `on_failure` is called: nothing waits for ever.
"""

import asyncio
import functools
import itertools
import queue
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from parallax.inference.batching import Batcher, Token
from parallax.inference.request import Request
from parallax.serving.errors import Refusal

ENDING = "the server is shutting down; send the request again in a while"
FAILED = "the server's engine failed and the server ends; its standard error says why"
LOST = "the step that computed this answer failed, as the server's standard error says; send the request again"
PAUSES = (0.0, 0.1, 0.5, 2.0)
"""Seconds before each attempt to make the slots again."""


class Engine:
    """Answers completions. All methods but `warm_up` belong to the event loop given to `attach`."""

    def __init__(self, make_batcher: Callable[[], Batcher], max_waiting: int):
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self.busy = 0
        """Slots in use after the last turn of the thread."""
        self.degraded = False
        """Whether a step failed and the slots are not made again yet."""
        self._make_batcher, self._max_waiting = make_batcher, max_waiting
        self._tickets = itertools.count()
        self._jobs: dict[int, Job] = {}
        self._waiting: set[int] = set()
        self._closed: Refusal | None = None
        # (ticket, what to run, or None to cancel it); None ends the thread.
        self._orders: queue.SimpleQueue[tuple[int, Request | None] | None] = queue.SimpleQueue()
        self._ready: Future[Batcher] = Future()
        self._thread = threading.Thread(target=self._live, name="engine", daemon=True)

    def warm_up(self) -> None:
        """Starts the thread and returns once everything is compiled; raises what the making of the Batcher raises."""
        self._thread.start()
        self._batcher = self._ready.result()

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    @property
    def under_way(self) -> int:
        """Answers that have not ended: those in slots and those that wait."""
        return len(self._jobs)

    @property
    def reused(self) -> int:
        """Tokens of prompts that were not read again."""
        return self._batcher.reused

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, completions: Sequence[Request]) -> "Job":
        """Puts completions into the queue, all or none.

        Raises Refusal if one can never run here (400), the queue is full (429), or the server ends (503).
        """
        for completion in completions:
            try:
                self._batcher.check(completion)
            except ValueError as error:
                raise Refusal(400, str(error), param="prompt", code="context_length_exceeded") from None
        if self._closed:
            raise self._closed
        if self.waiting + len(completions) > self._max_waiting:
            rule = f"at most {self._max_waiting} answers may wait, and {self.waiting} do"
            message = f"{rule}; try again in a second, or ask for fewer than {len(completions)}"
            raise Refusal(429, message, code="queue_full", headers={"Retry-After": "1"})
        job = Job(self, [next(self._tickets) for _ in completions])
        self._jobs |= dict.fromkeys(job.tickets, job)
        self._waiting.update(job.tickets)
        for order in zip(job.tickets, completions, strict=True):
            self._orders.put(order)
        return job

    def drop(self, ticket: int) -> None:
        """Frees what an answer holds; no token of it is delivered any more."""
        if self._jobs.pop(ticket, None):
            self._waiting.discard(ticket)
            self._orders.put((ticket, None))

    def close(self, reason: Refusal) -> None:
        """Ends every answer with `reason`, and takes no more."""
        self._closed = self._closed or reason
        for job in set(self._jobs.values()):
            job.inbox.put_nowait(reason)
        for ticket in list(self._jobs):
            self.drop(ticket)

    async def stop(self) -> None:
        """Ends what is under way, and the thread after its present step."""
        self.close(Refusal(503, ENDING, code="shutting_down"))
        self._orders.put(None)
        await asyncio.to_thread(self._thread.join, 10)

    def _live(self) -> None:
        """The thread."""
        try:
            batcher = self._make_batcher()
            batcher.warm_up()
            self._ready.set_result(batcher)
            slots = batcher.free
            waiting: dict[int, Request] = {}  # in the order of their arrival
            while self._obey(batcher, waiting, idle=batcher.free == slots):
                tokens: list[Token] = []
                lost = self._take_turn(batcher, waiting, tokens)
                self.busy = slots - batcher.free
                if tokens:
                    self._loop.call_soon_threadsafe(self._deliver, tokens)
                if self.degraded:
                    self._loop.call_soon_threadsafe(self._lose, lost)
                    self._rebuild(batcher)
        except BaseException as error:
            if self._ready.done():
                self._loop.call_soon_threadsafe(self._fail, error)
            else:
                self._ready.set_exception(error)

    def _take_turn(self, batcher: Batcher, waiting: dict[int, Request], tokens: list[Token]) -> set[int]:
        """Admits what there is room for and takes a step, into `tokens`; the tickets that an error of these ended."""
        admitted, before = set(), batcher.under_way
        try:
            while waiting and batcher.free:
                ticket = next(iter(waiting))
                admitted.add(ticket)
                tokens += batcher.admit(ticket, waiting.pop(ticket))
            tokens += batcher.step()
        except Exception:
            self.degraded = True
            traceback.print_exc()
            return admitted | before  # some of these may have ended in the step that failed
        return set()

    def _rebuild(self, batcher: Batcher) -> None:
        """Raises what the last attempt raises."""
        pauses = list(PAUSES)
        while self.degraded:
            time.sleep(pauses.pop(0))
            try:
                batcher.rebuild()
                self.degraded = False
            except Exception:
                if not pauses:
                    raise
                traceback.print_exc()

    def _obey(self, batcher: Batcher, waiting: dict[int, Request], *, idle: bool) -> bool:
        """Takes the orders that are there, and if idle waits for one; whether to go on."""
        wait = idle and not waiting
        if wait:
            self.busy = 0
        while wait or not self._orders.empty():
            order = self._orders.get()
            wait = False
            if order is None:
                return False
            ticket, completion = order
            if completion:
                waiting[ticket] = completion
            elif waiting.pop(ticket, None) is None:
                batcher.cancel(ticket)
        return True

    def _deliver(self, tokens: list[Token]) -> None:
        for token in tokens:
            self._waiting.discard(token.ticket)
            if job := self._jobs.get(token.ticket):
                job.inbox.put_nowait(token)
                if token.finish:
                    del self._jobs[token.ticket]

    def _lose(self, tickets: set[int]) -> None:
        for ticket in tickets:
            if job := self._jobs.get(ticket):
                job.inbox.put_nowait(Refusal(500, LOST, code="step_failed"))
                self.drop(ticket)

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        self.close(Refusal(500, FAILED, code="engine_failed"))
        self.on_failure()


class Job:
    """The completions of one request under way; `inbox` takes their tokens, or why they end before their time."""

    def __init__(self, engine: Engine, tickets: list[int]):
        self.tickets = tickets
        self.inbox: asyncio.Queue[Token | Refusal] = asyncio.Queue()
        self._engine, self._open = engine, set(tickets)

    async def tokens(self) -> AsyncIterator[tuple[int, Token]]:
        """(number of the completion, token) as they come, until each completion ended or was dropped.

        Raises Refusal if the server ends or a step fails.
        """
        while self._open:
            token = await self.inbox.get()
            if isinstance(token, Refusal):
                raise token
            if token.ticket in self._open:
                if token.finish:
                    self._open.discard(token.ticket)
                yield token.ticket - self.tickets[0], token

    def drop(self, number: int) -> None:
        """Ends one completion early."""
        self._open.discard(self.tickets[number])
        self._engine.drop(self.tickets[number])

    def close(self) -> None:
        """Ends what is not ended."""
        for ticket in self._open:
            self._engine.drop(ticket)
        self._open.clear()


SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Counts:
    """The numbers of one server, in a registry of its own, so that two servers in one process count apart.

    Args:
      engines: of all of its models.
      slots: that each of them has.
    """

    def __init__(self, engines: Sequence[Engine], slots: int):
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("parallax_requests", "Requests answered.", ["status"], registry=registry)
        self.answers = Counter(
            "parallax_answers",
            "Completions that ended, by how: stop, length, or unfinished (the client or the server went away).",
            ["finish"],
            registry=registry,
        )
        self.tokens = Counter("parallax_tokens", "Tokens read and generated.", ["kind"], registry=registry)
        self.first_token = Histogram(
            "parallax_first_token_seconds", "From the request to its first token.", buckets=SECONDS, registry=registry
        )
        for name, words, value in (
            ("slots", "Slots that there are.", lambda engine: slots),
            ("slots_busy", "Slots in use.", lambda engine: engine.busy),
            ("answers_waiting", "Completions that wait for a slot.", lambda engine: engine.waiting),
            ("prompt_tokens_reused", "Tokens of prompts that were in memory already.", lambda engine: engine.reused),
            ("answers_open", "Completions that wait or are under way.", lambda engine: engine.under_way),
        ):
            gauge = Gauge(f"parallax_{name}", words, registry=registry)
            gauge.set_function(functools.partial(lambda value: sum(map(value, engines)), value))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
