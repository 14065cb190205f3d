"""MQTT 3.1.1 packets as a broker writes them, made without the library and without Paho."""

from __future__ import annotations

CONNACK = bytes((0x20, 2, 0, 0))
PINGRESP = bytes((0xD0, 0))


def packet(head: int, body: bytes) -> bytes:
    """A packet: its first byte, the remaining length, and the rest."""
    return bytes((head,)) + length(len(body)) + body


def length(size: int) -> bytes:
    """A remaining length: seven bits a byte, the lowest first."""
    low, high = size % 128, size // 128
    return bytes((low | 128,)) + length(high) if high else bytes((low,))


def connack(code: int = 0) -> bytes:
    return packet(0x20, bytes((0, code)))


def publish(
    topic: str | bytes, payload: bytes = b"", packet_id: int | None = None, flags: int = 0
) -> bytes:
    """A ``PUBLISH`` of QoS 0 or, with a packet id, 1; ``flags`` are DUP (8) and RETAIN (1)."""
    name = topic.encode() if isinstance(topic, str) else topic
    number = b"" if packet_id is None else two(packet_id)
    qos = 0 if packet_id is None else 2
    return packet(0x30 | qos | flags, two(len(name)) + name + number + payload)


def puback(packet_id: int) -> bytes:
    return packet(0x40, two(packet_id))


def suback(packet_id: int, *codes: int) -> bytes:
    return packet(0x90, two(packet_id) + bytes(codes))


def unsuback(packet_id: int) -> bytes:
    return packet(0xB0, two(packet_id))


def two(number: int) -> bytes:
    return number.to_bytes(2, "big")
