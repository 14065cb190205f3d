"""MQTT in WebSocket frames, with wsproto. Without I/O."""

from __future__ import annotations

from wsproto import ConnectionType
from wsproto.connection import Connection, ConnectionState
from wsproto.events import BytesMessage, CloseConnection, Ping, TextMessage
from wsproto.extensions import Extension
from wsproto.frame_protocol import CloseReason, FrameDecoder, FrameProtocol, Opcode, RsvBits


class _TextAsBytes(Extension):
    """
    A private extension that decodes the bytes of text frames as Latin-1.

    Unlike RFC 6455, Emitter accepts any bytes in text frames. The extension is never offered to
    clients.
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
    The broker's side of a WebSocket after the handshake.

    The payloads of frames form one stream; a frame may contain a part of a packet, or several.

    :ivar closed: whether the client has closed the WebSocket or violated the protocol
    """

    def __init__(self) -> None:
        self.closed = False
        self._connection = Connection(ConnectionType.SERVER, [_TextAsBytes()])

    def receive(self, data: bytes) -> tuple[bytes, bytes]:
        """
        Handle received bytes.

        :return: the payload of the frames, and the control frames to send
        """
        payload, answer = bytearray(), bytearray()
        self._connection.receive_data(data)
        for event in self._connection.events():
            match event:
                case BytesMessage():
                    payload += event.data
                case TextMessage():
                    payload += event.data.encode("latin-1")
                case Ping() | CloseConnection():
                    answer += self._connection.send(event.response())
                    self.closed = isinstance(event, CloseConnection)
        return bytes(payload), bytes(answer)

    def wrap(self, packet: bytes) -> bytes:
        """Return a frame with one packet, like Emitter."""
        if self._connection.state is not ConnectionState.OPEN:
            return b""
        return bytes(self._connection.send(BytesMessage(packet)))
