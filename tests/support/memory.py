"""Byte streams in memory, for the client's ``connectable``: bytes that virtual time can see."""

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
    """One direction."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held = bytearray()
        self.ended = False
        self.broken = False
        self.reset = False
        self.taken = 0
        self.limit = math.inf
        """What is behind so many bytes stays on the way."""
        self.at_limit: Callable[[], None] | None = None
        self.changed = anyio.Event()

    def change(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()

    def take(self, max_bytes: int) -> bytes:
        """Take out what has arrived."""
        size = int(min(max_bytes, self.limit - self.taken))
        came = bool(self.held)
        data = bytes(self.held[:size])
        if data:
            del self.held[:size]
            self.taken += len(data)
            self.change()
        if came and self.taken == self.limit and self.at_limit is not None:
            at_limit, self.at_limit = self.at_limit, None
            at_limit()
        return data

    @property
    def over(self) -> bool:
        """Tell whether the end has arrived, which may stay on the way as well."""
        return self.ended and self.taken < self.limit

    def cut(self, *, reset: bool) -> None:
        """End it here, for both sides; a reset takes along what was on the way."""
        if reset or self.taken == self.limit:
            self.held.clear()
        self.limit = math.inf
        self.ended = self.broken = True
        self.reset = reset
        self.change()


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


_LITTLE = 16
"""So many bytes a link takes that does not bring them anywhere."""

Direction: TypeAlias = Literal["to_broker", "to_client"]
Kind: TypeAlias = Literal["reset", "end", "stall"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)


@dataclass(frozen=True)
class Fault:
    """
    What happens to a link once just so many bytes have arrived in one direction.

    With 0 it is when there is something to arrive. A cut ends both directions; what is on its way
    in the other one still arrives before an orderly end, and is lost with a reset. A stall takes
    little more, leaves the other direction as it is, and tells nobody.
    """

    direction: Direction
    after: int
    kind: Kind

    def strikes(self, client: MemoryStream, then: Callable[[], None] = lambda: None) -> None:
        """
        Have it befall a link.

        :param client: the client's end
        :param then: called when it has happened
        """
        pipes = (client._in, client._out)
        pipe = client._in if self.direction == "to_client" else client._out

        def strike() -> None:
            if self.kind == "stall":
                pipe.capacity = _LITTLE
            else:
                for each in pipes:
                    each.cut(reset=self.kind == "reset")
            then()

        pipe.limit, pipe.at_limit = self.after, strike


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
    :param kind: what the client's ends are
    """

    def __init__(
        self,
        capacity: int = 65536,
        before: Callable[[int], Awaitable[None]] | None = None,
        kind: type[MemoryStream] = MemoryStream,
    ) -> None:
        self.attempts = 0
        self.streams: list[MemoryStream] = []
        """The client's ends."""
        self._capacity = capacity
        self._before = before
        self._kind = kind
        self._in, self._out = anyio.create_memory_object_stream[MemoryStream](math.inf)

    async def connect(self) -> MemoryStream:
        self.attempts += 1
        await checkpoint()
        if self._before is not None:
            await self._before(self.attempts)
        client, peer = memory_link(self._capacity)
        client.__class__ = self._kind
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
