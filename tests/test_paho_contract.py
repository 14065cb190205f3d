"""
What the codec takes from Paho, and the traps that Paho sets.

This is what to run on another version of Paho: the private hooks have to be there and to do what
the codec needs, and each trap has to stay shut. Where a plain Paho client falls into the trap, that
is shown too, so that what is done against it can go when Paho has changed.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt import __version__ as paho_version
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode

from emitter_anyio import _codec
from emitter_anyio._codec import Codec, Hello
from emitter_anyio._errors import RemoteProtocolError
from emitter_anyio._messages import EmitterMessage
from emitter_anyio._packets import (
    ConnAck,
    Disconnect,
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
from tests.support.events import one_by_one
from tests.support.packets import CONNACK, PINGRESP, connack, packet, publish, suback, two, unsuback

HOOKS = {"_create_socket", "_filter_wildcard_len_check", "_mid_generate"}


def connected(hello: Hello | None = None) -> Codec:
    codec = Codec(hello or Hello())
    codec.connect()
    codec.decode(CONNACK)
    return codec


def plain_client(**options: Any) -> paho.Client:
    return paho.Client(CallbackAPIVersion.VERSION2, **options)


def private_names() -> set[str]:
    """The private names of Paho in the codec: overridden in its subclass, or used on a client."""
    tree = ast.parse(Path(_codec.__file__).read_text())
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == "_PahoClient":
            found |= {inner.name for inner in node.body if isinstance(inner, ast.FunctionDef)}
        elif isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            if owner.split(".")[-1] in ("_paho", "client", "paho", "message"):
                found.add(node.attr)
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


class TestPrivateHooks:
    def test_the_version_is_one_that_we_admit(self) -> None:
        assert (2, 0) <= tuple(map(int, paho_version.split(".")[:2])) < (3, 0)

    def test_these_are_all(self) -> None:
        assert private_names() == HOOKS

    def test_a_client_has_them_with_the_arguments_that_we_know(self) -> None:
        parameters = {
            name: list(inspect.signature(getattr(paho.Client, name)).parameters) for name in HOOKS
        }
        assert parameters == {
            "_create_socket": ["self"],
            "_mid_generate": ["self"],
            "_filter_wildcard_len_check": ["sub"],
        }
        static = inspect.getattr_static(paho.Client, "_filter_wildcard_len_check")
        assert isinstance(static, staticmethod)

    def test_connect_asks_for_the_socket_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = count_sockets(monkeypatch)
        client = _codec._PahoClient(Hello(), [])
        assert len(made) == 1
        assert client.socket() is made[0]

    def test_the_packet_ids_are_those_of_the_hook(self) -> None:
        codec = connected()
        for packet_id in (65535, 1, 300, 300):
            assert codec.encode(Subscribe(packet_id, "a/"))[2:4] == two(packet_id)
            assert codec.encode(Unsubscribe(packet_id, "a/"))[2:4] == two(packet_id)

    def test_a_filter_passes_the_hook_before_it_leaves(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = []

        def look(sub: bytes) -> MQTTErrorCode:
            seen.append(sub)
            return MQTTErrorCode.MQTT_ERR_SUCCESS

        monkeypatch.setattr(_codec._PahoClient, "_filter_wildcard_len_check", staticmethod(look))
        codec = connected()
        codec.encode(Subscribe(1, "#/"))
        codec.encode(Unsubscribe(2, "+/"))
        # Paho lets an UNSUBSCRIBE pass unseen, in some versions.
        assert seen[0] == b"#/"


def count_sockets(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    made: list[object] = []
    create = _codec._PahoClient._create_socket

    def create_socket(self: Any) -> Any:
        made.append(create(self))
        return made[-1]

    monkeypatch.setattr(_codec._PahoClient, "_create_socket", create_socket)
    return made


class TestTraps:
    """The numbers are those of ``tests/paho-traps.md``."""

    def test_1_one_loop_read_takes_one_packet(self) -> None:
        data = b"".join(suback(number, 0) for number in range(1, 11))
        assert connected().decode(data) == [SubAck(number, (0,)) for number in range(1, 11)]

    def test_1_a_loop_read_too_many_finds_nothing_and_no_end(self) -> None:
        codec = connected()
        assert codec._use_paho().loop_read() == MQTTErrorCode.MQTT_ERR_SUCCESS
        assert codec.decode(suback(1, 0)) == [SubAck(1, (0,))]

    @pytest.mark.parametrize("packet_id", [None, 5])
    def test_2_many_messages_in_one_chunk_come_at_once(self, packet_id: int | None) -> None:
        payloads = [str(number).encode() for number in range(50)]
        data = b"".join(publish("a/", payload, packet_id) for payload in payloads)
        events = one_by_one(connected().decode(data))
        assert [event.binary for event in events if isinstance(event, EmitterMessage)] == payloads

    def test_6_a_plain_client_handles_a_packet_again_if_a_callback_raises(self) -> None:
        client = _codec._PahoClient(Hello(), [])
        calls = []

        def raises(*args: object) -> None:
            calls.append(args)
            raise ZeroDivisionError

        client.on_message = raises
        client.link.inbound += CONNACK + publish("a/", b"x")
        client.loop_read()
        for _ in range(4):
            with pytest.raises(ZeroDivisionError):
                client.loop_read()
        assert len(calls) == 4

    @pytest.mark.parametrize("topic", [b"a/", b"a\xff/", b"\xed\xa0\x80"])
    def test_6_here_each_message_comes_once(self, topic: bytes) -> None:
        codec = connected()
        for _ in range(3):
            assert len(codec.decode(publish(topic, b"x", 5))) == 1
            assert codec.take_written() == packet(0x40, two(5))
        assert codec.decode(suback(1, 0) + unsuback(2)) == [SubAck(1, (0,)), UnsubAck(2)]
        assert codec.decode(PINGRESP) == [PingResp()]

    def test_6_what_paho_lets_out_ends_the_link(self) -> None:
        # Paho up to 2.1 lets struct.error out for a packet that is cut off.
        codec = connected()

        def raises(*args: object) -> None:
            raise ZeroDivisionError

        codec._use_paho().on_subscribe = raises
        (event,) = codec.decode(suback(1, 0) + publish("a/", b"x"))
        assert isinstance(event, RemoteProtocolError)
        assert isinstance(event.__cause__, ZeroDivisionError)
        assert codec.decode(publish("a/", b"x")) == []

    @pytest.mark.parametrize("packet_id", [None, 5])
    def test_7_a_topic_that_is_no_utf8(self, packet_id: int | None) -> None:
        codec = connected()
        bad, good = publish(b"\xff\xfe/", b"four", packet_id), publish("a/", b"x", packet_id)
        events = one_by_one(codec.decode(bad + good))
        assert events[0] == Undecodable(4)
        assert isinstance(events[1], EmitterMessage)
        assert len(events) == 2

    def test_13_a_plain_client_holds_publishes_back(self) -> None:
        client = _codec._PahoClient(Hello(), [])
        client.link.inbound += CONNACK
        client.loop_read()
        client.link.outbound.clear()
        for number in range(1, 101):
            client.next_mid = number
            client.publish("a/", b"", qos=1)
        assert bytes(client.link.outbound) == b"".join(
            publish("a/", b"", number) for number in range(1, 21)
        )

    def test_13_here_each_one_leaves_at_once(self) -> None:
        codec = connected()
        for number in range(1, 101):
            assert codec.encode(Publish(b"a/", b"", number)) == publish("a/", b"", number)

    def test_15_nothing_is_kept_for_another_time(self) -> None:
        codec = Codec(Hello())
        codec.connect()
        codec.encode(Publish(b"a/", b"early", 1))
        assert codec.decode(CONNACK) == [ConnAck(0)]
        assert codec.take_written() == b""
        codec.encode(Disconnect())
        codec.encode(Publish(b"a/", b"late", 2))
        codec.encode(Subscribe(3, "a/"))
        assert codec.take_written() == b""

    def test_16_a_fresh_codec_sends_nothing_old(self) -> None:
        hello = Hello("me")
        old = connected(hello)
        old.encode(Publish(b"emitter/keygen/", b"{}", 1))
        old.encode(Subscribe(2, "a/"))
        old.decode(publish("a/", b"x", 9))
        fresh = Codec(hello)
        assert fresh.connect() == Codec(hello).connect()
        assert fresh.decode(CONNACK) == [ConnAck(0)]
        assert fresh.take_written() == b""
        assert fresh.encode(PingReq()) == packet(0xC0, b"")

    def test_17_an_id_is_not_taken_from_one_that_is_pending(self) -> None:
        codec = connected()
        assert codec.encode(Subscribe(1, "a/"))[2:4] == two(1)
        for number in (2, 65535, 2):
            # Paho's own counter would go on from the one before.
            assert codec.encode(Unsubscribe(number, "b/"))[2:4] == two(number)
        assert codec.decode(suback(1, 0)) == [SubAck(1, (0,))]

    @pytest.mark.parametrize("code", [1, 2, 3, 4, 5])
    @pytest.mark.parametrize("client_id", ["", "me"])
    def test_29_a_refusal_is_not_answered_with_a_reconnect(
        self, code: int, client_id: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        codec = Codec(Hello(client_id))
        hello = codec.connect()
        made = count_sockets(monkeypatch)
        assert codec.decode(connack(code)) == [ConnAck(code)]
        assert codec.take_written() == b""
        assert not made
        # A later one neither.
        codec = Codec(Hello(client_id))
        assert codec.connect() == hello
        codec.decode(CONNACK)
        assert codec.decode(connack(code)) == [ConnAck(code)]
        assert codec.take_written() == b""
        assert not made

    def test_30_no_lock_of_paho_is_held_when_events_come_out(self) -> None:
        codec = connected()
        for event in codec.decode(publish("a/", b"x", 5) + suback(1, 0) + unsuback(2)):
            lock = codec._use_paho()._in_callback_mutex
            assert lock.acquire(blocking=False), event
            lock.release()
            assert codec.encode(Subscribe(3, "b/"))
            assert connected().take_written() == b""

    def test_30_paho_is_told_of_no_callback_that_it_calls_around_a_socket(self) -> None:
        client = connected()._use_paho()
        assert client.on_socket_open is None
        assert client.on_socket_close is None
        assert client.on_socket_register_write is None
        assert client.on_socket_unregister_write is None

    def test_34_disconnect_leaves_at_once(self) -> None:
        codec = connected()
        assert codec.encode(Disconnect()) == packet(0xE0, b"")
        assert codec.take_written() == b""
        client = _codec._PahoClient(Hello(), [])
        client.written()
        client.disconnect()
        assert client.written() == packet(0xE0, b"")

    FILTERS = ("#/", "k/#/", "k/#/?last=5", "#?last=5", "k/a+/", "k/+/a/?last=0", "k/$share/g/a/")

    @pytest.mark.parametrize("filter_", FILTERS)
    def test_38_filters_that_emitter_wants_go_out(self, filter_: str) -> None:
        codec = connected()
        text = two(len(filter_)) + filter_.encode()
        assert codec.encode(Subscribe(1, filter_)) == packet(0x82, two(1) + text + b"\0")
        assert codec.encode(Unsubscribe(2, filter_)) == packet(0xA2, two(2) + text)

    @pytest.mark.parametrize("filter_", ["#/", "k/#/?last=5", "k/a+/"])
    def test_38_a_plain_client_refuses_some(self, filter_: str) -> None:
        with pytest.raises(ValueError, match="Invalid subscription filter"):
            plain_client().subscribe(filter_)

    def test_it_is_made_when_there_is_something_for_it_to_do(self) -> None:
        codec = connected()
        codec.encode(Publish(b"a/", b"x", 1))
        codec.encode(PingReq())
        codec.decode(packet(0x40, two(1)) + PINGRESP + publish("a/", b"x"))
        codec.take_written()
        codec.encode(Disconnect())
        assert codec._paho is None
        assert codec.encode(Subscribe(2, "a/"))[0] == 0x82
        assert codec._paho is not None

    @pytest.mark.parametrize(
        "hello",
        [
            Hello("a", "secret"),
            Hello("a", "me", "secret"),
            Hello("a", will=Publish(b"secret/a/", b"x")),
        ],
    )
    def test_a_connect_with_a_secret_is_not_remembered(self, hello: Hello) -> None:
        remembered = _codec._encode_connect
        remembered.cache_clear()
        codec = Codec(hello)
        assert b"secret" in codec.connect()
        assert remembered.cache_info().currsize == 0
        # Its Paho goes on with the rest.
        client = codec._paho
        assert codec.decode(CONNACK) == [ConnAck(0)]
        assert codec.encode(Subscribe(1, "a/"))[0] == 0x82
        assert codec._paho is client
        plain = Codec(Hello("a")).connect()
        assert remembered.cache_info().currsize == 1
        assert Codec(Hello("a")).connect() is plain
        assert Codec(Hello("b")).connect() == plain.replace(b"\x01a", b"\x01b")

    def test_a_puback_never_reaches_paho(self) -> None:
        # It would wake what waits for a message of Paho's own with the same id.
        codec = connected()
        assert codec.decode(packet(0x40, two(7))) == [PubAck(7)]
        assert codec._paho is None
        assert codec._use_paho().link.inbound == b""
