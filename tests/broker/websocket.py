"""A WebSocket client that uses wsproto's handshake, which is independent of the broker's."""

from __future__ import annotations

from collections.abc import Sequence

from anyio.abc import ByteStream
from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    Event,
    Ping,
    Request,
)


class WebSocketStream(ByteStream):
    """
    The payloads of frames as a byte stream.

    :ivar subprotocol: the subprotocol that the broker accepted
    :ivar frames: the payload of each received frame
    :ivar received: the other received events
    """

    def __init__(self, stream: ByteStream) -> None:
        self.subprotocol: str | None = None
        self.frames: list[bytes] = []
        self.received: list[Event] = []
        self._stream = stream
        self._websocket = WSConnection(ConnectionType.CLIENT)

    @classmethod
    async def connect(
        cls, stream: ByteStream, path: str = "/", subprotocols: Sequence[str] = ("mqtt",)
    ) -> WebSocketStream:
        """Complete the handshake over a stream."""
        self = cls(stream)
        await self.send_event(Request("localhost", path, subprotocols=list(subprotocols)))
        self._websocket.receive_data(await stream.receive())
        [accepted] = self._websocket.events()
        assert isinstance(accepted, AcceptConnection)
        self.subprotocol = accepted.subprotocol
        return self

    async def send_event(self, event: Event) -> None:
        await self._stream.send(self._websocket.send(event))

    async def send(self, item: bytes) -> None:
        await self.send_event(BytesMessage(item))

    async def receive(self, max_bytes: int = 65536) -> bytes:
        carried = b""
        while not carried:
            self._websocket.receive_data(await self._stream.receive())
            for event in self._websocket.events():
                match event:
                    case BytesMessage():
                        carried += event.data
                        self.frames.append(bytes(event.data))
                    case Ping():
                        await self.send_event(event.response())
                    case _:
                        self.received.append(event)
        return carried

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()
