"""The development broker: its methods, connections, slow clients and timeouts."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Literal

import anyio
import pytest
from anyio.lowlevel import checkpoint

from emitter_anyio.testing import Broker, _connection, _requests, _sockets
from emitter_anyio.testing._connection import HIGH_WATER_BYTES, Client, SlowClients
from emitter_anyio.testing._exchange import Exchange
from emitter_anyio.testing._faults import Faults
from emitter_anyio.testing._keys import License
from emitter_anyio.testing._packets import (
    ConnAck,
    Connect,
    Disconnect,
    Packet,
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
from emitter_anyio.testing._sockets import SocketStream
from emitter_anyio.testing._stats import Stats
from emitter_anyio.testing._topics import parse
from tests.broker.player import MemoryStream, PacketConnection
from tests.broker.websocket import WebSocketStream
from tests.support.descriptors import no_free_descriptors
from tests.support.logs import awaiting_log, logged

REFUSED = "the security key provided is not authorized to perform this operation"


@pytest.fixture
async def broker() -> AsyncIterator[Broker]:
    async with Broker() as broker:
        yield broker


@pytest.fixture
async def connections() -> AsyncIterator[list[PacketConnection]]:
    """Connections that are closed at the end of the test."""
    connections: list[PacketConnection] = []
    yield connections
    for connection in connections:
        await anyio.aclose_forcefully(connection.stream)


async def subscribe(connection: PacketConnection, broker: Broker, channel: str) -> None:
    asked = Subscribe(1, ((f"{broker.keygen('#/')}/{channel}", 0),))
    assert await connection.ask(asked) == [SubAck(1, (0,))]


class TestEntering:
    async def test_licence_is_generated_by_default(self) -> None:
        first, second = Broker(), Broker()
        assert first.license != second.license
        assert License.parse(first.license).decrypt(first.secret_key).is_secret
        assert (
            License.parse(Broker(license=first.license).license).decrypt(first.secret_key).is_secret
        )

    async def test_malformed_licence_is_rejected(self) -> None:
        with pytest.raises(ValueError, match="licence"):
            Broker(license="nonsense")

    async def test_unknown_matcher_is_rejected(self) -> None:
        with pytest.raises(ValueError, match=r"'exact'.*emitter, mqtt"):
            Broker(matcher="exact")  # type: ignore[arg-type]  # the invalid value under test

    async def test_host_port_and_url(self, broker: Broker) -> None:
        assert broker.host == "127.0.0.1"
        assert broker.port > 0
        assert broker.url == f"mqtt://127.0.0.1:{broker.port}"
        assert Broker(port=8080).url == "mqtt://127.0.0.1:8080"
        assert Broker("::1", 8080).url == "mqtt://[::1]:8080"

    async def test_used_port_raises(self, broker: Broker) -> None:
        with pytest.raises(OSError, match="in use"):
            async with Broker(port=broker.port):
                pytest.fail("entered")

    async def test_entering_again(self, connections: list[PacketConnection]) -> None:
        broker = Broker()
        for _ in range(2):
            async with broker:
                connections.append(await PacketConnection.connect(broker))
                assert len(broker.clients) == 1
            assert broker.clients == []
            assert await connections[-1].read_to_end() == []
            with pytest.raises(OSError):  # noqa: PT011 -- the message depends on the system
                await PacketConnection.open(broker)

    async def test_accepting_continues_after_descriptors_run_out(
        self, broker: Broker, connections: list[PacketConnection], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_sockets, "ACCEPT_RETRY_SECONDS", 0.01)
        sock = socket.socket()
        connections.append(PacketConnection(SocketStream(sock)))
        with awaiting_log("could not accept a connection") as failed, no_free_descriptors():
            sock.connect_ex((broker.host, broker.port))
            await failed.wait()
        assert await connections[0].ask(Connect()) == [ConnAck()]

    async def test_exception_of_the_block_leaves_unwrapped(self) -> None:
        error = LookupError("raised in the block")
        with pytest.raises(LookupError) as info:
            async with Broker():
                raise error from KeyError("its cause")
        assert info.value is error
        assert isinstance(error.__cause__, KeyError)

    async def test_exception_group_of_the_block_is_not_wrapped(self) -> None:
        group = ExceptionGroup("raised in the block", [ValueError()])
        with pytest.raises(ExceptionGroup) as info:
            async with Broker():
                raise group
        assert info.value is group

    async def test_block_can_be_cancelled(self) -> None:
        connections: list[PacketConnection] = []
        with anyio.CancelScope() as scope:
            async with Broker() as broker:
                connections.append(await PacketConnection.connect(broker))
                scope.cancel()
                await anyio.sleep_forever()
        assert scope.cancelled_caught
        assert await connections[0].read_to_end() == []
        await connections[0].stream.aclose()


class TestMethods:
    async def test_clients(self, broker: Broker, connections: list[PacketConnection]) -> None:
        unconnected = await PacketConnection.open(broker)
        connections += [
            unconnected,
            await PacketConnection.open(broker),
            await PacketConnection.open(broker),
        ]
        await connections[1].ask(Connect("first", "alice"))
        await connections[2].ask(Connect("second"))
        first, second = broker.clients
        assert (first.client_id, first.username) == ("first", "alice")
        assert (second.client_id, second.username) == ("second", "")
        assert (await connections[1].request("me"))["id"] == first.id != second.id
        assert first.subscriptions == []
        for channel in ("b/", "a/+/", "$share/g/a/"):
            await subscribe(connections[1], broker, channel)
        assert first.subscriptions == ["b/", "a/+/", "$share/g/a/"]

    async def test_keygen(self, broker: Broker, connections: list[PacketConnection]) -> None:
        connections.append(await PacketConnection.connect(broker))
        key = broker.keygen("a/")
        assert await connections[0].ask(Publish(f"{key}/a/", b"x", 1, 5)) == [PubAck(5)]
        brief = broker.keygen("a/", "w", ttl=5)
        broker.advance(6)
        [error, ack] = await connections[0].ask(Publish(f"{brief}/a/", b"x", 1, 6))
        assert isinstance(error, Publish)
        assert json.loads(error.payload) == {"req": 6, "status": 401, "message": REFUSED}
        assert ack == PubAck(6)
        with pytest.raises(ValueError, match="should end with `/`"):
            broker.keygen("a")

    async def test_publish(self, broker: Broker, connections: list[PacketConnection]) -> None:
        connections += [
            await PacketConnection.connect(broker),
            await PacketConnection.connect(broker),
        ]
        await subscribe(connections[0], broker, "a/")
        await broker.publish("a/b/", "grüße")
        await broker.publish("a/", b"\xff", ttl=60)
        await broker.publish("b/", "x")
        assert await connections[0].ask() == [
            Publish("a/b/", "grüße".encode()),
            Publish("a/", b"\xff"),
        ]
        key = broker.keygen("a/", "rl")
        replayed = await connections[1].ask(Subscribe(1, ((f"{key}/a/?last=9", 0),)))
        assert replayed == [Publish("a/", b"\xff"), SubAck(1, (0,))]

    @pytest.mark.parametrize("channel", ["", "a", "a/+/", "a b/", "a/?ttl=5"])
    async def test_publishing_to_an_invalid_channel_raises(
        self, broker: Broker, channel: str
    ) -> None:
        with pytest.raises(ValueError, match="invalid channel"):
            await broker.publish(channel, "x")

    async def test_negative_advance_raises(self, broker: Broker) -> None:
        with pytest.raises(ValueError, match="at least 0, got -1"):
            broker.advance(-1)

    async def test_drop(self, broker: Broker, connections: list[PacketConnection]) -> None:
        connections += [
            await PacketConnection.connect(broker, name) for name in ("a", "b", "c", "d")
        ]
        connections.append(await PacketConnection.open(broker))
        a, b, c, d = broker.clients
        await broker.drop("a")
        await broker.drop(b.id)
        await broker.drop(c)
        assert broker.clients == [d]
        for client in (a, b, c):
            await client.wait_closed()
        with pytest.raises(LookupError, match="no such client"):
            await broker.drop("a")
        with pytest.raises(LookupError, match="no such client"):
            await broker.drop(a)
        await broker.drop()
        assert broker.clients == []
        for connection in connections:
            assert await connection.read_to_end() == []
        await broker.drop()

    async def test_will_of_a_dropped_client_is_published(
        self, broker: Broker, connections: list[PacketConnection]
    ) -> None:
        connections += [await PacketConnection.connect(broker), await PacketConnection.open(broker)]
        await subscribe(connections[0], broker, "a/")
        will = Will(f"{broker.keygen('a/', 'w')}/a/", b"will")
        await connections[1].ask(Connect("x", will=will))
        await broker.drop("x")
        assert await connections[0].ask() == [Publish("a/", b"will")]

    async def test_hold(self, broker: Broker, connections: list[PacketConnection]) -> None:
        connections.append(await PacketConnection.connect(broker))
        key = broker.keygen("a/", "rw")
        with broker.hold():
            got = await connections[0].ask(
                Subscribe(1, ((f"{key}/a/", 0),)),
                Publish(f"{key}/a/", b"x", 1, 2),
                Publish("emitter/me/", b"", 1, 3),
                Unsubscribe(4, (f"{key}/a/",)),
            )
            assert [packet.topic for packet in got if isinstance(packet, Publish)] == [
                "a/",
                "emitter/me/",
            ]
            assert len(got) == 2
        assert await connections[0].ask() == [SubAck(1, (0,)), PubAck(2), PubAck(3), UnsubAck(4)]

    async def test_lose(self, broker: Broker, connections: list[PacketConnection]) -> None:
        connections.append(await PacketConnection.connect(broker))
        with broker.lose("reply"):
            assert await connections[0].ask(Publish("emitter/me/", b"", 1, 3)) == [PubAck(3)]
        with broker.lose(), broker.hold("reply"):
            assert await connections[0].ask(Publish("emitter/me/", b"", 1, 4)) == []
        [answer] = await connections[0].ask()
        assert isinstance(answer, Publish)
        assert json.loads(answer.payload)["req"] == 4

    async def test_innermost_block_withholds_a_packet(
        self, broker: Broker, connections: list[PacketConnection]
    ) -> None:
        connections.append(await PacketConnection.connect(broker))
        with broker.lose("puback"):
            with broker.hold("puback", "reply"):
                assert await connections[0].ask(Publish("emitter/me/", b"", 1, 3)) == []
            [answer] = await connections[0].ask()
            assert isinstance(answer, Publish)
        with broker.hold("pingresp"):
            await connections[0].send(PingReq())
        assert await connections[0].receive() == PingResp()

    async def test_hold_sends_the_packets_after_an_error(
        self, broker: Broker, connections: list[PacketConnection]
    ) -> None:
        connections.append(await PacketConnection.connect(broker))
        with pytest.raises(KeyError), broker.hold("reply"):
            assert await connections[0].ask(Publish("emitter/me/")) == []
            raise KeyError
        [answer] = await connections[0].ask()
        assert isinstance(answer, Publish)

    async def test_refuse(self, broker: Broker, connections: list[PacketConnection]) -> None:
        connections += [await PacketConnection.open(broker), await PacketConnection.open(broker)]
        with broker.refuse(3):
            await connections[0].send(Connect("a"))
            assert await connections[0].read_to_end() == [ConnAck(3)]
            assert broker.clients == []
        with broker.refuse(), broker.refuse(4):
            pass
        assert await connections[1].ask(Connect("a")) == [ConnAck(0)]


class TestMatchers:
    @pytest.mark.parametrize(
        ("matcher", "reached"),
        [("emitter", ["a/", "a/b/", "a/b/c/"]), ("mqtt", ["a/"])],
    )
    async def test_channels_that_match_a_subscription(
        self,
        matcher: Literal["emitter", "mqtt"],
        reached: list[str],
        connections: list[PacketConnection],
    ) -> None:
        async with Broker(matcher=matcher) as broker:
            connections.append(await PacketConnection.connect(broker))
            await subscribe(connections[0], broker, "a/")
            for channel in ("a/", "a/b/", "a/b/c/", "b/"):
                await broker.publish(channel, "x")
            assert await connections[0].ask() == [Publish(channel, b"x") for channel in reached]

    async def test_hash_matches_levels_under_the_mqtt_matcher(
        self, connections: list[PacketConnection]
    ) -> None:
        async with Broker(matcher="mqtt") as broker:
            connections.append(await PacketConnection.connect(broker))
            await subscribe(connections[0], broker, "a/#/")
            for channel in ("a/", "a/b/", "a/b/c/"):
                await broker.publish(channel, "x")
            assert await connections[0].ask() == [Publish("a/b/", b"x"), Publish("a/b/c/", b"x")]


class TestConnections:
    @pytest.mark.parametrize(
        "packet",
        [
            pytest.param(Publish("emitter/me/", b"", 1, 1), id="before CONNECT"),
            pytest.param(ConnAck(), id="a broker's packet"),
        ],
    )
    async def test_invalid_first_packet_closes_the_connection(
        self, broker: Broker, connections: list[PacketConnection], packet: Packet
    ) -> None:
        connections.append(await PacketConnection.open(broker))
        await connections[0].send(packet)
        assert await connections[0].read_to_end() == []

    async def test_packet_of_a_broker_closes_the_connection(
        self, broker: Broker, connections: list[PacketConnection]
    ) -> None:
        connections.append(await PacketConnection.connect(broker))
        assert await connections[0].ask(SubAck(1, ())) == []
        assert connections[0].closed

    async def test_garbage_closes_only_its_connection(
        self, broker: Broker, connections: list[PacketConnection]
    ) -> None:
        connections += [
            await PacketConnection.connect(broker),
            await PacketConnection.connect(broker),
        ]
        await connections[0].stream.send(Publish("emitter/me/", b"", 1, 7).encode() + b"\xff\xff")
        answer, ack = await connections[0].read_to_end()
        assert ack == PubAck(7)
        assert isinstance(answer, Publish)
        assert len(broker.clients) == 1
        assert await connections[1].ask() == []
        assert not connections[1].closed

    async def test_second_connect_is_accepted(
        self, broker: Broker, connections: list[PacketConnection]
    ) -> None:
        connections.append(await PacketConnection.connect(broker, "one"))
        assert await connections[0].ask(Connect("two", "bob")) == [ConnAck()]
        [client] = broker.clients
        assert (client.client_id, client.username) == ("two", "bob")

    async def test_acknowledgements_from_a_client_are_ignored(
        self, broker: Broker, connections: list[PacketConnection]
    ) -> None:
        connections.append(await PacketConnection.connect(broker))
        assert await connections[0].ask(PubAck(1), PubRec(1), PubRel(1), PubComp(1)) == []
        assert not connections[0].closed

    async def test_queued_packets_are_written_after_disconnect(
        self, broker: Broker, connections: list[PacketConnection]
    ) -> None:
        connections.append(await PacketConnection.connect(broker))
        await connections[0].send(Publish("emitter/me/", b"", 1, 7), Disconnect())
        answer, ack = await connections[0].read_to_end()
        assert isinstance(answer, Publish)
        assert ack == PubAck(7)

    async def test_packets_sent_before_the_end_are_handled(
        self, broker: Broker, connections: list[PacketConnection]
    ) -> None:
        connections += [
            await PacketConnection.connect(broker),
            await PacketConnection.connect(broker, "sender"),
        ]
        await subscribe(connections[0], broker, "a/")
        sender = broker.clients[1]
        sent = [Publish(f"{broker.keygen('a/', 'w')}/a/", b"%d" % i) for i in range(500)]
        await connections[1].send(*sent, Disconnect())
        await connections[1].stream.aclose()
        await sender.wait_closed()
        assert len(await connections[0].ask()) == 500

    async def test_defect_of_the_broker_closes_only_one_connection(
        self,
        broker: Broker,
        connections: list[PacketConnection],
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        connections += [
            await PacketConnection.connect(broker),
            await PacketConnection.connect(broker),
        ]

        def fail(*args: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setitem(_requests._HANDLERS, "me", fail)
        assert await connections[0].ask(Publish("emitter/me/")) == []
        assert connections[0].closed
        assert await connections[1].ask() == []
        assert not connections[1].closed
        [record] = logged(caplog)
        assert record.levelname == "ERROR"
        assert record.exc_info is not None
        assert "failed" in record.message


class TestSlowClients:
    async def test_client_that_reads_nothing_is_disconnected(
        self,
        broker: Broker,
        connections: list[PacketConnection],
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr(_connection, "STALL_TIMEOUT_SECONDS", 0.01)
        connections += [await PacketConnection.connect(broker, name) for name in ("idle", "reader")]
        for connection in connections:
            await subscribe(connection, broker, "a/")
        idle, _ = broker.clients
        count = 0
        while not idle._closed.is_set():
            await broker.publish("a/", bytes(60000))
            assert await connections[1].receive() == Publish("a/", bytes(60000))
            count += 1
        assert count * 60000 > HIGH_WATER_BYTES
        assert [client.client_id for client in broker.clients] == ["reader"]
        assert "it stopped reading" in caplog.text


class TestDepth:
    """Channels with more levels than Python's recursion limit."""

    @pytest.mark.parametrize("matcher", ["emitter", "mqtt"])
    async def test_channel_of_many_levels_is_delivered_and_watched(
        self, matcher: Literal["emitter", "mqtt"], connections: list[PacketConnection]
    ) -> None:
        channel = "a/" * 1500
        async with Broker(matcher=matcher) as broker:
            connections += [
                await PacketConnection.connect(broker),
                await PacketConnection.connect(broker),
            ]
            key = broker.keygen("#/", "rwp")
            watch = {"key": key, "channel": channel, "changes": True, "status": False}
            assert (await connections[0].request("presence", **watch))["status"] == 200
            await subscribe(connections[1], broker, channel)
            await broker.publish(channel, "hello")
            assert await connections[1].ask() == [Publish(channel, b"hello")]
            watcher, subscriber = broker.clients
            await broker.drop(subscriber)
            [joined, left] = await connections[0].ask()
            assert isinstance(joined, Publish)
            assert isinstance(left, Publish)
            assert json.loads(left.payload)["event"] == "unsubscribe"
            await broker.drop(watcher)
            assert await connections[0].read_to_end() == []

    async def test_connection_is_closed_if_ending_its_subscriptions_fails(
        self, broker: Broker, connections: list[PacketConnection], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        connections.append(await PacketConnection.connect(broker))
        [client] = broker.clients

        def fail(self: Exchange, peer: object) -> None:
            raise RecursionError

        monkeypatch.setattr(Exchange, "leave", fail)
        await connections[0].send(Disconnect())
        await client.wait_closed()
        assert await connections[0].read_to_end() == []


@pytest.mark.virtual_time
class TestTime:
    """Timeouts, with connections in memory and virtual time."""

    @pytest.fixture
    async def served(self) -> AsyncIterator[list[tuple[PacketConnection, Client]]]:
        exchange, faults, slow_clients = Exchange(License.new()), Faults(), SlowClients()
        pairs = [MemoryStream.pair() for _ in range(2)]
        connections = [PacketConnection(here) for here, _ in pairs]
        clients = [
            Client(exchange, faults, slow_clients, Stats(exchange.name), there)
            for _, there in pairs
        ]
        async with anyio.create_task_group() as task_group:
            for client in clients:
                task_group.start_soon(client.serve)
            yield list(zip(connections, clients, strict=True))
            task_group.cancel_scope.cancel()
        for connection in connections:
            await connection.stream.aclose()

    async def test_delayed_packets_are_lost_when_the_client_disconnects(self) -> None:
        here, there = MemoryStream.pair()
        exchange = Exchange(License.new())
        stats = Stats(exchange.name)
        client = Client(exchange, Faults(), SlowClients(), stats, there, coalesce=True)
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(client.serve)
            connection = PacketConnection(here)
            await connection.send(Connect(), *([PingReq()] * 299), Disconnect())
            assert len(await connection.read_to_end()) == 60
            await here.aclose()

    async def test_idle_connection_is_closed_after_120_seconds(
        self, served: list[tuple[PacketConnection, Client]]
    ) -> None:
        [(connection, _), _] = served
        assert await connection.ask(Connect()) == [ConnAck()]
        await anyio.sleep(119)
        assert await connection.ask() == []
        start = anyio.current_time()
        assert await connection.read_to_end() == []
        assert anyio.current_time() - start == pytest.approx(120)

    async def test_incomplete_packet_does_not_extend_the_idle_timeout(
        self, served: list[tuple[PacketConnection, Client]]
    ) -> None:
        [(connection, _), _] = served
        start = anyio.current_time()
        await anyio.sleep(100)
        await connection.stream.send(b"\x10")
        assert await connection.read_to_end() == []
        assert anyio.current_time() - start == pytest.approx(120)

    async def test_queue_is_written_for_a_second_after_disconnect(
        self, served: list[tuple[PacketConnection, Client]]
    ) -> None:
        [(connection, client), _] = served
        start = anyio.current_time()
        for _ in range(8):
            await connection.send(Connect(), PingReq())
            await checkpoint()
        await connection.send(Disconnect())
        await client.wait_closed()
        assert anyio.current_time() - start == pytest.approx(1)

    async def test_client_that_does_not_read_its_replies_is_closed_after_120_seconds(
        self, served: list[tuple[PacketConnection, Client]]
    ) -> None:
        [(connection, client), _] = served
        start = anyio.current_time()
        client.peer.link("a", parse("emitter/me/?x=" + "x" * 30000))
        await connection.send(Connect(), *(Publish("a") for _ in range(40)))
        await client.wait_closed()
        assert anyio.current_time() - start == pytest.approx(120)
        assert HIGH_WATER_BYTES < client._outbox.queued < HIGH_WATER_BYTES + 65536

    async def test_replay_waits_for_its_reader(
        self, served: list[tuple[PacketConnection, Client]]
    ) -> None:
        [(connection, client), _] = served
        exchange = client._exchange
        for _ in range(2):
            exchange.store_and_send(parse("broker/a/"), bytes(30000), ttl=600)
        filters = ((f"{exchange.keygen('a/', 'rl', 0)}/a/?last=2", 0),) * 1400
        await connection.send(Connect(), Subscribe(1, filters))
        await client.wait_closed()
        assert HIGH_WATER_BYTES < client._outbox.queued < HIGH_WATER_BYTES + 65536

    async def test_websocket_pongs_wait_for_their_reader(
        self, served: list[tuple[PacketConnection, Client]]
    ) -> None:
        [(connection, client), _] = served
        websocket = await WebSocketStream.connect(connection.stream)
        await websocket.send(Connect().encode())
        pings = (b"\x89\xfd" + bytes(4 + 125)) * 500

        async def ping() -> None:
            with suppress(anyio.BrokenResourceError):
                for _ in range(40):
                    await connection.stream.send(pings)

        async with anyio.create_task_group() as task_group:
            task_group.start_soon(ping)
            await client.wait_closed()
        assert HIGH_WATER_BYTES < client._outbox.queued < HIGH_WATER_BYTES + 65536

    async def test_publisher_waits_for_a_slow_subscriber(
        self, served: list[tuple[PacketConnection, Client]]
    ) -> None:
        [(reader, client), (writer, _)] = served
        exchange, count = client._exchange, 50
        key = exchange.keygen("a/", "rw", 0)
        await reader.ask(Connect(), Subscribe(1, ((f"{key}/a/", 0),)))
        await writer.ask(Connect())
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(
                writer.send, *(Publish(f"{key}/a/", bytes(60000)) for _ in range(count))
            )
            while client._outbox.queued <= HIGH_WATER_BYTES:
                await checkpoint()
            for _ in range(count):
                await anyio.sleep(0.2)
                assert await reader.receive() == Publish("a/", bytes(60000))
                assert client._outbox.queued < HIGH_WATER_BYTES + 65536

    async def test_publisher_waits_a_second_for_a_stalled_subscriber(
        self, served: list[tuple[PacketConnection, Client]]
    ) -> None:
        [(idle, client), (writer, _)] = served
        exchange = client._exchange
        key = exchange.keygen("a/", "rw", 0)
        await idle.ask(Connect(), Subscribe(1, ((f"{key}/a/", 0),)))
        await writer.ask(Connect())
        start = anyio.current_time()
        assert await writer.ask(*(Publish(f"{key}/a/", bytes(60000)) for _ in range(50))) == []
        assert anyio.current_time() - start == pytest.approx(1)
        assert client._closed.is_set()

    async def test_messages_of_a_client_with_a_broken_receive_side_are_delivered(
        self, served: list[tuple[PacketConnection, Client]]
    ) -> None:
        [(reader, _), (half_broken, client)] = served
        exchange = client._exchange
        key = exchange.keygen("a/", "rw", 0)
        await reader.ask(Connect(), Subscribe(1, ((f"{key}/a/", 0),)))
        await half_broken.ask(Connect())
        assert isinstance(half_broken.stream, MemoryStream)
        half_broken.stream.break_receiving()
        for payload in (b"1", b"2"):
            await half_broken.send(PingReq(), Publish(f"{key}/a/", payload))
            assert await reader.receive() == Publish("a/", payload)
