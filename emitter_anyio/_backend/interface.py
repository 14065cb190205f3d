"""The interface of a backend: what the client needs beyond AnyIO."""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Final

import anyio
from anyio import ClosedResourceError

READ_CHUNK_BYTES: Final = 65536
"""The default size of a read, in bytes."""


class Wakeup(ABC):
    """An event for a single waiting task, cheaper than :class:`anyio.Event`."""

    __slots__ = ()

    @abstractmethod
    def set(self) -> None:
        """Wake the waiting task, if there is one. Setting it again has no effect."""

    @abstractmethod
    def wait(self) -> Awaitable[None]:
        """Wait until it is set. If it is already set, this is not a checkpoint."""


class LastHeard:
    """
    The time at which bytes last arrived from the peer.

    It is updated as soon as bytes are received, which might be before a task handles them.

    :param clock: returns the time of the event loop
    """

    __slots__ = ("clock", "time")

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.time = clock()

    def note(self) -> None:
        """Record that bytes have arrived, or that the reader was unable to receive them."""
        self.time = self.clock()

    def follow(self, other: LastHeard) -> None:
        """Copy the time of another transport."""
        self.time = other.time


class Reader(ABC):
    """A reader of a socket, for one task at a time."""

    last_heard: LastHeard

    @abstractmethod
    async def receive(self, size: int, into: memoryview | None = None) -> bytes | memoryview:
        """
        Wait for bytes.

        :param size: the maximum number of bytes to return, unless they are received into a view
        :param into: the memory into which they may be received
        :return: at least one byte, or the filled part of ``into``; an empty result at the end of
            the stream
        :raises ~anyio.ClosedResourceError: if the reader is closed

        Cancelling it loses no bytes.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop reading; a waiting task raises :exc:`~anyio.ClosedResourceError`."""


class WaitingReader(Reader):
    """A reader that waits for its socket before each read, which is cheap on Trio."""

    def __init__(self, sock: socket.socket, clock: Callable[[], float]) -> None:
        self.last_heard = LastHeard(clock)
        self._sock = sock
        self._closed = False

    async def receive(self, size: int, into: memoryview | None = None) -> bytes | memoryview:
        while True:
            if self._closed:
                raise ClosedResourceError
            await anyio.wait_readable(self._sock)
            try:
                if into is None:
                    data: bytes | memoryview = self._sock.recv(size)
                else:
                    data = into[: self._sock.recv_into(into)]
            except (BlockingIOError, InterruptedError):
                continue
            self.last_heard.note()
            return data

    def close(self) -> None:
        self._closed = True
        anyio.notify_closing(self._sock)


class Backend(ABC):
    """
    A running asyncio event loop or Trio run.

    :ivar token: an object that identifies the event loop or run
    :ivar clock: returns the time of the event loop
    :ivar make_wakeup: makes a :class:`Wakeup`
    :ivar runs_task: returns a true value in a task of the event loop, and a false value in its
        callbacks. It must be called in the thread of the event loop
    :ivar pause: gives other tasks one turn. If the task is cancelled, it might raise the
        cancellation or return
    """

    token: object
    clock: Callable[[], float]
    make_wakeup: Callable[[], Wakeup]
    runs_task: Callable[[], object]
    pause: Callable[[], Awaitable[None]]

    @abstractmethod
    def open_reader(self, sock: socket.socket) -> Reader:
        """Return a reader of a non-blocking socket."""

    @abstractmethod
    def current_task(self) -> object:
        """Return the current task."""

    @abstractmethod
    def has_ended(self, task: object) -> bool:
        """Return whether a task has ended without leaving a task group that it had entered."""

    @abstractmethod
    def abandons_tasks(self, host: object) -> bool:
        """Return whether a task has ended with an open task group, so that the run ends, too."""

    @abstractmethod
    def native_cancellations(self) -> int:
        """Return the number of native cancellations of the current task (``Task.cancel()``)."""
