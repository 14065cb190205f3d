"""The MQTT packets of the development broker."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emitter_anyio.testing._packets import (
    MAX_REMAINING_LENGTH,
    ConnAck,
    Connect,
    Disconnect,
    MalformedPacketError,
    Packet,
    PacketReader,
    PingReq,
    PingResp,
    PubAck,
    PubComp,
    Publish,
    PubRec,
    PubRel,
    SubAck,
    Subscribe,
    UnsubAck,
    Unsubscribe,
    Will,
)

ids = st.integers(0, 65535)
qos = st.integers(0, 2)
text = st.text(max_size=300)
payloads = st.binary(max_size=300)


def publish(
    topic: str, payload: bytes, qos: int, packet_id: int, retain: bool, dup: bool
) -> Publish:
    return Publish(topic, payload, qos, packet_id if qos else 0, retain, dup)


packets: st.SearchStrategy[Packet] = st.one_of(
    st.builds(
        Connect,
        text,
        st.none() | text,
        st.none() | payloads,
        st.none() | st.builds(Will, text, payloads, qos, st.booleans()),
        ids,
        st.booleans(),
    ),
    st.builds(ConnAck, st.integers(0, 255)),
    st.builds(publish, text, payloads, qos, ids, st.booleans(), st.booleans()),
    *(st.builds(kind, ids) for kind in (PubAck, PubRec, PubRel, PubComp, UnsubAck)),
    st.builds(Subscribe, ids, st.lists(st.tuples(text, qos), min_size=1, max_size=5).map(tuple)),
    st.builds(SubAck, ids, st.lists(st.integers(0, 255), max_size=5).map(tuple)),
    st.builds(Unsubscribe, ids, st.lists(text, min_size=1, max_size=5).map(tuple)),
    st.builds(PingReq),
    st.builds(PingResp),
    st.builds(Disconnect),
)


def read(*pieces: bytes, limit: int = MAX_REMAINING_LENGTH) -> list[Packet]:
    reader, found = PacketReader(limit), []
    for piece in pieces:
        reader.feed(piece)
        while (packet := reader.next_packet()) is not None:
            found.append(packet)
    return found


def test_all_packet_types_are_covered() -> None:
    assert len(get_args(Packet)) == 14


@given(st.lists(packets, max_size=5), st.data())
def test_chunks_of_any_size_give_the_same_packets(sent: list[Packet], data: st.DataObject) -> None:
    wire = b"".join(packet.encode() for packet in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=9), "cuts"))
    pieces = [wire[a:b] for a, b in zip([0, *cuts], [*cuts, len(wire)], strict=True)]
    got = read(*pieces)
    assert got == sent
    assert [type(packet) for packet in got] == [type(packet) for packet in sent]


def test_single_bytes_are_decoded() -> None:
    packet = Publish("a/", bytes(300), 1, 7)
    assert read(*(bytes((byte,)) for byte in packet.encode())) == [packet]


def outcome(*pieces: bytes) -> list[Packet] | None:
    try:
        return read(*pieces)
    except MalformedPacketError:
        return None


@given(st.binary(max_size=200))
def test_any_bytes_give_the_same_result_in_single_bytes(garbage: bytes) -> None:
    assert outcome(garbage) == outcome(*(bytes((byte,)) for byte in garbage))


@given(st.integers(1, 14), st.integers(0, 15), st.binary(max_size=40))
def test_any_body_is_decoded_or_raises_malformed_packet_error(
    kind: int, flags: int, body: bytes
) -> None:
    found = outcome(bytes((kind << 4 | flags, len(body))) + body)
    assert found is None or len(found) == 1


@given(packets, st.data())
def test_incomplete_packet_is_not_decoded(packet: Packet, data: st.DataObject) -> None:
    wire = packet.encode()
    assert read(wire[: data.draw(st.integers(0, len(wire) - 1))]) == []


@pytest.mark.parametrize(
    "wire",
    [
        pytest.param("0000", id="type 0"),
        pytest.param("f000", id="type 15"),
        pytest.param("308080808001", id="a length of five bytes"),
        pytest.param("30818004", id="one byte over the limit"),
        pytest.param("3605000161000178", id="QoS 3"),
        pytest.param("3000", id="PUBLISH without a topic"),
        pytest.param("300100", id="PUBLISH with half a length"),
        pytest.param("3003000261", id="a topic that is too short"),
        pytest.param("32030001 61", id="QoS 1 without an id"),
        pytest.param("8003000100", id="SUBSCRIBE with flags 0"),
        pytest.param("82020001", id="SUBSCRIBE to nothing"),
        pytest.param("820600010001 6103", id="SUBSCRIBE at QoS 3"),
        pytest.param("82050001000161", id="SUBSCRIBE without a QoS"),
        pytest.param("a2020001", id="UNSUBSCRIBE from nothing"),
        pytest.param("4003000100", id="a long PUBACK"),
        pytest.param("400100", id="a short PUBACK"),
        pytest.param("c00100", id="PINGREQ with a body"),
        pytest.param("c100", id="PINGREQ with a flag"),
        pytest.param("20030000 00", id="a long CONNACK"),
        pytest.param("100400044d51", id="CONNECT that ends in its name"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n".hex(), id="HTTP"),
        pytest.param("160301020001", id="a TLS hello"),
    ],
)
def test_malformed_packet_raises(wire: str) -> None:
    with pytest.raises(MalformedPacketError):
        read(bytes.fromhex(wire))


def test_packets_before_a_malformed_packet_are_decoded() -> None:
    reader = PacketReader()
    reader.feed(PingReq().encode() + b"\x00\x00")
    assert reader.next_packet() == PingReq()
    with pytest.raises(MalformedPacketError):
        reader.next_packet()


def test_limit_applies_to_the_remaining_length() -> None:
    fits = Publish("a/", bytes(MAX_REMAINING_LENGTH - 4))
    assert read(fits.encode()) == [fits]
    with pytest.raises(MalformedPacketError):
        read(fits._replace(payload=fits.payload + b"x").encode())
    with pytest.raises(MalformedPacketError):
        read(Publish("a/", b"123").encode(), limit=6)


def test_encoding_of_examples() -> None:
    """Compare with examples written by hand from the standard; the other tests are round trips."""
    assert Publish("a/b", b"\x00", 1, 10, retain=True).encode().hex() == "33080003612f62000a00"
    assert Subscribe(10, (("a/b", 1), ("c/d", 2))).encode().hex() == (
        "820e000a0003612f62010003632f6402"
    )
    assert SubAck(10, (0, 2, 128)).encode().hex() == "9005000a000280"
    connect = Connect("id", "me", b"pw", Will("w", b"gone", 1, True), 10)
    assert connect.encode().hex() == (
        "101f00044d51545404ee000a000269640001770004676f6e6500026d6500027077"
    )


def test_invalid_utf_8_is_replaced() -> None:
    [packet] = read(b"\x30\x04\x00\x02\xff\xfe")
    assert packet == Publish("��")
