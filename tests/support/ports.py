"""Ports for tests: one that answers no connection attempt, and free ones."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def unanswered_port() -> Iterator[int]:
    """Yield a port that answers no connection attempt, because its queue is full."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def pick_port(*hosts: str) -> int:
    """
    Return a port that is free at all hosts, outside the range of ephemeral ports.

    While its server is down, a client that is given an ephemeral port as its local port would
    connect to itself, and the server could not bind the port again.
    """
    while True:
        port = 20000 + secrets.randbelow(10000)
        with ExitStack() as stack:
            try:
                for host in hosts or ("127.0.0.1",):
                    sock = stack.enter_context(socket.socket())
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    sock.bind((host, port))
            except OSError:
                continue
            return port
