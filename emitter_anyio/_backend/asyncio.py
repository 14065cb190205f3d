"""The asyncio backend."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable
from functools import partial
from typing import Final

from anyio import ClosedResourceError

from .interface import READ_CHUNK_BYTES, Backend, LastHeard, Reader, WaitingReader, Wakeup

NativeCancelledError: Final = asyncio.CancelledError
"""The exception that awaiting a cancelled task or future raises."""


class AsyncioBackend(Backend):
    """
    An asyncio event loop.

    :param loop: the running loop
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.token = loop
        self.clock = loop.time
        self.make_wakeup = partial(FutureWakeup, loop)
        # In a guest run of Trio, no task of the host loop is current.
        self.runs_task = partial(asyncio.current_task, loop)
        self.pause = partial(asyncio.sleep, 0)

    def open_reader(self, sock: socket.socket) -> Reader:
        try:
            return WatchingReader(sock, self._loop)
        except NotImplementedError:
            # Windows' default event loop cannot watch sockets, but AnyIO can wait for them.
            return WaitingReader(sock, self.clock)

    def current_task(self) -> object:
        return asyncio.current_task(self._loop)

    def has_ended(self, task: object) -> bool:
        return isinstance(task, asyncio.Task) and task.done()

    def abandons_tasks(self, host: object) -> bool:
        return False

    def native_cancellations(self) -> int:
        task = asyncio.current_task(self._loop)
        return 0 if task is None else task.cancelling()


class FutureWakeup(Wakeup):
    """A future, which is also what ``asyncio.Event`` creates for each waiter."""

    __slots__ = ("_future",)

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._future: asyncio.Future[None] = loop.create_future()

    def set(self) -> None:
        if not self._future.done():
            self._future.set_result(None)

    def wait(self) -> Awaitable[None]:
        return self._future


class WatchingReader(Reader):
    """
    A reader that keeps its socket registered with the event loop.

    Registering the socket for each read would take two more system calls and twice the time. The
    reader reads at most one chunk ahead. Further bytes stay in the socket, which slows down the
    peer.
    """

    def __init__(self, sock: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        self.last_heard = LastHeard(loop.time)
        self._sock = sock
        self._loop = loop
        # Register the file descriptor instead of the socket: a selector's KeyError contains the
        # repr() of the socket, which takes two system calls.
        self._fileno = sock.fileno()
        self._size = READ_CHUNK_BYTES
        self._closed = False
        self._into: memoryview | None = None
        self._received: bytes | memoryview | Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        loop.add_reader(self._fileno, self._read)
        self._watched = True

    async def receive(self, size: int, into: memoryview | None = None) -> bytes | memoryview:
        self._size = size
        self._into = into
        while self._received is None:
            if self._closed:
                raise ClosedResourceError
            if not self._watched:
                self._loop.add_reader(self._fileno, self._read)
                self._watched = True
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        # Reading ahead must not overwrite what the caller has not handled yet.
        self._into = None
        received, self._received = self._received, None
        if isinstance(received, Exception):
            try:
                raise received
            finally:
                # Break the reference cycle: the traceback of the exception contains this frame.
                del received
        return received

    def close(self) -> None:
        self._closed = True
        self._stop_watching()
        if self._received is None:
            self._keep(ClosedResourceError())

    def _read(self) -> None:
        if self._received is not None:
            self._stop_watching()
            return
        try:
            if self._into is None:
                data: bytes | memoryview = self._sock.recv(self._size)
            else:
                data = self._into[: self._sock.recv_into(self._into)]
        except (BlockingIOError, InterruptedError):
            return
        except OSError as exc:
            self._stop_watching()
            self._keep(exc)
        else:
            self.last_heard.note()
            self._keep(data)

    def _keep(self, received: bytes | memoryview | Exception) -> None:
        self._received = received
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _stop_watching(self) -> None:
        if self._watched:
            self._watched = False
            self._loop.remove_reader(self._fileno)
