"""
What the engine takes from Paho, and the traps that Paho sets.

Run this file with another version of Paho before admitting it: the private hooks must exist and do
what the engine needs, and each trap must stay shut. Where a plain Paho client falls into a trap, a
test shows that too, so that the precaution can go when Paho has changed.
"""

from __future__ import annotations

import ast
import gc
import inspect
import weakref
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt import __version__ as paho_version
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode

from emitter_anyio._protocol import paho as engine
from emitter_anyio._protocol.codec import Codec
from emitter_anyio._protocol.packets import (
    ConnAck,
    Connect,
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
from emitter_anyio._protocol.paho import PahoEngine
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
    suback,
    uint16,
    unsuback,
)

HOOKS = {"_create_socket", "_filter_wildcard_len_check", "_mid_generate"}


@pytest.fixture(params=[True, False], ids=["fast path", "Paho"])
def fast_path(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def connected(connect: Connect | None = None, *, fast_path: bool = True) -> Codec:
    codec = Codec(connect or Connect(), fast_path=fast_path)
    codec.connect()
    codec.decode(CONNACK)
    return codec


def connected_engine() -> PahoEngine:
    engine = PahoEngine(Connect())
    engine.connect()
    assert engine.receive(CONNACK) == []
    return engine


def plain_client(**options: Any) -> paho.Client:
    return paho.Client(CallbackAPIVersion.VERSION2, **options)


def private_names() -> set[str]:
    """Return Paho's private names that the engine overrides in its subclass or uses on a client."""
    tree = ast.parse(Path(engine.__file__).read_text())
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == "_PahoClient":
            found |= {inner.name for inner in node.body if isinstance(inner, ast.FunctionDef)}
        elif isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            if owner.split(".")[-1] in ("_client", "client", "paho", "message"):
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

    def test_our_own_attributes_are_not_those_of_paho(self) -> None:
        ours = set(vars(PahoEngine(Connect())._client)) - set(vars(plain_client()))
        assert ours == {"_packet_id", "_memory"}
        assert not ours & set(dir(paho.Client))

    def test_connect_asks_for_the_socket_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = count_sockets(monkeypatch)
        engine = PahoEngine(Connect())
        engine.connect()
        assert made == [engine._socket]
        assert [engine._client.socket()] == made

    def test_the_packet_ids_are_those_of_the_hook(self) -> None:
        codec = connected(fast_path=False)
        for packet_id in (65535, 1, 300, 300):
            assert codec.encode(Subscribe(packet_id, "a/"))[2:4] == uint16(packet_id)
            assert codec.encode(Unsubscribe(packet_id, "a/"))[2:4] == uint16(packet_id)
            assert codec.encode(Publish(b"a", b"", packet_id))[5:7] == uint16(packet_id)
            assert codec.decode(puback(packet_id)) == [PubAck(packet_id)]

    def test_a_filter_passes_the_hook_before_it_leaves(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = []

        def look(sub: bytes) -> MQTTErrorCode:
            seen.append(sub)
            return MQTTErrorCode.MQTT_ERR_SUCCESS

        monkeypatch.setattr(engine._PahoClient, "_filter_wildcard_len_check", staticmethod(look))
        codec = connected()
        codec.encode(Subscribe(1, "#/"))
        codec.encode(Unsubscribe(2, "+/"))
        # Paho lets an UNSUBSCRIBE pass unseen, in some versions.
        assert seen[0] == b"#/"


def count_sockets(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    made: list[object] = []
    create = engine._PahoClient._create_socket

    def create_socket(self: Any) -> Any:
        made.append(create(self))
        return made[-1]

    monkeypatch.setattr(engine._PahoClient, "_create_socket", create_socket)
    return made


class TestEveryConnack:
    """Paho hides some return codes of CONNACK and merges others, so the codec reads them itself."""

    @pytest.mark.parametrize("code", range(256))
    @pytest.mark.parametrize("client_id", ["", "me"])
    def test_what_paho_reports(
        self, code: int, client_id: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = PahoEngine(Connect(client_id))
        engine.connect()
        made = count_sockets(monkeypatch)
        reported = []
        client = engine._client
        client.on_connect = lambda *arguments: reported.append(arguments[3].value)
        engine._socket.put(connack(code))
        accepted = client.loop_read() == MQTTErrorCode.MQTT_ERR_SUCCESS
        assert accepted == client.is_connected() == (code == 0)
        hidden = code == 1 or (code == 2 and not client_id)
        known = {0: 0, 2: 133, 3: 136, 4: 134, 5: 135}
        assert reported == ([] if hidden else [known.get(code, 128)])
        assert not made

    @pytest.mark.parametrize("code", range(256))
    @pytest.mark.parametrize("client_id", ["", "me"])
    def test_29_what_the_codec_reports(
        self, code: int, client_id: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        codec = Codec(Connect(client_id))
        codec.connect()
        made = count_sockets(monkeypatch)
        assert codec.decode(connack(code)) == [ConnAck(code)]
        assert codec.take_written() == b""
        # A refusal is not answered with a reconnect, nor is a later one.
        codec = connected(Connect(client_id))
        made.clear()
        assert codec.decode(connack(code)) == [ConnAck(code)]
        assert codec.take_written() == b""
        assert not made


class TestWhatPahoLeavesToTheCodec:
    @pytest.mark.parametrize("silent", [CONNACK, puback(7), packet(0x70, uint16(7)), PINGRESP])
    def test_it_reports_nothing_of_some_packets(self, silent: bytes) -> None:
        engine = connected_engine()
        assert engine.receive(silent) == []
        assert engine.take_written() == b""

    def test_it_reads_packets_before_the_connack(self) -> None:
        engine = PahoEngine(Connect())
        engine.connect()
        assert engine.receive(suback(1, 0)) == [SubAck(1, (0,))]

    @pytest.mark.parametrize(
        ("received", "answer"),
        [(packet(0xC0, b""), PINGRESP), (packet(0x62, uint16(7)), packet(0x70, uint16(7)))],
    )
    def test_it_answers_what_a_broker_may_not_send(self, received: bytes, answer: bytes) -> None:
        engine = connected_engine()
        assert engine.receive(received) == []
        assert engine.take_written() == answer

    def test_it_reads_a_packet_of_any_size(self) -> None:
        (event,) = connected_engine().receive(publish("a/", bytes(1_000_000)))
        assert isinstance(event, EmitterMessage)
        assert len(event.binary) == 1_000_000

    def test_after_disconnect_it_has_closed_its_socket(self) -> None:
        engine = connected_engine()
        assert engine.disconnect() == packet(0xE0, b"")
        assert engine._client.loop_read() == MQTTErrorCode.MQTT_ERR_NO_CONN
        assert engine.receive(suback(1, 0)) == []
        assert engine._socket.take_unread() == b""
        assert engine.disconnect() == engine.subscribe(1, "a/") == b""


class TestTraps:
    """The numbers are those of ``tests/paho-traps.md``."""

    def test_1_one_loop_read_takes_one_packet(self) -> None:
        data = b"".join(suback(number, 0) for number in range(1, 11))
        assert connected().decode(data) == [SubAck(number, (0,)) for number in range(1, 11)]

    def test_1_a_loop_read_too_many_finds_nothing_and_no_end(self) -> None:
        engine = connected_engine()
        assert engine._client.loop_read() == MQTTErrorCode.MQTT_ERR_SUCCESS
        assert engine.receive(suback(1, 0)) == [SubAck(1, (0,))]

    def test_1_one_loop_read_takes_one_packet_while_acknowledgements_are_awaited(self) -> None:
        codec = connected(fast_path=False)
        for number in range(1, 11):
            codec.encode(Publish(b"a", b"", number))
        data = b"".join(map(puback, range(1, 11)))
        assert codec.decode(data) == [PubAck(number) for number in range(1, 11)]

    @pytest.mark.parametrize("packet_id", [None, 5])
    def test_2_many_messages_in_one_chunk_come_at_once(self, packet_id: int | None) -> None:
        payloads = [str(number).encode() for number in range(50)]
        data = b"".join(publish("a/", payload, packet_id) for payload in payloads)
        events = unbatch(connected().decode(data))
        assert [event.binary for event in events if isinstance(event, EmitterMessage)] == payloads

    def test_6_a_plain_client_handles_a_packet_again_if_a_callback_raises(self) -> None:
        engine = connected_engine()
        client = engine._client
        calls = []

        def raises(*args: object) -> None:
            calls.append(args)
            raise ZeroDivisionError

        client.on_message = raises
        engine._socket.put(publish("a/", b"x"))
        for _ in range(4):
            with pytest.raises(ZeroDivisionError):
                client.loop_read()
        assert len(calls) == 4

    @pytest.mark.parametrize("topic", [b"a/", b"a\xff/", b"\xed\xa0\x80"])
    def test_6_here_each_message_comes_once(self, topic: bytes) -> None:
        codec = connected()
        for _ in range(3):
            assert len(codec.decode(publish(topic, b"x", 5))) == 1
            assert codec.take_written() == packet(0x40, uint16(5))
        assert codec.decode(suback(1, 0) + unsuback(2)) == [SubAck(1, (0,)), UnsubAck(2)]
        assert codec.decode(PINGRESP) == [PingResp()]

    def test_6_what_paho_lets_out_ends_the_link(self) -> None:
        # Paho up to 2.1 lets struct.error out for a packet that is cut off.
        codec = connected()

        def raises(*args: object) -> None:
            raise ZeroDivisionError

        codec._engine._client.on_subscribe = raises
        (event,) = codec.decode(suback(1, 0) + publish("a/", b"x"))
        assert isinstance(event, RemoteProtocolError)
        assert isinstance(event.__cause__, ZeroDivisionError)
        assert codec.decode(publish("a/", b"x")) == []

    @pytest.mark.parametrize("packet_id", [None, 5])
    def test_7_a_topic_that_is_no_utf8(self, packet_id: int | None) -> None:
        codec = connected()
        bad, good = publish(b"\xff\xfe/", b"four", packet_id), publish("a/", b"x", packet_id)
        events = unbatch(codec.decode(bad + good))
        assert events[0] == Undecodable(4)
        assert isinstance(events[1], EmitterMessage)
        assert len(events) == 2

    def test_13_a_plain_client_holds_publishes_back(self) -> None:
        socket = engine._MemorySocket()
        client = engine._PahoClient(Connect(), socket, [])
        client.max_inflight_messages_set(20)
        client.connect("emitter")
        socket.take_written()
        for number in range(1, 101):
            client.use_packet_id(number)
            client.publish("a/", b"", qos=1)
        written = socket.take_written()
        assert written == b"".join(publish("a/", b"", number) for number in range(1, 21))

    def test_13_here_each_one_leaves_at_once(self, fast_path: bool) -> None:
        codec = connected(fast_path=fast_path)
        for number in range(1, 101):
            assert codec.encode(Publish(b"a/", b"", number)) == publish("a/", b"", number)

    def test_15_nothing_is_kept_for_another_time(self) -> None:
        codec = Codec(Connect())
        codec.connect()
        codec.encode(Publish(b"a/", b"early", 1))
        assert codec.decode(CONNACK) == [ConnAck(0)]
        assert codec.take_written() == b""
        codec.encode(Disconnect())
        codec.encode(Publish(b"a/", b"late", 2))
        codec.encode(Subscribe(3, "a/"))
        assert codec.take_written() == b""

    def test_16_a_fresh_codec_sends_nothing_old(self) -> None:
        hello = Connect("me")
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
        assert codec.encode(Subscribe(1, "a/"))[2:4] == uint16(1)
        for number in (2, 65535, 2):
            # Paho's own counter would go on from the one before.
            assert codec.encode(Unsubscribe(number, "b/"))[2:4] == uint16(number)
        assert codec.decode(suback(1, 0)) == [SubAck(1, (0,))]

    def test_30_no_lock_of_paho_is_held_when_events_come_out(self) -> None:
        codec = connected()
        for event in codec.decode(publish("a/", b"x", 5) + suback(1, 0) + unsuback(2)):
            lock = codec._engine._client._in_callback_mutex
            assert lock.acquire(blocking=False), event
            lock.release()
            assert codec.encode(Subscribe(3, "b/"))
            assert connected().take_written() == b""

    def test_30_paho_is_told_of_no_callback_that_it_calls_around_a_socket(self) -> None:
        client = connected_engine()._client
        assert client.on_socket_open is None
        assert client.on_socket_close is None
        assert client.on_socket_register_write is None
        assert client.on_socket_unregister_write is None

    def test_34_disconnect_leaves_at_once(self, fast_path: bool) -> None:
        codec = connected(fast_path=fast_path)
        assert codec.encode(Disconnect()) == packet(0xE0, b"")
        assert codec.take_written() == b""

    FILTERS = ("#/", "k/#/", "k/#/?last=5", "#?last=5", "k/a+/", "k/+/a/?last=0", "k/$share/g/a/")

    @pytest.mark.parametrize("filter_", FILTERS)
    def test_38_filters_that_emitter_wants_go_out(self, filter_: str) -> None:
        codec = connected()
        text = uint16(len(filter_)) + filter_.encode()
        assert codec.encode(Subscribe(1, filter_)) == packet(0x82, uint16(1) + text + b"\0")
        assert codec.encode(Unsubscribe(2, filter_)) == packet(0xA2, uint16(2) + text)

    @pytest.mark.parametrize("filter_", ["#/", "k/#/?last=5", "k/a+/"])
    def test_38_a_plain_client_refuses_some(self, filter_: str) -> None:
        with pytest.raises(ValueError, match="Invalid subscription filter"):
            plain_client().subscribe(filter_)

    def test_with_the_fast_path_paho_has_no_publish_and_no_puback(self) -> None:
        codec = connected()
        client = codec._engine._client

        def raises(*arguments: object) -> None:
            raise AssertionError

        client.on_message = client.on_publish = raises
        assert codec.encode(Publish(b"a/", b"x", 1))
        assert codec.decode(puback(1)) == [PubAck(1)]
        assert unbatch(codec.decode(publish("a/", b"x")))
        # QoS 1 is for Paho.
        (event,) = codec.decode(publish("a/", b"x", 1))
        assert isinstance(event, RemoteProtocolError)

    def test_a_codec_leaves_nothing_to_the_garbage_collector(self, fast_path: bool) -> None:
        gc.collect()
        gc.disable()
        try:
            codec = connected(fast_path=fast_path)
            codec.encode(Subscribe(1, "a/"))
            codec.encode(Publish(b"a/", b"x", 2))
            codec.decode(suback(1, 0) + puback(2))
            codec.encode(Unsubscribe(3, "a/"))
            codec.encode(Disconnect())
            client = weakref.ref(codec._engine._client)
            del codec
            assert client() is None
            assert gc.collect() == 0
        finally:
            gc.enable()
