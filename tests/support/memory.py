"""In-memory byte streams for the client's ``connectable``, which also work with virtual time."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import anyio
from anyio import BrokenResourceError, ClosedResourceError, EndOfStream
from anyio.abc import ByteStream, ByteStreamConnectable
from anyio.lowlevel import checkpoint


class _Pipe:
    """One direction of a connection."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.buffer = bytearray()
        self.ended = False
        self.broken = False
        self.reset = False
        self.delivered = 0
        self.limit = math.inf
        """The number of bytes after which nothing more is delivered."""
        self.on_limit: Callable[[], None] | None = None
        self.changed = anyio.Event()

    def change(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()

    def take(self, max_bytes: int) -> bytes:
        """Take up to ``max_bytes`` from the buffer."""
        size = int(min(max_bytes, self.limit - self.delivered))
        had_data = bool(self.buffer)
        data = bytes(self.buffer[:size])
        if data:
            del self.buffer[:size]
            self.delivered += len(data)
            self.change()
        if had_data and self.delivered == self.limit and self.on_limit is not None:
            on_limit, self.on_limit = self.on_limit, None
            on_limit()
        return data

    @property
    def over(self) -> bool:
        """Whether the end of the stream has been delivered. ``limit`` holds it back too."""
        return self.ended and self.delivered < self.limit

    def cut(self, *, reset: bool) -> None:
        """End the stream for both sides. A reset also discards the buffer."""
        if reset or self.delivered == self.limit:
            self.buffer.clear()
        self.limit = math.inf
        self.ended = self.broken = True
        self.reset = reset
        self.change()


class MemoryStream(ByteStream):
    """
    One end of an in-memory connection.

    As with a socket, a send writes as much as fits and then waits with the rest, so that cancelling
    it can leave a partial write.
    """

    def __init__(self, inbound: _Pipe, outbound: _Pipe) -> None:
        self._in = inbound
        self._out = outbound
        self._closed = False

    async def receive(self, max_bytes: int = 65536) -> bytes:
        await checkpoint()
        while not (data := self._in.take(max_bytes)):
            if self._closed:
                raise ClosedResourceError
            if self._in.reset:
                raise BrokenResourceError
            if self._in.over:
                raise EndOfStream
            await self._in.changed.wait()
        return data

    async def send(self, item: bytes) -> None:
        await checkpoint()
        while True:
            if self._closed:
                raise ClosedResourceError
            if self._out.broken or self._out.ended:
                raise BrokenResourceError
            space = max(0, self._out.capacity - len(self._out.buffer))
            if space and item:
                self._out.buffer += item[:space]
                self._out.change()
                item = item[space:]
            if not item:
                return
            await self._out.changed.wait()

    def send_nowait(self, item: bytes) -> None:
        """Send immediately, without regard to the capacity."""
        self._out.buffer += item
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


_STALLED_CAPACITY_BYTES = 16
"""The capacity of a stalled direction."""

Direction: TypeAlias = Literal["to_broker", "to_client"]
Kind: TypeAlias = Literal["reset", "end", "stall"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)


@dataclass(frozen=True)
class Fault:
    """
    A fault of a connection after exactly ``after`` bytes have arrived in one direction.

    With 0, it occurs when there is something to receive. ``"end"`` and ``"reset"`` end both
    directions; bytes in flight in the other direction still arrive with ``"end"`` and are lost with
    ``"reset"``. ``"stall"`` stops one direction without an error and leaves the other as it is.
    """

    direction: Direction
    after: int
    kind: Kind

    def inject(self, client: MemoryStream, then: Callable[[], None] = lambda: None) -> None:
        """
        Prepare the fault on a connection.

        :param client: the client's end
        :param then: called when the fault has occurred
        """
        pipes = (client._in, client._out)
        pipe = client._in if self.direction == "to_client" else client._out

        def occur() -> None:
            if self.kind == "stall":
                pipe.capacity = _STALLED_CAPACITY_BYTES
            else:
                for each in pipes:
                    each.cut(reset=self.kind == "reset")
            then()

        pipe.limit, pipe.on_limit = self.after, occur


def memory_stream_pair(capacity: int = 65536) -> tuple[MemoryStream, MemoryStream]:
    """
    Create an in-memory connection.

    :param capacity: the number of bytes that fit into each direction before a send waits
    :return: the two ends
    """
    first, second = _Pipe(capacity), _Pipe(capacity)
    return MemoryStream(second, first), MemoryStream(first, second)


class MemoryConnectable(ByteStreamConnectable):
    """
    An in-memory server; :meth:`accept` returns its ends of the connections.

    :param capacity: as in :func:`memory_stream_pair`
    :param before: awaited with the number of each attempt, from 1; it may raise or never return
    :param kind: the class of the client's ends
    """

    def __init__(
        self,
        capacity: int = 65536,
        before: Callable[[int], Awaitable[None]] | None = None,
        kind: type[MemoryStream] = MemoryStream,
    ) -> None:
        self.attempts = 0
        self.streams: list[MemoryStream] = []
        """The client's ends of all connections."""
        self._capacity = capacity
        self._before = before
        self._kind = kind
        self._in, self._out = anyio.create_memory_object_stream[MemoryStream](math.inf)

    async def connect(self) -> MemoryStream:
        self.attempts += 1
        await checkpoint()
        if self._before is not None:
            await self._before(self.attempts)
        client, peer = memory_stream_pair(self._capacity)
        client.__class__ = self._kind
        self.streams.append(client)
        self._in.send_nowait(peer)
        return client

    async def accept(self) -> MemoryStream:
        """Wait for a client and return the server's end."""
        return await self._out.receive()

    def close(self) -> None:
        """Stop accepting clients."""
        self._in.close()
        self._out.close()
