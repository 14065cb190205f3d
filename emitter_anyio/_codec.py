"""MQTT 3.1.1 as bytes: the only file that imports Paho.

Paho sees a socket in memory. It does CONNECT, SUBSCRIBE and UNSUBSCRIBE and their answers, by
``loop_read()`` and ``loop_write()``, which never wait here. ``PUBLISH`` of QoS 0 and ``PUBACK``,
nearly all of the traffic, are framed and decoded in place, and ``PUBLISH`` is encoded here too:
through Paho each would cost ten times as much. So are the pings and DISCONNECT, two bytes that are
always the same, and CONNACK, which Paho does not tell of when it says 1 or 2.

Each link has a Paho of its own, so that it never sends again what an earlier link left open. It is
made when there is something for it to do: a CONNECT that says nothing of who we are is remembered,
and both together would take a sixth of the time of a short link.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Final, NamedTuple, TypeAlias

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion

from ._batches import Messages, in_one_go
from ._errors import RemoteProtocolError
from ._messages import ITEM_BYTES, EmitterMessage
from ._packets import (
    ConnAck,
    Disconnect,
    Event,
    Packet,
    PingReq,
    PingResp,
    PubAck,
    Publish,
    SubAck,
    Subscribe,
    Undecodable,
    UnsubAck,
    Unsubscribe,
)

_NO_CONNACK: Final = "the peer did not answer CONNECT with a CONNACK"

_CONNACK: Final = 2
_PUBLISH: Final = 3
_PUBACK: Final = 4
_PINGRESP: Final = 13

_NOT_A_BROKERS: Final = {
    1: "a CONNECT",
    5: "a PUBREC",
    6: "a PUBREL",
    7: "a PUBCOMP",
    8: "a SUBSCRIBE",
    10: "an UNSUBSCRIBE",
    12: "a PINGREQ",
    14: "a DISCONNECT",
}
"""Packets that only clients send, or those who publish at QoS 2, as nobody does here."""

MESSAGES_PER_TURN: Final = 4096
"""At most this many messages of QoS 0 are decoded before other tasks get a turn."""

_OTHER: Final = 16
"""A packet of another kind counts as this many messages: the session takes it in by itself."""

_BY_PAHO: Final = 64
"""One that Paho decodes counts as this many more."""

_PINGREQ: Final = b"\xc0\0"
_DISCONNECT: Final = b"\xe0\0"

_CONNECTS: Final = 64
"""So many are remembered."""

_SHORT_PUBLISH: Final = struct.Struct("!BBH")
_PUBLISH_HEAD: Final = struct.Struct("!BBBH")
_TWO_SHORTS: Final = struct.Struct("!HH")
_TWO_BYTES: Final = struct.Struct("!H")


_Head: TypeAlias = tuple[str, int, int]
"""The channel of a ``PUBLISH``, how many bytes it has, and how many of them its head has."""

_Seen: TypeAlias = tuple[str, int, int, Callable[[EmitterMessage], None]]
"""The same, and what puts a message in with those of its channel."""

_HEADS: Final = 1024
_LONG_HEAD: Final = 128
"""So many heads are remembered, if they have no more bytes than that."""


class Hello(NamedTuple):
    """What CONNECT says."""

    client_id: str = ""
    username: str | None = None
    password: str | None = None
    keepalive: int = 30
    will: Publish | None = None

    def __repr__(self) -> str:
        return f"Hello(username={self.username!r}, password=…, will={self.will})"


class _MemorySocket:
    """What Paho takes for its socket."""

    def __init__(self) -> None:
        self.inbound = bytearray()
        self.outbound = bytearray()

    def recv(self, size: int) -> bytes:
        if not self.inbound:
            raise BlockingIOError
        data = bytes(self.inbound[:size])
        del self.inbound[:size]
        return data

    def send(self, data: bytes | bytearray) -> int:
        self.outbound += data
        return len(data)

    def setblocking(self, flag: bool) -> None:
        pass

    def close(self) -> None:
        pass


class _PahoClient(paho.Client):
    """
    Paho with the three private hooks that an external session and an in-memory link need; it
    begins with CONNECT.

    :param heard: gets what the peer says to it
    """

    def __init__(self, hello: Hello, heard: list[Event]) -> None:
        super().__init__(
            CallbackAPIVersion.VERSION2,
            hello.client_id,
            protocol=MQTTProtocolVersion.MQTTv311,
            # Paho would answer some refusals with a blocking reconnect() inside loop_read().
            reconnect_on_failure=False,
        )
        if hello.username is not None:
            self.username_pw_set(hello.username, hello.password)
        if hello.will is not None:
            self.will_set(hello.will.topic.decode(), hello.will.payload, retain=hello.will.retain)
        # A callback that raises would make Paho handle the same packet again: they only append.
        # Nor do they know the codec: what a link leaves behind waits for no garbage collector.
        self.on_subscribe = partial(_note_suback, heard)
        self.on_unsubscribe = partial(_note_unsuback, heard)
        self.on_message = partial(_note_message, heard)
        self.link = _MemorySocket()
        self.next_mid = 0
        self.connect("emitter", 1, hello.keepalive)

    def written(self) -> bytes:
        """Give what it has written; first of all that is CONNECT."""
        self.loop_write()
        data = bytes(self.link.outbound)
        self.link.outbound.clear()
        return data

    def _create_socket(self) -> Any:
        return self.link

    def _mid_generate(self) -> int:
        # The session allots the packet ids: Paho's own counter runs into ids that are pending.
        return self.next_mid

    @staticmethod
    def _filter_wildcard_len_check(sub: bytes) -> MQTTErrorCode:
        # Paho's check refuses "#/" and "#?last=5", which Emitter wants.
        return MQTTErrorCode.MQTT_ERR_SUCCESS


class Codec:
    """
    Both directions of one link.

    :param hello: what CONNECT says
    :param max_message_size: the largest remaining length to take from the peer, in bytes
    """

    def __init__(self, hello: Hello, max_message_size: int = 65536) -> None:
        self._max_message_size = max_message_size
        self._keepalive = hello.keepalive
        self._connected = False
        self._broken = False
        self._rest: list[bytes] = []
        """What has come of a packet, in pieces."""
        self.missing = 0
        """How many bytes of it have yet to come, as far as that is known."""
        self._left = MESSAGES_PER_TURN
        """How many more messages may be decoded in this turn."""
        self.turn_over = False
        """Whether other tasks get a turn before the next call of :meth:`decode`."""
        self._heads: dict[bytes, _Head] = {}
        self._head_size = 0
        """How many bytes the last new one had: most have as many."""
        self._heard: list[Event] = []
        self._written = b""
        """What Paho has written on its own."""
        self._hello = hello
        self._paho: _PahoClient | None = None

    def connect(self) -> bytes:
        """Encode the CONNECT with which a link begins."""
        if self._hello.username is None and self._hello.will is None:
            return _encode_connect(self._hello)
        self._paho = _PahoClient(self._hello, self._heard)
        return self._paho.written()

    def encode(self, packet: Packet) -> bytes:
        """Turn a packet into bytes."""
        if type(packet) is Publish:
            return encode_publish(packet.topic, packet.payload, packet.retain, packet.packet_id)
        if type(packet) is PingReq:
            return _PINGREQ
        if type(packet) is Disconnect:
            return _DISCONNECT
        client = self._use_paho()
        match packet:
            case Subscribe(packet_id, topic):
                client.next_mid = packet_id
                client.subscribe(topic)
            case Unsubscribe(packet_id, topic):  # pragma: no branch - there is no other packet
                client.next_mid = packet_id
                client.unsubscribe(topic)
        return client.written()

    def decode(self, data: bytes) -> list[Event]:
        """
        Turn bytes from the peer, cut anywhere, into events, as many as one turn may have.

        When :attr:`turn_over` is true, the next call, with nothing, takes what is left.

        Malformed bytes end in a :class:`~emitter_anyio.RemoteProtocolError` as the last event,
        behind those that came before; what follows it is passed over.
        """
        if self._broken:
            return []
        if self.turn_over:
            self.turn_over, self._left = False, MESSAGES_PER_TURN
        if self._rest:
            self._rest.append(data)
            self.missing -= len(data)
            if self.missing > 0:
                return []
            data = b"".join(self._rest)
            self._rest.clear()
            self.missing = 0
        events: list[Event] = []
        try:
            self._take_packets(data, events)
            self.turn_over = self._left <= 0
        except RemoteProtocolError as exc:
            self._broken = True
            events.append(exc)
        return events

    def take_written(self) -> bytes:
        """Give what Paho has written on its own: the acknowledgements of messages of QoS 1."""
        written, self._written = self._written, b""
        return written

    def _take_packets(self, data: bytes, events: list[Event]) -> None:
        at, end = 0, len(data)
        while at < end:
            if self._left <= 0:
                return self._keep(data, at, 0)
            head = data[at]
            if self._connected and (head == 0x40 or head & 0xF6 == 0x30):
                take = self._take_pubacks if head == 0x40 else self._take_publishes
                before = at
                at = take(data, at, end, events)
                if at != before:
                    continue
            kind = head >> 4
            if not self._connected and kind != _CONNACK:
                raise RemoteProtocolError(_NO_CONNACK)
            if kind in _NOT_A_BROKERS:
                raise RemoteProtocolError(
                    f"the peer sent {_NOT_A_BROKERS[kind]}, which a broker may not send"
                )
            size, start = 0, at + 1
            shift = 0
            while True:
                if start == end:
                    return self._keep(data, at, 1)
                byte = data[start]
                start += 1
                size |= (byte & 0x7F) << shift
                if byte < 0x80:
                    break
                shift += 7
                if shift == 28:
                    raise RemoteProtocolError("a packet's length takes more than four bytes")
            if size > self._max_message_size:
                raise RemoteProtocolError(
                    f"the peer announced a packet of {size} bytes; max_message_size is "
                    f"{self._max_message_size}"
                )
            stop = start + size
            if stop > end:
                return self._keep(data, at, stop - end)
            self._left -= _OTHER
            if kind == _CONNACK:
                if size != 2:
                    raise RemoteProtocolError(f"a CONNACK of {size} bytes, where it has 2")
                events.append(ConnAck(data[stop - 1]))
                self._connected = True
            elif kind == _PUBLISH and not head & 6:
                _put(events, _decode_publish(data, start, stop))
            elif kind == _PUBACK:
                if size != 2:
                    raise RemoteProtocolError(f"a PUBACK of {size} bytes, where it has 2")
                events.append(PubAck(data[start] << 8 | data[start + 1]))
            elif kind == _PINGRESP and not size:
                events.append(PingResp())
            else:
                self._hand_to_paho(head, data[at:stop], events)
            at = stop
        return None

    def _take_publishes(self, data: bytes, at: int, end: int, events: list[Event]) -> int:
        # Of QoS 0, whole, and of less than 16 KiB: nearly all that comes. It stops at the first
        # packet that is anything else, or wrong.
        length = self._head_size
        if found := self._heads.get(data[at : at + length]):
            stop = at + found[1]
            if stop == end or (stop < end and data[stop] & 0xF6 != 0x30):
                # It is by itself: where traffic is thin, that is so each time.
                message = EmitterMessage(found[0], data[at + length : stop])
                if events:
                    _put(events, message)
                else:
                    events.append(message)
                self._left -= 1
                return stop
        in_order: list[EmitterMessage] = []
        by_channel: dict[str, list[EmitterMessage]] = {}
        each: dict[str, int | None] = {}
        seen: dict[bytes, _Seen] = {}
        append, new = in_order.append, object.__new__
        try:
            for _ in range(self._left):
                # The head of a packet up to its payload: one that came before says the same again.
                head = data[at : at + length]
                known = seen.get(head)
                if known is None:
                    if at == end:
                        break
                    found = self._heads.get(head) or self._find_head(data, at)
                    if found is None or at + found[1] > end:
                        break
                    channel, size, length = found
                    self._head_size = length
                    messages = by_channel.get(channel)
                    if messages is None:
                        by_channel[channel] = messages = []
                        each[channel] = size - length + len(channel) + ITEM_BYTES
                    elif each[channel] != size - length + len(channel) + ITEM_BYTES:
                        each[channel] = None
                    known = channel, size, length, messages.append
                    seen[data[at : at + length]] = known
                channel, size, length, append_too = known
                stop = at + size
                if stop > end:
                    break
                # As EmitterMessage(…), for a third less.
                message = new(EmitterMessage)
                message.channel = channel
                message.binary = data[at + length : stop]
                append(message)
                append_too(message)
                at = stop
        except (struct.error, UnicodeDecodeError):
            pass
        self._left -= len(in_order)
        if events and type(events[-1]) in (Messages, EmitterMessage):
            for message in in_order:
                _put(events, message)
        elif in_order:
            events.append(Messages(in_order, by_channel, each))
        return at

    def _find_head(self, data: bytes, at: int) -> _Head | None:
        head, size, length = _SHORT_PUBLISH.unpack_from(data, at)
        start = at + 4
        if size > 0x7F:
            head, size, high, length = _PUBLISH_HEAD.unpack_from(data, at)
            size += (high << 7) - 0x80
            start = at + 5
            if high > 0x7F:
                return None
        middle, stop = start + length, start + size - 2
        if (known := self._heads.get(data[at:middle])) is not None:
            return known
        if head & 0xF6 != 0x30 or not start < middle <= stop or size > self._max_message_size:
            return None
        known = data[start:middle].decode(), stop - at, middle - at
        if known[2] <= _LONG_HEAD and middle <= len(data):
            if len(self._heads) >= _HEADS:
                self._heads.clear()
            self._heads[data[at:middle]] = known
        return known

    def _take_pubacks(self, data: bytes, at: int, end: int, events: list[Event]) -> int:
        # Whole ones, and no further: one chunk has those of all that one chunk has published.
        start, most = at, at - self._left // -_OTHER * 4
        end = most if most < end else end - (end - at) % 4
        for head, packet_id in _TWO_SHORTS.iter_unpack(memoryview(data)[at:end]):
            if head != 0x4002:
                break
            # As PubAck(packet_id), for half of what that costs.
            events.append(tuple.__new__(PubAck, (packet_id,)))
            at += 4
        self._left -= (at - start) // 4 * _OTHER
        return at

    def _keep(self, data: bytes, at: int, missing: int) -> None:
        self._rest.append(data[at:] if at else data)
        self.missing = missing

    def _hand_to_paho(self, head: int, packet: bytes, events: list[Event]) -> None:
        kind = head >> 4
        if kind == _PUBLISH and head & 6 != 2:
            raise RemoteProtocolError("the peer delivered at a QoS over 1, which nobody asked for")
        self._left -= _BY_PAHO
        client = self._use_paho()
        client.link.inbound += packet
        try:
            # One call takes one packet in, or more where Paho has messages of its own in flight,
            # which it never has here.
            code = client.loop_read()
        except Exception as exc:
            # Paho up to 2.1 lets struct.error and the like out.
            raise RemoteProtocolError(f"the peer sent a malformed packet of type {kind}") from exc
        if code != MQTTErrorCode.MQTT_ERR_SUCCESS or client.link.inbound:
            raise RemoteProtocolError(f"the peer sent a malformed packet of type {kind}")
        self._written += client.written()
        for event in self._heard:
            _put(events, event)
        self._heard.clear()

    def _use_paho(self) -> _PahoClient:
        if self._paho is None:
            self._paho = _PahoClient(self._hello, self._heard)
            # Its CONNECT has been sent.
            self._paho.written()
        return self._paho


def _put(events: list[Event], event: Event) -> None:
    # Messages in a row are one event: who waits for room for one keeps no other from a consumer.
    last = events[-1] if events else None
    if type(event) is EmitterMessage:
        if type(last) is EmitterMessage:
            last = events[-1] = in_one_go([last])
        if type(last) is Messages:
            last.append(event)
            return
    events.append(event)


@lru_cache(_CONNECTS)
def _encode_connect(hello: Hello) -> bytes:
    return _PahoClient(hello, []).written()


def _note_suback(
    heard: list[Event], client: object, userdata: object, mid: int, codes: list[Any], _: object
) -> None:
    heard.append(SubAck(mid, tuple(code.value for code in codes)))


def _note_unsuback(
    heard: list[Event], client: object, userdata: object, mid: int, codes: object, _: object
) -> None:
    heard.append(UnsubAck(mid))


def _note_message(
    heard: list[Event], client: object, userdata: object, message: paho.MQTTMessage
) -> None:
    payload = bytes(message.payload)
    try:
        heard.append(EmitterMessage(message.topic, payload))
    except UnicodeDecodeError:
        heard.append(Undecodable(len(payload)))


def encode_publish(
    topic: bytes, payload: bytes, retain: bool = False, packet_id: int | None = None
) -> bytes:
    """Encode a ``PUBLISH`` of QoS 0 or, with a packet id, 1."""
    length = len(topic)
    size = 2 + length + len(payload)
    head = 0x30 | retain
    if packet_id is not None:
        size += 2
        head |= 0x02
        topic += _TWO_BYTES.pack(packet_id)
    if size < 0x80:
        return _SHORT_PUBLISH.pack(head, size, length) + topic + payload
    if size < 0x4000:
        return _PUBLISH_HEAD.pack(head, size & 0x7F | 0x80, size >> 7, length) + topic + payload
    return b"".join((bytes((head, *_varint(size))), _TWO_BYTES.pack(length), topic, payload))


def is_unconfirmed_publish(packet: bytes | memoryview) -> bool:
    """Tell whether an encoded packet is a ``PUBLISH`` of QoS 0."""
    return packet[0] & 0xF6 == 0x30


def _varint(value: int) -> list[int]:
    digits = []
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return [*digits, value]


def _decode_publish(data: bytes, start: int, stop: int) -> Event:
    middle = start + 2
    if middle <= stop:
        middle += data[start] << 8 | data[start + 1]
    if not start + 2 < middle <= stop:
        raise RemoteProtocolError("the peer sent a PUBLISH whose topic is empty or cut off")
    try:
        return EmitterMessage(data[start + 2 : middle].decode(), data[middle:stop])
    except UnicodeDecodeError:
        return Undecodable(stop - middle)
