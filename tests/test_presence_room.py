"""A room of many who come and go, while events are lost: ``.members`` is right at the end."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext

import anyio
import pytest

from emitter_anyio import (
    Emitter,
    EventStream,
    Member,
    PresenceEvent,
    PresenceFeed,
    PresenceStatus,
    RequestError,
    SlowConsumerError,
    connect,
)
from emitter_anyio.testing import Broker

ROOM = "room/"
PLACES = [ROOM, *(f"{ROOM}{place}/" for place in ("a", "a/x", "a/x/y", "b", "c", "d", "+/z"))]

OFTEN = 0.01


@pytest.fixture
async def broker(anyio_backend: object) -> AsyncIterator[Broker]:
    async with Broker() as broker:
        yield broker


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
    """Wait until the members of each feed are right, and see that they stay so."""
    watched = {feed: name.replace("_", "/") for name, feed in feeds.items()}
    wrong = dict(watched)
    with anyio.move_on_after(30):
        while wrong := {f: c for f, c in wrong.items() if told(f) != truth(broker, c)}:
            await statuses.more()
    assert not wrong
    await statuses.more(20 * len(feeds))
    for feed, channel in watched.items():
        assert told(feed) == truth(broker, channel)


async def move(member: Emitter, key: str, dice: random.Random, moves: int) -> None:
    """Come to some places and leave others, as the dice say."""
    for _ in range(moves):
        place = dice.choice(PLACES)
        if dice.random() < 0.6:
            await member.subscribe(key, place, 0)
        else:
            await member.unsubscribe(key, place)


@asynccontextmanager
async def crowd(
    broker: Broker, key: str, seed: int, count: int = 50, phases: int = 6
) -> AsyncGenerator[list[Emitter]]:
    """
    Let them come and go; every other time, what would be told of it is lost.

    In the end a fifth of them have left altogether.
    """
    async with AsyncExitStack() as stack:
        members = [
            await stack.enter_async_context(connect(broker.url, username=f"m{number}"))
            for number in range(count)
        ]
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


@pytest.mark.parametrize("seed", range(3))
async def test_the_members_are_right_in_the_end(
    broker: Broker, watcher: Emitter, key: str, seed: int
) -> None:
    statuses = Statuses(watcher)
    async with watcher.watch_presence(key, ROOM, buffer=100000, refresh=OFTEN) as feed:
        async with crowd(broker, key, seed):
            assert len(truth(broker, ROOM)) > 30
            await right(broker, statuses, room_=feed)
        await right(broker, statuses, room_=feed)
        assert told(feed) == {}


async def test_several_feeds_on_overlapping_channels_are_right_at_once(
    broker: Broker, watcher: Emitter, key: str
) -> None:
    statuses = Statuses(watcher)
    async with (
        watcher.watch_presence(key, ROOM, buffer=100000, refresh=OFTEN) as room,
        watcher.watch_presence(key, ROOM, buffer=1, overflow="drop_oldest", refresh=OFTEN) as too,
        watcher.watch_presence(key, f"{ROOM}a/", buffer=100000, refresh=OFTEN) as a,
        watcher.watch_presence(key, f"{ROOM}a/x/", buffer=100000, refresh=OFTEN) as ax,
        watcher.watch_presence(key, f"{ROOM}+/", buffer=100000, refresh=OFTEN) as any_,
        crowd(broker, key, 7),
    ):
        assert len({len(truth(broker, c)) for c in (ROOM, f"{ROOM}a/", f"{ROOM}a/x/")}) == 3
        await right(broker, statuses, room_=room, room_a_=a, room_a_x_=ax)
        assert told(too) == told(room)
        assert any_
