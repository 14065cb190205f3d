"""In-memory byte streams for the client's ``connectable``, which also work with virtual time."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import anyio
from anyio import BrokenResourceError
from anyio.abc import ByteStreamConnectable
from anyio.lowlevel import checkpoint

from emitter_anyio.testing import _memory
from emitter_anyio.testing._memory import CAPACITY_BYTES


class FaultyPipe(_memory.Pipe):
    """
    A direction of a connection that can fail after a number of bytes.

    :ivar delivered: the number of bytes that were taken
    :ivar limit: the number of bytes after which nothing more is delivered
    :ivar on_limit: called when the limit is reached and there is something to take
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.reset = False
        self.delivered = 0
        self.limit = math.inf
        self.on_limit: Callable[[], None] | None = None

    def take(self, max_bytes: int) -> bytes:
        had_data = self.size > 0
        data = super().take(int(min(max_bytes, self.limit - self.delivered)))
        self.delivered += len(data)
        if had_data and self.delivered == self.limit and self.on_limit is not None:
            on_limit, self.on_limit = self.on_limit, None
            on_limit()
        return data

    def check_end(self) -> None:
        if self.reset:
            raise BrokenResourceError
        # The limit holds the end of the stream back, too.
        if self.delivered < self.limit:
            super().check_end()

    def cut(self, *, reset: bool) -> None:
        """End the stream for both sides. A reset also discards the buffer."""
        if reset or self.delivered == self.limit:
            super().take(self.size)
        self.limit = math.inf
        self.reset = reset
        self.end()
        self.break_off()


class MemoryStream(_memory.MemoryStream):
    """One end of an in-memory connection whose directions can fail."""

    def __init__(self, inbound: FaultyPipe, outbound: FaultyPipe) -> None:
        super().__init__(inbound, outbound)
        self.inbound = inbound
        self.outbound = outbound

    def send_nowait(self, item: bytes) -> None:
        """Send immediately, without regard to the capacity."""
        self.outbound.put(item)


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
        pipes = (client.inbound, client.outbound)
        pipe = client.inbound if self.direction == "to_client" else client.outbound

        def occur() -> None:
            if self.kind == "stall":
                pipe.capacity = _STALLED_CAPACITY_BYTES
            else:
                for each in pipes:
                    each.cut(reset=self.kind == "reset")
            then()

        pipe.limit, pipe.on_limit = self.after, occur


def memory_stream_pair(capacity: int = CAPACITY_BYTES) -> tuple[MemoryStream, MemoryStream]:
    """
    Create an in-memory connection.

    :param capacity: the number of bytes that fit into each direction before a send waits
    :return: the two ends
    """
    first, second = FaultyPipe(capacity), FaultyPipe(capacity)
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
        capacity: int = CAPACITY_BYTES,
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
