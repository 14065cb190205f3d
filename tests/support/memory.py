"""Byte streams in memory, for the client's ``connectable``: bytes that virtual time can see."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

import anyio
from anyio import BrokenResourceError, ClosedResourceError, EndOfStream
from anyio.abc import ByteStream, ByteStreamConnectable
from anyio.lowlevel import checkpoint


class _Pipe:
    """One direction."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held = bytearray()
        self.ended = False
        self.broken = False
        self.changed = anyio.Event()

    def change(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()


class MemoryStream(ByteStream):
    """
    One end of a link in memory.

    As with a socket, a send takes what there is room for and waits with the rest in its hand, so
    that cancelling it there leaves half of it on the link.
    """

    def __init__(self, inbound: _Pipe, outbound: _Pipe) -> None:
        self._in = inbound
        self._out = outbound
        self._closed = False

    async def receive(self, max_bytes: int = 65536) -> bytes:
        await checkpoint()
        while not self._in.held:
            if self._closed:
                raise ClosedResourceError
            if self._in.ended:
                raise EndOfStream
            await self._in.changed.wait()
        data = bytes(self._in.held[:max_bytes])
        del self._in.held[:max_bytes]
        self._in.change()
        return data

    async def send(self, item: bytes) -> None:
        await checkpoint()
        while True:
            if self._closed:
                raise ClosedResourceError
            if self._out.broken or self._out.ended:
                raise BrokenResourceError
            room = max(0, self._out.capacity - len(self._out.held))
            if room and item:
                self._out.held += item[:room]
                self._out.change()
                item = item[room:]
            if not item:
                return
            await self._out.changed.wait()

    def send_nowait(self, item: bytes) -> None:
        """Send in the present turn, whatever the capacity."""
        self._out.held += item
        self._out.change()

    async def send_eof(self) -> None:
        self._out.ended = True
        self._out.change()
        await checkpoint()

    async def aclose(self) -> None:
        self._closed = True
        self._out.ended = self._in.broken = True
        self._in.change()
        self._out.change()
        await checkpoint()

    @property
    def closed(self) -> bool:
        return self._closed


def memory_link(capacity: int = 65536) -> tuple[MemoryStream, MemoryStream]:
    """
    Make a link.

    :param capacity: how many bytes fit into each direction before a send waits
    :return: its two ends
    """
    there, back = _Pipe(capacity), _Pipe(capacity)
    return MemoryStream(back, there), MemoryStream(there, back)


class MemoryConnectable(ByteStreamConnectable):
    """
    What a client connects to; the other ends come out of :meth:`accept`.

    :param capacity: as in :func:`memory_link`
    :param before: awaited with the number of each attempt, from 1: it may raise, or never return
    """

    def __init__(
        self, capacity: int = 65536, before: Callable[[int], Awaitable[None]] | None = None
    ) -> None:
        self.attempts = 0
        self.streams: list[MemoryStream] = []
        """The client's ends."""
        self._capacity = capacity
        self._before = before
        self._in, self._out = anyio.create_memory_object_stream[MemoryStream](math.inf)

    async def connect(self) -> MemoryStream:
        self.attempts += 1
        await checkpoint()
        if self._before is not None:
            await self._before(self.attempts)
        client, peer = memory_link(self._capacity)
        self.streams.append(client)
        self._in.send_nowait(peer)
        return client

    async def accept(self) -> MemoryStream:
        """Wait for a client, and return the peer's end."""
        return await self._out.receive()

    def close(self) -> None:
        """Take nobody any more."""
        self._in.close()
        self._out.close()
