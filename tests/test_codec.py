from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import TypeAlias

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from emitter_anyio._protocol.codec import Codec
from emitter_anyio._protocol.fast_path import encode_publish
from emitter_anyio._protocol.packets import (
    ConnAck,
    Connect,
    Disconnect,
    Event,
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
from emitter_anyio._values.batches import MessageBatch
from emitter_anyio._values.errors import RemoteProtocolError
from emitter_anyio._values.messages import EmitterMessage
from tests.support.events import unbatch
from tests.support.packets import (
    CONNACK,
    PINGRESP,
    connack,
    packet,
    puback,
    publish,
    remaining_length,
    suback,
    uint16,
    unsuback,
)

LIMIT = 1024

Plain: TypeAlias = tuple[object, ...]


def plain(events: Iterable[Event]) -> list[Plain]:
    """Convert events to tuples that can be compared."""
    return [
        ("message", event.channel, event.binary)
        if isinstance(event, EmitterMessage)
        else ("error",)
        if isinstance(event, RemoteProtocolError)
        else (type(event).__name__, *event)
        for event in unbatch(events)
    ]


def connected(limit: int = 65536, *, fast_path: bool = True) -> Codec:
    codec = Codec(Connect(), limit, fast_path=fast_path)
    codec.connect()
    assert codec.decode(CONNACK) == [ConnAck(0)]
    return codec


@pytest.fixture(params=[True, False], ids=["fast path", "Paho"])
def fast_path(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def message_or_undecodable(topic: bytes, payload: bytes) -> Plain:
    try:
        return ("message", topic.decode(), payload)
    except UnicodeDecodeError:
        return ("Undecodable", len(payload))


def publish_and_event(
    topic: bytes, payload: bytes, packet_id: int | None, flags: int
) -> tuple[bytes, list[Plain]]:
    return publish(topic, payload, packet_id, flags), [message_or_undecodable(topic, payload)]


# Packets that a broker may send, with the events that they decode to.
ids = st.integers(0, 65535)
topics = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).map(
    str.encode
) | st.binary(min_size=1, max_size=8)
payloads = st.binary(max_size=20) | st.binary(min_size=200, max_size=300)
flags = st.sampled_from([0, 1, 8, 9])
valid_packets = st.one_of(
    st.builds(publish_and_event, topics, payloads, st.none(), flags),
    st.builds(publish_and_event, topics, payloads, ids, flags),
    st.builds(lambda id: (puback(id), [("PubAck", id)]), ids),
    st.builds(lambda id: (unsuback(id), [("UnsubAck", id)]), ids),
    st.builds(
        lambda id, codes: (suback(id, *codes), [("SubAck", id, tuple(codes))]),
        ids,
        st.lists(st.sampled_from([0, 1, 2, 128]), max_size=3),
    ),
    st.just((PINGRESP, [("PingResp",)])),
)
streams = st.lists(valid_packets, max_size=12)


PACKET_IDS = st.none() | st.integers(1, 65535)


def chunks(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in pairwise(places)] or [b""]


class TestDecoding:
    @given(streams, st.lists(st.integers(0, 10_000), max_size=20))
    def test_events_do_not_depend_on_chunks(
        self, stream: list[tuple[bytes, list[Plain]]], cuts: list[int]
    ) -> None:
        data = CONNACK + b"".join(packet for packet, _ in stream)
        expected = [("ConnAck", 0), *(event for _, events in stream for event in events)]
        codec = Codec(Connect())
        codec.connect()
        assert plain(codec.decode(data)) == expected
        codec = Codec(Connect())
        codec.connect()
        decoded = [event for chunk in chunks(data, cuts) for event in plain(codec.decode(chunk))]
        assert decoded == expected

    @given(streams)
    def test_packet_is_decoded_with_its_last_byte(
        self, stream: list[tuple[bytes, list[Plain]]]
    ) -> None:
        codec = connected()
        for data, expected in stream:
            decoded = [plain(codec.decode(bytes((byte,)))) for byte in data]
            assert decoded[-1] == expected
            assert not any(decoded[:-1])

    @given(st.binary(max_size=200) | streams.map(lambda s: b"".join(p for p, _ in s)), st.data())
    def test_any_bytes_decode_to_at_most_one_error(self, data: bytes, draw: st.DataObject) -> None:
        mutated = bytearray(data)
        for place in draw.draw(st.lists(st.integers(0, 400), max_size=4)):
            if place < len(mutated):
                mutated[place] = draw.draw(st.integers(0, 255))
        codec = Codec(Connect(), LIMIT)
        codec.connect()
        events: list[Event] = []
        broken = False
        if draw.draw(st.booleans()):
            events += codec.decode(CONNACK)
        for chunk in chunks(bytes(mutated), draw.draw(st.lists(st.integers(0, 400), max_size=8))):
            more = codec.decode(chunk)
            assert not (broken and more)
            events += more
            broken = broken or any(isinstance(event, RemoteProtocolError) for event in more)
            assert len(codec._framing._kept) <= LIMIT + 5
        assert [isinstance(event, RemoteProtocolError) for event in events[:-1]].count(True) == 0
        for event in events:
            if isinstance(event, RemoteProtocolError):
                assert str(event)

    def test_no_bytes_decode_to_no_events(self) -> None:
        assert connected().decode(b"") == []

    def test_batch_has_weight_of_equally_heavy_messages(self) -> None:
        retained = publish("a/", b"three", flags=1)
        for data, each in (
            (publish("a/", b"seven") + retained, 5 + len("a/") + 128),
            (publish("a/") + retained, None),
        ):
            (event,) = connected().decode(data)
            assert isinstance(event, MessageBatch)
            assert event.weights == {"a/": each}
            assert unbatch([event]) == event.in_order

    def test_payload_is_a_bytes_object(self) -> None:
        (event,) = unbatch(connected().decode(publish("a/", b"x")))
        assert isinstance(event, EmitterMessage)
        assert type(event.binary) is bytes

    @pytest.mark.parametrize("size", [0, 1, 127, 128, 16383, 16384, 65000])
    @pytest.mark.parametrize("packet_id", [None, 7])
    def test_payload_of_any_size_is_decoded(self, size: int, packet_id: int | None) -> None:
        codec = connected()
        data = publish("a/", b"x" * size, packet_id)
        head, tail = data[:-1], data[-1:]
        assert codec.decode(head) == []
        assert plain(codec.decode(tail)) == [("message", "a/", b"x" * size)]

    def test_message_of_qos_1_is_acknowledged(self) -> None:
        codec = connected()
        assert codec.take_written() == b""
        codec.decode(publish("a/", b"x", 0x1234))
        assert codec.take_written() == puback(0x1234)
        assert codec.take_written() == b""

    def test_puback_with_unusual_encoding_is_decoded(self) -> None:
        # A flag that has no meaning, and a remaining length in two bytes instead of one.
        decoded = connected().decode(b"\x42\x02\x00\x03" + b"\x40\x82\x00\x00\x04")
        assert plain(decoded) == [("PubAck", 3), ("PubAck", 4)]


class TestLargePackets:
    """Incomplete packets of 64 KiB or more, which are collected in a buffer."""

    @given(
        st.lists(
            st.tuples(st.sampled_from((0, 5, 65_500, 65_600, 200_000)), PACKET_IDS), max_size=5
        ),
        st.data(),
    )
    def test_messages_do_not_depend_on_how_they_are_received(
        self, sizes: list[tuple[int, int | None]], draw: st.DataObject
    ) -> None:
        payloads = [bytes((65 + at,)) * size for at, (size, _) in enumerate(sizes)]
        ids = [packet_id for _, packet_id in sizes]
        left = b"".join(publish("a/", *each) for each in zip(payloads, ids, strict=True))
        codec = connected(1_000_000, fast_path=draw.draw(st.booleans()))
        events: list[Event] = []
        while left:
            unfilled = codec.unfilled
            size = draw.draw(st.sampled_from((1, 1000, 65_536, 300_000)))
            if unfilled is not None and draw.draw(st.booleans()):
                size = min(size, len(unfilled), len(left))
                unfilled[:size] = left[:size]
                events += codec.decode(unfilled[:size])
            else:
                events += codec.decode(left[:size])
            left = left[size:]
            while codec.turn_over:
                events += codec.decode(b"")
        assert plain(events) == [("message", "a/", payload) for payload in payloads]
        for event in unbatch(events):
            assert isinstance(event, EmitterMessage)
            assert type(event.binary) is bytes
        assert codec.take_written() == b"".join(puback(one) for one in ids if one is not None)

    def test_buffer_serves_consecutive_packets_and_is_freed_by_small_ones(self) -> None:
        codec = connected(1_000_000)
        data = publish("a/", bytes(100_000))
        buffers = []
        for _ in range(2):
            codec.decode(data[:1000])
            buffers.append(codec._framing.buffer)
            assert codec.unfilled is not None
            codec.decode(data[1000:])
        assert buffers[0] is buffers[1]
        codec.decode(PINGRESP)
        assert not codec._framing.buffer

    def test_packet_after_a_large_one_in_the_same_read_is_decoded(self) -> None:
        codec = connected(1_000_000)
        data = publish("a/", bytes(100_000))
        codec.decode(data[:70_000])
        decoded = codec.decode(data[70_000:] + PINGRESP + data[:70_000])
        assert plain(decoded) == [("message", "a/", bytes(100_000)), ("PingResp",)]
        assert plain(codec.decode(data[70_000:])) == [("message", "a/", bytes(100_000))]

    def test_payload_is_kept_while_the_next_packet_is_received(self) -> None:
        codec = connected(1_000_000)
        events: list[Event] = []
        for letter in (b"x", b"y"):
            data = publish("a/", letter * 100_000)
            codec.decode(data[:70_000])
            events += codec.decode(data[70_000:])
        assert plain(events) == [("message", "a/", letter * 100_000) for letter in (b"x", b"y")]


class TestConnAck:
    @pytest.mark.parametrize("code", range(256))
    def test_connack_of_any_code_is_decoded(self, code: int, fast_path: bool) -> None:
        codec = Codec(Connect(), fast_path=fast_path)
        codec.connect()
        assert codec.decode(connack(code)) == [ConnAck(code)]
        assert codec.take_written() == b""

    @pytest.mark.parametrize(
        "first",
        [
            *(publish("a/", b"x"), puback(1), suback(1, 0), PINGRESP),
            *(b"HTTP/1.1 400", b"\x15\x03\x01\0\2xx"),
            *(packet(0x20, b""), packet(0x20, b"\0"), packet(0x20, b"\0\0\0")),
        ],
    )
    def test_other_first_packet_is_an_error(self, first: bytes) -> None:
        codec = Codec(Connect())
        codec.connect()
        (event,) = codec.decode(first + bytes(100))
        assert isinstance(event, RemoteProtocolError)
        assert "CONNACK" in str(event)

    def test_packets_after_connack_are_decoded_too(self) -> None:
        codec = Codec(Connect())
        codec.connect()
        decoded = plain(codec.decode(CONNACK + publish("a/", b"x") + puback(3)))
        assert decoded == [("ConnAck", 0), ("message", "a/", b"x"), ("PubAck", 3)]

    @pytest.mark.parametrize("code", [0, 1, 2, 5, 6, 255])
    def test_second_connack_is_decoded(self, code: int) -> None:
        codec = connected()
        assert codec.decode(connack(code)) == [ConnAck(code)]
        assert codec.take_written() == b""

    @pytest.mark.parametrize("size", [0, 1, 3])
    def test_second_connack_of_wrong_size_is_an_error(self, size: int) -> None:
        assert plain(connected().decode(packet(0x20, bytes(size)))) == [("error",)]


class TestMalformed:
    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (packet(0x30, b""), "PUBLISH whose topic is empty or cut off"),
            (packet(0x30, b"\0"), "PUBLISH whose topic is empty or cut off"),
            (packet(0x30, b"\0\0payload"), "PUBLISH whose topic is empty or cut off"),
            (packet(0x30, b"\0\3a/"), "PUBLISH whose topic is empty or cut off"),
            (packet(0x32, b"\0\0\0\1x"), "malformed packet of type 3"),
            (packet(0x32, b"\0\2a/\1"), "malformed packet of type 3"),
            (packet(0x34, b"\0\2a/\0\1x"), "QoS over 1"),
            (packet(0x36, b"\0\2a/\0\1x"), "QoS over 1"),
            (packet(0x40, b""), "PUBACK of 0 bytes"),
            (packet(0x40, b"\1"), "PUBACK of 1 bytes"),
            (packet(0x40, b"\0\1\0"), "PUBACK of 3 bytes"),
            (packet(0x90, b""), "malformed packet of type 9"),
            (packet(0x90, b"\0"), "malformed packet of type 9"),
            (packet(0x90, b"\0\1\3"), "malformed packet of type 9"),
            (packet(0xB0, b""), "malformed packet of type 11"),
            (packet(0xB0, b"\0\1\0"), "malformed packet of type 11"),
            (packet(0xD0, b"\0"), "malformed packet of type 13"),
            (packet(0x00, b""), "malformed packet of type 0"),
            (packet(0xF0, b""), "malformed packet of type 15"),
            (packet(0x10, b"\0\4MQTT"), "a CONNECT, which a broker must not send"),
            (packet(0x50, uint16(5)), "a PUBREC, which a broker must not send"),
            (packet(0x62, uint16(5)), "a PUBREL, which a broker must not send"),
            (packet(0x70, uint16(5)), "a PUBCOMP, which a broker must not send"),
            (packet(0x82, b"\0\1\0\2a/\0"), "a SUBSCRIBE, which a broker must not send"),
            (packet(0xA2, b"\0\1\0\2a/"), "an UNSUBSCRIBE, which a broker must not send"),
            (packet(0xC0, b""), "a PINGREQ, which a broker must not send"),
            (packet(0xC0, b"\0"), "a PINGREQ, which a broker must not send"),
            (packet(0xE0, b""), "a DISCONNECT, which a broker must not send"),
            (b"\x30\x80\x80\x80\x80\x01", "exceeds four bytes"),
            (b"\x30\xff\xff\xff\xff", "exceeds four bytes"),
        ],
    )
    def test_error_names_malformed_packet(self, data: bytes, reason: str) -> None:
        codec = connected()
        events = codec.decode(publish("a/", b"x") + data + publish("b/", b"y"))
        assert plain(events) == [("message", "a/", b"x"), ("error",)]
        assert reason in str(events[-1])
        assert codec.decode(publish("c/", b"z")) == []

    def test_length_over_limit_is_rejected_before_packet_arrives(self) -> None:
        for size in (LIMIT + 1, 0xFFFFFFF):
            codec = connected(LIMIT)
            (event,) = codec.decode(b"\x30" + remaining_length(size))
            assert isinstance(event, RemoteProtocolError)
            assert f"{size} bytes, which exceeds max_message_size ({LIMIT})" in str(event)

    def test_packet_of_maximum_size_is_decoded(self) -> None:
        codec = connected(LIMIT)
        payload = b"x" * (LIMIT - 4)
        assert plain(codec.decode(publish("a/", payload))) == [("message", "a/", payload)]

    def test_at_most_one_packet_is_buffered(self) -> None:
        codec = connected(LIMIT)
        data = publish("a/", b"x" * (LIMIT - 4)) * 3
        decoded = 0
        for byte in data[:-1]:
            decoded += len(codec.decode(bytes((byte,))))
            assert len(codec._framing._kept) < LIMIT + 5
        assert decoded == 2

    @pytest.mark.parametrize("packet_id", [None, 9])
    def test_topic_that_is_not_utf8_does_not_end_connection(self, packet_id: int | None) -> None:
        codec = connected()
        data = publish(b"a\xff/", b"four", packet_id) + publish("b/", b"x")
        assert codec.decode(data)[0] == Undecodable(4)
        assert plain(codec.decode(data))[1] == ("message", "b/", b"x")


class TestEncode:
    def test_connect_with_all_fields(self) -> None:
        will = Publish(b"k/a/", b"bye", None, True)
        data = Codec(Connect("me", "ann", "word", 45, will)).connect()
        body = data[2:]
        assert data[:2] == bytes((0x10, len(body)))
        # User, password, will retain, will, clean session.
        assert body[:10] == b"\0\4MQTT\4" + bytes((0b11100110,)) + uint16(45)
        rest = body[10:]
        for text in (b"me", b"k/a/", b"bye", b"ann", b"word"):
            assert rest[: 2 + len(text)] == uint16(len(text)) + text
            rest = rest[2 + len(text) :]
        assert rest == b""

    def test_connect_without_fields(self) -> None:
        assert Codec(Connect()).connect() == packet(0x10, b"\0\4MQTT\4\2\0\x1e\0\0")

    def test_connect_with_username_only(self) -> None:
        data = Codec(Connect("", "ann")).connect()
        assert data[9] == 0b10000010
        assert data.endswith(b"\0\3ann")

    def test_connect_with_will_that_is_not_retained(self) -> None:
        assert Codec(Connect(will=Publish(b"k/a/", b""))).connect()[9] == 0b00000110

    def test_packets_are_encoded(self, fast_path: bool) -> None:
        codec = connected(fast_path=fast_path)
        assert codec.encode(Subscribe(7, "k/a/")) == packet(0x82, uint16(7) + uint16(4) + b"k/a/\0")
        assert codec.encode(Unsubscribe(8, "k/a/")) == packet(0xA2, uint16(8) + uint16(4) + b"k/a/")
        assert codec.encode(Publish(b"k/a/", b"x")) == publish("k/a/", b"x")
        assert codec.encode(Publish(b"k/a/", b"x", 9, True)) == publish("k/a/", b"x", 9, 1)
        assert codec.encode(PingReq()) == packet(0xC0, b"")
        assert codec.encode(Disconnect()) == packet(0xE0, b"")

    def test_encoded_packet_is_returned_exactly_once(self, fast_path: bool) -> None:
        codec = connected(fast_path=fast_path)
        for number in range(1, 200):
            expected = packet(0x82, uint16(number) + uint16(4) + b"k/a/\0")
            assert codec.encode(Subscribe(number, "k/a/")) == expected
            assert codec.encode(Publish(b"a/", b"", number)) == publish("a/", b"", number)
        assert codec.take_written() == b""

    def test_packet_is_encoded_before_connack(self) -> None:
        codec = Codec(Connect())
        codec.connect()
        assert codec.encode(Subscribe(1, "a/")) == packet(0x82, uint16(1) + uint16(2) + b"a/\0")

    def test_packet_is_encoded_while_another_is_partly_received(self) -> None:
        codec = connected()
        half = suback(1, 0)
        codec.encode(Subscribe(1, "a/"))
        codec.decode(half[:3])
        assert codec.encode(PingReq()) == packet(0xC0, b"")
        assert codec.decode(half[3:] + PINGRESP) == [SubAck(1, (0,)), PingResp()]


class TestAfterDisconnect:
    LATE = (suback(1, 0), unsuback(1), PINGRESP, publish("a/", b"x", 5))

    @pytest.mark.parametrize("late", LATE)
    def test_late_packet_is_not_an_error(self, late: bytes) -> None:
        codec = connected()
        assert codec.encode(Disconnect()) == packet(0xE0, b"")
        events = codec.decode(late + publish("a/", b"y") + puback(3))
        assert plain(events)[-2:] == [("message", "a/", b"y"), ("PubAck", 3)]
        assert codec.take_written() == b""

    @pytest.mark.parametrize("late", LATE)
    def test_late_packet_without_fast_path_is_dropped(self, late: bytes) -> None:
        codec = connected(fast_path=False)
        codec.encode(Publish(b"a/", b"x", 3))
        assert codec.encode(Disconnect()) == packet(0xE0, b"")
        events = codec.decode(late + publish("a/", b"y") + puback(3))
        assert events == ([PingResp()] if late == PINGRESP else [])
        assert codec.take_written() == b""

    def test_malformed_packet_is_still_an_error(self) -> None:
        codec = connected()
        codec.encode(Disconnect())
        assert plain(codec.decode(packet(0x40, b""))) == [("error",)]


names = st.text(st.sampled_from("ab/?=é漢\U0001f600"), min_size=1, max_size=100).map(str.encode)

any_packets = st.one_of(
    # PUBLISH of QoS 0, well-formed and not.
    st.builds(publish, topics, payloads, st.none(), st.sampled_from([0, 1, 8, 9])),
    st.builds(packet, st.sampled_from([0x30, 0x31, 0x38, 0x39]), st.binary(max_size=8)),
    st.builds(
        lambda size, rest: packet(0x30, uint16(size) + rest),
        st.integers(0, 6),
        st.binary(max_size=6),
    ),
    # PUBACK, well-formed and not.
    st.builds(puback, st.integers(1, 6)),
    st.builds(packet, st.sampled_from([0x40, 0x4F]), st.binary(max_size=4)),
    # Packets that do not take the fast path.
    st.builds(publish, topics, payloads, ids),
    st.builds(packet, st.sampled_from([0xD0, 0xDF]), st.binary(max_size=1)),
    st.builds(suback, st.integers(1, 6), st.sampled_from([0, 1, 2, 128])),
)


class TestFastPathAgainstPaho:
    @given(
        topic=names,
        size=st.integers(0, 140) | st.integers(16_370, 16_390),
        packet_id=st.none() | st.integers(1, 65535),
        retain=st.booleans(),
    )
    # The remaining length takes one byte up to 127, two up to 16383, three up to 2097151.
    @example(topic=b"a/", size=127 - 4, packet_id=None, retain=False)
    @example(topic=b"a/", size=128 - 4, packet_id=None, retain=False)
    @example(topic=b"a/", size=127 - 6, packet_id=1, retain=True)
    @example(topic=b"a/", size=128 - 6, packet_id=1, retain=True)
    @example(topic=b"a/", size=2_097_151 - 4, packet_id=None, retain=False)
    @example(topic=b"a/", size=2_097_152 - 6, packet_id=65535, retain=False)
    def test_publish_is_encoded_as_by_paho(
        self, topic: bytes, size: int, packet_id: int | None, retain: bool
    ) -> None:
        message = Publish(topic, bytes(size), packet_id, retain)
        with_paho = connected(fast_path=False).encode(message)
        assert connected().encode(message) == with_paho
        assert encode_publish(topic, bytes(size), retain, packet_id) == with_paho

    @given(st.lists(any_packets, max_size=8), st.integers(0, 30), st.lists(st.integers(0, 999)))
    def test_packets_are_decoded_as_by_paho(
        self, stream: list[bytes], missing: int, cuts: list[int]
    ) -> None:
        data = b"".join(stream)
        data = data[: len(data) - missing] if missing < len(data) else data
        with_paho = connected(fast_path=False)
        for packet_id in range(1, 7):
            # Paho reports a PUBACK once, and only for a PUBLISH that it has sent.
            with_paho.encode(Publish(b"a", b"", packet_id))
        open_ids = set(range(1, 7))
        expected: list[Plain] = []
        fast = connected()
        for event in fast.decode(data):
            if isinstance(event, PubAck):
                if event.packet_id not in open_ids:
                    continue
                open_ids.remove(event.packet_id)
            expected += plain([event])
        decoded = [
            event for chunk in chunks(data, cuts) for event in plain(with_paho.decode(chunk))
        ]
        assert decoded == expected
        assert with_paho.take_written() == fast.take_written()

    def test_turn_ends_after_fewer_messages_with_paho(self) -> None:
        codec = connected(fast_path=False)
        events = unbatch(codec.decode(publish("a/", b"x") * 200))
        assert codec.turn_over
        turns = 1
        while codec.turn_over:
            events += unbatch(codec.decode(b""))
            turns += 1
        assert len(events) == 200
        assert turns == 4


def test_repr_of_packet_hides_key_and_password() -> None:
    reprs = [
        repr(Publish(b"private/a/?ttl=5", b"x", 7, True)),
        repr(Publish(b"emitter/keygen/", b'{"key":"private"}')),
        repr(Subscribe(8, "private/a/")),
        repr(Unsubscribe(9, "private/a/")),
        repr(Connect("me", "ann", "private", 30)),
    ]
    assert reprs == [
        "Publish(topic='…/a/?ttl=5', 1 bytes, packet_id=7, retain=True)",
        "Publish(topic='…/keygen/', 17 bytes, packet_id=None, retain=False)",
        "Subscribe(packet_id=8, topic='…/a/')",
        "Unsubscribe(packet_id=9, topic='…/a/')",
        "Connect(username='ann', password=…, will=None)",
    ]


def test_plain_distinguishes_events_of_equal_fields() -> None:
    assert plain([UnsubAck(1), PubAck(1), SubAck(1, (0,))]) == [
        ("UnsubAck", 1),
        ("PubAck", 1),
        ("SubAck", 1, (0,)),
    ]
