"""Nodes of a cluster, as they were seen on two real ones."""

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
from tests.broker.player import Link

NOW = 1_900_000_000
"""When the test's messages are stored: they outlive it."""
OLD = NOW - 10


class Nodes(NamedTuple):
    """Two nodes, a client of each, and a key for everything."""

    a: Broker
    b: Broker
    on_a: Link
    on_b: Link
    key: str


@pytest.fixture
async def nodes() -> AsyncIterator[Nodes]:
    async with Broker() as a, Broker(cluster=a) as b:
        on_a, on_b = await Link.connect(a), await Link.connect(b)
        yield Nodes(a, b, on_a, on_b, a.keygen("#/", "rwslp"))
        for link in (on_a, on_b):
            await anyio.aclose_forcefully(link.stream)


@pytest.fixture(autouse=True)
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """For how many seconds nodes have waited for others, which takes no time here."""
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr(_exchange, "sleep", sleep)
    return waited


def store(node: Broker, second: int, *payloads: bytes | str) -> None:
    """Have a node store messages on ``a/`` in one second."""
    for payload in payloads:
        data = payload.encode() if isinstance(payload, str) else payload
        node._exchange.storage.add(second, 10**9, "a/", ("a",), data)


async def page(link: Link, key: str, last: int = 100, after: str = "", **window: int) -> list[Any]:
    """Ask for a page of history: the messages, as they come."""
    options = "".join(f"&{name}={value}" for name, value in window.items())
    fields = {"startFromID": after} if after else {}
    answer = await link.request("history", channel=f"{key}/a/?last={last}{options}", **fields)
    messages: list[Any] = answer["messages"]
    return messages


def texts(messages: Sequence[Any]) -> list[str]:
    return [base64.b64decode(message["payload"]).decode()[:9] for message in messages]


def node_of(message: Any) -> bytes:
    return base64.b64decode(message["id"])[12:16]


async def listen(link: Link, topic: str) -> list[tuple[str, bytes]]:
    """Subscribe, and give what is replayed."""
    *replayed, ack = await link.ask(Subscribe(1, ((topic, 0),)))
    assert ack == SubAck(1, (0,))
    return [(one.topic, one.payload) for one in replayed if isinstance(one, Publish)]


async def got(link: Link) -> list[str]:
    """Give the payloads that a client has been sent."""
    return [one.payload.decode() for one in await link.ask() if isinstance(one, Publish)]


class TestJoining:
    async def test_a_node_has_the_licence_of_its_cluster(self) -> None:
        a = Broker()
        b = Broker(cluster=a, license=a.license)
        assert Broker(cluster=b).license == a.license
        with pytest.raises(ValueError, match="not that of the cluster: all nodes need the same"):
            Broker(cluster=a, license=Broker().license)

    async def test_all_nodes_have_one_clock(self, nodes: Nodes) -> None:
        nodes.b.advance(3600)
        assert abs(nodes.a._exchange.now() - nodes.b._exchange.now()) < 60
        await nodes.a.publish("a/", "1", ttl=60)
        nodes.b.advance(61)
        assert await page(nodes.on_a, nodes.key) == []

    async def test_a_node_alone_waits_for_nobody(self, waited: list[float]) -> None:
        async with Broker() as a:
            link = await Link.connect(a)
            key = a.keygen("#/", "rwslp")
            await page(link, key)
            await link.request("presence", key=key, channel="a/")
            await anyio.aclose_forcefully(link.stream)
        assert waited == []


class TestHistory:
    async def test_each_node_keeps_what_it_took_and_answers_for_all(self, nodes: Nodes) -> None:
        for link, text in ((nodes.on_a, b"1"), (nodes.on_b, b"2"), (nodes.on_a, b"3")):
            await link.ask(Publish(f"{nodes.key}/a/?ttl=60", text))
        for link in (nodes.on_a, nodes.on_b):
            messages = await page(link, nodes.key)
            found = {
                text: node_of(one) for text, one in zip(texts(messages), messages, strict=True)
            }
            assert found["1"] == found["3"] != found["2"]
        counts = [len(node._exchange.storage._expiries) for node in (nodes.a, nodes.b)]
        assert counts == [2, 1]

    async def test_a_subscription_is_replayed_what_all_have(self, nodes: Nodes) -> None:
        store(nodes.a, NOW, "a")
        store(nodes.b, OLD, "b")
        replayed = await listen(nodes.on_a, f"{nodes.key}/a/?last=9")
        assert replayed == [("a/", b"b"), ("a/", b"a")]

    async def test_pages_are_sorted_by_second_and_cut_inside_it(self, nodes: Nodes) -> None:
        store(nodes.a, NOW, "a1", "a2", "a3", "a4")
        store(nodes.b, NOW, "b1", "b2", "b3", "b4")
        store(nodes.b, OLD, "old")
        first = await page(nodes.on_a, nodes.key, 6)
        assert texts(first) == ["a2", "a1", "b4", "b3", "b2", "b1"]
        # Going on from the last id gives the newest ones of a never.
        oldest = max((one["id"] for one in first), key=base64.b64decode)
        assert not {"a4", "a3"} & set(texts(await page(nodes.on_a, nodes.key, 6, oldest)))

    async def test_many_in_one_second_come_in_any_order(self, nodes: Nodes) -> None:
        for node in (nodes.a, nodes.b):
            store(node, NOW, *map(str, range(20)))
        store(nodes.b, OLD, "old")
        orders = [texts(await page(nodes.on_a, nodes.key, 41)) for _ in range(3)]
        assert {order[0] for order in orders} == {"old"}
        assert len(set(map(tuple, orders))) > 1

    async def test_each_node_cuts_its_own_answer(self, nodes: Nodes) -> None:
        for second in range(4):
            store(nodes.a, NOW - second, bytes((48 + second,)) * 30000)
            store(nodes.b, NOW - 1000 - second, f"b{second}")
        replayed = await listen(nodes.on_b, f"{nodes.key}/a/?last=9")
        assert [payload[:2] for _, payload in replayed] == [
            b"b3",
            b"b2",
            b"b1",
            b"b0",
            b"11",
            b"00",
        ]

    async def test_an_oversized_message_hides_its_node(self, nodes: Nodes) -> None:
        store(nodes.a, OLD, "hidden")
        store(nodes.a, NOW, bytes(65536))
        assert await page(nodes.on_a, nodes.key, until=NOW) == []
        store(nodes.b, OLD, "b")
        assert texts(await page(nodes.on_a, nodes.key)) == ["b"]
        assert texts(await page(nodes.on_a, nodes.key, until=NOW - 1)) == ["hidden", "b"]

    async def test_an_answer_of_more_than_64_kib_is_not_sent(self, nodes: Nodes) -> None:
        store(nodes.a, NOW, bytes(30000))
        store(nodes.b, NOW, bytes(30000))
        asked = json.dumps({"channel": f"{nodes.key}/a/?last=2"}).encode()
        assert await nodes.on_a.ask(Publish("emitter/history/", asked, 1, 9)) == [PubAck(9)]

    async def test_a_node_that_does_not_hold_the_id_skips_one(self, nodes: Nodes) -> None:
        store(nodes.a, NOW, "a1")
        store(nodes.b, OLD, "b1", "b2", "b3")
        store(nodes.a, OLD, "a0")
        [newest] = await page(nodes.on_a, nodes.key, 1)
        assert texts([newest]) == ["a1"]
        assert texts(await page(nodes.on_b, nodes.key, 9, newest["id"])) == ["b2", "b1", "a0"]


class TestDisturbances:
    async def test_a_node_that_is_paused_is_waited_for(
        self, nodes: Nodes, waited: list[float]
    ) -> None:
        store(nodes.a, NOW, "a")
        store(nodes.b, OLD, "b")
        nodes.b.pause()
        nodes.b.pause()
        assert texts(await page(nodes.on_a, nodes.key)) == ["a"]
        assert waited == [2]
        assert await listen(nodes.on_a, f"{nodes.key}/a/?last=0") == []
        assert waited == [2, 2]
        nodes.b.resume()
        nodes.b.resume()
        assert texts(await page(nodes.on_a, nodes.key)) == ["b", "a"]
        assert waited == [2, 2]

    async def test_how_long_is_an_option(self, waited: list[float]) -> None:
        async with Broker(patience=7) as a, Broker(cluster=a):
            link = await Link.connect(a)
            await link.request("presence", key=a.keygen("#/", "p"), channel="a/")
            await anyio.aclose_forcefully(link.stream)
        assert waited == [3.5]

    async def test_a_node_that_is_paused_goes_on_where_it_was(self, nodes: Nodes) -> None:
        await listen(nodes.on_b, f"{nodes.key}/a/")
        nodes.b.pause()
        await nodes.on_b.send(PingReq())
        late = await Link.open(nodes.b)
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

    async def test_who_leaves_a_paused_node_has_left_when_it_goes_on(self, nodes: Nodes) -> None:
        gone = await Link.connect(nodes.b)
        await listen(gone, f"{nodes.key}/a/")
        client = nodes.b.clients[-1]
        nodes.b.pause()
        await anyio.aclose_forcefully(gone.stream)
        await anyio.wait_all_tasks_blocked()
        assert client.subscriptions == ["a/"]
        nodes.b.resume()
        await client.wait_closed()
        assert client.subscriptions == []

    async def test_a_node_that_was_stopped_is_missed_by_none(
        self, nodes: Nodes, waited: list[float]
    ) -> None:
        store(nodes.a, NOW, "a")
        store(nodes.b, OLD, "b")
        await nodes.b.stop()
        await nodes.b.stop()
        assert await nodes.on_b.read_to_end() == []
        assert nodes.b.clients == []
        with pytest.raises(OSError):  # noqa: PT011 -- each system says it its own way
            await Link.open(nodes.b)
        assert texts(await page(nodes.on_a, nodes.key)) == ["a"]
        assert waited == []
        await nodes.b.restart()
        assert texts(await page(nodes.on_a, nodes.key)) == ["b", "a"]

    async def test_a_node_that_was_restarted_asks_in_vain(
        self, nodes: Nodes, waited: list[float]
    ) -> None:
        store(nodes.a, NOW, "a")
        store(nodes.b, OLD, "b")
        port, [*_, before] = nodes.b.port, await page(nodes.on_b, nodes.key, until=OLD)
        await nodes.b.restart()
        assert nodes.b.port == port
        link = await Link.connect(nodes.b)
        assert texts(await page(link, nodes.key)) == ["b"]
        assert waited == [2]
        assert texts(await page(nodes.on_a, nodes.key)) == ["b", "a"]
        # What it stores now has another name, and is counted anew.
        store(nodes.b, NOW, "new")
        [new] = await page(link, nodes.key, 1)
        assert node_of(new) != node_of(before)
        assert base64.b64decode(new["id"])[8:12] == (0xFFFFFFFF - 1).to_bytes(4, "big")
        # Once the other one is restarted, the two have changed places.
        waited.clear()
        await nodes.a.restart()
        assert sorted(texts(await page(link, nodes.key))) == ["a", "b", "new"]
        assert waited == []
        await anyio.aclose_forcefully(link.stream)

    async def test_a_node_may_lose_what_it_stored(self, nodes: Nodes) -> None:
        store(nodes.b, NOW, "b")
        await nodes.b.restart(forget=True)
        assert await page(nodes.on_a, nodes.key) == []

    async def test_a_node_that_is_cut_off(self, nodes: Nodes, waited: list[float]) -> None:
        store(nodes.a, NOW, "a")
        store(nodes.b, OLD, "b")
        for link in (nodes.on_a, nodes.on_b):
            await listen(link, f"{nodes.key}/live/")
        nodes.b.cut()
        for link, own in ((nodes.on_a, "a"), (nodes.on_b, "b")):
            assert texts(await page(link, nodes.key)) == [own]
            assert await got(link) == []
            await link.send(Publish(f"{nodes.key}/live/", own.encode()))
            assert await got(link) == [own]
        assert waited == [2, 2]
        nodes.b.heal()
        await nodes.on_a.ask(Publish(f"{nodes.key}/live/", b"again"))
        assert await got(nodes.on_b) == ["again"]
        assert texts(await page(nodes.on_a, nodes.key)) == ["b", "a"]

    async def test_what_needs_a_node_that_runs(self, nodes: Nodes) -> None:
        await nodes.b.stop()
        for disturb in (nodes.b.pause, nodes.b.resume, nodes.b.cut, nodes.b.heal):
            with pytest.raises(RuntimeError, match=f"cannot {disturb.__name__} the broker"):
                disturb()

    async def test_a_broker_that_is_not_entered_cannot_be_restarted(self) -> None:
        broker = Broker()
        await broker.stop()
        with pytest.raises(RuntimeError, match="not entered; use `async with`"):
            await broker.restart()
        async with broker:
            pass
        with pytest.raises(RuntimeError, match="not entered; use `async with`"):
            await broker.restart()

    async def test_a_stop_ends_a_pause(self, nodes: Nodes) -> None:
        nodes.b.pause()
        await nodes.b.restart()
        link = await Link.connect(nodes.b)
        await anyio.aclose_forcefully(link.stream)


class TestPresence:
    async def test_a_status_lists_those_of_its_node_only(
        self, nodes: Nodes, waited: list[float]
    ) -> None:
        for link in (nodes.on_a, nodes.on_b):
            await listen(link, f"{nodes.key}/a/")
        for link, node in ((nodes.on_a, nodes.a), (nodes.on_b, nodes.b)):
            answer = await link.request("presence", key=nodes.key, channel="a/")
            assert answer["who"] == [{"id": node.clients[0].id}]
        assert waited == [1, 1]

    async def test_changes_come_from_all_nodes(self, nodes: Nodes) -> None:
        asked = {"key": nodes.key, "channel": "a/", "changes": True, "status": False}
        await nodes.on_a.request("presence", **asked)
        await listen(nodes.on_b, f"{nodes.key}/a/")
        await nodes.on_b.ask(Unsubscribe(2, (f"{nodes.key}/a/",)))
        changes = [json.loads(text) for text in await got(nodes.on_a)]
        assert [change["event"] for change in changes] == ["subscribe", "unsubscribe"]
        assert [change["who"]["id"] for change in changes] == [nodes.b.clients[0].id] * 2

    async def test_those_of_a_killed_node_leave_with_a_wrong_id(self, nodes: Nodes) -> None:
        bob = await Link.open(nodes.b)
        await bob.ask(Connect("", username="bob", will=Will(f"{nodes.key}/a/", b"will")))
        await listen(bob, f"{nodes.key}/a/")
        watched = {"key": nodes.key, "channel": "a/", "changes": True, "status": False}
        await bob.request("presence", **watched)
        await nodes.on_a.request("presence", **watched)
        await listen(nodes.on_a, f"{nodes.key}/a/?last=0")
        await got(nodes.on_a)
        there = nodes.b.clients[-1].id
        nodes.b.cut()  # what it still sent would not arrive
        await nodes.b.stop()
        [text] = await got(nodes.on_a)
        change = json.loads(text)
        assert (change["event"], change["who"]["username"]) == ("unsubscribe", "bob")
        assert change["who"]["id"] != there
        await anyio.aclose_forcefully(bob.stream)


class TestGroups:
    """Jobs of a group with one member on each node, published on one of them."""

    async def shares(self, nodes: Nodes, *others: Link) -> list[list[str]]:
        for link in (nodes.on_a, nodes.on_b):
            await listen(link, f"{nodes.key}/$share/g/jobs/")
        publisher = await Link.connect(nodes.a)
        await publisher.ask(*(Publish(f"{nodes.key}/jobs/", b"%d" % n) for n in range(60)))
        for link in (publisher, *others):
            await anyio.aclose_forcefully(link.stream)
        return [await got(link) for link in (nodes.on_a, nodes.on_b)]

    async def test_alone_on_its_channel_a_group_gets_each_once(self, nodes: Nodes) -> None:
        one, two = await self.shares(nodes)
        assert sorted(one + two, key=int) == [str(n) for n in range(60)]
        assert one
        assert two

    @pytest.mark.parametrize("subscription", ["jobs/", "$share/h/jobs/"])
    async def test_beside_another_subscription_a_group_gets_some_twice(
        self, nodes: Nodes, subscription: str
    ) -> None:
        beside = [await Link.connect(node) for node in (nodes.a, nodes.b)]
        for link in beside:
            await listen(link, f"{nodes.key}/{subscription}")
        one, two = await self.shares(nodes, *beside)
        assert set(one) | set(two) == {str(n) for n in range(60)}
        assert set(one) & set(two)

    async def test_another_node_is_one_member(
        self, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        more = [await Link.connect(nodes.b) for _ in range(3)]
        for link in more:
            await listen(link, f"{nodes.key}/$share/g/jobs/")
        drawn: list[int] = []

        def choice(members: Sequence[Any]) -> Any:
            drawn.append(len(members))
            return members[-1]

        monkeypatch.setattr(random, "choice", choice)
        await self.shares(nodes, *more)
        assert set(drawn[::2]) == {2}
        assert set(drawn[1::2]) == {4}


class TestBans:
    async def ban(self, link: Link, node: Broker, target: str, banned: bool) -> None:
        answer = await link.request("keyban", secret=node.secret_key, target=target, banned=banned)
        assert answer["status"] == 200

    async def test_a_ban_spreads(self, nodes: Nodes) -> None:
        target = nodes.a.keygen("b/", "w")
        for banned in (True, False):
            await self.ban(nodes.on_a, nodes.a, target, banned)
            assert bool(await got_error(nodes.on_b, target)) is banned

    async def test_a_ban_reaches_a_node_once_it_can(self, nodes: Nodes) -> None:
        target = nodes.a.keygen("b/", "w")
        nodes.b.cut()
        await self.ban(nodes.on_b, nodes.b, target, True)
        assert not await got_error(nodes.on_a, target)
        await self.ban(nodes.on_a, nodes.a, target, True)
        await self.ban(nodes.on_b, nodes.b, target, False)
        assert await got_error(nodes.on_a, target)
        nodes.b.heal()  # the newest word counts
        assert not await got_error(nodes.on_a, target)
        await self.ban(nodes.on_a, nodes.a, target, True)
        async with Broker(cluster=nodes.b) as c:
            link = await Link.connect(c)
            assert await got_error(link, target)
            await anyio.aclose_forcefully(link.stream)


async def got_error(link: Link, key: str) -> bool:
    """Say whether the broker refuses this key."""
    return len(await link.ask(Publish(f"{key}/b/", b"x", 1, 9))) == 2


async def test_publishers_wait_for_a_slow_subscriber_of_another_node(nodes: Nodes) -> None:
    await nodes.on_b.ask(Subscribe(1, ((f"{nodes.key}/a/", 0),)))
    [slow] = nodes.b.clients
    publisher = await Link.connect(nodes.a)
    payload = bytes(60000)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(publisher.ask, *(Publish(f"{nodes.key}/a/", payload) for _ in range(200)))
        await slow.wait_closed()
    await anyio.aclose_forcefully(publisher.stream)
