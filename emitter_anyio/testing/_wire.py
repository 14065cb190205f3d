"""MQTT, HTTP and WebSocket on one port, chosen by the first byte like in Emitter. Without I/O."""

from __future__ import annotations

import base64
import hashlib
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._websocket import WebSocket

#: The largest head of an HTTP request.
MAX_HEAD_BYTES = 16384
#: The WebSocket subprotocols that Emitter accepts, by preference (``internal/network/websocket``).
SUBPROTOCOLS = ("mqttv3.1", "mqttv3", "mqtt")

_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
    501: "Not Implemented",
}
_NEWLINE = re.compile(r"\r?\n")
_END = re.compile(rb"\r?\n\r?\n")
_KEY = re.compile(r"[+/0-9A-Za-z]{22}==")
# The constant that is hashed with the key (RFC 6455, section 4.2.2).
_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
# The paths of Emitter's web pages, which this broker does not have.
_PAGE_PATHS = re.compile(r"/(keygen|presence|metrics|debug(/.*)?)")


class Wire:
    """
    The decoder of a connection's bytes. A connection that begins with a capital letter is HTTP.

    :ivar closed: whether to close the connection without reading more
    """

    def __init__(self) -> None:
        self.closed = False
        self._started = False
        self._head: bytearray | None = None
        self._websocket: WebSocket | None = None
        self._answer = b""

    def receive(self, data: bytes) -> bytes:
        """Return the MQTT bytes in received bytes."""
        if not self._started:
            self._started = True
            if data[:1].isupper():  # CONNECT does not begin with a letter
                self._head = bytearray()
        if self._head is not None:
            data = self._read_head(self._head, data)
        if self._websocket is not None:
            data, answer = self._websocket.receive(data)
            self._answer += answer
            self.closed = self._websocket.closed
        return data

    def answer(self) -> bytes:
        """Return and remove the HTTP and WebSocket bytes to send."""
        answer, self._answer = self._answer, b""
        return answer

    def wrap(self, packet: bytes) -> bytes:
        """Return the bytes to send for an MQTT packet, or ``b""`` if the WebSocket is closed."""
        return packet if self._websocket is None else self._websocket.wrap(packet)

    def _read_head(self, head: bytearray, data: bytes) -> bytes:
        """Add bytes to the head of the request, and return the bytes after it."""
        start = max(0, len(head) - 3)
        head += data
        end = _END.search(head, start, MAX_HEAD_BYTES)
        if end is None:
            if len(head) >= MAX_HEAD_BYTES:
                self._refuse(_Response(431))
            return b""
        self._head = None
        try:
            self._answer = self._upgrade(bytes(head[: end.start()]).decode("latin-1"))
        except _Response as response:
            self._refuse(response)
            return b""
        return bytes(head[end.end() :])

    def _refuse(self, response: _Response) -> None:
        self._answer = response.encode()
        self.closed = True

    def _upgrade(self, head: str) -> bytes:
        """Upgrade to WebSocket and return the response, or raise another response."""
        line, *lines = _NEWLINE.split(head)
        match line.split(" "):
            case [method, target, "HTTP/1.1" | "HTTP/1.0"]:
                path = target.partition("?")[0]
            case _:
                raise _Response(400)
        headers = _parse(lines)
        body = method != "HEAD"
        if path == "/health":
            raise _Response(200, body=body)
        if _PAGE_PATHS.fullmatch(path):
            text = "the development broker has no web pages: publish requests to emitter/..."
            raise _Response(404, text, body=body)
        if (
            "websocket" not in _tokens(headers.get("upgrade"))
            or "upgrade" not in _tokens(headers.get("connection"))
            or headers.get("sec-websocket-version") != "13"
            or "host" not in headers
        ):
            raise _Response(400, "expected MQTT, or MQTT over WebSocket version 13", body=body)
        if method != "GET":
            raise _Response(405, body=body)
        key = headers.get("sec-websocket-key", "")
        if not _KEY.fullmatch(key):
            raise _Response(400, "invalid Sec-WebSocket-Key: expected 16 bytes in base64")
        try:
            from ._websocket import WebSocket
        except ImportError:
            text = "WebSocket requires wsproto: pip install '.[websocket]' in a checkout"
            raise _Response(501, text) from None
        self._websocket = WebSocket()
        wanted = _tokens(headers.get("sec-websocket-protocol"))
        chosen = [f"Sec-WebSocket-Protocol: {each}" for each in SUBPROTOCOLS if each in wanted]
        accept = base64.b64encode(hashlib.sha1((key + _GUID).encode()).digest()).decode()
        return "\r\n".join(
            (
                "HTTP/1.1 101 Switching Protocols",
                "Upgrade: websocket",
                "Connection: Upgrade",
                f"Sec-WebSocket-Accept: {accept}",
                *chosen[:1],
                "\r\n",
            )
        ).encode()


class _Response(Exception):  # noqa: N818 - a response is not an error
    """An HTTP response after which the connection is closed."""

    def __init__(self, status: int, text: str = "", *, body: bool = True) -> None:
        super().__init__(status, text)
        self._status = status
        self._text = f"{text or _REASONS[status]}\n".encode()
        self._body = body

    def encode(self) -> bytes:
        lines = (
            f"HTTP/1.1 {self._status} {_REASONS[self._status]}",
            "Content-Type: text/plain; charset=utf-8",
            f"Content-Length: {len(self._text)}",
            "Sec-WebSocket-Version: 13",
            "Connection: close",
            "\r\n",
        )
        return "\r\n".join(lines).encode() + self._text * self._body


def _parse(lines: list[str]) -> dict[str, str]:
    """Parse header lines, and join the values of repeated names."""
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise _Response(400)
        name, value = name.lower(), value.strip()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def _tokens(value: str | None) -> set[str]:
    return {token.strip().lower() for token in (value or "").split(",")}
