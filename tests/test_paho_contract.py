"""
What the engine uses of Paho, and the traps of Paho that it avoids.

Run this file before allowing another version of Paho: the private hooks must exist and do what the
engine needs, and each trap must stay avoided. Some tests show that a plain Paho client falls into a
trap; if such a test fails with a new version, the precaution can be removed.
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
    def test_paho_version_is_supported(self) -> None:
        assert (2, 0) <= tuple(map(int, paho_version.split(".")[:2])) < (3, 0)

    def test_engine_uses_no_other_private_names(self) -> None:
        assert private_names() == HOOKS

    def test_hooks_have_the_expected_parameters(self) -> None:
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

    def test_engine_attributes_do_not_clash_with_paho(self) -> None:
        own_attributes = set(vars(PahoEngine(Connect())._client)) - set(vars(plain_client()))
        assert own_attributes == {"_packet_id", "_memory"}
        assert not own_attributes & set(dir(paho.Client))

    def test_connect_creates_one_socket(self, monkeypatch: pytest.MonkeyPatch) -> None:
        created = count_sockets(monkeypatch)
        engine = PahoEngine(Connect())
        engine.connect()
        assert created == [engine._socket]
        assert [engine._client.socket()] == created

    def test_packet_ids_come_from_the_hook(self) -> None:
        codec = connected(fast_path=False)
        for packet_id in (65535, 1, 300, 300):
            assert codec.encode(Subscribe(packet_id, "a/"))[2:4] == uint16(packet_id)
            assert codec.encode(Unsubscribe(packet_id, "a/"))[2:4] == uint16(packet_id)
            assert codec.encode(Publish(b"a", b"", packet_id))[5:7] == uint16(packet_id)
            assert codec.decode(puback(packet_id)) == [PubAck(packet_id)]

    def test_filter_is_checked_by_the_hook_before_sending(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        checked = []

        def check(sub: bytes) -> MQTTErrorCode:
            checked.append(sub)
            return MQTTErrorCode.MQTT_ERR_SUCCESS

        monkeypatch.setattr(engine._PahoClient, "_filter_wildcard_len_check", staticmethod(check))
        codec = connected()
        codec.encode(Subscribe(1, "#/"))
        codec.encode(Unsubscribe(2, "+/"))
        # Some versions of Paho do not check the filter of an UNSUBSCRIBE.
        assert checked[0] == b"#/"


def count_sockets(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    created: list[object] = []
    create = engine._PahoClient._create_socket

    def create_socket(self: Any) -> Any:
        created.append(create(self))
        return created[-1]

    monkeypatch.setattr(engine._PahoClient, "_create_socket", create_socket)
    return created


class TestConnackCodes:
    """Paho hides some return codes of CONNACK and merges others, so the codec reads them itself."""

    @pytest.mark.parametrize("code", range(256))
    @pytest.mark.parametrize("client_id", ["", "me"])
    def test_connack_codes_reported_by_paho(
        self, code: int, client_id: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = PahoEngine(Connect(client_id))
        engine.connect()
        created = count_sockets(monkeypatch)
        reported = []
        client = engine._client
        client.on_connect = lambda *arguments: reported.append(arguments[3].value)
        engine._socket.put(connack(code))
        accepted = client.loop_read() == MQTTErrorCode.MQTT_ERR_SUCCESS
        assert accepted == client.is_connected() == (code == 0)
        hidden = code == 1 or (code == 2 and not client_id)
        known = {0: 0, 2: 133, 3: 136, 4: 134, 5: 135}
        assert reported == ([] if hidden else [known.get(code, 128)])
        assert not created

    @pytest.mark.parametrize("code", range(256))
    @pytest.mark.parametrize("client_id", ["", "me"])
    def test_29_connack_codes_reported_by_the_codec(
        self, code: int, client_id: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        codec = Codec(Connect(client_id))
        codec.connect()
        created = count_sockets(monkeypatch)
        assert codec.decode(connack(code)) == [ConnAck(code)]
        assert codec.take_written() == b""
        # Neither this refusal nor a later one makes Paho reconnect.
        codec = connected(Connect(client_id))
        created.clear()
        assert codec.decode(connack(code)) == [ConnAck(code)]
        assert codec.take_written() == b""
        assert not created


class TestPahoWithoutTheCodec:
    @pytest.mark.parametrize("received", [CONNACK, puback(7), packet(0x70, uint16(7)), PINGRESP])
    def test_paho_does_not_report_some_packets(self, received: bytes) -> None:
        engine = connected_engine()
        assert engine.receive(received) == []
        assert engine.take_written() == b""

    def test_paho_reads_packets_before_connack(self) -> None:
        engine = PahoEngine(Connect())
        engine.connect()
        assert engine.receive(suback(1, 0)) == [SubAck(1, (0,))]

    @pytest.mark.parametrize(
        ("received", "answer"),
        [(packet(0xC0, b""), PINGRESP), (packet(0x62, uint16(7)), packet(0x70, uint16(7)))],
    )
    def test_paho_answers_packets_that_a_broker_may_not_send(
        self, received: bytes, answer: bytes
    ) -> None:
        engine = connected_engine()
        assert engine.receive(received) == []
        assert engine.take_written() == answer

    def test_paho_reads_a_packet_of_any_size(self) -> None:
        (event,) = connected_engine().receive(publish("a/", bytes(1_000_000)))
        assert isinstance(event, EmitterMessage)
        assert len(event.binary) == 1_000_000

    def test_paho_closes_its_socket_on_disconnect(self) -> None:
        engine = connected_engine()
        assert engine.disconnect() == packet(0xE0, b"")
        assert engine._client.loop_read() == MQTTErrorCode.MQTT_ERR_NO_CONN
        assert engine.receive(suback(1, 0)) == []
        assert engine._socket.take_unread() == b""
        assert engine.disconnect() == engine.subscribe(1, "a/") == b""


class TestTraps:
    """The numbers are those of ``tests/paho-traps.md``."""

    def test_1_all_packets_of_a_chunk_are_decoded(self) -> None:
        data = b"".join(suback(number, 0) for number in range(1, 11))
        assert connected().decode(data) == [SubAck(number, (0,)) for number in range(1, 11)]

    def test_1_extra_loop_read_finds_no_data_and_no_end(self) -> None:
        engine = connected_engine()
        assert engine._client.loop_read() == MQTTErrorCode.MQTT_ERR_SUCCESS
        assert engine.receive(suback(1, 0)) == [SubAck(1, (0,))]

    def test_1_all_packets_of_a_chunk_are_decoded_while_acknowledgements_are_pending(self) -> None:
        codec = connected(fast_path=False)
        for number in range(1, 11):
            codec.encode(Publish(b"a", b"", number))
        data = b"".join(map(puback, range(1, 11)))
        assert codec.decode(data) == [PubAck(number) for number in range(1, 11)]

    @pytest.mark.parametrize("packet_id", [None, 5])
    def test_2_all_messages_of_a_chunk_are_decoded_together(self, packet_id: int | None) -> None:
        payloads = [str(number).encode() for number in range(50)]
        data = b"".join(publish("a/", payload, packet_id) for payload in payloads)
        events = unbatch(connected().decode(data))
        assert [event.binary for event in events if isinstance(event, EmitterMessage)] == payloads

    def test_6_a_plain_client_handles_a_packet_again_if_a_callback_raises(self) -> None:
        engine = connected_engine()
        client = engine._client
        calls = []

        def fail(*args: object) -> None:
            calls.append(args)
            raise ZeroDivisionError

        client.on_message = fail
        engine._socket.put(publish("a/", b"x"))
        for _ in range(4):
            with pytest.raises(ZeroDivisionError):
                client.loop_read()
        assert len(calls) == 4

    @pytest.mark.parametrize("topic", [b"a/", b"a\xff/", b"\xed\xa0\x80"])
    def test_6_codec_decodes_each_message_once(self, topic: bytes) -> None:
        codec = connected()
        for _ in range(3):
            assert len(codec.decode(publish(topic, b"x", 5))) == 1
            assert codec.take_written() == packet(0x40, uint16(5))
        assert codec.decode(suback(1, 0) + unsuback(2)) == [SubAck(1, (0,)), UnsubAck(2)]
        assert codec.decode(PINGRESP) == [PingResp()]

    def test_6_exception_in_paho_ends_the_connection(self) -> None:
        # Paho up to 2.1 raises struct.error for a truncated packet.
        codec = connected()

        def fail(*args: object) -> None:
            raise ZeroDivisionError

        codec._engine._client.on_subscribe = fail
        (event,) = codec.decode(suback(1, 0) + publish("a/", b"x"))
        assert isinstance(event, RemoteProtocolError)
        assert isinstance(event.__cause__, ZeroDivisionError)
        assert codec.decode(publish("a/", b"x")) == []

    @pytest.mark.parametrize("packet_id", [None, 5])
    def test_7_topic_that_is_not_utf8(self, packet_id: int | None) -> None:
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

    def test_13_codec_sends_each_publish_immediately(self, fast_path: bool) -> None:
        codec = connected(fast_path=fast_path)
        for number in range(1, 101):
            assert codec.encode(Publish(b"a/", b"", number)) == publish("a/", b"", number)

    def test_15_nothing_is_queued_while_disconnected(self) -> None:
        codec = Codec(Connect())
        codec.connect()
        codec.encode(Publish(b"a/", b"early", 1))
        assert codec.decode(CONNACK) == [ConnAck(0)]
        assert codec.take_written() == b""
        codec.encode(Disconnect())
        codec.encode(Publish(b"a/", b"late", 2))
        codec.encode(Subscribe(3, "a/"))
        assert codec.take_written() == b""

    def test_16_new_codec_resends_nothing(self) -> None:
        connect = Connect("me")
        old = connected(connect)
        old.encode(Publish(b"emitter/keygen/", b"{}", 1))
        old.encode(Subscribe(2, "a/"))
        old.decode(publish("a/", b"x", 9))
        new = Codec(connect)
        assert new.connect() == Codec(connect).connect()
        assert new.decode(CONNACK) == [ConnAck(0)]
        assert new.take_written() == b""
        assert new.encode(PingReq()) == packet(0xC0, b"")

    def test_17_packet_ids_of_pending_packets_are_not_reused(self) -> None:
        codec = connected()
        assert codec.encode(Subscribe(1, "a/"))[2:4] == uint16(1)
        for number in (2, 65535, 2):
            # Paho's own counter would continue from the previous id.
            assert codec.encode(Unsubscribe(number, "b/"))[2:4] == uint16(number)
        assert codec.decode(suback(1, 0)) == [SubAck(1, (0,))]

    def test_30_no_lock_of_paho_is_held_when_events_are_returned(self) -> None:
        codec = connected()
        for event in codec.decode(publish("a/", b"x", 5) + suback(1, 0) + unsuback(2)):
            lock = codec._engine._client._in_callback_mutex
            assert lock.acquire(blocking=False), event
            lock.release()
            assert codec.encode(Subscribe(3, "b/"))
            assert connected().take_written() == b""

    def test_30_no_socket_callbacks_are_set(self) -> None:
        client = connected_engine()._client
        assert client.on_socket_open is None
        assert client.on_socket_close is None
        assert client.on_socket_register_write is None
        assert client.on_socket_unregister_write is None

    def test_34_disconnect_is_sent_immediately(self, fast_path: bool) -> None:
        codec = connected(fast_path=fast_path)
        assert codec.encode(Disconnect()) == packet(0xE0, b"")
        assert codec.take_written() == b""

    FILTERS = ("#/", "k/#/", "k/#/?last=5", "#?last=5", "k/a+/", "k/+/a/?last=0", "k/$share/g/a/")

    @pytest.mark.parametrize("filter_", FILTERS)
    def test_38_filters_of_emitter_are_sent(self, filter_: str) -> None:
        codec = connected()
        text = uint16(len(filter_)) + filter_.encode()
        assert codec.encode(Subscribe(1, filter_)) == packet(0x82, uint16(1) + text + b"\0")
        assert codec.encode(Unsubscribe(2, filter_)) == packet(0xA2, uint16(2) + text)

    @pytest.mark.parametrize("filter_", ["#/", "k/#/?last=5", "k/a+/"])
    def test_38_plain_client_rejects_some_filters(self, filter_: str) -> None:
        with pytest.raises(ValueError, match="Invalid subscription filter"):
            plain_client().subscribe(filter_)

    def test_fast_path_handles_publish_and_puback_without_paho(self) -> None:
        codec = connected()
        client = codec._engine._client

        def fail(*arguments: object) -> None:
            raise AssertionError

        client.on_message = client.on_publish = fail
        assert codec.encode(Publish(b"a/", b"x", 1))
        assert codec.decode(puback(1)) == [PubAck(1)]
        assert unbatch(codec.decode(publish("a/", b"x")))
        # Inbound QoS 1 is handled by Paho.
        (event,) = codec.decode(publish("a/", b"x", 1))
        assert isinstance(event, RemoteProtocolError)

    def test_codec_leaves_no_reference_cycles(self, fast_path: bool) -> None:
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
