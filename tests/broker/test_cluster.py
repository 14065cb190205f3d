"""Clusters of development brokers, which behave as measured on two nodes of Emitter."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

import anyio
import pytest

from emitter_anyio.testing import Broker, _exchange
from emitter_anyio.testing._packets import (
    Connect,
    PingReq,
    PingResp,
    PubAck,
    Publish,
    SubAck,
    Subscribe,
    Unsubscribe,
    Will,
)
from tests.broker.player import PacketConnection

NOW = 1_900_000_000
"""The time at which messages are stored. They do not expire during a test."""
OLD = NOW - 10


class Nodes(NamedTuple):
    """Two nodes, a connection to each, and a key for all channels."""

    a: Broker
    b: Broker
    on_a: PacketConnection
    on_b: PacketConnection
    key: str


@pytest.fixture
async def nodes() -> AsyncIterator[Nodes]:
    async with Broker() as a, Broker(cluster=a) as b:
        on_a, on_b = await PacketConnection.connect(a), await PacketConnection.connect(b)
        yield Nodes(a, b, on_a, on_b, a.keygen("#/", "rwslp"))
        for connection in (on_a, on_b):
            await anyio.aclose_forcefully(connection.stream)


@pytest.fixture(autouse=True)
def waited_seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that nodes have waited for others, without real delays."""
    waited_seconds: list[float] = []

    async def sleep(seconds: float) -> None:
        waited_seconds.append(seconds)

    monkeypatch.setattr(_exchange, "sleep", sleep)
    return waited_seconds


def store(node: Broker, second: int, *payloads: bytes | str) -> None:
    """Store messages on ``a/`` in a node, with this second as their time."""
    for payload in payloads:
        data = payload.encode() if isinstance(payload, str) else payload
        node._exchange.storage.add(second, 10**9, "a/", ("a",), data)


async def page(
    connection: PacketConnection, key: str, last: int = 100, after: str = "", **window: int
) -> list[Any]:
    """Request a page of history and return its messages."""
    options = "".join(f"&{name}={value}" for name, value in window.items())
    fields = {"startFromID": after} if after else {}
    answer = await connection.request("history", channel=f"{key}/a/?last={last}{options}", **fields)
    messages: list[Any] = answer["messages"]
    return messages


def texts(messages: Sequence[Any]) -> list[str]:
    return [base64.b64decode(message["payload"]).decode()[:9] for message in messages]


def node_of(message: Any) -> bytes:
    return base64.b64decode(message["id"])[12:16]


async def subscribe(connection: PacketConnection, topic: str) -> list[tuple[str, bytes]]:
    """Subscribe and return the replayed messages."""
    *replayed, ack = await connection.ask(Subscribe(1, ((topic, 0),)))
    assert ack == SubAck(1, (0,))
    return [(one.topic, one.payload) for one in replayed if isinstance(one, Publish)]


async def received(connection: PacketConnection) -> list[str]:
    """Return the payloads that a client has received."""
    return [one.payload.decode() for one in await connection.ask() if isinstance(one, Publish)]


class TestJoining:
    async def test_node_has_the_licence_of_its_cluster(self) -> None:
        a = Broker()
        b = Broker(cluster=a, license=a.license)
        assert Broker(cluster=b).license == a.license
        with pytest.raises(ValueError, match="all nodes of a cluster need the same licence"):
            Broker(cluster=a, license=Broker().license)

    async def test_nodes_share_a_clock(self, nodes: Nodes) -> None:
        nodes.b.advance(3600)
        assert abs(nodes.a._exchange.now() - nodes.b._exchange.now()) < 60
        await nodes.a.publish("a/", "1", ttl=60)
        nodes.b.advance(61)
        assert await page(nodes.on_a, nodes.key) == []

    async def test_single_node_does_not_wait(self, waited_seconds: list[float]) -> None:
        async with Broker() as a:
            connection = await PacketConnection.connect(a)
            key = a.keygen("#/", "rwslp")
            await page(connection, key)
            await connection.request("presence", key=key, channel="a/")
            await anyio.aclose_forcefully(connection.stream)
        assert waited_seconds == []


class TestHistory:
    async def test_each_node_stores_its_messages_and_replies_for_all(self, nodes: Nodes) -> None:
        for connection, text in ((nodes.on_a, b"1"), (nodes.on_b, b"2"), (nodes.on_a, b"3")):
            await connection.ask(Publish(f"{nodes.key}/a/?ttl=60", text))
        for connection in (nodes.on_a, nodes.on_b):
            messages = await page(connection, nodes.key)
            found = {
                text: node_of(one) for text, one in zip(texts(messages), messages, strict=True)
            }
            assert found["1"] == found["3"] != found["2"]
        counts = [len(node._exchange.storage._expiries) for node in (nodes.a, nodes.b)]
        assert counts == [2, 1]

    async def test_replay_contains_messages_of_all_nodes(self, nodes: Nodes) -> None:
        store(nodes.a, NOW, "a")
        store(nodes.b, OLD, "b")
        replayed = await subscribe(nodes.on_a, f"{nodes.key}/a/?last=9")
        assert replayed == [("a/", b"b"), ("a/", b"a")]

    async def test_pages_are_sorted_only_by_second(self, nodes: Nodes) -> None:
        store(nodes.a, NOW, "a1", "a2", "a3", "a4")
        store(nodes.b, NOW, "b1", "b2", "b3", "b4")
        store(nodes.b, OLD, "old")
        first = await page(nodes.on_a, nodes.key, 6)
        assert texts(first) == ["a2", "a1", "b4", "b3", "b2", "b1"]
        # The page after the last id never contains the newest messages of node a.
        oldest = max((one["id"] for one in first), key=base64.b64decode)
        assert not {"a4", "a3"} & set(texts(await page(nodes.on_a, nodes.key, 6, oldest)))

    async def test_order_within_a_second_is_random(self, nodes: Nodes) -> None:
        for node in (nodes.a, nodes.b):
            store(node, NOW, *map(str, range(20)))
        store(nodes.b, OLD, "old")
        orders = [texts(await page(nodes.on_a, nodes.key, 41)) for _ in range(3)]
        assert {order[0] for order in orders} == {"old"}
        assert len(set(map(tuple, orders))) > 1

    async def test_each_node_limits_its_own_reply(self, nodes: Nodes) -> None:
        for second in range(4):
            store(nodes.a, NOW - second, bytes((48 + second,)) * 30000)
            store(nodes.b, NOW - 1000 - second, f"b{second}")
        replayed = await subscribe(nodes.on_b, f"{nodes.key}/a/?last=9")
        assert [payload[:2] for _, payload in replayed] == [
            b"b3",
            b"b2",
            b"b1",
            b"b0",
            b"11",
            b"00",
        ]

    async def test_oversized_message_hides_older_messages_of_its_node(self, nodes: Nodes) -> None:
        store(nodes.a, OLD, "hidden")
        store(nodes.a, NOW, bytes(65536))
        assert await page(nodes.on_a, nodes.key, until=NOW) == []
        store(nodes.b, OLD, "b")
        assert texts(await page(nodes.on_a, nodes.key)) == ["b"]
        assert texts(await page(nodes.on_a, nodes.key, until=NOW - 1)) == ["hidden", "b"]

    async def test_reply_above_64_kib_is_not_sent(self, nodes: Nodes) -> None:
        store(nodes.a, NOW, bytes(30000))
        store(nodes.b, NOW, bytes(30000))
        asked = json.dumps({"channel": f"{nodes.key}/a/?last=2"}).encode()
        assert await nodes.on_a.ask(Publish("emitter/history/", asked, 1, 9)) == [PubAck(9)]

    async def test_node_without_the_start_id_skips_a_message(self, nodes: Nodes) -> None:
        store(nodes.a, NOW, "a1")
        store(nodes.b, OLD, "b1", "b2", "b3")
        store(nodes.a, OLD, "a0")
        [newest] = await page(nodes.on_a, nodes.key, 1)
        assert texts([newest]) == ["a1"]
        assert texts(await page(nodes.on_b, nodes.key, 9, newest["id"])) == ["b2", "b1", "a0"]


class TestFaults:
    async def test_paused_node_delays_replies(
        self, nodes: Nodes, waited_seconds: list[float]
    ) -> None:
        store(nodes.a, NOW, "a")
        store(nodes.b, OLD, "b")
        nodes.b.pause()
        nodes.b.pause()
        assert texts(await page(nodes.on_a, nodes.key)) == ["a"]
        assert waited_seconds == [2]
        assert await subscribe(nodes.on_a, f"{nodes.key}/a/?last=0") == []
        assert waited_seconds == [2, 2]
        nodes.b.resume()
        nodes.b.resume()
        assert texts(await page(nodes.on_a, nodes.key)) == ["b", "a"]
        assert waited_seconds == [2, 2]

    async def test_patience_sets_the_delay(self, waited_seconds: list[float]) -> None:
        async with Broker(patience=7) as a, Broker(cluster=a):
            connection = await PacketConnection.connect(a)
            await connection.request("presence", key=a.keygen("#/", "p"), channel="a/")
            await anyio.aclose_forcefully(connection.stream)
        assert waited_seconds == [3.5]

    async def test_resumed_node_handles_delayed_packets(self, nodes: Nodes) -> None:
        await subscribe(nodes.on_b, f"{nodes.key}/a/")
        nodes.b.pause()
        await nodes.on_b.send(PingReq())
        late = await PacketConnection.open(nodes.b)
        await late.send(Connect("late"))
        await nodes.on_a.ask(Publish(f"{nodes.key}/a/", b"1"))
        await anyio.wait_all_tasks_blocked()
        assert [client.client_id for client in nodes.b.clients] == [""]
        nodes.b.resume()
        packets = [await nodes.on_b.receive() for _ in range(2)]
        assert PingResp() in packets
        assert Publish("a/", b"1") in packets
        assert len(await late.ask()) == 1
        await anyio.aclose_forcefully(late.stream)

    async def test_disconnect_from_a_paused_node_is_handled_on_resume(self, nodes: Nodes) -> None:
        gone = await PacketConnection.connect(nodes.b)
        await subscribe(gone, f"{nodes.key}/a/")
        client = nodes.b.clients[-1]
        nodes.b.pause()
        await anyio.aclose_forcefully(gone.stream)
        await anyio.wait_all_tasks_blocked()
        assert client.subscriptions == ["a/"]
        nodes.b.resume()
        await client.wait_closed()
        assert client.subscriptions == []

    async def test_stopped_node_does_not_delay_replies(
        self, nodes: Nodes, waited_seconds: list[float]
    ) -> None:
        store(nodes.a, NOW, "a")
        store(nodes.b, OLD, "b")
        await nodes.b.stop()
        await nodes.b.stop()
        assert await nodes.on_b.read_to_end() == []
        assert nodes.b.clients == []
        with pytest.raises(OSError):  # noqa: PT011 -- the message depends on the system
            await PacketConnection.open(nodes.b)
        assert texts(await page(nodes.on_a, nodes.key)) == ["a"]
        assert waited_seconds == []
        await nodes.b.restart()
        assert texts(await page(nodes.on_a, nodes.key)) == ["b", "a"]

    async def test_restarted_node_gets_no_replies(
        self, nodes: Nodes, waited_seconds: list[float]
    ) -> None:
        store(nodes.a, NOW, "a")
        store(nodes.b, OLD, "b")
        port, [*_, before] = nodes.b.port, await page(nodes.on_b, nodes.key, until=OLD)
        await nodes.b.restart()
        assert nodes.b.port == port
        connection = await PacketConnection.connect(nodes.b)
        assert texts(await page(connection, nodes.key)) == ["b"]
        assert waited_seconds == [2]
        assert texts(await page(nodes.on_a, nodes.key)) == ["b", "a"]
        # New messages have another node number, and the counter starts again.
        store(nodes.b, NOW, "new")
        [new] = await page(connection, nodes.key, 1)
        assert node_of(new) != node_of(before)
        assert base64.b64decode(new["id"])[8:12] == (0xFFFFFFFF - 1).to_bytes(4, "big")
        # After a restart of the other node, this one gets replies.
        waited_seconds.clear()
        await nodes.a.restart()
        assert sorted(texts(await page(connection, nodes.key))) == ["a", "b", "new"]
        assert waited_seconds == []
        await anyio.aclose_forcefully(connection.stream)

    async def test_restart_can_forget_stored_messages(self, nodes: Nodes) -> None:
        store(nodes.b, NOW, "b")
        await nodes.b.restart(forget=True)
        assert await page(nodes.on_a, nodes.key) == []

    async def test_cut_separates_nodes_until_heal(
        self, nodes: Nodes, waited_seconds: list[float]
    ) -> None:
        store(nodes.a, NOW, "a")
        store(nodes.b, OLD, "b")
        for connection in (nodes.on_a, nodes.on_b):
            await subscribe(connection, f"{nodes.key}/live/")
        nodes.b.cut()
        for connection, own in ((nodes.on_a, "a"), (nodes.on_b, "b")):
            assert texts(await page(connection, nodes.key)) == [own]
            assert await received(connection) == []
            await connection.send(Publish(f"{nodes.key}/live/", own.encode()))
            assert await received(connection) == [own]
        assert waited_seconds == []

    async def test_healed_nodes_know_only_new_subscriptions(
        self, nodes: Nodes, waited_seconds: list[float]
    ) -> None:
        store(nodes.a, NOW, "a")
        store(nodes.b, OLD, "b")
        topic = f"{nodes.key}/live/"
        for connection in (nodes.on_a, nodes.on_b):
            await subscribe(connection, f"{topic}?last=0")
        nodes.b.cut()
        nodes.b.heal()
        pairs = ((nodes.on_a, nodes.on_b, "a"), (nodes.on_b, nodes.on_a, "b"))
        for connection, other, own in pairs:
            await connection.ask(Publish(topic, own.encode()))
            assert await received(other) == []
            assert texts(await page(connection, nodes.key)) == [own]
            await other.ask(Unsubscribe(2, (topic,)))
            await subscribe(other, f"{topic}?last=0")
            await connection.ask(Publish(topic, own.encode()))
            assert await received(other) == [own]
        assert set(waited_seconds) == {2}
        for node in nodes[:2]:
            await node.stop()
        for node in nodes[:2]:
            await node.restart()
        waited_seconds.clear()
        connection = await PacketConnection.connect(nodes.a)
        assert texts(await page(connection, nodes.key)) == ["b", "a"]
        assert waited_seconds == []
        await anyio.aclose_forcefully(connection.stream)

    async def test_restarted_node_does_not_know_subscriptions_of_the_others(
        self, nodes: Nodes
    ) -> None:
        topic = f"{nodes.key}/live/"
        await subscribe(nodes.on_a, f"{topic}?last=0")
        await nodes.b.restart()
        connection = await PacketConnection.connect(nodes.b)
        await connection.ask(Publish(topic, b"unknown"))
        assert await received(nodes.on_a) == []
        again = await PacketConnection.connect(nodes.a)
        await subscribe(again, f"{topic}?last=0")
        await connection.ask(Publish(topic, b"known"))
        assert await received(again) == ["known"]
        for each in (connection, again):
            await anyio.aclose_forcefully(each.stream)

    async def test_faults_of_a_stopped_node_raise(self, nodes: Nodes) -> None:
        await nodes.b.stop()
        for inject in (nodes.b.pause, nodes.b.resume, nodes.b.cut, nodes.b.heal):
            with pytest.raises(RuntimeError, match=f"cannot {inject.__name__} the broker"):
                inject()

    async def test_restart_outside_the_block_raises(self) -> None:
        broker = Broker()
        await broker.stop()
        with pytest.raises(RuntimeError, match="not running; use 'async with'"):
            await broker.restart()
        async with broker:
            pass
        with pytest.raises(RuntimeError, match="not running; use 'async with'"):
            await broker.restart()

    async def test_restart_ends_a_pause(self, nodes: Nodes) -> None:
        nodes.b.pause()
        await nodes.b.restart()
        connection = await PacketConnection.connect(nodes.b)
        await anyio.aclose_forcefully(connection.stream)


class TestPresence:
    async def test_status_lists_only_clients_of_its_node(
        self, nodes: Nodes, waited_seconds: list[float]
    ) -> None:
        for connection in (nodes.on_a, nodes.on_b):
            await subscribe(connection, f"{nodes.key}/a/")
        for connection, node in ((nodes.on_a, nodes.a), (nodes.on_b, nodes.b)):
            answer = await connection.request("presence", key=nodes.key, channel="a/")
            assert answer["who"] == [{"id": node.clients[0].id}]
        assert waited_seconds == [1, 1]

    async def test_events_arrive_from_all_nodes(self, nodes: Nodes) -> None:
        asked = {"key": nodes.key, "channel": "a/", "changes": True, "status": False}
        await nodes.on_a.request("presence", **asked)
        await subscribe(nodes.on_b, f"{nodes.key}/a/")
        await nodes.on_b.ask(Unsubscribe(2, (f"{nodes.key}/a/",)))
        changes = [json.loads(text) for text in await received(nodes.on_a)]
        assert [change["event"] for change in changes] == ["subscribe", "unsubscribe"]
        assert [change["who"]["id"] for change in changes] == [nodes.b.clients[0].id] * 2

    @pytest.mark.parametrize("fault", ["cut", "stop"])
    async def test_events_of_a_lost_node_have_a_wrong_id(self, nodes: Nodes, fault: str) -> None:
        bob = await PacketConnection.open(nodes.b)
        await bob.ask(Connect("", username="bob", will=Will(f"{nodes.key}/a/", b"will")))
        await subscribe(bob, f"{nodes.key}/a/")
        watched = {"key": nodes.key, "channel": "a/", "changes": True, "status": False}
        await bob.request("presence", **watched)
        await nodes.on_a.request("presence", **watched)
        await subscribe(nodes.on_a, f"{nodes.key}/a/?last=0")
        await received(nodes.on_a)
        there = nodes.b.clients[-1].id
        if fault == "cut":
            nodes.b.cut()  # node b cannot announce the end itself
        await nodes.b.stop()
        [text] = await received(nodes.on_a)
        change = json.loads(text)
        assert (change["event"], change["who"]["username"]) == ("unsubscribe", "bob")
        assert change["who"]["id"] != there
        await anyio.aclose_forcefully(bob.stream)


class TestGroups:
    """A group with one member on each node, and messages published on one node."""

    async def publish_to_group(self, nodes: Nodes, *others: PacketConnection) -> list[list[str]]:
        for connection in (nodes.on_a, nodes.on_b):
            await subscribe(connection, f"{nodes.key}/$share/g/jobs/")
        publisher = await PacketConnection.connect(nodes.a)
        await publisher.ask(*(Publish(f"{nodes.key}/jobs/", b"%d" % n) for n in range(60)))
        for connection in (publisher, *others):
            await anyio.aclose_forcefully(connection.stream)
        return [await received(connection) for connection in (nodes.on_a, nodes.on_b)]

    async def test_group_without_other_subscriptions_receives_each_message_once(
        self, nodes: Nodes
    ) -> None:
        one, two = await self.publish_to_group(nodes)
        assert sorted(one + two, key=int) == [str(n) for n in range(60)]
        assert one
        assert two

    @pytest.mark.parametrize("subscription", ["jobs/", "$share/h/jobs/"])
    async def test_group_with_other_subscriptions_receives_some_messages_twice(
        self, nodes: Nodes, subscription: str
    ) -> None:
        more = [await PacketConnection.connect(node) for node in (nodes.a, nodes.b)]
        for connection in more:
            await subscribe(connection, f"{nodes.key}/{subscription}")
        one, two = await self.publish_to_group(nodes, *more)
        assert set(one) | set(two) == {str(n) for n in range(60)}
        assert set(one) & set(two)

    async def test_other_node_counts_as_one_member(
        self, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        more = [await PacketConnection.connect(nodes.b) for _ in range(3)]
        for connection in more:
            await subscribe(connection, f"{nodes.key}/$share/g/jobs/")
        sizes: list[int] = []

        def choice(members: Sequence[Any]) -> Any:
            sizes.append(len(members))
            return members[-1]

        monkeypatch.setattr(random, "choice", choice)
        await self.publish_to_group(nodes, *more)
        assert set(sizes[::2]) == {2}
        assert set(sizes[1::2]) == {4}


class TestBans:
    async def ban(
        self, connection: PacketConnection, node: Broker, target: str, banned: bool
    ) -> None:
        answer = await connection.request(
            "keyban", secret=node.secret_key, target=target, banned=banned
        )
        assert answer["status"] == 200

    async def test_ban_reaches_other_nodes(self, nodes: Nodes) -> None:
        target = nodes.a.keygen("b/", "w")
        for banned in (True, False):
            await self.ban(nodes.on_a, nodes.a, target, banned)
            assert bool(await is_refused(nodes.on_b, target)) is banned

    async def test_ban_reaches_a_node_after_heal(self, nodes: Nodes) -> None:
        target = nodes.a.keygen("b/", "w")
        nodes.b.cut()
        await self.ban(nodes.on_b, nodes.b, target, True)
        assert not await is_refused(nodes.on_a, target)
        await self.ban(nodes.on_a, nodes.a, target, True)
        await self.ban(nodes.on_b, nodes.b, target, False)
        assert await is_refused(nodes.on_a, target)
        nodes.b.heal()  # the newest decision applies
        assert not await is_refused(nodes.on_a, target)
        await self.ban(nodes.on_a, nodes.a, target, True)
        async with Broker(cluster=nodes.b) as c:
            connection = await PacketConnection.connect(c)
            assert await is_refused(connection, target)
            await anyio.aclose_forcefully(connection.stream)


async def is_refused(connection: PacketConnection, key: str) -> bool:
    """Return whether the broker refuses this key."""
    return len(await connection.ask(Publish(f"{key}/b/", b"x", 1, 9))) == 2


async def test_publisher_waits_for_a_slow_subscriber_of_another_node(nodes: Nodes) -> None:
    await nodes.on_b.ask(Subscribe(1, ((f"{nodes.key}/a/", 0),)))
    [slow] = nodes.b.clients
    publisher = await PacketConnection.connect(nodes.a)
    payload = bytes(60000)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(publisher.ask, *(Publish(f"{nodes.key}/a/", payload) for _ in range(200)))
        await slow.wait_closed()
    await anyio.aclose_forcefully(publisher.stream)
