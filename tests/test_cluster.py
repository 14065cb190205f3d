"""The client with a cluster of two development brokers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from anyio.lowlevel import checkpoint

from emitter_anyio import (
    ConnectOptions,
    Emitter,
    Gap,
    HistoryIncompleteError,
    Member,
    PresenceFeed,
    StoredMessage,
    connect,
)
from emitter_anyio.testing import Broker
from tests.support.connections import connect_reconnecting, while_disconnected

Pair = tuple[Broker, Broker]


@pytest.fixture
async def nodes(anyio_backend: object) -> AsyncIterator[Pair]:
    """Two nodes that wait only 10 ms for each other when they answer a presence request."""
    async with Broker(patience=0.01) as one, Broker(cluster=one, patience=0.01) as other:
        yield one, other


@pytest.fixture
def key(nodes: Pair) -> str:
    return nodes[0].keygen("#/", "rwlsp")


async def store(nodes: Pair, count: int, *, per_second: int, size: int = 0) -> list[str]:
    """Store messages on both nodes in turn, ``per_second`` messages per second of broker time."""
    texts = [f"{number}".ljust(size, ".") for number in range(count)]
    for number, text in enumerate(texts):
        if number and number % per_second == 0:
            nodes[0].advance(1)
        await nodes[number % 2].publish("a/", text, ttl=60000)
    return texts


async def read_past_errors(
    stored: AsyncIterator[StoredMessage],
) -> tuple[list[StoredMessage], list[HistoryIncompleteError]]:
    found: list[StoredMessage] = []
    errors: list[HistoryIncompleteError] = []
    while True:
        try:
            async for message in stored:
                found.append(message)  # noqa: PERF401 - keeps the messages before an error
        except HistoryIncompleteError as error:
            errors.append(error)
        else:
            return found, errors


# History


@pytest.mark.parametrize("count", [400, 1000])
@pytest.mark.parametrize("node", [0, 1])
async def test_history_has_messages_of_both_nodes(
    nodes: Pair, key: str, node: int, count: int
) -> None:
    texts = await store(nodes, count, per_second=50)
    async with connect(nodes[node].url) as emitter:
        stored = [message async for message in emitter.history(key, "a/", 5000)]
        assert {message.as_string() for message in stored} == set(texts)
        assert len(stored) == count
        times = [message.time for message in stored]
        assert times == sorted(times)


@pytest.mark.parametrize("node", [0, 1])
async def test_history_reports_messages_that_exceed_one_response(
    nodes: Pair, key: str, node: int
) -> None:
    texts = await store(nodes, 400, per_second=400, size=400)
    nodes[0].advance(1)
    texts += await store(nodes, 20, per_second=2)
    async with connect(nodes[node].url) as emitter:
        stored, errors = await read_past_errors(emitter.history(key, "a/", 5000))
        found = {message.as_string() for message in stored}
        assert {text for text in texts if len(text) < 400} <= found <= set(texts)
        assert errors
        assert all("more messages within one second" in str(error) for error in errors)


@pytest.mark.parametrize("permissions", ["l", "lp"])
async def test_history_detects_cluster_by_presence_if_key_permits(
    nodes: Pair, permissions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emitter_anyio._features.history._SLOW_PRESENCE_SECONDS", 0.001)
    for number in range(400):
        await nodes[1].publish("a/", f"{number}".ljust(400, "."), ttl=60)
    statuses: list[object] = []
    async with connect(nodes[0].url) as emitter:
        emitter.on("presence", statuses.append)
        key = nodes[0].keygen("a/", permissions)
        found, errors = await read_past_errors(emitter.history(key, "a/", 400))
        assert len(found) == 400
        assert bool(errors) == ("p" in permissions), "another node might have more messages"
    assert statuses == []


async def test_history_without_reply_of_a_node_is_incomplete(
    nodes: Pair, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emitter_anyio._features.history._SLOW_PAGE_SECONDS", 0.001)
    await store(nodes, 10, per_second=2)
    async with connect(nodes[0].url) as emitter:
        nodes[1].pause()
        found, errors = await read_past_errors(emitter.history(key, "a/", order="newest"))
        assert [message.as_string() for message in found] == ["8", "6", "4", "2", "0"]
        (error,) = errors
        assert error.since < found[-1].time < found[0].time <= error.until
        nodes[1].resume()


# Resuming


async def test_resume_has_messages_of_both_nodes(nodes: Pair, key: str) -> None:
    async with connect_reconnecting(nodes[0].url) as emitter:
        async with emitter.subscribe(key, "a/", 0, resume=True, mark_gaps=True) as messages:
            async with while_disconnected(emitter, nodes[0]):
                texts = await store(nodes, 300, per_second=30)
            gap = await messages.receive()
            assert gap == Gap("a/", 300, True)
            received = [await messages.receive() for _ in range(300)]
            assert {m.as_string() for m in received if not isinstance(m, Gap)} == set(texts)


async def test_resume_without_reply_of_a_node_is_incomplete(
    nodes: Pair, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emitter_anyio._features.history._SLOW_PAGE_SECONDS", 0.001)
    async with connect_reconnecting(nodes[0].url) as emitter:
        async with emitter.subscribe(key, "a/", 0, resume=True, mark_gaps=True) as messages:
            async with while_disconnected(emitter, nodes[0]):
                await store(nodes, 10, per_second=2)
                nodes[1].pause()
            gap = await messages.receive()
            assert isinstance(gap, Gap)
            assert (gap.resumed, gap.complete) == (5, False)
            assert "might not have replied" in str(gap.reason)
            nodes[1].resume()


# Presence


async def wait_for_members(feed: PresenceFeed, *names: str) -> None:
    while sorted(member.username or "" for member in feed.members.values()) != sorted(names):
        await checkpoint()


async def test_members_on_another_node_are_kept(nodes: Pair, key: str) -> None:
    async with AsyncExitStack() as stack:

        async def connect_member(node: Broker, name: str) -> Emitter:
            member = await stack.enter_async_context(connect(node.url, username=name))
            await member.subscribe(key, "a/", 0)
            return member

        watcher = await stack.enter_async_context(connect(nodes[0].url))
        ann = await connect_member(nodes[0], "ann")
        feed = await stack.enter_async_context(watcher.watch_presence(key, "a/", refresh=0.001))
        bob = await connect_member(nodes[1], "bob")
        await wait_for_members(feed, "ann", "bob")
        async with watcher.stream("presence") as statuses:
            for _ in range(10):
                await statuses.receive()
        assert len(feed.members) == 2
        with nodes[0].lose("message"):
            await ann.unsubscribe(key, "a/")
        await wait_for_members(feed, "bob")
        await bob.unsubscribe(key, "a/")
        await wait_for_members(feed)


@pytest.mark.parametrize("names", [("ann", "bob"), ("", "")])
async def test_members_are_kept_when_another_node_stops(
    nodes: Pair, key: str, names: tuple[str, str]
) -> None:
    """
    Check that a false report does not remove a member.

    The broker reports that the other node's member left, but with the id of the remaining member.
    """
    async with AsyncExitStack() as stack:

        async def connect_member(node: Broker, name: str) -> Emitter:
            options: ConnectOptions = {"username": name} if name else {}
            return await stack.enter_async_context(connect(node.url, **options))

        # Each is the first client of its node.
        remaining, stopped = (
            await connect_member(nodes[0], names[0]),
            await connect_member(nodes[1], names[1]),
        )
        watcher = await connect_member(nodes[0], "")
        feed = await stack.enter_async_context(watcher.watch_presence(key, "a/", refresh=None))
        for member in remaining, stopped:
            await member.subscribe(key, "a/", 0)
        await wait_for_members(feed, *names)
        id = (await remaining.me()).id
        await nodes[1].stop()
        while (event := await feed.receive()).event != "unsubscribe":
            pass
        assert event.who == (Member(id, names[1] or None),)
        while id not in feed.members:
            await checkpoint()
        assert len(feed.members) == 2, "the member of the stopped node is not reported as gone"


async def test_members_of_previous_connection_are_not_confirmed(nodes: Pair, key: str) -> None:
    async with (
        connect_reconnecting(nodes[0].url) as watcher,
        connect(nodes[0].url, username="ann") as ann,
        connect(nodes[1].url, username="bob") as bob,
        watcher.watch_presence(key, "a/", refresh=0.001) as feed,
    ):
        await ann.subscribe(key, "a/", 0)
        await bob.subscribe(key, "a/", 0)
        await wait_for_members(feed, "ann", "bob")
        (client,) = [each for each in nodes[0].clients if each.username != "ann"]
        async with watcher.stream("connect") as connected:
            await nodes[0].drop(client)
            await connected.receive()

        def confirmed() -> set[str | None]:
            return {member.username for member in feed.members.values() if member.confirmed}

        while confirmed() != {"ann"}:
            await checkpoint()
        (away,) = [member for member in feed.members.values() if member.username == "bob"]
        assert away == Member(away.id, "bob", confirmed=False)
        await bob.unsubscribe(key, "a/")
        await wait_for_members(feed, "ann")
