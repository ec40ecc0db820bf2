"""Where the server listens.

Invariant: without a key, only this machine reaches it.
"""

import ipaddress
import socket

BACKLOG = 2048
"""Clients that may wait to be heard: what uvicorn takes."""


def listen(host: str, port: int, key: str) -> socket.socket:
    """A bound socket, which listens once the server answers.

    Raises:
      ValueError: the address is unknown or in use, or open to other machines without a key.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise ValueError(
            f"--host {host!r} must be an address of this machine ({error}); try 127.0.0.1"
        ) from None
    if not key and not is_loopback(str(address[0])):
        raise ValueError(
            f"--host {host} is open to other machines and needs --api-key; give one, or leave --host out"
        )
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
