"""The client side of MQTT over WebSocket, with wsproto. No I/O.

The payloads of the frames form one byte stream. Frames and MQTT packets need not align.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from http import HTTPStatus
from itertools import islice
from typing import Final

from h11 import LocalProtocolError
from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Event,
    Ping,
    RejectConnection,
    RejectData,
    Request,
)
from wsproto.extensions import Extension
from wsproto.frame_protocol import CloseReason, FrameDecoder, FrameProtocol, Opcode, RsvBits
from wsproto.handshake import H11Handshake
from wsproto.utilities import RemoteProtocolError as BrokenRuleError

from emitter_anyio._values.errors import ConnectError, RemoteProtocolError
from emitter_anyio._values.text import make_printable

MAX_HEAD_BYTES: Final = 16384
"""The maximum size of the HTTP response's status line and headers, in bytes."""

_MAX_PACKET_HEADER_BYTES: Final = 5
"""The maximum size of an MQTT packet's fixed header, which ``max_message_size`` excludes."""

_MAX_BODY_BYTES: Final = 200
"""The number of bytes after which the body of a refusal is no longer read."""

_FRAMES_PER_TURN: Final = 256
"""The maximum number of frames decoded before other tasks get a turn."""

_HTTP: Final = b"HTTP/1."
_TLS: Final = b"\x15\x03"
_END: Final = re.compile(rb"\n\r?\n")


class Upgrade:
    """
    The WebSocket handshake.

    :param host: the host name or address, and the port unless it is the scheme's default
    :param path: the path and query to request
    :param headers: the names and values of additional headers
    :raises OSError: if the host name is invalid
    :ivar request: the bytes to send
    :ivar refused: whether the server has refused, and only the body of its response is awaited
    """

    def __init__(self, host: str, path: str, headers: Iterable[tuple[str, str]] = ()) -> None:
        asked = Request(
            host=host,
            target=path,
            # Emitter would prefer "mqttv3.1" if it were offered.
            subprotocols=["mqtt"],
            extra_headers=[(name.encode(), value.encode()) for name, value in headers],
        )
        self._handshake = H11Handshake(ConnectionType.CLIENT)
        try:
            self.request = bytes(self._handshake.send(asked))
        except (LocalProtocolError, UnicodeError) as exc:
            raise OSError(f"invalid host name {host!r}: {exc}") from exc
        self._head = bytearray()
        self._refusal: RejectConnection | None = None
        self._body = bytearray()

    @property
    def refused(self) -> bool:
        return self._refusal is not None

    def receive(self, data: bytes) -> bytes | None:
        """
        Decode received bytes.

        :param data: the bytes; empty if the connection has ended
        :return: the bytes that followed the handshake; ``None`` while the handshake is incomplete
        :raises ConnectError: if the server has refused
        :raises RemoteProtocolError: if the response is invalid
        :raises EOFError: if the connection ended before the handshake was complete
        """
        if self._refusal is None:
            if not data:
                raise EOFError("the peer closed the connection during the WebSocket handshake")
            start = max(0, len(self._head) - 2)
            self._head += data
            self._check_beginning()
            end = _END.search(self._head, start, MAX_HEAD_BYTES)
            if end is None:
                if len(self._head) >= MAX_HEAD_BYTES:
                    raise RemoteProtocolError(
                        f"the peer's HTTP response headers exceed {MAX_HEAD_BYTES} bytes"
                    )
                return None
            data = bytes(self._head[end.end() :])
            if self._accepted(bytes(self._head[: end.end()])):
                return data
            if not data:
                return None
        self._take_body(data)
        return None

    def _check_beginning(self) -> None:
        if self._head[: len(_HTTP)] == _HTTP[: len(self._head)]:
            return
        if self._head[: len(_TLS)] == _TLS[: len(self._head)]:
            raise RemoteProtocolError("the peer uses TLS on this port; try wss://")
        raise RemoteProtocolError(
            "the peer does not speak HTTP on this port; try mqtt:// or mqtts://"
        )

    def _accepted(self, head: bytes) -> bool:
        try:
            self._handshake.receive_data(head)
        except (BrokenRuleError, ValueError) as exc:
            raise RemoteProtocolError(
                f"invalid response to the WebSocket handshake: {make_printable(str(exc))}"
            ) from exc
        return self._take(self._handshake.events())

    def _take_body(self, data: bytes) -> None:
        try:
            self._handshake.receive_data(data)
        except BrokenRuleError:
            data = b""
        self._take(self._handshake.events())
        if not data or len(self._body) >= _MAX_BODY_BYTES:
            raise self.refusal()

    def _take(self, events: Iterable[Event]) -> bool:
        for event in events:
            if isinstance(event, AcceptConnection):
                return True
            if isinstance(event, RejectConnection):
                self._refusal = event
                finished = not event.has_body
            else:
                assert isinstance(event, RejectData)
                self._body += event.data
                finished = event.body_finished
            if finished:
                raise self.refusal()
        return False

    def refusal(self) -> ConnectError:
        """Make the error for the response that has arrived so far."""
        assert self._refusal is not None
        status = self._refusal.status_code
        phrase = f" ({HTTPStatus(status).phrase})" if status in set(HTTPStatus) else ""
        body = make_printable(self._body.decode(errors="replace"))
        body = f": {body!r}" if body else ""
        return ConnectError(
            f"the server refused WebSocket with HTTP {status}{phrase}{body} ({self._hint(status)})"
        )

    def _hint(self, status: int) -> str:
        assert self._refusal is not None
        if 300 <= status < 400:
            headers = {name.lower(): value for name, value in self._refusal.headers}
            target = headers.get(b"location", b"another URL").decode(errors="replace")
            # The query might contain a secret.
            target = make_printable(target.partition("?")[0])
            return f"it redirects to {target}; the client does not follow redirects, use that URL"
        if status in (401, 403, 407, 429):
            return "Emitter does not send this status; check the rules of the proxy in front of it"
        if status in (502, 503, 504):
            return "a proxy in front of the broker cannot reach it"
        return (
            "Emitter accepts any path except /health, /keygen, /presence, /debug and /metrics; "
            "a proxy in front of it might accept only one path"
        )


class WebSocket:
    """
    The encoder and decoder of frames after the handshake.

    :param max_message_size: the maximum size of an MQTT packet, in bytes
    :ivar pong: the answer to the last ping, or empty bytes
    :ivar end: why no more frames can be received: an :class:`EOFError` if the peer has closed the
        connection, a :class:`~emitter_anyio.RemoteProtocolError` if it violated the protocol
    :ivar turn_over: whether frames remain that a call of :meth:`receive` without bytes decodes,
        after other tasks got a turn
    """

    def __init__(self, max_message_size: int) -> None:
        self.pong = b""
        self.end: Exception | None = None
        self.turn_over = False
        self._close_frame = CloseConnection(CloseReason.NORMAL_CLOSURE)
        self._checks = _FrameChecks(max_message_size)
        self._connection = Connection(ConnectionType.CLIENT, [self._checks])

    @property
    def open(self) -> bool:
        """Whether neither side has closed the connection."""
        return self._connection.state is ConnectionState.OPEN and self.end is None

    def receive(self, data: bytes) -> bytes:
        """Decode received bytes, and return the payloads of the frames in this turn."""
        if self.end is not None:
            return b""
        carried = []
        self._connection.receive_data(data)
        frames = 0
        for event in islice(self._connection.events(), _FRAMES_PER_TURN):
            frames += 1
            match event:
                case BytesMessage():
                    carried.append(event.data)
                case Ping() if self.open:
                    # Only the last of several pings must be answered (RFC 6455, section 5.5.3).
                    self.pong = bytes(self._connection.send(event.response()))
                case CloseConnection():
                    self._handle_close(event)
        self.turn_over = frames == _FRAMES_PER_TURN
        return b"".join(carried)

    def wrap(self, data: bytes) -> bytes:
        """Encode bytes as a frame; return nothing after a close frame."""
        return bytes(self._connection.send(BytesMessage(data))) if self.open else b""

    def take_pong(self) -> bytes:
        """Return and remove the answer to the last ping."""
        answer, self.pong = self.pong, b""
        return answer

    def close(self) -> bytes:
        """Return a close frame, or the answer to the peer's; nothing if it was returned before."""
        answer, self.pong = self.pong, b""
        if self._connection.state in (ConnectionState.OPEN, ConnectionState.REMOTE_CLOSING):
            answer += self._connection.send(self._close_frame)
        return answer

    def _handle_close(self, event: CloseConnection) -> None:
        reason = make_printable(event.reason or "")
        if self._connection.state in (ConnectionState.OPEN, ConnectionState.LOCAL_CLOSING):
            # The event is not from the peer: wsproto reports a protocol violation by it.
            self._close_frame = CloseConnection(event.code)
            self.end = RemoteProtocolError(
                self._checks.violation or f"the peer violated the WebSocket protocol: {reason}"
            )
            return
        self._close_frame = event.response()
        code = f"code {event.code:d}"
        if isinstance(event.code, CloseReason):
            name = event.code.name
            code += f" ({name.lower().replace('_', ' ')})"
        self.end = EOFError(
            f"the broker closed the WebSocket connection: {code}" + (reason and f", {reason!r}")
        )


class _FrameChecks(Extension):
    """
    A check of each frame's header, before its payload has arrived.

    It is a wsproto extension only to see the headers, and is never offered to the peer.

    :ivar violation: why the last frame was rejected, or an empty string
    """

    def __init__(self, max_message_size: int) -> None:
        self.violation = ""
        self._max_message_size = max_message_size

    def enabled(self) -> bool:
        return True

    def offer(self) -> bool:
        return False

    def frame_inbound_header(
        self, proto: FrameDecoder | FrameProtocol, opcode: Opcode, rsv: RsvBits, payload_length: int
    ) -> CloseReason | RsvBits:
        if opcode is Opcode.TEXT:
            self.violation = "the peer sent a text frame, but MQTT requires binary frames"
            return CloseReason.UNSUPPORTED_DATA
        if payload_length > self._max_message_size + _MAX_PACKET_HEADER_BYTES:
            self.violation = (
                f"the peer sent a frame of {payload_length} bytes, which exceeds max_message_size "
                f"({self._max_message_size})"
            )
            return CloseReason.MESSAGE_TOO_BIG
        return RsvBits(False, False, False)
