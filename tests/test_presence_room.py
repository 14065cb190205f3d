"""A room of many who come and go, while events are lost: ``.members`` is right at the end."""

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

OFTEN = 0.01


@pytest.fixture
async def watcher(broker: Broker) -> AsyncIterator[Emitter]:
    async with connect(broker.url) as watcher:
        yield watcher


@pytest.fixture
def key(broker: Broker) -> str:
    return broker.keygen("#/", "rwp")


def reaches(wanted: str, channel: str) -> bool:
    """Emitter's rule, written once more: a subscription reaches its channel and all below it."""
    levels = wanted.rstrip("/").split("/")
    given = channel.rstrip("/").split("/")[: len(levels)]
    return len(given) == len(levels) and all(
        level in ("+", there) for level, there in zip(levels, given, strict=True)
    )


def truth(broker: Broker, watched: str) -> dict[str, str]:
    """
    Who is there, by the broker's own books, and under which name.

    It is whom a message to the channel would reach, and who is subscribed below it.
    """
    return {
        client.id: client.username
        for client in broker.clients
        if any(reaches(s, watched) or reaches(watched, s) for s in client.subscriptions)
    }


def told(feed: PresenceFeed) -> dict[str, str]:
    return {id: member.username or "" for id, member in feed.members.items()}


class Statuses:
    """Tells of each status that the watcher has asked for."""

    def __init__(self, watcher: Emitter) -> None:
        self.count = 0
        self._another = anyio.Event()
        watcher.on("presence", self._note)

    def _note(self, event: PresenceEvent) -> None:
        if isinstance(event, PresenceStatus):
            self.count += 1
            self._another.set()

    async def more(self, count: int = 1) -> None:
        for _ in range(count):
            self._another = anyio.Event()
            await self._another.wait()


async def right(broker: Broker, statuses: Statuses, **feeds: PresenceFeed) -> None:
    """
    Wait until the members of each feed are right, and stay so.

    They may be right too early: who went unseen from one place to another is still there by what is
    known of the first, until a status tells that he is not, and one of the other that he is.
    """
    watched = {feed: name.replace("_", "/") for name, feed in feeds.items()}
    wanted, steady = 10 * len(feeds), 0
    # Far above what it takes on a busy machine: it ends only a feed that never becomes right.
    with anyio.move_on_after(120):
        while steady < wanted:
            await statuses.more()
            right = all(told(f) == truth(broker, channel) for f, channel in watched.items())
            steady = steady + 1 if right else 0
    assert steady == wanted, {channel: told(feed) for feed, channel in watched.items()}


async def move(member: Emitter, key: str, dice: random.Random, moves: int) -> None:
    """Come to some places and leave others, as the dice say."""
    for _ in range(moves):
        place = dice.choice(PLACES)
        if dice.random() < 0.3:
            await member.subscribe(key, place, 0)
        else:
            await member.unsubscribe(key, place)


@asynccontextmanager
async def crowd(
    broker: Broker, statuses: Statuses, key: str, seed: int, count: int = 50, phases: int = 6
) -> AsyncGenerator[list[Emitter]]:
    """
    Let them come and go; every other time, what would be told of it is lost.

    At first all are there until statuses have named them, so that they are not taken for those of
    another node. In the end a fifth of them have left altogether.
    """
    async with AsyncExitStack() as stack:
        members = [
            await stack.enter_async_context(connect_once(broker.url, username=f"m{number}"))
            for number in range(count)
        ]
        for member in members:
            await member.subscribe(key, ROOM)
        await statuses.more(20)
        for phase in range(phases):
            with broker.lose("message") if phase % 2 else nullcontext():
                async with anyio.create_task_group() as tasks:
                    for number, member in enumerate(members):
                        dice = random.Random(f"{seed} {phase} {number}")
                        tasks.start_soon(move, member, key, dice, 4)
        with broker.lose("message"):
            for number in range(0, count, 5):
                (link,) = [c for c in broker.clients if c.username == f"m{number}"]
                await members[number].disconnect()
                await link.wait_closed()
        yield members


@pytest.mark.without_debug
@pytest.mark.parametrize("seed", range(2))
async def test_the_members_are_right_in_the_end(
    broker: Broker, watcher: Emitter, key: str, seed: int
) -> None:
    statuses = Statuses(watcher)
    async with watcher.watch_presence(key, ROOM, buffer=100000, refresh=OFTEN) as feed:
        async with crowd(broker, statuses, key, seed):
            assert len(truth(broker, ROOM)) > 20
            await right(broker, statuses, room_=feed)
        await right(broker, statuses, room_=feed)
        assert told(feed) == {}


@pytest.mark.without_debug
async def test_several_feeds_on_overlapping_channels_are_right_at_once(
    broker: Broker, watcher: Emitter, key: str
) -> None:
    statuses = Statuses(watcher)
    async with (
        watcher.watch_presence(key, ROOM, buffer=100000, refresh=OFTEN) as room,
        watcher.watch_presence(key, ROOM, buffer=1, overflow="drop_oldest", refresh=OFTEN) as too,
        watcher.watch_presence(key, f"{ROOM}a/", buffer=100000, refresh=OFTEN) as a,
        watcher.watch_presence(key, f"{ROOM}d/", buffer=100000, refresh=OFTEN) as d,
        crowd(broker, statuses, key, 7, count=25),
    ):
        numbers = [len(truth(broker, each)) for each in (ROOM, f"{ROOM}a/", f"{ROOM}d/")]
        assert numbers == sorted(set(numbers), reverse=True), "each has its own"
        await right(broker, statuses, room_=room, room_a_=a, room_d_=d)
        assert told(too) == told(room)


@pytest.mark.without_debug
@pytest.mark.parametrize("overflow", ["raise", "drop_oldest", "drop_newest"])
async def test_the_members_are_right_whether_or_not_anybody_reads(
    broker: Broker, watcher: Emitter, key: str, overflow: Any
) -> None:
    """One reader lags behind, one's buffer overflows, and neither has read anything."""
    statuses = Statuses(watcher)
    async with (
        watcher.watch_presence(key, ROOM, buffer=100000, refresh=OFTEN) as lagging,
        watcher.watch_presence(key, ROOM, buffer=2, overflow=overflow, refresh=OFTEN) as full,
        crowd(broker, statuses, key, 11, count=20),
    ):
        await right(broker, statuses, room_=lagging)
        assert told(full) == told(lagging)
        assert full.statistics().current_buffer_used == 3, "the first status is beside the buffer"
        assert full.statistics().dropped > 10
        assert lagging.statistics().dropped == 0
        assert (await lagging.receive()).event == "status"
        if overflow == "raise":
            with pytest.raises(SlowConsumerError, match="watch_presence"):
                while True:
                    full.receive_nowait()


@pytest.mark.without_debug
async def test_each_phase_of_losing_ends_right(broker: Broker, watcher: Emitter, key: str) -> None:
    statuses = Statuses(watcher)
    async with watcher.watch_presence(key, ROOM, buffer=100000, refresh=OFTEN) as feed:
        async with crowd(broker, statuses, key, 3, count=10, phases=2) as members:
            staying = [member for member in members if member.state == "connected"]
            for phase in range(3):
                with broker.lose("message"):
                    for number, member in enumerate(staying):
                        await move(member, key, random.Random(f"{phase} {number}"), 3)
                await right(broker, statuses, room_=feed)


# One doubt at a time


@pytest.fixture
async def ann(broker: Broker) -> AsyncIterator[Emitter]:
    async with connect(broker.url, username="ann") as ann:
        yield ann


async def test_who_is_left_in_another_channel_that_we_did_not_see_is_found_by_a_doubt(
    broker: Broker, watcher: Emitter, ann: Emitter, key: str
) -> None:
    """She was there before the feed, through a parent; her leaving of the room is a doubt."""
    await ann.subscribe(key, "+/")
    await ann.subscribe(key, ROOM)
    async with watcher.watch_presence(key, ROOM, refresh=None) as feed:
        assert list(told(feed).values()) == ["ann"]
        await ann.unsubscribe(key, ROOM)
        assert [(await feed.receive()).event for _ in range(3)] == [
            "status",
            "unsubscribe",
            "status",
        ]
        assert list(told(feed).values()) == ["ann"]


async def test_who_leaves_unseen_is_found_missing_with_the_next_doubt(
    broker: Broker, watcher: Emitter, ann: Emitter, key: str
) -> None:
    await ann.subscribe(key, ROOM)
    async with connect(broker.url, username="bob") as bob:
        await bob.subscribe(key, ROOM)
        async with watcher.watch_presence(key, ROOM, refresh=None) as feed:
            assert sorted(told(feed).values()) == ["ann", "bob"]
            with broker.lose("message"):
                await ann.unsubscribe(key, ROOM)
            assert len(told(feed)) == 2, "nothing has told of it"
            await bob.unsubscribe(key, ROOM)
            assert [(await feed.receive()).event for _ in range(3)] == [
                "status",
                "unsubscribe",
                "status",
            ]
            assert told(feed) == {}


@pytest.mark.parametrize("place", ["", "a/"])
async def test_who_comes_or_goes_unseen_is_found_by_the_refresh(
    broker: Broker, watcher: Emitter, ann: Emitter, key: str, place: str
) -> None:
    channel = ROOM + place
    statuses = Statuses(watcher)
    async with watcher.watch_presence(key, ROOM, refresh=OFTEN) as feed:
        await ann.subscribe(key, channel)
        await ann.unsubscribe(key, channel)
        assert [(await feed.receive()).event for _ in range(3)] == [
            "status",
            "subscribe",
            "unsubscribe",
        ]
        for verb, there in ((ann.subscribe, ["ann"]), (ann.unsubscribe, [])):
            with broker.lose("message"):
                await verb(key, channel)
            status = await feed.receive()
            assert (status.event, status.channel) == ("status", channel)
            assert [member.username for member in status.who] == there
            assert list(told(feed).values()) == there
        await statuses.more(5)
        with pytest.raises(anyio.WouldBlock):
            feed.receive_nowait()


async def test_a_key_for_the_room_alone_is_enough(
    broker: Broker, watcher: Emitter, ann: Emitter, key: str
) -> None:
    """The statuses of the channels below are refused; events tell of them all the same."""
    statuses = Statuses(watcher)
    errors: list[Exception] = []
    watcher.on("error", errors.append)
    strict = broker.keygen(ROOM, "p")
    async with watcher.watch_presence(strict, ROOM, refresh=OFTEN) as feed:
        await ann.subscribe(key, f"{ROOM}a/")
        await statuses.more(5)
        assert list(told(feed).values()) == ["ann"]
        await ann.unsubscribe(key, f"{ROOM}a/")
        await statuses.more(5)
        assert told(feed) == {}
    assert errors == []


@pytest.mark.virtual_time
async def test_doubts_do_not_put_off_the_refresh() -> None:
    """Every ten seconds somebody unknown leaves, and every sixty all the channels are looked at."""
    asked: list[tuple[int, str]] = []

    async def come_and_go(peer: Peer) -> None:
        for number in itertools.count():
            await anyio.sleep(10)
            left = {"event": "unsubscribe", "channel": ROOM, "who": {"id": f"x{number}"}}
            await tell(peer, {"time": 1, **left})

    async def play(peer: Peer) -> None:
        await peer.accept()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(come_and_go, peer)
            while packet := await peer.packet():
                if packet.kind == PUBLISH:
                    wanted = json.loads(packet.payload)["channel"]
                    asked.append((round(anyio.current_time()), wanted))
                    answer = {"status": 200, "event": "status", "channel": wanted, "who": []}
                    await tell(peer, {"req": packet.packet_id, "time": 1, **answer})
                    if len(asked) == 1:
                        came = {"event": "subscribe", "channel": f"{ROOM}a/", "who": {"id": "y"}}
                        await tell(peer, {"time": 1, **came})
                await peer.answer(packet)
            tasks.cancel_scope.cancel()

    async def tell(peer: Peer, what: dict[str, Any]) -> None:
        await peer.send(packets.publish("emitter/presence/", json.dumps(what).encode()))

    async with memory_peer(play) as connectable, connect(connectable=connectable) as watcher:
        async with watcher.watch_presence("K" * 32, ROOM) as feed:
            while "y" not in feed.members:
                await feed.receive()
            await anyio.sleep(245)
            assert told(feed) == {"y": ""}, "it may be on another node"
    start = asked[0][0]
    below = [time - start for time, channel in asked if channel != ROOM]
    assert below == [60, 120, 180, 240]
    assert len(asked) > 24, "and the doubts have been asked for, too"


# A status that is too large


async def test_a_status_too_large_is_an_error_that_says_so(
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


async def test_a_room_that_becomes_too_large_ends_the_feed_with_an_error_that_says_so(
    broker: Broker, watcher: Emitter, key: str
) -> None:
    async with AsyncExitStack() as stack:
        feed = await stack.enter_async_context(watcher.watch_presence(key, ROOM, refresh=OFTEN))
        for number in range(2):
            member = connect(broker.url, username=f"{number}" * 40000)
            await (await stack.enter_async_context(member)).subscribe(key, ROOM)
        events = []
        with pytest.raises(RequestError, match="too large"):
            events += [event async for event in feed]
        with pytest.raises(RequestError, match="too large"):
            await feed.receive()
        assert watcher.state == "connected"


async def test_an_answer_that_does_not_come_in_time_is_reported_and_asked_for_again(
    broker: Broker, watcher: Emitter, ann: Emitter, key: str
) -> None:
    statuses = Statuses(watcher)
    errors: list[Exception] = []
    reported = anyio.Event()

    @watcher.on("error")
    def report(error: Exception) -> None:
        errors.append(error)
        reported.set()

    async with connect(broker.url, request_timeout=0.05) as hasty:
        named = Statuses(hasty)
        hasty.on("error", report)
        # No answer that is awaited here may be late: only those to the refreshing may.
        async with hasty.watch_presence(key, ROOM, refresh=OFTEN, timeout=None) as feed:
            with broker.hold("answer", "puback"):
                await reported.wait()
            await ann.subscribe(key, ROOM)
            assert [(await feed.receive()).event for _ in range(2)] == ["status", "subscribe"]
            await named.more(2)
            with broker.lose("message"):
                await ann.unsubscribe(key, ROOM)
            assert (await feed.receive()).event == "status"
            assert told(feed) == {}
    assert all(isinstance(error, RequestTimeoutError) for error in errors)
    assert statuses.count == 0
