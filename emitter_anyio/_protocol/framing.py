"""Where packets begin and end, and which of them a broker may not send."""

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

_MAX_LENGTH_BITS: Final = 28
"""MQTT encodes a remaining length in at most four bytes of seven bits each."""


class Framing:
    """
    The boundaries of packets in the bytes from the peer.

    Paho reads a packet of any size and answers packets that only a client may send, so both are
    checked here, in the header, before the packet has arrived.

    :param max_message_size: the largest remaining length to accept, in bytes
    """

    def __init__(self, max_message_size: int) -> None:
        self._max_message_size = max_message_size
        self._kept: list[bytes] = []
        """The pieces of a packet that is not complete."""
        self.missing = 0
        """How many more bytes are needed, at least, to complete the packet that is kept."""

    def join(self, data: bytes) -> bytes:
        """Return the kept bytes and these, or nothing while the kept packet is not complete."""
        if not self._kept:
            return data
        self._kept.append(data)
        self.missing -= len(data)
        if self.missing > 0:
            return b""
        data = b"".join(self._kept)
        self._kept.clear()
        self.missing = 0
        return data

    def keep(self, data: bytes, at: int, missing: int = 0) -> None:
        """Keep the bytes from ``at`` on for the next :meth:`join`."""
        self._kept.append(data[at:] if at else data)
        self.missing = missing

    def measure(self, data: bytes, at: int) -> tuple[int, int] | None:
        """
        Read the header of the packet that begins at ``at``.

        :return: where its body begins and ends, or ``None`` if the packet is not complete and was
            kept
        :raises RemoteProtocolError: if a broker may not send the packet, or the packet is too large
        """
        head = data[at]
        kind = head >> 4
        if kind in _CLIENT_PACKETS:
            raise RemoteProtocolError(
                f"the peer sent {_CLIENT_PACKETS[kind]}, which a broker may not send"
            )
        if kind == _PUBLISH and head & 6 > 2:
            raise RemoteProtocolError("the peer delivered at a QoS over 1, which nobody asked for")
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
                raise RemoteProtocolError("a packet's length takes more than four bytes")
        if size > self._max_message_size:
            raise RemoteProtocolError(
                f"the peer announced a packet of {size} bytes; max_message_size is "
                f"{self._max_message_size}"
            )
        stop = start + size
        if stop > len(data):
            self.keep(data, at, stop - len(data))
            return None
        return start, stop
