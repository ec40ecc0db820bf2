"""What the server counts, for Prometheus.

Invariant: a registry of its own, so that two servers in one process count apart.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from parallax.serving.engine import Engine

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Counts:
    """The numbers of one server."""

    def __init__(self, engine: Engine, slots: int):
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
            ("slots", "Slots that there are.", lambda: slots),
            ("slots_busy", "Slots in use.", lambda: engine.busy),
            ("answers_waiting", "Completions that wait for a slot.", lambda: engine.waiting),
            ("answers_open", "Completions that wait or are under way.", lambda: engine.under_way),
        ):
            Gauge(f"parallax_{name}", words, registry=registry).set_function(value)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
