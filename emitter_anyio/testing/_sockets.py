"""TCP sockets for the proxy. Unlike AnyIO's, they can reset a connection on both backends."""

from __future__ import annotations

import logging
import socket
import struct
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TypeVar

from anyio import (
    BrokenResourceError,
    EndOfStream,
    notify_closing,
    sleep,
    to_thread,
    wait_readable,
    wait_writable,
)
from anyio.abc import ByteStream

from emitter_anyio._backend.interrupts import uninterrupted

T = TypeVar("T")

ACCEPT_RETRY_SECONDS = 1.0
"""The delay before the next attempt after accepting a connection has failed."""

#: The value of SO_LINGER with which closing a socket resets the connection.
_NO_LINGER = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)

logger = logging.getLogger("emitter_anyio.testing")


class SocketStream(ByteStream):
    """
    A TCP socket as a byte stream.

    :param sock: the socket, which this stream closes
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def receive(self, max_bytes: int = 65536) -> bytes:
        if data := await _retry_when_ready(wait_readable, self._sock, self._sock.recv, max_bytes):
            return data
        raise EndOfStream

    async def send(self, item: bytes) -> None:
        while item:
            item = item[await _retry_when_ready(wait_writable, self._sock, self._sock.send, item) :]

    async def send_eof(self) -> None:
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    async def aclose(self) -> None:
        notify_closing(self._sock)
        self._sock.close()

    async def reset(self) -> None:
        """Close the socket and reset the connection."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        await self.aclose()


async def open_socket(host: str, port: int) -> SocketStream:
    """
    Connect to a server.

    :raises OSError: if it cannot be reached
    """
    return SocketStream(await to_thread.run_sync(socket.create_connection, (host, port), 10))


@contextmanager
def listening(host: str) -> Iterator[socket.socket]:
    """Listen on a free port."""
    with socket.create_server((host, 0)) as sock:
        sock.setblocking(False)
        try:
            yield sock
        finally:
            notify_closing(sock)


async def accept(sock: socket.socket) -> SocketStream:
    """Accept a connection of a listening socket."""
    client, _ = await _retry_when_ready(wait_readable, sock, sock.accept)
    return SocketStream(client)


@uninterrupted
async def keep_accepting(accept: Callable[[], Awaitable[None]]) -> NoReturn:
    """
    Accept connections until cancelled. After a failure, such as a lack of descriptors, try again.

    :param accept: a function that accepts one or more connections
    """
    while True:
        try:
            await accept()
        except (OSError, BrokenResourceError) as exc:
            # BrokenResourceError has the system's error as its cause.
            cause = exc.__cause__ or exc
            logger.warning(
                "could not accept a connection, retrying in %g s: %s", ACCEPT_RETRY_SECONDS, cause
            )
            await sleep(ACCEPT_RETRY_SECONDS)


async def _retry_when_ready(
    wait: Callable[[socket.socket], Awaitable[None]],
    sock: socket.socket,
    call: Callable[..., T],
    *args: Any,
) -> T:
    """Call a function, and repeat it when the socket is ready if it would block."""
    while True:
        try:
            return call(*args)
        except (BlockingIOError, InterruptedError):
            await wait(sock)
        except OSError as exc:
            raise BrokenResourceError from exc
