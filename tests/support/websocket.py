"""
A server's end of a WebSocket, built on wsproto's connection.

The development broker uses only wsproto's frames, so this is an independent implementation.
"""

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
    The payload of binary frames as a byte stream. It answers neither pings nor closes.

    :ivar request: the client's handshake
    :ivar received: events other than binary messages, in order
    """

    def __init__(self, stream: ByteStream) -> None:
        self.stream = stream
        self.request: Event | None = None
        self.received: list[Event] = []
        self._payload = b""
        self._websocket = WSConnection(ConnectionType.SERVER)

    @classmethod
    async def accept(cls, stream: ByteStream, subprotocol: str | None = "mqtt") -> ServerStream:
        """Complete the handshake over a stream."""
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
        """Wait for an event of this kind and remove it; binary messages are kept."""
        while True:
            for event in self.received:
                if isinstance(event, kind):
                    self.received.remove(event)
                    return event
            await self._take()

    async def receive(self, max_bytes: int = 65536) -> bytes:
        while not self._payload:
            if any(isinstance(event, CloseConnection) for event in self.received):
                raise EndOfStream
            await self._take()
        payload, self._payload = self._payload, b""
        return payload

    async def send_eof(self) -> None:
        await self.send_event(CloseConnection(1000))

    async def aclose(self) -> None:
        await self.stream.aclose()

    async def _take(self) -> None:
        for event in await self._events():
            if isinstance(event, BytesMessage):
                self._payload += event.data
            else:
                self.received.append(event)

    async def _events(self) -> list[Event]:
        self._websocket.receive_data(await self.stream.receive())
        return list(self._websocket.events())
