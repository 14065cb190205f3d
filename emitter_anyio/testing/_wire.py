"""What stands between a link's bytes and MQTT: nothing, or HTTP and WebSocket. No I/O.

Emitter serves all of it on one port and tells by the first bytes which it is; so does this.
"""

from __future__ import annotations

import base64
import hashlib
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._websocket import WebSocket

#: The longest head of an HTTP request that is read, in bytes.
MAX_HEAD = 16384
#: The subprotocols of WebSocket that Emitter offers; of those that a client wants, the first here
#: is taken (``internal/network/websocket``).
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
# what a key is hashed with (RFC 6455, section 4.2.2)
_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
# what Emitter serves to people, and this broker does not
_PAGES = re.compile(r"/(keygen|presence|metrics|debug(/.*)?)")


class Wire:
    """
    A link's bytes, as far as MQTT: whoever begins with a letter speaks HTTP.

    :ivar closed: whether nothing more is to be read
    """

    def __init__(self) -> None:
        self.closed = False
        self._begun = False
        self._head: bytearray | None = None
        self._websocket: WebSocket | None = None
        self._answer = b""

    def receive(self, data: bytes) -> bytes:
        """Take what the link brought, and give what there is of MQTT in it."""
        if not self._begun:
            self._begun = True
            if data[:1].isupper():  # no MQTT packet that may come first does
                self._head = bytearray()
        if self._head is not None:
            data = self._read_head(self._head, data)
        if self._websocket is not None:
            data, answer = self._websocket.receive(data)
            self._answer += answer
            self.closed = self._websocket.closed
        return data

    def answer(self) -> bytes:
        """Give what is to be sent because of what was received, beside MQTT, and forget it."""
        answer, self._answer = self._answer, b""
        return answer

    def wrap(self, packet: bytes) -> bytes:
        """Give an MQTT packet as it is to be sent: nothing, if the other side has closed."""
        return packet if self._websocket is None else self._websocket.wrap(packet)

    def _read_head(self, head: bytearray, data: bytes) -> bytes:
        """Take a part of a request's head, and give what comes behind it."""
        start = max(0, len(head) - 3)
        head += data
        end = _END.search(head, start, MAX_HEAD)
        if end is None:
            if len(head) >= MAX_HEAD:
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
        """Go over to WebSocket, on any path that is not another thing, and give the answer."""
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
        if _PAGES.fullmatch(path):
            text = "this development broker has no pages: publish requests to emitter/..."
            raise _Response(404, text, body=body)
        if (
            "websocket" not in _tokens(headers.get("upgrade"))
            or "upgrade" not in _tokens(headers.get("connection"))
            or headers.get("sec-websocket-version") != "13"
            or "host" not in headers
        ):
            raise _Response(400, "here is MQTT, by itself or over WebSocket version 13", body=body)
        if method != "GET":
            raise _Response(405, body=body)
        key = headers.get("sec-websocket-key", "")
        if not _KEY.fullmatch(key):
            raise _Response(400, "a Sec-WebSocket-Key is 16 bytes in base64")
        try:
            from ._websocket import WebSocket
        except ImportError:
            text = "no WebSocket without wsproto: pip install 'emitter_anyio[websocket]'"
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


class _Response(Exception):  # noqa: N818 - an answer is no error
    """An answer of HTTP that ends the link."""

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
    """Read header lines; of a name that is there more than once, the values are joined."""
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
