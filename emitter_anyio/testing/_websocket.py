"""MQTT in the frames of WebSocket, by wsproto. No I/O."""

from __future__ import annotations

from wsproto import ConnectionType
from wsproto.connection import Connection, ConnectionState
from wsproto.events import BytesMessage, CloseConnection, Ping, TextMessage
from wsproto.extensions import Extension
from wsproto.frame_protocol import CloseReason, FrameDecoder, FrameProtocol, Opcode, RsvBits


class _TextAsBytes(Extension):
    """
    Not an extension that anybody is offered: it passes the bytes of text frames on as Latin-1.

    Emitter takes text frames and, unlike RFC 6455, any bytes in them.
    """

    def __init__(self) -> None:
        self._text = self._data = False

    def enabled(self) -> bool:
        return True

    def offer(self) -> bool:
        return False

    def frame_inbound_header(
        self, proto: FrameDecoder | FrameProtocol, opcode: Opcode, rsv: RsvBits, payload_length: int
    ) -> RsvBits:
        self._data = not opcode.iscontrol()
        if opcode in (Opcode.TEXT, Opcode.BINARY):
            self._text = opcode is Opcode.TEXT
        return RsvBits(False, False, False)

    def frame_inbound_payload_data(
        self, proto: FrameDecoder | FrameProtocol, data: bytes
    ) -> bytes | CloseReason:
        return data.decode("latin-1").encode() if self._text and self._data else data


class WebSocket:
    """
    The broker's side of a WebSocket, from the handshake on.

    A frame is no packet: what they carry is one stream.

    :ivar closed: whether the other side has closed, or must be closed because it broke the rules
    """

    def __init__(self) -> None:
        self.closed = False
        self._connection = Connection(ConnectionType.SERVER, [_TextAsBytes()])

    def receive(self, data: bytes) -> tuple[bytes, bytes]:
        """
        Take what the link brought.

        :return: what the frames carried, and what is to be sent because of them
        """
        carried, answer = bytearray(), bytearray()
        self._connection.receive_data(data)
        for event in self._connection.events():
            match event:
                case BytesMessage():
                    carried += event.data
                case TextMessage():
                    carried += event.data.encode("latin-1")
                case Ping() | CloseConnection():
                    answer += self._connection.send(event.response())
                    self.closed = isinstance(event, CloseConnection)
        return bytes(carried), bytes(answer)

    def wrap(self, packet: bytes) -> bytes:
        """Put a packet into a frame of its own, as Emitter does."""
        if self._connection.state is not ConnectionState.OPEN:
            return b""
        return bytes(self._connection.send(BytesMessage(packet)))
