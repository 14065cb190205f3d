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
from emitter_anyio.testing._connection import HIGH_WATER, Client, Crowd
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
from emitter_anyio.testing._topics import parse
from tests.broker.player import Link, MemoryStream
from tests.broker.websocket import WebSocketStream
from tests.support.descriptors import no_free_descriptors
from tests.support.logs import awaiting_log, logged

REFUSED = "the security key provided is not authorized to perform this operation"


@pytest.fixture
async def broker() -> AsyncIterator[Broker]:
    async with Broker() as broker:
        yield broker


@pytest.fixture
async def links() -> AsyncIterator[list[Link]]:
    """What a test puts in here is closed at its end."""
    links: list[Link] = []
    yield links
    for link in links:
        await anyio.aclose_forcefully(link.stream)


async def subscribe(link: Link, broker: Broker, channel: str) -> None:
    asked = Subscribe(1, ((f"{broker.keygen('#/')}/{channel}", 0),))
    assert await link.ask(asked) == [SubAck(1, (0,))]


class TestEntering:
    async def test_a_licence_is_made_unless_given(self) -> None:
        first, second = Broker(), Broker()
        assert first.license != second.license
        assert License.parse(first.license).decrypt(first.secret_key).is_master
        assert (
            License.parse(Broker(license=first.license).license).decrypt(first.secret_key).is_master
        )

    async def test_a_bad_licence(self) -> None:
        with pytest.raises(ValueError, match="licence"):
            Broker(license="nonsense")

    async def test_an_unknown_matcher(self) -> None:
        with pytest.raises(ValueError, match=r"'exact'.*emitter, mqtt"):
            Broker(matcher="exact")  # type: ignore[arg-type]  # that is the point

    async def test_where_it_listens(self, broker: Broker) -> None:
        assert broker.host == "127.0.0.1"
        assert broker.port > 0
        assert broker.url == f"mqtt://127.0.0.1:{broker.port}"
        assert Broker(port=8080).url == "mqtt://127.0.0.1:8080"
        assert Broker("::1", 8080).url == "mqtt://[::1]:8080"

    async def test_a_port_that_is_taken(self, broker: Broker) -> None:
        with pytest.raises(OSError, match="in use"):
            async with Broker(port=broker.port):
                pytest.fail("entered")

    async def test_it_can_be_entered_again(self, links: list[Link]) -> None:
        broker = Broker()
        for _ in range(2):
            async with broker:
                links.append(await Link.connect(broker))
                assert len(broker.clients) == 1
            assert broker.clients == []
            assert await links[-1].read_to_end() == []
            with pytest.raises(OSError):  # noqa: PT011 -- each system says it its own way
                await Link.open(broker)

    async def test_it_goes_on_after_descriptors_have_run_out(
        self, broker: Broker, links: list[Link], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_sockets, "ACCEPT_PAUSE", 0.01)
        sock = socket.socket()
        links.append(Link(SocketStream(sock)))
        with awaiting_log("accepting failed") as failed, no_free_descriptors():
            sock.connect_ex((broker.host, broker.port))
            await failed.wait()
        assert await links[0].ask(Connect()) == [ConnAck()]

    async def test_an_exception_of_the_body_leaves_bare(self) -> None:
        error = LookupError("of the body")
        with pytest.raises(LookupError) as info:
            async with Broker():
                raise error from KeyError("its cause")
        assert info.value is error
        assert isinstance(error.__cause__, KeyError)

    async def test_a_group_of_the_body_stays_that_group(self) -> None:
        group = ExceptionGroup("of the body", [ValueError()])
        with pytest.raises(ExceptionGroup) as info:
            async with Broker():
                raise group
        assert info.value is group

    async def test_the_body_can_be_cancelled(self) -> None:
        links: list[Link] = []
        with anyio.CancelScope() as scope:
            async with Broker() as broker:
                links.append(await Link.connect(broker))
                scope.cancel()
                await anyio.sleep_forever()
        assert scope.cancelled_caught
        assert await links[0].read_to_end() == []
        await links[0].stream.aclose()


class TestKnobs:
    async def test_clients(self, broker: Broker, links: list[Link]) -> None:
        unheard = await Link.open(broker)
        links += [unheard, await Link.open(broker), await Link.open(broker)]
        await links[1].ask(Connect("first", "alice"))
        await links[2].ask(Connect("second"))
        first, second = broker.clients
        assert (first.client_id, first.username) == ("first", "alice")
        assert (second.client_id, second.username) == ("second", "")
        assert (await links[1].request("me"))["id"] == first.id != second.id
        assert first.subscriptions == []
        for channel in ("b/", "a/+/", "$share/g/a/"):
            await subscribe(links[1], broker, channel)
        assert first.subscriptions == ["b/", "a/+/", "$share/g/a/"]

    async def test_keygen(self, broker: Broker, links: list[Link]) -> None:
        links.append(await Link.connect(broker))
        key = broker.keygen("a/")
        assert await links[0].ask(Publish(f"{key}/a/", b"x", 1, 5)) == [PubAck(5)]
        brief = broker.keygen("a/", "w", ttl=5)
        broker.advance(6)
        [error, ack] = await links[0].ask(Publish(f"{brief}/a/", b"x", 1, 6))
        assert isinstance(error, Publish)
        assert json.loads(error.payload) == {"req": 6, "status": 401, "message": REFUSED}
        assert ack == PubAck(6)
        with pytest.raises(ValueError, match="should end with `/`"):
            broker.keygen("a")

    async def test_publish(self, broker: Broker, links: list[Link]) -> None:
        links += [await Link.connect(broker), await Link.connect(broker)]
        await subscribe(links[0], broker, "a/")
        await broker.publish("a/b/", "grüße")
        await broker.publish("a/", b"\xff", ttl=60)
        await broker.publish("b/", "x")
        assert await links[0].ask() == [Publish("a/b/", "grüße".encode()), Publish("a/", b"\xff")]
        key = broker.keygen("a/", "rl")
        replayed = await links[1].ask(Subscribe(1, ((f"{key}/a/?last=9", 0),)))
        assert replayed == [Publish("a/", b"\xff"), SubAck(1, (0,))]

    @pytest.mark.parametrize("channel", ["", "a", "a/+/", "a b/", "a/?ttl=5"])
    async def test_publish_to_no_channel(self, broker: Broker, channel: str) -> None:
        with pytest.raises(ValueError, match="publish"):
            await broker.publish(channel, "x")

    async def test_the_clock_goes_forward_only(self, broker: Broker) -> None:
        with pytest.raises(ValueError, match="forward only"):
            broker.advance(-1)

    async def test_drop(self, broker: Broker, links: list[Link]) -> None:
        links += [await Link.connect(broker, name) for name in ("a", "b", "c", "d")]
        links.append(await Link.open(broker))
        a, b, c, d = broker.clients
        await broker.drop("a")
        await broker.drop(b.id)
        await broker.drop(c)
        assert broker.clients == [d]
        for gone in (a, b, c):
            await gone.wait_closed()
        with pytest.raises(LookupError, match="no such client"):
            await broker.drop("a")
        with pytest.raises(LookupError, match="no such client"):
            await broker.drop(a)
        await broker.drop()
        assert broker.clients == []
        for link in links:
            assert await link.read_to_end() == []
        await broker.drop()

    async def test_a_dropped_client_leaves_its_will(
        self, broker: Broker, links: list[Link]
    ) -> None:
        links += [await Link.connect(broker), await Link.open(broker)]
        await subscribe(links[0], broker, "a/")
        will = Will(f"{broker.keygen('a/', 'w')}/a/", b"gone")
        await links[1].ask(Connect("x", will=will))
        await broker.drop("x")
        assert await links[0].ask() == [Publish("a/", b"gone")]

    async def test_hold(self, broker: Broker, links: list[Link]) -> None:
        links.append(await Link.connect(broker))
        key = broker.keygen("a/", "rw")
        with broker.hold():
            got = await links[0].ask(
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
        assert await links[0].ask() == [SubAck(1, (0,)), PubAck(2), PubAck(3), UnsubAck(4)]

    async def test_lose(self, broker: Broker, links: list[Link]) -> None:
        links.append(await Link.connect(broker))
        with broker.lose("answer"):
            assert await links[0].ask(Publish("emitter/me/", b"", 1, 3)) == [PubAck(3)]
        with broker.lose(), broker.hold("answer"):
            assert await links[0].ask(Publish("emitter/me/", b"", 1, 4)) == []
        [answer] = await links[0].ask()
        assert isinstance(answer, Publish)
        assert json.loads(answer.payload)["req"] == 4

    async def test_the_later_of_two_holds_gets_a_packet(
        self, broker: Broker, links: list[Link]
    ) -> None:
        links.append(await Link.connect(broker))
        with broker.lose("puback"):
            with broker.hold("puback", "answer"):
                assert await links[0].ask(Publish("emitter/me/", b"", 1, 3)) == []
            [answer] = await links[0].ask()
            assert isinstance(answer, Publish)
        with broker.hold("pingresp"):
            await links[0].send(PingReq())
        assert await links[0].receive() == PingResp()

    async def test_a_hold_ends_with_an_error_too(self, broker: Broker, links: list[Link]) -> None:
        links.append(await Link.connect(broker))
        with pytest.raises(KeyError), broker.hold("answer"):
            assert await links[0].ask(Publish("emitter/me/")) == []
            raise KeyError
        [answer] = await links[0].ask()
        assert isinstance(answer, Publish)

    async def test_refuse(self, broker: Broker, links: list[Link]) -> None:
        links += [await Link.open(broker), await Link.open(broker)]
        with broker.refuse(3):
            await links[0].send(Connect("a"))
            assert await links[0].read_to_end() == [ConnAck(3)]
            assert broker.clients == []
        with broker.refuse(), broker.refuse(4):
            pass
        assert await links[1].ask(Connect("a")) == [ConnAck(0)]


class TestMatchers:
    @pytest.mark.parametrize(
        ("matcher", "reached"),
        [("emitter", ["a/", "a/b/", "a/b/c/"]), ("mqtt", ["a/"])],
    )
    async def test_which_channels_reach_a_subscriber(
        self, matcher: Literal["emitter", "mqtt"], reached: list[str], links: list[Link]
    ) -> None:
        async with Broker(matcher=matcher) as broker:
            links.append(await Link.connect(broker))
            await subscribe(links[0], broker, "a/")
            for channel in ("a/", "a/b/", "a/b/c/", "b/"):
                await broker.publish(channel, "x")
            assert await links[0].ask() == [Publish(channel, b"x") for channel in reached]

    async def test_the_tail_is_matched_by_mqtts_only(self, links: list[Link]) -> None:
        async with Broker(matcher="mqtt") as broker:
            links.append(await Link.connect(broker))
            await subscribe(links[0], broker, "a/#/")
            for channel in ("a/", "a/b/", "a/b/c/"):
                await broker.publish(channel, "x")
            assert await links[0].ask() == [Publish("a/b/", b"x"), Publish("a/b/c/", b"x")]


class TestLinks:
    @pytest.mark.parametrize(
        "packet",
        [
            pytest.param(Publish("emitter/me/", b"", 1, 1), id="before CONNECT"),
            pytest.param(ConnAck(), id="a broker's packet"),
        ],
    )
    async def test_what_must_not_be_sent_closes_the_link(
        self, broker: Broker, links: list[Link], packet: Packet
    ) -> None:
        links.append(await Link.open(broker))
        await links[0].send(packet)
        assert await links[0].read_to_end() == []

    async def test_what_only_a_broker_sends_closes_the_link(
        self, broker: Broker, links: list[Link]
    ) -> None:
        links.append(await Link.connect(broker))
        assert await links[0].ask(SubAck(1, ())) == []
        assert links[0].closed

    async def test_garbage_closes_one_link_only(self, broker: Broker, links: list[Link]) -> None:
        links += [await Link.connect(broker), await Link.connect(broker)]
        await links[0].stream.send(Publish("emitter/me/", b"", 1, 7).encode() + b"\xff\xff")
        answer, ack = await links[0].read_to_end()
        assert ack == PubAck(7)
        assert isinstance(answer, Publish)
        assert len(broker.clients) == 1
        assert await links[1].ask() == []
        assert not links[1].closed

    async def test_a_second_connect_is_taken_like_the_first(
        self, broker: Broker, links: list[Link]
    ) -> None:
        links.append(await Link.connect(broker, "one"))
        assert await links[0].ask(Connect("two", "bob")) == [ConnAck()]
        [client] = broker.clients
        assert (client.client_id, client.username) == ("two", "bob")

    async def test_acknowledgements_from_a_client_are_passed_over(
        self, broker: Broker, links: list[Link]
    ) -> None:
        links.append(await Link.connect(broker))
        assert await links[0].ask(PubAck(1), PubRec(1), PubRel(1), PubComp(1)) == []
        assert not links[0].closed

    async def test_one_that_leaves_gets_what_was_queued(
        self, broker: Broker, links: list[Link]
    ) -> None:
        links.append(await Link.connect(broker))
        await links[0].send(Publish("emitter/me/", b"", 1, 7), Disconnect())
        answer, ack = await links[0].read_to_end()
        assert isinstance(answer, Publish)
        assert ack == PubAck(7)

    async def test_what_one_sent_before_it_went_is_taken(
        self, broker: Broker, links: list[Link]
    ) -> None:
        links += [await Link.connect(broker), await Link.connect(broker, "hasty")]
        await subscribe(links[0], broker, "a/")
        hasty = broker.clients[1]
        sent = [Publish(f"{broker.keygen('a/', 'w')}/a/", b"%d" % i) for i in range(500)]
        await links[1].send(*sent, Disconnect())
        await links[1].stream.aclose()
        await hasty.wait_closed()
        assert len(await links[0].ask()) == 500

    async def test_a_fault_of_the_broker_costs_one_link(
        self,
        broker: Broker,
        links: list[Link],
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        links += [await Link.connect(broker), await Link.connect(broker)]

        def fail(*args: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setitem(_requests._HANDLERS, "me", fail)
        assert await links[0].ask(Publish("emitter/me/")) == []
        assert links[0].closed
        assert await links[1].ask() == []
        assert not links[1].closed
        [record] = logged(caplog)
        assert record.levelname == "ERROR"
        assert record.exc_info is not None
        assert "failed" in record.message


class TestSlowOnes:
    async def test_one_that_reads_nothing_is_cut_and_the_others_go_on(
        self,
        broker: Broker,
        links: list[Link],
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr(_connection, "PATIENCE", 0.01)
        links += [await Link.connect(broker, name) for name in ("idle", "reader")]
        for link in links:
            await subscribe(link, broker, "a/")
        idle, _ = broker.clients
        count = 0
        while not idle._closed.is_set():
            await broker.publish("a/", bytes(60000))
            assert await links[1].receive() == Publish("a/", bytes(60000))
            count += 1
        assert count * 60000 > HIGH_WATER
        assert [client.client_id for client in broker.clients] == ["reader"]
        assert "takes nothing" in caplog.text


class TestDepth:
    """Channels of more levels than Python's stack has frames."""

    @pytest.mark.parametrize("matcher", ["emitter", "mqtt"])
    async def test_a_deep_channel_is_delivered_and_watched(
        self, matcher: Literal["emitter", "mqtt"], links: list[Link]
    ) -> None:
        channel = "a/" * 1500
        async with Broker(matcher=matcher) as broker:
            links += [await Link.connect(broker), await Link.connect(broker)]
            key = broker.keygen("#/", "rwp")
            watch = {"key": key, "channel": channel, "changes": True, "status": False}
            assert (await links[0].request("presence", **watch))["status"] == 200
            await subscribe(links[1], broker, channel)
            await broker.publish(channel, "hello")
            assert await links[1].ask() == [Publish(channel, b"hello")]
            watcher, subscriber = broker.clients
            await broker.drop(subscriber)
            [came, gone] = await links[0].ask()
            assert isinstance(came, Publish)
            assert isinstance(gone, Publish)
            assert json.loads(gone.payload)["event"] == "unsubscribe"
            await broker.drop(watcher)
            assert await links[0].read_to_end() == []

    async def test_a_link_is_closed_even_if_ending_its_subscriptions_fails(
        self, broker: Broker, links: list[Link], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        links.append(await Link.connect(broker))
        [client] = broker.clients

        def fail(self: Exchange, peer: object) -> None:
            raise RecursionError

        monkeypatch.setattr(Exchange, "leave", fail)
        await links[0].send(Disconnect())
        await client.wait_closed()
        assert await links[0].read_to_end() == []


@pytest.mark.virtual_time
class TestTime:
    """Over links in memory, so that the clock may jump."""

    @pytest.fixture
    async def served(self) -> AsyncIterator[list[tuple[Link, Client]]]:
        exchange, faults, crowd = Exchange(License.new()), Faults(), Crowd()
        pairs = [MemoryStream.pair() for _ in range(2)]
        links = [Link(here) for here, _ in pairs]
        clients = [Client(exchange, faults, crowd, there) for _, there in pairs]
        async with anyio.create_task_group() as task_group:
            for client in clients:
                task_group.start_soon(client.serve)
            yield list(zip(links, clients, strict=True))
            task_group.cancel_scope.cancel()
        for link in links:
            await link.stream.aclose()

    async def test_what_is_coalesced_is_lost_when_its_client_leaves(self) -> None:
        here, there = MemoryStream.pair()
        client = Client(Exchange(License.new()), Faults(), Crowd(), there, coalesce=True)
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(client.serve)
            link = Link(here)
            await link.send(Connect(), *([PingReq()] * 299), Disconnect())
            assert len(await link.read_to_end()) == 60
            await here.aclose()

    async def test_a_silent_link_is_closed_after_120_seconds(
        self, served: list[tuple[Link, Client]]
    ) -> None:
        [(link, _), _] = served
        assert await link.ask(Connect()) == [ConnAck()]
        await anyio.sleep(119)
        assert await link.ask() == []
        start = anyio.current_time()
        assert await link.read_to_end() == []
        assert anyio.current_time() - start == pytest.approx(120)

    async def test_half_a_packet_does_not_break_the_silence(
        self, served: list[tuple[Link, Client]]
    ) -> None:
        [(link, _), _] = served
        start = anyio.current_time()
        await anyio.sleep(100)
        await link.stream.send(b"\x10")
        assert await link.read_to_end() == []
        assert anyio.current_time() - start == pytest.approx(120)

    async def test_one_that_leaves_has_a_second_to_take_what_is_queued(
        self, served: list[tuple[Link, Client]]
    ) -> None:
        [(link, client), _] = served
        start = anyio.current_time()
        for _ in range(8):
            await link.send(Connect(), PingReq())
            await checkpoint()
        await link.send(Disconnect())
        await client.wait_closed()
        assert anyio.current_time() - start == pytest.approx(1)

    async def test_one_that_does_not_read_its_own_answers_has_120_seconds(
        self, served: list[tuple[Link, Client]]
    ) -> None:
        [(link, client), _] = served
        start = anyio.current_time()
        client.peer.link("a", parse("emitter/me/?x=" + "x" * 30000))
        await link.send(Connect(), *(Publish("a") for _ in range(40)))
        await client.wait_closed()
        assert anyio.current_time() - start == pytest.approx(120)
        assert HIGH_WATER < client._outbox.queued < HIGH_WATER + 65536

    async def test_one_subscribe_packet_replays_at_the_pace_of_its_reader(
        self, served: list[tuple[Link, Client]]
    ) -> None:
        [(link, client), _] = served
        exchange = client._exchange
        for _ in range(2):
            exchange.spread(parse("broker/a/"), bytes(30000), ttl=600)
        filters = ((f"{exchange.keygen('a/', 'rl', 0)}/a/?last=2", 0),) * 1400
        await link.send(Connect(), Subscribe(1, filters))
        await client.wait_closed()
        assert HIGH_WATER < client._outbox.queued < HIGH_WATER + 65536

    async def test_websocket_pings_are_answered_at_the_pace_of_their_reader(
        self, served: list[tuple[Link, Client]]
    ) -> None:
        [(link, client), _] = served
        websocket = await WebSocketStream.connect(link.stream)
        await websocket.send(Connect().encode())
        pings = (b"\x89\xfd" + bytes(4 + 125)) * 500

        async def ping() -> None:
            with suppress(anyio.BrokenResourceError):
                for _ in range(40):
                    await link.stream.send(pings)

        async with anyio.create_task_group() as task_group:
            task_group.start_soon(ping)
            await client.wait_closed()
        assert HIGH_WATER < client._outbox.queued < HIGH_WATER + 65536

    async def test_a_flood_goes_at_the_pace_of_a_slow_reader(
        self, served: list[tuple[Link, Client]]
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
            while client._outbox.queued <= HIGH_WATER:
                await checkpoint()
            for _ in range(count):
                await anyio.sleep(0.2)
                assert await reader.receive() == Publish("a/", bytes(60000))
                assert client._outbox.queued < HIGH_WATER + 65536

    async def test_one_that_takes_nothing_holds_up_a_publisher_for_a_second(
        self, served: list[tuple[Link, Client]]
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

    async def test_what_a_client_that_takes_no_more_sends_is_taken(
        self, served: list[tuple[Link, Client]]
    ) -> None:
        [(reader, _), (deaf, client)] = served
        exchange = client._exchange
        key = exchange.keygen("a/", "rw", 0)
        await reader.ask(Connect(), Subscribe(1, ((f"{key}/a/", 0),)))
        await deaf.ask(Connect())
        assert isinstance(deaf.stream, MemoryStream)
        deaf.stream.take_no_more()
        for payload in (b"1", b"2"):
            await deaf.send(PingReq(), Publish(f"{key}/a/", payload))
            assert await reader.receive() == Publish("a/", payload)
