"""Connections in memory between clients and the broker."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from anyio import BrokenResourceError, ClosedResourceError, EndOfStream, Event
from anyio.abc import ByteStream, ByteStreamConnectable, TaskGroup
from anyio.lowlevel import checkpoint, current_token

from emitter_anyio._backend.interrupts import uninterrupted
from emitter_anyio._values.errors import WrongLoopError

CAPACITY_BYTES = 65536
"""The number of bytes that fit into one direction of a connection before a send waits."""


class Pipe:
    """
    One direction of a connection.

    :param capacity: the number of bytes that fit into it before a send waits

    :ivar ended: whether the sender has ended it
    :ivar broken: whether the receiver has closed it
    """

    def __init__(self, capacity: int = CAPACITY_BYTES) -> None:
        self.capacity = capacity
        self.ended = False
        self.broken = False
        self._buffer = bytearray()
        self._changed = Event()

    @property
    def size(self) -> int:
        """The number of bytes in it."""
        return len(self._buffer)

    @property
    def free(self) -> int:
        """The number of bytes that fit into it now."""
        return max(0, self.capacity - self.size)

    def put(self, data: bytes) -> None:
        """Add bytes, without regard to the capacity."""
        self._buffer += data
        self.change()

    def take(self, max_bytes: int) -> bytes:
        """Remove and return at most ``max_bytes`` bytes."""
        data = bytes(self._buffer[:max_bytes])
        if data:
            del self._buffer[:max_bytes]
            self.change()
        return data

    def check_end(self) -> None:
        """
        Check, when nothing can be taken, whether more can arrive.

        :raises EndOfStream: if the sender has ended it
        """
        if self.ended:
            raise EndOfStream

    def end(self) -> None:
        """End it for the receiver, after the bytes in it."""
        self.ended = True
        self.change()

    def break_off(self) -> None:
        """Let sends fail."""
        self.broken = True
        self.change()

    def change(self) -> None:
        """Wake the tasks in :meth:`wait_changed`."""
        self._changed.set()
        self._changed = Event()

    async def wait_changed(self) -> None:
        """Wait until bytes are added or removed, or until one side closes it."""
        await self._changed.wait()


class MemoryStream(ByteStream):
    """
    One end of a connection in memory.

    As with a socket, a send writes as much as fits and then waits with the rest, so that cancelling
    it can leave a partial write.
    """

    def __init__(self, inbound: Pipe, outbound: Pipe) -> None:
        self._in = inbound
        self._out = outbound
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether this end is closed."""
        return self._closed

    async def receive(self, max_bytes: int = 65536) -> bytes:
        await checkpoint()
        while not (data := self._in.take(max_bytes)):
            if self._closed:
                raise ClosedResourceError
            self._in.check_end()
            await self._in.wait_changed()
        return data

    async def send(self, item: bytes) -> None:
        await checkpoint()
        while True:
            if self._closed:
                raise ClosedResourceError
            if self._out.broken or self._out.ended:
                raise BrokenResourceError
            if item and (free := self._out.free):
                self._out.put(item[:free])
                item = item[free:]
            if not item:
                return
            await self._out.wait_changed()

    async def send_eof(self) -> None:
        self._out.end()
        await checkpoint()

    def close(self) -> None:
        """Close this end."""
        self._closed = True
        self._out.end()
        self._in.break_off()

    async def aclose(self) -> None:
        self.close()
        await checkpoint()


def memory_stream_pair() -> tuple[MemoryStream, MemoryStream]:
    """Create a connection and return its ends."""
    first, second = Pipe(), Pipe()
    return MemoryStream(second, first), MemoryStream(first, second)


class MemoryListener:
    """Accepts connections in memory, in the event loop in which it was created."""

    def __init__(self) -> None:
        self._token = current_token()
        # A memory object stream would warn if the broker's task is cancelled before it begins.
        self._waiting: deque[MemoryStream] = deque()
        self._changed = Event()

    def connect(self) -> MemoryStream:
        """
        Open a connection and return the client's end.

        :raises WrongLoopError: if called from another event loop
        """
        if current_token() != self._token:
            raise WrongLoopError(
                "cannot connect in memory: the broker runs in another thread or event loop; "
                "connect to its url"
            )
        client, server = memory_stream_pair()
        self._waiting.append(server)
        self._changed.set()
        return client

    @uninterrupted
    async def serve(
        self, handler: Callable[[MemoryStream], Coroutine[Any, Any, None]], task_group: TaskGroup
    ) -> None:
        """Start a task for the server's end of each connection, until cancelled."""
        while True:
            while self._waiting:
                task_group.start_soon(handler, self._waiting.popleft())
            self._changed = Event()
            await self._changed.wait()

    def close(self) -> None:
        """Close the connections that have not been accepted."""
        while self._waiting:
            self._waiting.popleft().close()


class MemoryConnectable(ByteStreamConnectable):
    """
    Opens connections to a listener that can be replaced.

    :param listener: returns the current listener, or ``None`` if connections are to be refused
    """

    def __init__(self, listener: Callable[[], MemoryListener | None]) -> None:
        self._listener = listener

    async def connect(self) -> MemoryStream:
        await checkpoint()
        if (listener := self._listener()) is None:
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        return listener.connect()
