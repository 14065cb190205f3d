"""What each feature does with clients on different nodes, and after a failover."""

from __future__ import annotations

import itertools
from contextlib import AsyncExitStack

import anyio
import pytest

from emitter_anyio import (
    ConnectionLostError,
    Emitter,
    EmitterMessage,
    EventStream,
    Gap,
    PresenceFeed,
    UnauthorizedError,
    connect,
)

from .driver import Cluster, read_everything
from .traffic import connect_in_turn

pytestmark = pytest.mark.timeout(120)

COUNT = 60
PROBE = "probe"
"""The payload that makes sure that all nodes know a subscription."""


@pytest.fixture
async def stored(clients: list[Emitter], key: str, unique: str) -> list[str]:
    """Messages that the nodes store in turn."""
    return await store(clients, key, unique)


async def store(clients: list[Emitter], key: str, channel: str) -> list[str]:
    texts = [str(number) for number in range(COUNT)]
    for text, publisher in zip(texts, itertools.cycle(clients), strict=False):
        await publisher.publish(key, channel, text, ttl=3600, qos=1)
    return texts


async def become_known(
    clients: list[Emitter], key: str, channel: str, stream: EventStream[EmitterMessage]
) -> None:
    """Wait until all nodes forward messages to a stream."""
    for number, publisher in enumerate(clients):
        text = ""
        while text != f"{PROBE} {number}":
            with anyio.move_on_after(0.2):
                await publisher.publish(key, channel, f"{PROBE} {number}", qos=1)
                text = (await stream.receive()).as_string()


async def receive(stream: EventStream[EmitterMessage], count: int) -> list[str]:
    """Receive messages, apart from those of :func:`become_known`."""
    found: list[str] = []
    while len(found) < count:
        if not (text := (await stream.receive()).as_string()).startswith(PROBE):
            found.append(text)
    return found


# Stored messages


async def test_history_on_each_node_has_messages_of_all(
    clients: list[Emitter], key: str, unique: str, stored: list[str]
) -> None:
    for client in clients:
        found, missing = await read_everything(client, key, unique)
        assert sorted(found, key=int) == stored
        assert missing == []


async def test_replay_on_each_node_has_messages_of_all(
    clients: list[Emitter], key: str, unique: str, stored: list[str]
) -> None:
    for client in clients:
        async with client.subscribe(key, unique, COUNT) as messages:
            assert sorted(await receive(messages, COUNT), key=int) == stored


async def test_consumer_continues_on_another_node(
    clients: list[Emitter], key: str, unique: str, stored: list[str]
) -> None:
    found: set[str] = set()
    cursor: str | None = None
    for client, goal in ((clients[0], COUNT // 2), (clients[-1], COUNT)):
        async with client.consume(key, unique, after=cursor) as log:
            while len(found) < goal:
                found.add((await anext(log)).as_string())
            cursor = log.cursor
    assert found == set(stored)


async def test_consumer_gets_new_messages_of_all_nodes(
    clients: list[Emitter], key: str, unique: str
) -> None:
    async with clients[0].consume(key, unique) as log:
        texts = await store(clients, key, unique)
        found: set[str] = set()
        while len(found) < COUNT:
            found.add((await anext(log)).as_string())
    assert found == set(texts)


# Failover


async def test_stream_resumes_on_the_next_node(cluster: Cluster, key: str, unique: str) -> None:
    numbers = itertools.count()
    accepted: set[str] = set()
    received: set[str] = set()
    gaps: list[Gap] = []

    async def publish() -> None:
        text = str(next(numbers))
        await publisher.publish(key, unique, text, ttl=3600, qos=1)
        accepted.add(text)

    async def receive_until(goal: str) -> None:
        while goal not in received:
            item = await messages.receive()
            if isinstance(item, Gap):
                gaps.append(item)
            else:
                received.add(item.as_string())

    async with (
        connect(cluster.urls[1]) as publisher,
        connect_in_turn(cluster.servers_from(0)) as client,
        client.subscribe(key, unique, 0, resume=True, mark_gaps=True) as messages,
    ):
        while not received:
            await publish()
            with anyio.move_on_after(0.2):
                await receive_until(max(accepted, key=int))
        async with client.stream("connect") as connected:
            await cluster.do("stop", 0)
            for _ in range(COUNT):
                await publish()
            await connected.receive()
        assert client.connection is not None
        assert client.connection.server == cluster.urls[1]
        await publish()
        await receive_until(max(accepted, key=int))
        first = min(received, key=int)
    assert received >= {text for text in accepted if int(text) >= int(first)}
    assert len(gaps) == 1


async def test_publishes_after_a_failover_reach_clients_of_the_next_node(
    cluster: Cluster, key: str, unique: str
) -> None:
    async with (
        connect(cluster.urls[1]) as other,
        connect_in_turn(cluster.servers_from(0)) as client,
        other.subscribe(key, unique, 0) as messages,
    ):
        async with client.stream("connect") as connected:
            await cluster.do("stop", 0)
            await connected.receive()
        await client.publish(key, unique, "after", qos=1)
        assert await receive(messages, 1) == ["after"]


# Presence


async def wait_for_members(feed: PresenceFeed, *names: str) -> None:
    while sorted(member.username or "" for member in feed.members.values()) != sorted(names):
        await anyio.sleep(0.01)


async def join(
    member: Emitter, key: str, channel: str, feed: PresenceFeed, names: list[str]
) -> None:
    """Subscribe until the feed has these members, because a node might not know the feed yet."""
    while True:
        await member.subscribe(key, channel, 0)
        with anyio.move_on_after(1):
            return await wait_for_members(feed, *names)
        await member.unsubscribe(key, channel)


async def test_members_of_all_nodes_come_and_leave(
    cluster: Cluster, clients: list[Emitter], key: str, unique: str
) -> None:
    async with AsyncExitStack() as stack:
        feed = await stack.enter_async_context(clients[0].watch_presence(key, unique))
        members: list[Emitter] = []
        for number, url in enumerate(cluster.urls):
            member = await stack.enter_async_context(connect(url, username=str(number)))
            members.append(member)
            await join(member, key, unique, feed, [str(each) for each in range(len(members))])
        for number, member in enumerate(members):
            await member.unsubscribe(key, unique)
            await wait_for_members(feed, *map(str, range(number + 1, len(members))))


async def test_member_of_a_dead_node_is_not_taken_for_another(
    cluster: Cluster, key: str, unique: str
) -> None:
    """The id in the event of a node that has died is wrong, and can be that of another member."""
    async with (
        connect(cluster.urls[0], username="alive") as alive,
        connect(cluster.urls[0]) as watcher,
        watcher.watch_presence(key, unique, refresh=1) as feed,
    ):
        await alive.subscribe(key, unique, 0)
        with pytest.raises(ConnectionLostError):
            async with connect(cluster.urls[1], username="dead", reconnect=None) as dead:
                await join(dead, key, unique, feed, ["alive", "dead"])
                await cluster.do("stop", 1)
                await anyio.sleep_forever()
        while (await feed.receive()).event != "unsubscribe":
            pass
        while "alive" not in {member.username for member in feed.members.values()}:
            await anyio.sleep(0.01)
        id = (await alive.me()).id
        assert feed.members[id].username == "alive"


# Groups


@pytest.mark.parametrize("node", [0, -1])
async def test_group_on_one_node_gets_each_job_once(
    cluster: Cluster, clients: list[Emitter], key: str, unique: str, node: int
) -> None:
    group_key = await cluster.keygen(clients[0], f"$share/g/{unique}", "r")
    found: list[str] = []

    async def work(jobs: EventStream[EmitterMessage]) -> None:
        async for job in jobs:
            found.append(job.as_string())  # noqa: PERF401 - the test reads the list while it grows

    async with AsyncExitStack() as stack:
        queues: list[EventStream[EmitterMessage]] = []
        for _ in range(3):
            member = await stack.enter_async_context(connect(cluster.urls[node]))
            shared = member.subscribe(group_key, unique, group="g")
            queues.append(await stack.enter_async_context(shared))
        tasks = await stack.enter_async_context(anyio.create_task_group())
        for jobs in queues:
            tasks.start_soon(work, jobs)
        # Any member can get a probe, so let a node be known by jobs that do not count.
        for number, publisher in enumerate(clients):
            while f"first {number}" not in found:
                await publisher.publish(key, unique, f"first {number}", qos=1)
                await anyio.sleep(0.05)
        texts = [str(number) for number in range(COUNT)]
        for text, publisher in zip(texts, itertools.cycle(clients), strict=False):
            await publisher.publish(key, unique, text, qos=1)
        while not set(texts) <= set(found):
            await anyio.sleep(0.01)
        tasks.cancel_scope.cancel()
    assert sorted((text for text in found if text.isdecimal()), key=int) == texts


# Keys


async def test_key_of_one_node_is_valid_on_all(
    clients: list[Emitter], key: str, unique: str
) -> None:
    async with clients[0].subscribe(key, unique, 0) as messages:
        await become_known(clients, key, unique, messages)
        for number, publisher in enumerate(clients):
            await publisher.publish(key, unique, str(number), qos=1)
        assert sorted(await receive(messages, len(clients))) == [
            str(number) for number in range(len(clients))
        ]


async def wait_refused(clients: list[Emitter], key: str, channel: str, refused: bool) -> None:
    for client in clients:
        while True:
            try:
                await client.publish(key, channel, "", qos=1)
                now_refused = False
            except UnauthorizedError:
                now_refused = True
            if now_refused == refused:
                break
            await anyio.sleep(0.01)


@pytest.mark.parametrize("cut", [False, True])
async def test_ban_reaches_all_nodes(
    cluster: Cluster, clients: list[Emitter], unique: str, cut: bool
) -> None:
    target = await cluster.keygen(clients[0], unique, "w")
    await wait_refused(clients, target, unique, False)
    if cut:
        await cluster.do("cut", 0)
    await clients[0].keyban(cluster.secret, target)
    await wait_refused(clients[:1], target, unique, True)
    if cut:
        await wait_refused(clients[1:], target, unique, False)
        await cluster.do("heal", 0)
    await wait_refused(clients, target, unique, True)
    await clients[-1].keyban(cluster.secret, target, banned=False)
    await wait_refused(clients, target, unique, False)
