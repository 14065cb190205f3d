"""The codec of a connection: decodes bytes to events, and encodes packets to bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from emitter_anyio._protocol.packets import (
    ConnAck,
    Connect,
    Disconnect,
    Event,
    Packet,
    PingReq,
    PingResp,
    Publish,
    Subscribe,
    Unsubscribe,
    append_event,
)
from emitter_anyio._protocol.session import EncodePublish
from emitter_anyio._values.errors import RemoteProtocolError

from .fast_path import FastPath, encode_publish
from .framing import Framing
from .paho import PahoEngine

_CONNACK: Final = 2
_PINGRESP: Final = 13
_PINGREQ: Final = b"\xc0\0"

_NO_CONNACK: Final = "the peer did not answer CONNECT with CONNACK"

MESSAGES_PER_TURN: Final = 4096
"""The maximum number of QoS 0 messages decoded before other tasks get a turn."""

_PACKET_WEIGHT: Final = 16
"""The weight of any other packet in messages, because the session handles each separately."""

_PAHO_PACKET_WEIGHT: Final = 64
"""The additional weight of a packet that Paho decodes, in messages."""


class Codec:
    """
    The decoder and encoder of a connection.

    The codec reads the return code of CONNACK and handles pings itself, because Paho hides the
    return codes 1 and 2, merges those above 5, and has no public interface for pings.

    :param connect: the contents of CONNECT
    :param max_message_size: the maximum remaining length of a packet from the peer, in bytes
    :param fast_path: whether to use the fast path; without it, Paho also handles its packets
    """

    def __init__(
        self, connect: Connect, max_message_size: int = 65536, *, fast_path: bool = True
    ) -> None:
        self._engine = PahoEngine(connect)
        self._framing = Framing(max_message_size)
        self._fast_path = FastPath(max_message_size) if fast_path else None
        self.encode_publish: EncodePublish
        self.encode_publish = encode_publish if fast_path else self._engine.publish
        self._written = b""
        self._connected = False
        self._broken = False
        self._left = MESSAGES_PER_TURN
        """The number of messages that may still be decoded in this turn."""
        self.turn_over = False
        """Whether other tasks get a turn before the next call of :meth:`decode`."""

    @property
    def unfilled(self) -> memoryview | None:
        """The memory into which to receive the next bytes of a large packet, if there is one."""
        return self._framing.unfilled

    def connect(self) -> bytes:
        """Encode CONNECT."""
        return self._engine.connect()

    def encode(self, packet: Packet) -> bytes:
        """Encode a packet."""
        match packet:
            case Publish(topic, payload, packet_id, retain):
                return self.encode_publish(topic, payload, retain, packet_id)
            case Subscribe(packet_id, topic):
                return self._engine.subscribe(packet_id, topic)
            case Unsubscribe(packet_id, topic):
                return self._engine.unsubscribe(packet_id, topic)
            case PingReq():
                return _PINGREQ
            case Disconnect():  # pragma: no branch - there is no other packet
                return self._engine.disconnect()

    def decode(self, data: bytes | memoryview) -> list[Event]:
        """
        Decode bytes from the peer to the events of this turn. Packets may be split anywhere.

        While :attr:`turn_over` is true, call it without bytes to decode the remaining ones.

        :param data: the bytes; a view, if they were received into :attr:`unfilled`

        If the bytes are malformed, the last event is a :class:`~emitter_anyio.RemoteProtocolError`,
        and everything after it is ignored.
        """
        if self._broken:
            return []
        if self.turn_over:
            self.turn_over, self._left = False, MESSAGES_PER_TURN
        events: list[Event] = []
        try:
            if (unfilled := self._framing.unfilled) is None:
                self._take_packets(self._framing.join(bytes(data)), events)
                if self._framing.buffer and self._framing.unfilled is None:
                    self._framing.free()
            else:
                rest = self._framing.fill(unfilled, data)
                if self._framing.unfilled is None:
                    packet, start, stop = self._framing.filled()
                    for event in self._decode_packet(packet, 0, start, stop):
                        append_event(events, event)
                self._take_packets(rest, events)
            self.turn_over = self._left <= 0
        except RemoteProtocolError as exc:
            self._broken = True
            events.append(exc)
        return events

    def take_written(self) -> bytes:
        """Return the PUBACKs for the QoS 1 messages decoded since the last call."""
        written, self._written = self._written, b""
        return written

    def _take_packets(self, data: bytes, events: list[Event]) -> None:
        at, end = 0, len(data)
        while at < end:
            if self._left <= 0:
                self._framing.keep(data, at)
                return
            if self._fast_path is not None and self._connected:
                at, weight = self._fast_path.take(data, at, end, events, self._left)
                if weight:
                    self._left -= weight
                    continue
            if not self._connected and data[at] >> 4 != _CONNACK:
                raise RemoteProtocolError(_NO_CONNACK)
            if (body := self._framing.measure(data, at)) is None:
                return
            for event in self._decode_packet(data, at, *body):
                append_event(events, event)
            at = body[1]

    def _decode_packet(
        self, data: bytes | memoryview, at: int, start: int, stop: int
    ) -> Sequence[Event]:
        self._left -= _PACKET_WEIGHT
        head, size = data[at], stop - start
        if head >> 4 == _PINGRESP and not size:
            return (PingResp(),)
        if head >> 4 == _CONNACK:
            if size != 2:
                raise RemoteProtocolError(f"the peer sent a CONNACK of {size} bytes instead of 2")
            self._connected = True
            code = data[stop - 1]
            if code == 0:
                self._engine.receive(bytes(data[at:stop]))
            return (ConnAck(code),)
        if self._fast_path is not None:
            event = self._fast_path.decode(data, head, start, stop)
            if event is not None:
                return (event,)
        self._left -= _PAHO_PACKET_WEIGHT
        events = self._engine.receive(bytes(data[at:stop]))
        self._written += self._engine.take_written()
        return events
