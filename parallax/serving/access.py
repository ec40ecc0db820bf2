"""Who reaches the server, by which names, from which pages and with which key, and how much it takes on.

Invariant: without a key, only this machine reaches it, and a request that is refused here reaches nothing behind. A
page elsewhere cannot use the server through its reader's browser: by a name that it points here (DNS rebinding) it
fails on Host, by its own name on Origin. Memory is bounded by the limits, the slots and their capacity, whatever
clients send.
"""

import dataclasses
import hmac
import ipaddress
import socket
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from parallax.serving.errors import Refusal

BACKLOG = 2048
"""Connections that may wait to be accepted: uvicorn's default."""
SAFETY = {
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}


@dataclasses.dataclass(frozen=True)
class Limits:
    max_prompt_tokens: int = 1024
    """The longest prompt, in tokens."""
    max_tokens: int = 1024
    """The most tokens that an answer may ask for; prompt and answer together must also fit a slot."""
    max_answers: int = 32
    """The most answers that one request may ask for: its prompts times n."""
    queue: int = 256
    """How many answers may wait for a slot; a request beyond that is refused with status 429."""
    max_body_bytes: int = 1 << 20
    """The largest body of a request, in bytes."""
    body_seconds: int = 30
    """How long a body may take to arrive, in seconds; a request that is slower is refused with status 408."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, flag = getattr(self, field.name), f"--{field.name.replace('_', '-')}"
            if value < 1:
                raise ValueError(f"{flag} {value} must be at least 1; try {field.default}")
        if self.max_answers > self.queue:
            raise ValueError(
                f"--max-answers {self.max_answers} must not exceed --queue {self.queue}, or no such request could "
                f"ever wait; try --queue {self.max_answers}"
            )

    def within(self, capacity: int) -> "Limits":
        """These limits, with lengths that a slot of `capacity` tokens can hold."""
        return dataclasses.replace(
            self, max_prompt_tokens=min(self.max_prompt_tokens, capacity), max_tokens=min(self.max_tokens, capacity)
        )


def listen(host: str, port: int, key: str) -> socket.socket:
    """A bound socket, which listens once the server answers.

    Raises ValueError if the address is unknown or in use, or open to other machines without a key.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host {host!r} must be an address of this machine ({error}); try 127.0.0.1") from None
    if not key and not is_loopback(str(address[0])):
        raise ValueError(f"--host {host} is open to other machines and needs --api-key; give one, or leave --host out")
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _cannot_listen(host, port, error) from None
    return listener


def start_listening(listener: socket.socket) -> None:
    """Lets clients connect. Raises ValueError where another program bound the same address and was first."""
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        host, port = listener.getsockname()[:2]
        raise _cannot_listen(host, port, error) from None


def _cannot_listen(host: str, port: int, error: OSError) -> ValueError:
    remedy = "try --port 0, which takes a free one"
    return ValueError(f"--host {host} --port {port} cannot be listened on ({error.strerror}); {remedy}")


def address_of(listener: socket.socket) -> str:
    """What a browser opens."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_loopback(name: str) -> bool:
    """Whether a host's name or address can only mean this machine."""
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


@dataclasses.dataclass(frozen=True)
class Guard:
    """Middleware around the whole server.

    Args:
      names: what Host may say, beside the loopback's own addresses; None lets every name pass, which is safe only with
        a key.
      open_paths: what needs no key: the page, which asks for the key itself, and the question whether the server lives.
      count: takes the status of each answer.
    """

    app: ASGIApp
    names: frozenset[str] | None
    api_key: str
    open_paths: frozenset[str]
    count: Callable[[int], None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SAFETY)
                self.count(message["status"])
            await send(message)

        headers = Headers(scope=scope)
        try:
            self._check_names(headers)
            if scope["path"] not in self.open_paths:
                self._check_key(headers)
        except Refusal as refusal:
            return await refusal.response()(scope, receive, send_safely)
        return await self.app(scope, receive, send_safely)

    def _check_names(self, headers: Headers) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        name = _name_of(host)
        if self.names is not None and name not in self.names and not is_loopback(name):
            raise Refusal(
                403,
                f"Host={host!r} must name this server, which listens on this machine alone; try localhost",
                code="wrong_host",
            )
        if origin is not None and origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower()):
            raise Refusal(
                403,
                f"Origin={origin!r} must be this server's own page; no other page may use it; open / instead",
                code="wrong_origin",
            )

    def _check_key(self, headers: Headers) -> None:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), self.api_key.encode())
        if self.api_key and not (right and scheme.lower() == "bearer"):
            raise Refusal(
                401,
                "this server wants its key; send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _name_of(host: str) -> str:
    """The name in a Host header, without the port and the brackets of IPv6, in small letters."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().rstrip(".")
