"""Packet boundaries, and the rejection of packets that a broker must not send."""

from __future__ import annotations

from typing import Final

from emitter_anyio._values.errors import RemoteProtocolError

_CLIENT_PACKETS: Final = {
    1: "a CONNECT",
    5: "a PUBREC",
    6: "a PUBREL",
    7: "a PUBCOMP",
    8: "a SUBSCRIBE",
    10: "an UNSUBSCRIBE",
    12: "a PINGREQ",
    14: "a DISCONNECT",
}
"""Packets that only a client sends, or that belong to QoS 2, which this client does not use."""

_PUBLISH: Final = 3

LARGE_PACKET_BYTES: Final = 65536
"""The size from which an incomplete packet is collected in a buffer, in bytes."""

_MAX_LENGTH_BITS: Final = 28
"""MQTT encodes a remaining length in at most four bytes of seven bits each."""


class Framing:
    """
    A parser of packet boundaries in the bytes from the peer.

    It checks the size and type of a packet as soon as the header has arrived, because Paho accepts
    packets of any size, and answers packets that only a client may send.

    :param max_message_size: the maximum remaining length of a packet, in bytes
    """

    def __init__(self, max_message_size: int) -> None:
        self._max_message_size = max_message_size
        self._kept: list[bytes] = []
        """The pieces of an incomplete small packet."""
        self._missing = 0
        """The minimum number of bytes that are missing from the incomplete small packet."""
        self.buffer = bytearray()
        """
        The buffer in which large packets are collected. It is kept from one to the next, because
        the pages of a new one would take longer than the copy.
        """
        self._body = 0, 0
        """The start and end of the body of the packet in the buffer."""
        self.unfilled: memoryview | None = None
        """The part of the buffer that an incomplete large packet must still fill."""

    def fill(self, unfilled: memoryview, data: bytes | memoryview) -> bytes:
        """
        Add bytes to the incomplete large packet. It is complete if nothing is unfilled afterwards.

        :param unfilled: :attr:`unfilled`
        :param data: the received bytes; a view, if they were received into ``unfilled``
        :return: the bytes that follow the packet
        """
        size, rest = len(data), b""
        if not isinstance(data, memoryview):
            size = min(size, len(unfilled))
            unfilled[:size] = data[:size]
            rest = data[size:]
        self.unfilled = unfilled[size:] or None
        return rest

    def filled(self) -> tuple[memoryview, int, int]:
        """
        Return the complete large packet, which is valid until the next one begins.

        :return: the packet, and the start and end of its body
        """
        start, stop = self._body
        return memoryview(self.buffer), start, stop

    def free(self) -> None:
        """Free the buffer, because the last packets were small."""
        self.buffer = bytearray()

    def join(self, data: bytes) -> bytes:
        """Return the kept bytes and ``data``, or nothing while the kept packet is incomplete."""
        if not self._kept:
            return data
        self._kept.append(data)
        self._missing -= len(data)
        if self._missing > 0:
            return b""
        data = b"".join(self._kept)
        self._kept.clear()
        self._missing = 0
        return data

    def keep(self, data: bytes, at: int, missing: int = 0) -> None:
        """Keep the bytes from ``at`` on for the next :meth:`join`."""
        self._kept.append(data[at:] if at else data)
        self._missing = missing

    def measure(self, data: bytes, at: int) -> tuple[int, int] | None:
        """
        Parse the header of the packet that begins at ``at``.

        :return: the start and end of its body; ``None`` if the packet is incomplete, and was kept
        :raises RemoteProtocolError: if a broker must not send the packet, or it is too large
        """
        head = data[at]
        kind = head >> 4
        if kind in _CLIENT_PACKETS:
            raise RemoteProtocolError(
                f"the peer sent {_CLIENT_PACKETS[kind]}, which a broker must not send"
            )
        if kind == _PUBLISH and head & 6 > 2:
            raise RemoteProtocolError(
                "the peer sent a message with a QoS over 1, but subscriptions use QoS 0"
            )
        size, shift, start = 0, 0, at + 1
        while True:
            if start == len(data):
                self.keep(data, at, 1)
                return None
            byte = data[start]
            start += 1
            size |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
            if shift == _MAX_LENGTH_BITS:
                raise RemoteProtocolError(
                    "the peer sent a packet whose length field exceeds four bytes"
                )
        if size > self._max_message_size:
            raise RemoteProtocolError(
                f"the peer sent a packet of {size} bytes, which exceeds max_message_size "
                f"({self._max_message_size})"
            )
        stop = start + size
        if stop <= len(data):
            return start, stop
        if stop - at < LARGE_PACKET_BYTES:
            self.keep(data, at, stop - len(data))
        else:
            self._collect(memoryview(data)[at:], start - at, stop - at)
        return None

    def _collect(self, piece: memoryview, start: int, stop: int) -> None:
        if len(self.buffer) < stop:
            self.buffer = bytearray(stop)
        buffer = memoryview(self.buffer)
        buffer[: len(piece)] = piece
        self.unfilled = buffer[len(piece) : stop]
        self._body = start, stop
