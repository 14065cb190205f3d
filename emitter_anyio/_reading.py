"""Reading from a socket, in the way that costs least on each backend."""

from __future__ import annotations

import asyncio
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final

import anyio
from anyio import ClosedResourceError

from ._backend import asyncio_loop, clock_of

CHUNK: Final = 65536
"""So many bytes are read at a time, where nothing larger is awaited."""


class LastHeard:
    """
    The time at which bytes last arrived from the peer.

    It is set where bytes are received: they show that the peer is alive before a task handles them.

    :param clock: returns the time of the loop
    """

    __slots__ = ("clock", "time")

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.time = clock()


class Reader(ABC):
    """What reads one socket, for one task at a time."""

    last_heard: LastHeard

    @abstractmethod
    async def receive(self, size: int) -> bytes:
        """Wait for some bytes, at most ``size``; none are the end. Cancelling it loses none."""

    @abstractmethod
    def close(self) -> None:
        """Read no more; whoever waits gets a :exc:`~anyio.ClosedResourceError`."""


class AskingReader(Reader):
    """Asks the loop each time, which costs little on Trio."""

    def __init__(self, sock: socket.socket, loop: asyncio.AbstractEventLoop | None) -> None:
        self.last_heard = LastHeard(clock_of(loop))
        self._sock = sock
        self._closed = False

    async def receive(self, size: int) -> bytes:
        while True:
            if self._closed:
                raise ClosedResourceError
            await anyio.wait_readable(self._sock)
            try:
                data = self._sock.recv(size)
            except (BlockingIOError, InterruptedError):
                continue
            self.last_heard.time = self.last_heard.clock()
            return data

    def close(self) -> None:
        self._closed = True
        anyio.notify_closing(self._sock)


class WatchingReader(Reader):
    """
    Has the loop of asyncio watch the socket all the time: to begin and to end it for each message
    takes two system calls and twice the time.

    It reads one chunk ahead at most. What then comes stays in the socket, and holds up the peer.
    """

    def __init__(self, sock: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        self.last_heard = LastHeard(loop.time)
        self._sock = sock
        self._loop = loop
        # Not the socket: where a selector does not know one, it words an error with its repr(),
        # which asks the system for both addresses, and then drops it.
        self._fileno = sock.fileno()
        self._size = CHUNK
        self._closed = False
        self._came: bytes | Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        loop.add_reader(self._fileno, self._readable)
        self._watched = True

    async def receive(self, size: int) -> bytes:
        self._size = size
        while self._came is None:
            if self._closed:
                raise ClosedResourceError
            if not self._watched:
                self._loop.add_reader(self._fileno, self._readable)
                self._watched = True
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        came, self._came = self._came, None
        if isinstance(came, Exception):
            try:
                raise came
            finally:
                # Its traceback has this frame.
                del came
        return came

    def close(self) -> None:
        self._closed = True
        self._watch_no_more()
        if self._came is None:
            self._arrived(ClosedResourceError())

    def _readable(self) -> None:
        if self._came is not None:
            self._watch_no_more()
            return
        try:
            data = self._sock.recv(self._size)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as exc:
            self._watch_no_more()
            self._arrived(exc)
        else:
            self.last_heard.time = self._loop.time()
            self._arrived(data)

    def _arrived(self, came: bytes | Exception) -> None:
        self._came = came
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _watch_no_more(self) -> None:
        if self._watched:
            self._watched = False
            self._loop.remove_reader(self._fileno)


def open_reader(sock: socket.socket) -> Reader:
    """Make what suits the backend that runs."""
    loop = asyncio_loop()
    if loop is None:
        return AskingReader(sock, loop)
    try:
        return WatchingReader(sock, loop)
    except NotImplementedError:
        # The loop of Windows watches no sockets; AnyIO knows how to do without.
        return AskingReader(sock, loop)
