"""What the client needs from a backend beyond AnyIO."""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Final

import anyio
from anyio import ClosedResourceError

READ_CHUNK_BYTES: Final = 65536
"""The bytes that are read at a time, unless a larger packet is awaited."""


class Wakeup(ABC):
    """An event that one task awaits; it costs a fraction of an :class:`anyio.Event`."""

    __slots__ = ()

    @abstractmethod
    def set(self) -> None:
        """Wake the task that waits, if there is one; setting it again has no effect."""

    @abstractmethod
    def wait(self) -> Awaitable[None]:
        """Wait until it is set. This is no checkpoint if it is set already."""


class LastHeard:
    """
    The time at which bytes last arrived from the peer.

    It is set where bytes are received: they show that the peer is alive before a task handles them.

    :param clock: returns the time of the event loop
    """

    __slots__ = ("clock", "time")

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.time = clock()

    def note(self) -> None:
        """Note that bytes have arrived, or that they could not: the reader was busy."""
        self.time = self.clock()

    def follow(self, other: LastHeard) -> None:
        """Take over the time of the transport below."""
        self.time = other.time


class Reader(ABC):
    """Reads from one socket, for one task at a time."""

    last_heard: LastHeard

    @abstractmethod
    async def receive(self, size: int) -> bytes:
        """
        Wait for bytes; cancelling it loses none.

        :param size: the most bytes to return
        :return: at least one byte, or none at the end
        :raises ~anyio.ClosedResourceError: once the reader is closed
        """

    @abstractmethod
    def close(self) -> None:
        """Stop reading; a task that waits gets a :exc:`~anyio.ClosedResourceError`."""


class WaitingReader(Reader):
    """Waits for the socket before each read, which costs little on Trio."""

    def __init__(self, sock: socket.socket, clock: Callable[[], float]) -> None:
        self.last_heard = LastHeard(clock)
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
            self.last_heard.note()
            return data

    def close(self) -> None:
        self._closed = True
        anyio.notify_closing(self._sock)


class Backend(ABC):
    """
    A running event loop of asyncio, or a run of Trio.

    :ivar token: identifies the event loop or run
    :ivar clock: returns its time
    :ivar make_wakeup: makes a :class:`Wakeup`
    :ivar runs_task: returns a true value if one of its tasks runs, in its own thread. Other code of
        the event loop might run as well
    """

    token: object
    clock: Callable[[], float]
    make_wakeup: Callable[[], Wakeup]
    runs_task: Callable[[], object]

    @abstractmethod
    def open_reader(self, sock: socket.socket) -> Reader:
        """Begin to read from a non-blocking socket."""

    @abstractmethod
    def current_task(self) -> object:
        """Return the task that runs."""

    @abstractmethod
    def has_ended(self, task: object) -> bool:
        """Return whether a task has ended that had entered a task group and not left it."""

    @abstractmethod
    def native_cancellations(self) -> int:
        """Return how often the current task was cancelled other than by a cancel scope."""
