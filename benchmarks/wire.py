"""The MQTT packets, topics and WebSocket frames of the peer."""

from __future__ import annotations

import base64
import hashlib
import socket
import struct
from collections.abc import Iterator
from typing import Final, Protocol

CONNECT, PUBLISH, SUBSCRIBE, UNSUBSCRIBE, PINGREQ, DISCONNECT = 1, 3, 8, 10, 12, 14
CONNACK: Final = b"\x20\x02\x00\x00"
PINGRESP: Final = b"\xd0\x00"

KEY: Final = "k" * 32
"""A key with the length of Emitter's keys."""

DONE: Final = "bench/done/"
"""The topic on which the peer reports that it has counted all messages."""


def channel(number: int) -> str:
    """Return the name of a channel; all names have the same length."""
    return f"bench/{number:04}/"


def topic(number: int) -> str:
    """Return the topic for publishing to a channel: the channel preceded by a key."""
    return f"{KEY}/{channel(number)}"


def remaining_length(length: int) -> bytes:
    """Encode the remaining length of a packet."""
    encoded = bytearray()
    while length > 127:
        encoded.append(length & 127 | 128)
        length >>= 7
    encoded.append(length)
    return bytes(encoded)


def publish(name: str, payload: bytes) -> bytes:
    """Encode a PUBLISH of QoS 0."""
    encoded = name.encode()
    body = struct.pack("!H", len(encoded)) + encoded + payload
    return b"\x30" + remaining_length(len(body)) + body


def framed(data: bytes | bytearray, start: int) -> tuple[int, int] | None:
    """
    Find the packet that begins at ``start``.

    :return: the start and the end of its body; ``None`` if the packet is incomplete
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
    """The methods of a socket, TLS socket or WebSocket that the peer needs."""

    def recv(self, size: int, /) -> bytes: ...
    def recv_into(self, buffer: bytearray, /) -> int: ...
    def sendall(self, data: bytes, /) -> None: ...


class WebSocketPipe:
    """The server side of a WebSocket with binary frames over a blocking socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._data = bytearray()
        self._taken = 0
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
        parts = list[bytes]()
        while not parts and self._read(size):
            for mask, start, end in self._frames():
                parts.append(_unmask(self._data[start:end], mask))
        return b"".join(parts)

    def recv_into(self, buffer: bytearray, /) -> int:
        """Return the number of received bytes. The buffer stays unchanged: callers only count."""
        size = 0
        while not size and self._read(len(buffer)):
            size = sum(end - start for _, start, end in self._frames())
        return size

    def _read(self, size: int) -> bool:
        del self._data[: self._taken]
        self._taken = 0
        received = self._sock.recv(size)
        self._data += received
        return bool(received)

    def _frames(self) -> Iterator[tuple[bytes, int, int]]:
        """Yield the mask, the start and the end of the payload of each complete frame."""
        data = self._data
        while len(data) >= self._taken + 6:
            start, length = self._taken + 2, data[self._taken + 1] & 127
            if length == 126:
                start, length = start + 2, int.from_bytes(data[start : start + 2], "big")
            elif length == 127:
                start, length = start + 8, int.from_bytes(data[start : start + 8], "big")
            end = start + 4 + length
            if end > len(data):
                break
            is_control = data[self._taken] & 8
            self._taken = end
            if not is_control:
                yield bytes(data[start : start + 4]), start + 4, end


def _unmask(data: bytearray, mask: bytes) -> bytes:
    size = len(data)
    whole = int.from_bytes(mask * (size // 4) + mask[: size % 4], "big")
    return (int.from_bytes(data, "big") ^ whole).to_bytes(size, "big")
