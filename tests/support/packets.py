"""MQTT 3.1.1 packets as a broker sends them, built without the library and without Paho."""

from __future__ import annotations

CONNACK = bytes((0x20, 2, 0, 0))
PINGRESP = bytes((0xD0, 0))


def packet(head: int, body: bytes) -> bytes:
    """Build a packet from its first byte and its body."""
    return bytes((head,)) + remaining_length(len(body)) + body


def remaining_length(size: int) -> bytes:
    """Encode a remaining length: seven bits per byte, the lowest first."""
    low, high = size % 128, size // 128
    return bytes((low | 128,)) + remaining_length(high) if high else bytes((low,))


def connack(code: int = 0) -> bytes:
    return packet(0x20, bytes((0, code)))


def publish(
    topic: str | bytes, payload: bytes = b"", packet_id: int | None = None, flags: int = 0
) -> bytes:
    """
    Build a ``PUBLISH``.

    :param packet_id: for QoS 1; without one, the packet has QoS 0
    :param flags: DUP (8) and RETAIN (1)
    """
    name = topic.encode() if isinstance(topic, str) else topic
    number = b"" if packet_id is None else uint16(packet_id)
    qos = 0 if packet_id is None else 2
    return packet(0x30 | qos | flags, uint16(len(name)) + name + number + payload)


def puback(packet_id: int) -> bytes:
    return packet(0x40, uint16(packet_id))


def suback(packet_id: int, *codes: int) -> bytes:
    return packet(0x90, uint16(packet_id) + bytes(codes))


def unsuback(packet_id: int) -> bytes:
    return packet(0xB0, uint16(packet_id))


def uint16(number: int) -> bytes:
    return number.to_bytes(2, "big")
