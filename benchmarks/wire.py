"""The few packets of MQTT 3.1.1 that the peer needs, the names of its topics, and WebSocket."""

from __future__ import annotations

import base64
import hashlib
import socket
import struct
from typing import Final, Protocol

CONNECT, PUBLISH, SUBSCRIBE, UNSUBSCRIBE, PINGREQ, DISCONNECT = 1, 3, 8, 10, 12, 14
CONNACK: Final = b"\x20\x02\x00\x00"
PINGRESP: Final = b"\xd0\x00"

KEY: Final = "k" * 32
"""As long as Emitter's keys are."""

DONE: Final = "bench/done/"
"""Where the peer says that it has counted all."""


def channel(number: int) -> str:
    """Name a channel; all names are of one length."""
    return f"bench/{number:04}/"


def topic(number: int) -> str:
    """Name the topic that is published to: Emitter's, with a key in front."""
    return f"{KEY}/{channel(number)}"


def remaining_length(length: int) -> bytes:
    """Encode the length of a packet."""
    encoded = bytearray()
    while length > 127:
        encoded.append(length & 127 | 128)
        length >>= 7
    encoded.append(length)
    return bytes(encoded)


def publish(name: str, payload: bytes) -> bytes:
    """Make a PUBLISH of QoS 0."""
    encoded = name.encode()
    body = struct.pack("!H", len(encoded)) + encoded + payload
    return b"\x30" + remaining_length(len(body)) + body


def framed(data: bytes | bytearray, start: int) -> tuple[int, int] | None:
    """
    Find the packet that begins at ``start``.

    :return: where its body begins and where it ends; ``None`` if not all of it is there
    """
    length = shift = 0
    for position in range(start + 1, min(start + 5, len(data))):
        length |= (data[position] & 127) << shift
        if data[position] < 128:
            end = position + 1 + length
            return (position + 1, end) if end <= len(data) else None
        shift += 7
    return None


class Pipe(Protocol):
    """What the peer needs of a socket; also a TLS socket, and a WebSocket."""

    def recv(self, size: int, /) -> bytes: ...
    def sendall(self, data: bytes, /) -> None: ...


class WebSocketPipe:
    """The server's side of a WebSocket over a blocking socket, in binary frames."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._data = bytearray()
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += sock.recv(4096)
        key = next(
            line.split(b":", 1)[1].strip()
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"sec-websocket-key:")
        )
        accept = base64.b64encode(
            hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
        )
        sock.sendall(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Protocol: mqtt\r\nSec-WebSocket-Accept: " + accept + b"\r\n\r\n"
        )

    def sendall(self, data: bytes, /) -> None:
        if len(data) < 126:
            head = bytes((0x82, len(data)))
        elif len(data) < 65536:
            head = b"\x82\x7e" + struct.pack("!H", len(data))
        else:
            head = b"\x82\x7f" + struct.pack("!Q", len(data))
        self._sock.sendall(head + data)

    def recv(self, size: int, /) -> bytes:
        while True:
            payload, kind = self._frames()
            if payload or kind == 8:
                return payload
            received = self._sock.recv(size)
            if not received:
                return b""
            self._data += received

    def _frames(self) -> tuple[bytes, int]:
        """Take the payload of all whole frames, and the kind of the last one."""
        data, position, parts, kind = self._data, 0, [], 0
        while len(data) >= position + 6:
            start, length = position + 2, data[position + 1] & 127
            if length == 126:
                start, length = start + 2, int.from_bytes(data[start : start + 2], "big")
            elif length == 127:
                start, length = start + 8, int.from_bytes(data[start : start + 8], "big")
            end = start + 4 + length
            if end > len(data):
                break
            kind = data[position] & 15
            if kind < 8:
                parts.append(_unmask(data[start + 4 : end], bytes(data[start : start + 4])))
            position = end
        del data[:position]
        return b"".join(parts), kind


def _unmask(data: bytearray, mask: bytes) -> bytes:
    size = len(data)
    whole = int.from_bytes(mask * (size // 4) + mask[: size % 4], "big")
    return (int.from_bytes(data, "big") ^ whole).to_bytes(size, "big")
