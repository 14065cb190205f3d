"""MQTT 3.1.1 packets, implemented without Paho so that the two implementations check each other.

Each packet is a tuple with an ``encode()`` method. :class:`PacketReader` decodes packets from
chunks of any size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

#: The largest remaining length that Emitter accepts and sends, in bytes.
MAX_REMAINING_LENGTH = 65536


class MalformedPacketError(ValueError):
    """Bytes that are not an MQTT 3.1.1 packet, or a packet above the size limit."""


class Will(NamedTuple):
    """The will of a ``CONNECT``, published when the connection ends."""

    topic: str
    payload: bytes
    qos: int = 0
    retain: bool = False


class Connect(NamedTuple):
    """``CONNECT``. Like Emitter, the reader ignores the name and level of the protocol."""

    client_id: str = ""
    username: str | None = None
    password: bytes | None = None
    will: Will | None = None
    keepalive: int = 60
    clean_session: bool = True

    def encode(self) -> bytes:
        flags, tail = self.clean_session << 1, _text(self.client_id)
        if self.will is not None:
            flags |= 4 | self.will.qos << 3 | self.will.retain << 5
            tail += _text(self.will.topic) + _binary(self.will.payload)
        if self.username is not None:
            flags |= 128
            tail += _text(self.username)
        if self.password is not None:
            flags |= 64
            tail += _binary(self.password)
        return _frame(0x10, _text("MQTT") + bytes((4, flags)) + _number(self.keepalive) + tail)


class ConnAck(NamedTuple):
    """``CONNACK``; code 0 accepts the connection."""

    code: int = 0

    def encode(self) -> bytes:
        return bytes((0x20, 2, 0, self.code))


class Publish(NamedTuple):
    """``PUBLISH``; the packet id is encoded unless the QoS is 0."""

    topic: str
    payload: bytes = b""
    qos: int = 0
    packet_id: int = 0
    retain: bool = False
    dup: bool = False

    def encode(self) -> bytes:
        head = 0x30 | self.dup << 3 | self.qos << 1 | self.retain
        packet_id = _number(self.packet_id) if self.qos else b""
        return _frame(head, _text(self.topic) + packet_id + self.payload)


class PubAck(NamedTuple):
    """``PUBACK``."""

    packet_id: int

    def encode(self) -> bytes:
        return b"\x40\x02" + _number(self.packet_id)


class PubRec(NamedTuple):
    """``PUBREC``, which Emitter never sends and ignores."""

    packet_id: int

    def encode(self) -> bytes:
        return b"\x50\x02" + _number(self.packet_id)


class PubRel(NamedTuple):
    """``PUBREL``, which Emitter never sends and ignores."""

    packet_id: int

    def encode(self) -> bytes:
        return b"\x62\x02" + _number(self.packet_id)


class PubComp(NamedTuple):
    """``PUBCOMP``, which Emitter never sends and ignores."""

    packet_id: int

    def encode(self) -> bytes:
        return b"\x70\x02" + _number(self.packet_id)


class Subscribe(NamedTuple):
    """``SUBSCRIBE``: filters with the requested QoS."""

    packet_id: int
    filters: tuple[tuple[str, int], ...]

    def encode(self) -> bytes:
        filters = b"".join(_text(topic) + bytes((qos,)) for topic, qos in self.filters)
        return _frame(0x82, _number(self.packet_id) + filters)


class SubAck(NamedTuple):
    """``SUBACK``: the granted QoS of each filter, or 128 if it was refused."""

    packet_id: int
    codes: tuple[int, ...]

    def encode(self) -> bytes:
        return _frame(0x90, _number(self.packet_id) + bytes(self.codes))


class Unsubscribe(NamedTuple):
    """``UNSUBSCRIBE``."""

    packet_id: int
    filters: tuple[str, ...]

    def encode(self) -> bytes:
        return _frame(0xA2, _number(self.packet_id) + b"".join(map(_text, self.filters)))


class UnsubAck(NamedTuple):
    """``UNSUBACK``."""

    packet_id: int

    def encode(self) -> bytes:
        return b"\xb0\x02" + _number(self.packet_id)


class PingReq(NamedTuple):
    """``PINGREQ``."""

    def encode(self) -> bytes:
        return b"\xc0\x00"


class PingResp(NamedTuple):
    """``PINGRESP``."""

    def encode(self) -> bytes:
        return b"\xd0\x00"


class Disconnect(NamedTuple):
    """``DISCONNECT``."""

    def encode(self) -> bytes:
        return b"\xe0\x00"


Packet: TypeAlias = (
    Connect
    | ConnAck
    | Publish
    | PubAck
    | PubRec
    | PubRel
    | PubComp
    | Subscribe
    | SubAck
    | Unsubscribe
    | UnsubAck
    | PingReq
    | PingResp
    | Disconnect
)


class PacketReader:
    """
    Decodes packets from chunks of bytes.

    :param limit: the largest remaining length to accept
    """

    def __init__(self, limit: int = MAX_REMAINING_LENGTH) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._at = 0

    def feed(self, data: bytes) -> None:
        """Add received bytes."""
        del self._buffer[: self._at]
        self._at = 0
        self._buffer += data

    def next_packet(self) -> Packet | None:
        """
        Return the next packet, or ``None`` if it is incomplete.

        :raises MalformedPacketError: if the bytes are not a valid packet; the reader cannot be
            used afterwards
        """
        buffer, at = self._buffer, self._at
        if at == len(buffer):
            return None
        # Check the first byte before the length is complete, to detect other protocols early.
        kind, flags = buffer[at] >> 4, buffer[at] & 15
        if kind != 3:
            if kind not in _PARSERS:
                raise MalformedPacketError(f"reserved packet type {kind}")
            if flags != _PARSERS[kind][0]:
                raise MalformedPacketError(f"invalid flags {flags} for packet type {kind}")
        length = shift = 0
        while True:
            at += 1
            if at == len(buffer):
                return None
            length |= (buffer[at] & 127) << shift
            if buffer[at] < 128:
                break
            shift += 7
            if shift > 21:
                raise MalformedPacketError("remaining length of more than four bytes")
        if length > self._limit:
            raise MalformedPacketError(f"remaining length {length} exceeds {self._limit} bytes")
        start, end = at + 1, at + 1 + length
        if end > len(buffer):
            return None
        self._at = end
        body = bytes(buffer[start:end])
        return _publish(flags, body) if kind == 3 else _PARSERS[kind][1](_Body(body))


class _Body:
    """Decodes the fields of a packet."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, size: int) -> bytes:
        start, self._at = self._at, self._at + size
        if self._at > len(self._data):
            raise MalformedPacketError("a field exceeds the packet")
        return self._data[start : self._at]

    def byte(self) -> int:
        return self.take(1)[0]

    def number(self) -> int:
        return int.from_bytes(self.take(2), "big")

    def binary(self) -> bytes:
        return self.take(self.number())

    def text(self) -> str:
        # Like Emitter, accept invalid UTF-8 here. The check of the topic's alphabet rejects it.
        return self.binary().decode(errors="replace")

    def rest(self) -> bytes:
        return self.take(len(self._data) - self._at)

    def more(self) -> bool:
        return self._at < len(self._data)

    def end(self) -> None:
        if self.more():
            raise MalformedPacketError("bytes after the last field")


def _publish(flags: int, body: bytes) -> Publish:
    qos, at = flags >> 1 & 3, 2 + int.from_bytes(body[:2], "big")
    if qos == 3:
        raise MalformedPacketError("invalid QoS 3")
    topic, packet_id = body[2:at], 0
    if qos:
        packet_id, at = int.from_bytes(body[at : at + 2], "big"), at + 2
    if len(body) < at or len(body) < 2:
        raise MalformedPacketError("a field exceeds the packet")
    return Publish(
        topic.decode(errors="replace"), body[at:], qos, packet_id, flags & 1 != 0, flags & 8 != 0
    )


def _connect(body: _Body) -> Connect:
    body.binary()
    body.byte()
    flags, keepalive, client_id = body.byte(), body.number(), body.text()
    will = None
    if flags & 4:
        will = Will(body.text(), body.binary(), flags >> 3 & 3, flags & 32 != 0)
    username = body.text() if flags & 128 else None
    password = body.binary() if flags & 64 else None
    return Connect(client_id, username, password, will, keepalive, flags & 2 != 0)


def _connack(body: _Body) -> ConnAck:
    body.byte()
    packet = ConnAck(body.byte())
    body.end()
    return packet


def _subscribe(body: _Body) -> Subscribe:
    packet_id = body.number()
    filters: list[tuple[str, int]] = []
    while body.more() or not filters:
        topic, qos = body.text(), body.byte()
        if qos > 2:
            raise MalformedPacketError(f"invalid QoS {qos}")
        filters.append((topic, qos))
    return Subscribe(packet_id, tuple(filters))


def _unsubscribe(body: _Body) -> Unsubscribe:
    packet_id = body.number()
    filters: list[str] = []
    while body.more() or not filters:
        filters.append(body.text())
    return Unsubscribe(packet_id, tuple(filters))


def _numbered(
    kind: Callable[[int], PubAck | PubRec | PubRel | PubComp | UnsubAck],
) -> Callable[[_Body], Packet]:
    def parse(body: _Body) -> Packet:
        packet = kind(body.number())
        body.end()
        return packet

    return parse


def _empty(packet: Packet) -> Callable[[_Body], Packet]:
    def parse(body: _Body) -> Packet:
        body.end()
        return packet

    return parse


# The required flags and the parser of the body, by packet type.
_PARSERS: dict[int, tuple[int, Callable[[_Body], Packet]]] = {
    1: (0, _connect),
    2: (0, _connack),
    4: (0, _numbered(PubAck)),
    5: (0, _numbered(PubRec)),
    6: (2, _numbered(PubRel)),
    7: (0, _numbered(PubComp)),
    8: (2, _subscribe),
    9: (0, lambda body: SubAck(body.number(), tuple(body.rest()))),
    10: (2, _unsubscribe),
    11: (0, _numbered(UnsubAck)),
    12: (0, _empty(PingReq())),
    13: (0, _empty(PingResp())),
    14: (0, _empty(Disconnect())),
}


def _number(value: int) -> bytes:
    return value.to_bytes(2, "big")


def _binary(value: bytes) -> bytes:
    return len(value).to_bytes(2, "big") + value


def _text(value: str) -> bytes:
    return _binary(value.encode())


def _frame(head: int, body: bytes) -> bytes:
    length = len(body)
    if length < 128:
        return bytes((head, length)) + body
    out = bytearray((head,))
    while length > 127:
        out.append(length & 127 | 128)
        length >>= 7
    out.append(length)
    return bytes(out) + body
