"""Many members join and leave while events are lost; ``.members`` is correct in the end."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from typing import Any

import anyio
import pytest

from emitter_anyio import (
    Emitter,
    PresenceEvent,
    PresenceFeed,
    PresenceStatus,
    RequestError,
    RequestTimeoutError,
    SlowConsumerError,
    connect,
)
from emitter_anyio.testing import Broker
from tests.support import packets
from tests.support.connections import connect_once
from tests.support.peer import PUBLISH, Peer, memory_peer

ROOM = "room/"
PLACES = [ROOM, *(f"{ROOM}{place}/" for place in ("a", "a/x", "a/x/y", "b", "c", "d", "+/z"))]

REFRESH_SECONDS = 0.01


@pytest.fixture
async def watcher(broker: Broker) -> AsyncIterator[Emitter]:
    async with connect(broker.url) as watcher:
        yield watcher


@pytest.fixture
def key(broker: Broker) -> str:
    return broker.keygen("#/", "rwp")


def reaches(wanted: str, channel: str) -> bool:
    """A second implementation of Emitter's rule: a subscription covers its subchannels."""
    levels = wanted.rstrip("/").split("/")
    given = channel.rstrip("/").split("/")[: len(levels)]
    return len(given) == len(levels) and all(
        level in ("+", there) for level, there in zip(levels, given, strict=True)
    )


def expected_members(broker: Broker, watched: str) -> dict[str, str]:
    """
    Return the ids and usernames of the members, from the broker's tables.

    The members are the clients that a message to the channel would reach, and the subscribers of
    its subchannels.
    """
    return {
        client.id: client.username
        for client in broker.clients
        if any(reaches(s, watched) or reaches(watched, s) for s in client.subscriptions)
    }


def members_of(feed: PresenceFeed) -> dict[str, str]:
    return {id: member.username or "" for id, member in feed.members.items()}


class StatusCounter:
    """Counts the statuses that the watcher has requested, and waits for more."""

    def __init__(self, watcher: Emitter) -> None:
        self.count = 0
        self._received = anyio.Event()
        watcher.on("presence", self._note)

    def _note(self, event: PresenceEvent) -> None:
        if isinstance(event, PresenceStatus):
            self.count += 1
            self._received.set()

    async def wait_for(self, count: int = 1) -> None:
        for _ in range(count):
            self._received = anyio.Event()
            await self._received.wait()


async def wait_until_correct(
    broker: Broker, statuses: StatusCounter, **feeds: PresenceFeed
) -> None:
    """
    Wait until the members of each feed are correct, and stay correct.

    They can be correct for a while by accident: a member whose move between two channels was lost
    is still listed for the first one, until a status of each channel corrects that.
    """
    watched = {feed: name.replace("_", "/") for name, feed in feeds.items()}
    wanted, steady = 10 * len(feeds), 0
    # Far more than a busy machine needs: only a feed that never becomes correct times out.
    with anyio.move_on_after(120):
        while steady < wanted:
            await statuses.wait_for()
            correct = all(
                members_of(f) == expected_members(broker, channel) for f, channel in watched.items()
            )
            steady = steady + 1 if correct else 0
    assert steady == wanted, {channel: members_of(feed) for feed, channel in watched.items()}


async def move(member: Emitter, key: str, rng: random.Random, moves: int) -> None:
    """Subscribe to some channels and unsubscribe from others, at random."""
    for _ in range(moves):
        place = rng.choice(PLACES)
        if rng.random() < 0.3:
            await member.subscribe(key, place, 0)
        else:
            await member.unsubscribe(key, place)


@asynccontextmanager
async def crowd(
    broker: Broker, statuses: StatusCounter, key: str, seed: int, count: int = 50, phases: int = 6
) -> AsyncGenerator[list[Emitter]]:
    """
    Let members join and leave at random; in every other phase, the events are lost.

    First, all members join until statuses have listed them, so that the feed does not take them
    for members on another node. At the end, a fifth of them disconnect.
    """
    async with AsyncExitStack() as stack:
        members = [
            await stack.enter_async_context(connect_once(broker.url, username=f"m{number}"))
            for number in range(count)
        ]
        for member in members:
            await member.subscribe(key, ROOM)
        await statuses.wait_for(20)
        for phase in range(phases):
            with broker.lose("message") if phase % 2 else nullcontext():
                async with anyio.create_task_group() as tasks:
                    for number, member in enumerate(members):
                        rng = random.Random(f"{seed} {phase} {number}")
                        tasks.start_soon(move, member, key, rng, 4)
        with broker.lose("message"):
            for number in range(0, count, 5):
                (connection,) = [c for c in broker.clients if c.username == f"m{number}"]
                await members[number].disconnect()
                await connection.wait_closed()
        yield members


@pytest.mark.without_debug
@pytest.mark.parametrize("seed", range(2))
async def test_members_are_correct_in_the_end(
    broker: Broker, watcher: Emitter, key: str, seed: int
) -> None:
    statuses = StatusCounter(watcher)
    async with watcher.watch_presence(key, ROOM, buffer=100000, refresh=REFRESH_SECONDS) as feed:
        async with crowd(broker, statuses, key, seed):
            assert len(expected_members(broker, ROOM)) > 20
            await wait_until_correct(broker, statuses, room_=feed)
        await wait_until_correct(broker, statuses, room_=feed)
        assert members_of(feed) == {}


@pytest.mark.without_debug
async def test_feeds_on_overlapping_channels_are_correct(
    broker: Broker, watcher: Emitter, key: str
) -> None:
    statuses = StatusCounter(watcher)
    async with (
        watcher.watch_presence(key, ROOM, buffer=100000, refresh=REFRESH_SECONDS) as room,
        watcher.watch_presence(
            key, ROOM, buffer=1, overflow="drop_oldest", refresh=REFRESH_SECONDS
        ) as small_buffer,
        watcher.watch_presence(key, f"{ROOM}a/", buffer=100000, refresh=REFRESH_SECONDS) as a,
        watcher.watch_presence(key, f"{ROOM}d/", buffer=100000, refresh=REFRESH_SECONDS) as d,
        crowd(broker, statuses, key, 7, count=25),
    ):
        numbers = [len(expected_members(broker, each)) for each in (ROOM, f"{ROOM}a/", f"{ROOM}d/")]
        assert numbers == sorted(set(numbers), reverse=True), (
            "the feeds should have different members"
        )
        await wait_until_correct(broker, statuses, room_=room, room_a_=a, room_d_=d)
        assert members_of(small_buffer) == members_of(room)


@pytest.mark.without_debug
@pytest.mark.parametrize("overflow", ["raise", "drop_oldest", "drop_newest"])
async def test_members_are_correct_without_a_reader(
    broker: Broker, watcher: Emitter, key: str, overflow: Any
) -> None:
    """Neither feed is read; the buffer of one overflows."""
    statuses = StatusCounter(watcher)
    async with (
        watcher.watch_presence(key, ROOM, buffer=100000, refresh=REFRESH_SECONDS) as lagging,
        watcher.watch_presence(
            key, ROOM, buffer=2, overflow=overflow, refresh=REFRESH_SECONDS
        ) as full,
        crowd(broker, statuses, key, 11, count=20),
    ):
        await wait_until_correct(broker, statuses, room_=lagging)
        assert members_of(full) == members_of(lagging)
        assert full.statistics().current_buffer_used == 3, (
            "two events and the first status, which does not use the buffer"
        )
        assert full.statistics().dropped > 10
        assert lagging.statistics().dropped == 0
        assert (await lagging.receive()).event == "status"
        if overflow == "raise":
            with pytest.raises(SlowConsumerError, match="watch_presence"):
                while True:
                    full.receive_nowait()


@pytest.mark.without_debug
async def test_members_are_correct_after_each_phase_with_lost_events(
    broker: Broker, watcher: Emitter, key: str
) -> None:
    statuses = StatusCounter(watcher)
    async with watcher.watch_presence(key, ROOM, buffer=100000, refresh=REFRESH_SECONDS) as feed:
        async with crowd(broker, statuses, key, 3, count=10, phases=2) as members:
            staying = [member for member in members if member.state == "connected"]
            for phase in range(3):
                with broker.lose("message"):
                    for number, member in enumerate(staying):
                        await move(member, key, random.Random(f"{phase} {number}"), 3)
                await wait_until_correct(broker, statuses, room_=feed)


# Single inconsistencies


@pytest.fixture
async def ann(broker: Broker) -> AsyncIterator[Emitter]:
    async with connect(broker.url, username="ann") as ann:
        yield ann


async def test_member_still_reached_through_a_parent_is_kept(
    broker: Broker, watcher: Emitter, ann: Emitter, key: str
) -> None:
    """Ann subscribed to a parent before the feed started; her unsubscribe triggers a status."""
    await ann.subscribe(key, "+/")
    await ann.subscribe(key, ROOM)
    async with watcher.watch_presence(key, ROOM, refresh=None) as feed:
        assert list(members_of(feed).values()) == ["ann"]
        await ann.unsubscribe(key, ROOM)
        assert [(await feed.receive()).event for _ in range(3)] == [
            "status",
            "unsubscribe",
            "status",
        ]
        assert list(members_of(feed).values()) == ["ann"]


async def test_member_whose_leaving_was_lost_is_removed_by_the_next_status(
    broker: Broker, watcher: Emitter, ann: Emitter, key: str
) -> None:
    await ann.subscribe(key, ROOM)
    async with connect(broker.url, username="bob") as bob:
        await bob.subscribe(key, ROOM)
        async with watcher.watch_presence(key, ROOM, refresh=None) as feed:
            assert sorted(members_of(feed).values()) == ["ann", "bob"]
            with broker.lose("message"):
                await ann.unsubscribe(key, ROOM)
            assert len(members_of(feed)) == 2, "no event reported it"
            await bob.unsubscribe(key, ROOM)
            assert [(await feed.receive()).event for _ in range(3)] == [
                "status",
                "unsubscribe",
                "status",
            ]
            assert members_of(feed) == {}


@pytest.mark.parametrize("place", ["", "a/"])
async def test_lost_events_are_corrected_by_the_refresh(
    broker: Broker, watcher: Emitter, ann: Emitter, key: str, place: str
) -> None:
    channel = ROOM + place
    statuses = StatusCounter(watcher)
    async with watcher.watch_presence(key, ROOM, refresh=REFRESH_SECONDS) as feed:
        await ann.subscribe(key, channel)
        await ann.unsubscribe(key, channel)
        assert [(await feed.receive()).event for _ in range(3)] == [
            "status",
            "subscribe",
            "unsubscribe",
        ]
        for method, there in ((ann.subscribe, ["ann"]), (ann.unsubscribe, [])):
            with broker.lose("message"):
                await method(key, channel)
            status = await feed.receive()
            assert (status.event, status.channel) == ("status", channel)
            assert [member.username for member in status.who] == there
            assert list(members_of(feed).values()) == there
        await statuses.wait_for(5)
        with pytest.raises(anyio.WouldBlock):
            feed.receive_nowait()


async def test_key_for_the_room_only_is_enough(
    broker: Broker, watcher: Emitter, ann: Emitter, key: str
) -> None:
    """Statuses of subchannels are refused, but their events arrive."""
    statuses = StatusCounter(watcher)
    errors: list[Exception] = []
    watcher.on("error", errors.append)
    strict = broker.keygen(ROOM, "p")
    async with watcher.watch_presence(strict, ROOM, refresh=REFRESH_SECONDS) as feed:
        await ann.subscribe(key, f"{ROOM}a/")
        await statuses.wait_for(5)
        assert list(members_of(feed).values()) == ["ann"]
        await ann.unsubscribe(key, f"{ROOM}a/")
        await statuses.wait_for(5)
        assert members_of(feed) == {}
    assert errors == []


@pytest.mark.virtual_time
async def test_requested_statuses_do_not_delay_the_refresh() -> None:
    """An unknown member leaves every 10 s; all channels are refreshed every 60 s."""
    requested: list[tuple[int, str]] = []

    async def send_unknown_leaves(peer: Peer) -> None:
        for number in itertools.count():
            await anyio.sleep(10)
            left = {"event": "unsubscribe", "channel": ROOM, "who": {"id": f"x{number}"}}
            await send(peer, {"time": 1, **left})

    async def play(peer: Peer) -> None:
        await peer.accept()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send_unknown_leaves, peer)
            while packet := await peer.packet():
                if packet.kind == PUBLISH:
                    wanted = json.loads(packet.payload)["channel"]
                    requested.append((round(anyio.current_time()), wanted))
                    answer = {"status": 200, "event": "status", "channel": wanted, "who": []}
                    await send(peer, {"req": packet.packet_id, "time": 1, **answer})
                    if len(requested) == 1:
                        joined = {"event": "subscribe", "channel": f"{ROOM}a/", "who": {"id": "y"}}
                        await send(peer, {"time": 1, **joined})
                await peer.answer(packet)
            tasks.cancel_scope.cancel()

    async def send(peer: Peer, reply: dict[str, Any]) -> None:
        await peer.send(packets.publish("emitter/presence/", json.dumps(reply).encode()))

    async with memory_peer(play) as connectable, connect(connectable=connectable) as watcher:
        async with watcher.watch_presence("K" * 32, ROOM) as feed:
            while "y" not in feed.members:
                await feed.receive()
            await anyio.sleep(245)
            assert members_of(feed) == {"y": ""}, "the member might be on another node"
    start = requested[0][0]
    below = [time - start for time, channel in requested if channel != ROOM]
    assert below == [60, 120, 180, 240]
    assert len(requested) > 24, "statuses were also requested after the events"


# Statuses that are too large


async def test_status_too_large_raises_with_the_reason(
    broker: Broker, watcher: Emitter, key: str
) -> None:
    async with AsyncExitStack() as stack:
        for number in range(2):
            member = connect(broker.url, username=f"{number}" * 40000)
            await (await stack.enter_async_context(member)).subscribe(key, ROOM)
        with pytest.raises(RequestError, match="too large") as caught:
            await watcher.presence(key, ROOM)
        assert (caught.value.status, caught.value.operation) == (None, "presence")
        assert caught.value.channel == ROOM
        with pytest.raises(RequestError, match="too large"):
            async with watcher.watch_presence(key, ROOM):
                pass


async def test_room_that_grows_too_large_ends_the_feed_with_the_reason(
    broker: Broker, watcher: Emitter, key: str
) -> None:
    async with AsyncExitStack() as stack:
        feed = await stack.enter_async_context(
            watcher.watch_presence(key, ROOM, refresh=REFRESH_SECONDS)
        )
        for number in range(2):
            member = connect(broker.url, username=f"{number}" * 40000)
            await (await stack.enter_async_context(member)).subscribe(key, ROOM)
        events = []
        with pytest.raises(RequestError, match="too large"):
            events += [event async for event in feed]
        with pytest.raises(RequestError, match="too large"):
            await feed.receive()
        assert watcher.state == "connected"


async def test_status_that_times_out_is_reported_and_requested_again(
    broker: Broker, watcher: Emitter, ann: Emitter, key: str
) -> None:
    statuses = StatusCounter(watcher)
    errors: list[Exception] = []
    reported = anyio.Event()

    @watcher.on("error")
    def report(error: Exception) -> None:
        errors.append(error)
        reported.set()

    async with connect(broker.url, request_timeout=0.05) as client:
        client_statuses = StatusCounter(client)
        client.on("error", report)
        # timeout=None: only the replies to the refresh may time out.
        async with client.watch_presence(key, ROOM, refresh=REFRESH_SECONDS, timeout=None) as feed:
            with broker.hold("reply", "puback"):
                await reported.wait()
            await ann.subscribe(key, ROOM)
            assert [(await feed.receive()).event for _ in range(2)] == ["status", "subscribe"]
            await client_statuses.wait_for(2)
            with broker.lose("message"):
                await ann.unsubscribe(key, ROOM)
            assert (await feed.receive()).event == "status"
            assert members_of(feed) == {}
    assert all(isinstance(error, RequestTimeoutError) for error in errors)
    assert statuses.count == 0
