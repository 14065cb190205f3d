"""MQTT in the frames of WebSocket, at the client's end, by wsproto. No I/O.

A frame is no packet: what the frames carry is one stream, wherever they are cut.
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
"""The longest head of an HTTP answer that is read, in bytes."""

_MAX_PACKET_HEADER_BYTES: Final = 5
"""So many bytes at most precede what ``max_message_size`` limits in an MQTT packet."""

_MAX_BODY_BYTES: Final = 200
"""So many characters of what a server says in a refusal are told."""

_FRAMES_PER_TURN: Final = 256
"""At most this many frames are read before other tasks get a turn."""

_HTTP: Final = b"HTTP/1."
_TLS: Final = b"\x15\x03"
_END: Final = re.compile(rb"\n\r?\n")


class Upgrade:
    """
    The handshake.

    :param host: the server's name or address, with its port unless it is the scheme's own
    :param path: what is asked for
    :raises OSError: if there is no such host
    :ivar request: what is to be sent
    :ivar refused: whether the server has refused, and only its words are awaited
    """

    def __init__(self, host: str, path: str) -> None:
        # Emitter takes the first of its own list that is offered, where "mqttv3.1" comes first.
        asked = Request(host=host, target=path, subprotocols=["mqtt"])
        self._handshake = H11Handshake(ConnectionType.CLIENT)
        try:
            self.request = bytes(self._handshake.send(asked))
        except (LocalProtocolError, UnicodeError) as exc:
            raise OSError(f"{host!r} is no host name: {exc}") from exc
        self._head = bytearray()
        self._refusal: RejectConnection | None = None
        self._body = bytearray()

    @property
    def refused(self) -> bool:
        return self._refusal is not None

    def receive(self, data: bytes) -> bytes | None:
        """
        Take what the link brought.

        :param data: nothing, if the link has ended
        :return: what came behind the handshake; ``None`` as long as it goes on
        :raises ConnectError: if the server has refused
        :raises RemoteProtocolError: if this was no answer to a handshake
        :raises EOFError: if the link ended too early
        """
        if self._refusal is None:
            if not data:
                raise EOFError("the peer closed the link in the WebSocket handshake")
            start = max(0, len(self._head) - 2)
            self._head += data
            self._check_beginning()
            end = _END.search(self._head, start, MAX_HEAD_BYTES)
            if end is None:
                if len(self._head) >= MAX_HEAD_BYTES:
                    raise RemoteProtocolError(
                        f"the head of the peer's HTTP answer has more than {MAX_HEAD_BYTES} bytes"
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
            raise RemoteProtocolError("the peer speaks TLS where HTTP was expected: try wss://")
        raise RemoteProtocolError(
            "the peer does not speak HTTP, and so no WebSocket: try mqtt:// or mqtts://"
        )

    def _accepted(self, head: bytes) -> bool:
        try:
            self._handshake.receive_data(head)
        except (BrokenRuleError, ValueError) as exc:
            raise RemoteProtocolError(
                f"the peer's answer to the WebSocket handshake is none: {make_printable(str(exc))}"
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
        """Tell what the server has said so far."""
        assert self._refusal is not None
        status = self._refusal.status_code
        phrase = f" ({HTTPStatus(status).phrase})" if status in set(HTTPStatus) else ""
        said = make_printable(self._body.decode(errors="replace"))
        said = f", and said: {said!r}" if said else ""
        return ConnectError(
            f"the server refused WebSocket by HTTP {status}{phrase}{said} ({self._hint(status)})"
        )

    def _hint(self, status: int) -> str:
        assert self._refusal is not None
        if 300 <= status < 400:
            headers = {name.lower(): value for name, value in self._refusal.headers}
            place = headers.get(b"location", b"another place").decode(errors="replace")
            # What follows may be a secret.
            place = make_printable(place.partition("?")[0])
            return f"it redirects to {place}, where this client does not follow: give that URL"
        if status in (401, 403, 407, 429):
            return "this is not Emitter, but something in front of it, with rules of its own"
        if status in (502, 503, 504):
            return "something in front of the broker cannot reach it"
        return (
            "Emitter takes any path but /health, /keygen, /presence, /debug and /metrics; what is "
            "in front of it may take one only"
        )


class WebSocket:
    """
    The frames, behind the handshake.

    :param max_message_size: how large a packet may be
    :ivar answer: what the last ping is to be answered with; who sends it, empties it
    :ivar end: why nothing more comes: an :class:`EOFError` if the peer has closed, a
        :class:`~emitter_anyio.RemoteProtocolError` if it broke the rules
    :ivar turn_over: whether other tasks get a turn before :meth:`receive` is called again, with
        nothing, for the frames that are left
    """

    def __init__(self, max_message_size: int) -> None:
        self.pong = b""
        self.end: Exception | None = None
        self.turn_over = False
        self._close_frame = CloseConnection(CloseReason.NORMAL_CLOSURE)
        self._limits = _FrameChecks(max_message_size)
        self._connection = Connection(ConnectionType.CLIENT, [self._limits])

    @property
    def open(self) -> bool:
        """Whether neither side has ended it."""
        return self._connection.state is ConnectionState.OPEN and self.end is None

    def receive(self, data: bytes) -> bytes:
        """Take what the link brought, and give what the frames of one turn carried."""
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
                    # One that has not been answered yet needs no answer any more (RFC 6455, 5.5.3).
                    self.pong = bytes(self._connection.send(event.response()))
                case CloseConnection():
                    self._finish(event)
        self.turn_over = frames == _FRAMES_PER_TURN
        return b"".join(carried)

    def wrap(self, data: bytes) -> bytes:
        """Put some of the stream into a frame; behind a close there is none."""
        return bytes(self._connection.send(BytesMessage(data))) if self.open else b""

    def take_pong(self) -> bytes:
        """Return what answers the last ping, and forget it."""
        answer, self.pong = self.pong, b""
        return answer

    def close(self) -> bytes:
        """Give what ends it or, if the peer has ended it, answers that; nothing if done before."""
        answer, self.pong = self.pong, b""
        if self._connection.state in (ConnectionState.OPEN, ConnectionState.REMOTE_CLOSING):
            answer += self._connection.send(self._close_frame)
        return answer

    def _finish(self, event: CloseConnection) -> None:
        reason = make_printable(event.reason or "")
        if self._connection.state in (ConnectionState.OPEN, ConnectionState.LOCAL_CLOSING):
            # The peer has sent no such thing: wsproto asks for it.
            self._close_frame = CloseConnection(event.code)
            self.end = RemoteProtocolError(
                self._limits.broken or f"the peer broke the rules of WebSocket: {reason}"
            )
            return
        self._close_frame = event.response()
        code = f"code {event.code:d}"
        if isinstance(event.code, CloseReason):
            name = event.code.name
            code += f" ({name.lower().replace('_', ' ')})"
        self.end = EOFError(
            f"the broker closed the WebSocket: {code}" + (reason and f", {reason!r}")
        )


class _FrameChecks(Extension):
    """
    Not an extension that anybody is offered: it looks at each frame before it is read.

    :ivar broken: what was wrong with the last one
    """

    def __init__(self, max_message_size: int) -> None:
        self.broken = ""
        self._max_message_size = max_message_size

    def enabled(self) -> bool:
        return True

    def offer(self) -> bool:
        return False

    def frame_inbound_header(
        self, proto: FrameDecoder | FrameProtocol, opcode: Opcode, rsv: RsvBits, payload_length: int
    ) -> CloseReason | RsvBits:
        if opcode is Opcode.TEXT:
            self.broken = "the peer sent a text frame; MQTT comes in binary ones"
            return CloseReason.UNSUPPORTED_DATA
        if payload_length > self._max_message_size + _MAX_PACKET_HEADER_BYTES:
            self.broken = (
                f"the peer announced a frame of {payload_length} bytes; max_message_size is "
                f"{self._max_message_size}"
            )
            return CloseReason.MESSAGE_TOO_BIG
        return RsvBits(False, False, False)
