"""A peer's end of a WebSocket, on all of wsproto, where the broker's own has only the frames."""

from __future__ import annotations

from anyio import BrokenResourceError, EndOfStream
from anyio.abc import ByteStream
from wsproto import ConnectionType, WSConnection
from wsproto.connection import ConnectionState
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Event,
)


class ServerStream(ByteStream):
    """
    The bytes that frames carry, as a stream; it says nothing of its own accord.

    :ivar request: what the client has asked for
    :ivar received: every event so far but those of bytes
    """

    def __init__(self, stream: ByteStream) -> None:
        self.stream = stream
        self.request: Event | None = None
        self.received: list[Event] = []
        self._left = b""
        self._websocket = WSConnection(ConnectionType.SERVER)

    @classmethod
    async def accept(cls, stream: ByteStream, subprotocol: str | None = "mqtt") -> ServerStream:
        """Shake hands over a stream."""
        self = cls(stream)
        events: list[Event] = []
        while not events:
            events = await self._events()
        [self.request] = events
        await self.send_event(AcceptConnection(subprotocol=subprotocol))
        return self

    async def send_event(self, event: Event) -> None:
        await self.stream.send(bytes(self._websocket.send(event)))

    async def send(self, item: bytes) -> None:
        if self._websocket.state is not ConnectionState.OPEN:
            raise BrokenResourceError
        await self.send_event(BytesMessage(item))

    async def until(self, kind: type[Event]) -> Event:
        """Take what comes up to an event of this kind, but not of bytes, which are kept."""
        while True:
            for event in self.received:
                if isinstance(event, kind):
                    self.received.remove(event)
                    return event
            self._left += await self._carried()

    async def receive(self, max_bytes: int = 65536) -> bytes:
        if self._left:
            left, self._left = self._left, b""
            return left
        while not any(isinstance(event, CloseConnection) for event in self.received):
            if carried := await self._carried():
                return carried
        raise EndOfStream

    async def send_eof(self) -> None:
        await self.send_event(CloseConnection(1000))

    async def aclose(self) -> None:
        await self.stream.aclose()

    async def _carried(self) -> bytes:
        carried = b""
        for event in await self._events():
            if isinstance(event, BytesMessage):
                carried += event.data
            else:
                self.received.append(event)
        return carried

    async def _events(self) -> list[Event]:
        self._websocket.receive_data(await self.stream.receive())
        return list(self._websocket.events())
