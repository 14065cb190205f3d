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
        self._carried = b""
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
        """Wait for an event of this kind, but not of bytes, which are kept."""
        while True:
            for event in self.received:
                if isinstance(event, kind):
                    self.received.remove(event)
                    return event
            await self._take()

    async def receive(self, max_bytes: int = 65536) -> bytes:
        while not self._carried:
            if any(isinstance(event, CloseConnection) for event in self.received):
                raise EndOfStream
            await self._take()
        carried, self._carried = self._carried, b""
        return carried

    async def send_eof(self) -> None:
        await self.send_event(CloseConnection(1000))

    async def aclose(self) -> None:
        await self.stream.aclose()

    async def _take(self) -> None:
        for event in await self._events():
            if isinstance(event, BytesMessage):
                self._carried += event.data
            else:
                self.received.append(event)

    async def _events(self) -> list[Event]:
        self._websocket.receive_data(await self.stream.receive())
        return list(self._websocket.events())
