"""Replay of stored messages to a second subscriber of a channel."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import anyio
import pytest

from emitter_anyio import (
    Emitter,
    EmitterMessage,
    EventStream,
    SubscriptionConflictError,
)
from tests.client.tools import Calls, arrived, checkpoints, enter, texts
from tests.support.server import Server

pytestmark = pytest.mark.emitter


@pytest.fixture
async def nine(emitter: Emitter, key: str, unique: str) -> str:
    """A channel with the stored messages 1 to 9."""
    for number in range(1, 10):
        await emitter.publish(key, unique, str(number), ttl=600)
    await emitter.flush()
    return unique


def hold_history_replies(server: Server) -> AbstractContextManager[None]:
    """Hold the reply to the history request, if the broker is the development broker."""
    return nullcontext() if server.broker is None else server.broker.hold("reply", "puback")


# Only that subscriber gets the replay


@pytest.mark.parametrize("last", [0, 1, 4, 9, 50])
async def test_second_subscriber_gets_the_last_messages_in_order_of_time(
    emitter: Emitter, key: str, nine: str, last: int
) -> None:
    async with emitter.subscribe(key, nine, last=0) as first:
        async with emitter.subscribe(key, nine, last=last) as messages:
            expected = [str(number) for number in range(1, 10)][9 - min(last, 9) :]
            assert await arrived(emitter, messages) == expected
        assert await arrived(emitter, first) == []


async def test_several_subscribers_get_their_own_replay(
    emitter: Emitter, key: str, nine: str
) -> None:
    async with (
        emitter.subscribe(key, nine, last=0) as none,
        emitter.subscribe(key, nine, last=2) as two,
        emitter.subscribe(key, nine, last=1) as one,
        emitter.subscribe(key, nine, last=3) as three,
    ):
        found = [await arrived(emitter, stream) for stream in (none, one, two, three)]
        assert found == [[], ["9"], ["8", "9"], ["7", "8", "9"]]


async def test_window_applies_to_a_second_subscriber(emitter: Emitter, key: str, nine: str) -> None:
    (newest,) = [message async for message in emitter.history(key, nine, 1)]
    now = newest.time.timestamp()
    async with emitter.subscribe(key, nine, last=0):
        for options, expected in [
            ({"since": now - 60, "last": 2}, ["8", "9"]),
            ({"since": now - 60}, ["9"]),
            ({"until": now + 60, "last": 1}, ["9"]),
            ({"until": now - 60, "last": 9}, []),
            ({"since": now + 60, "last": 9}, []),
        ]:
            arguments: dict[str, Any] = options
            async with emitter.subscribe(key, nine, **arguments) as messages:
                assert await arrived(emitter, messages) == expected, options


async def test_replay_of_a_wildcard_does_not_reach_an_overlapping_stream(
    emitter: Emitter, key: str, unique: str
) -> None:
    for channel in ("a/", "b/", "b/c/"):
        await emitter.publish(key, unique + channel, channel, ttl=600)
    async with emitter.subscribe(key, f"{unique}b/", last=0) as narrow:
        async with emitter.subscribe(key, f"{unique}+/", last=5) as wide:
            assert await arrived(emitter, wide) == ["a/", "b/", "b/c/"]
        assert await arrived(emitter, narrow) == []


async def test_replay_of_the_first_subscriber_does_not_reach_concurrent_ones(
    emitter: Emitter, key: str, nine: str
) -> None:
    found: dict[str, list[str]] = {}

    async def subscribe(name: str, channel: str, last: int) -> None:
        async with emitter.subscribe(key, channel, last=last) as messages:
            found[name] = sorted(await arrived(emitter, messages))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(subscribe, "first", nine, 3)
        tasks.start_soon(subscribe, "same", nine, 0)
        tasks.start_soon(subscribe, "below", f"{nine}a/", 5)
        tasks.start_soon(subscribe, "two", nine, 2)
    assert found == {"first": ["7", "8", "9"], "same": [], "below": [], "two": ["8", "9"]}


async def test_replay_comes_before_live_messages(
    server: Server, emitter: Emitter, other: Emitter, key: str, nine: str
) -> None:
    async with emitter.subscribe(key, nine, last=0) as first, anyio.create_task_group() as tasks:

        async def subscribe() -> None:
            async with emitter.subscribe(key, nine, last=2) as second:
                assert await receive_until(second, "live") == ["8", "9", "live"]

        with hold_history_replies(server):
            tasks.start_soon(subscribe)
            await emitter.flush()
            await other.publish(key, nine, "live")
            assert await receive_until(first, "live") == ["live"]


async def test_messages_stored_during_the_replay_might_repeat_but_none_is_missed(
    server: Server, emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    """Messages are stored and sent before, during and after the history request."""
    found: list[list[str]] = []

    async def subscribe() -> None:
        async with emitter.subscribe(key, unique, last=100) as messages:
            found.append(await receive_until(messages, "59"))

    async def publish(start: int, stop: int) -> None:
        for number in range(start, stop):
            await other.publish(key, unique, str(number), ttl=600)
            await checkpoints(1)

    async with emitter.subscribe(key, unique, last=0) as first:
        await publish(0, 20)
        async with anyio.create_task_group() as tasks:
            with hold_history_replies(server):
                for _ in range(3):
                    tasks.start_soon(subscribe)
                await publish(20, 40)
                await other.flush()
                await emitter.flush()
            await publish(40, 60)
            assert await receive_until(first, "59") == [str(number) for number in range(60)]
    assert len(found) == 3
    for received in found:
        assert list(dict.fromkeys(received)) == [str(number) for number in range(60)]


async def receive_until(messages: EventStream[EmitterMessage], last: str) -> list[str]:
    found: list[str] = []
    while last not in found:
        found += texts([await messages.receive()])
    return found


async def test_replay_to_handlers_does_not_reach_a_stream(
    emitter: Emitter, key: str, nine: str
) -> None:
    calls = Calls()
    emitter.on("message", calls, channel=nine)
    async with emitter.subscribe(key, nine, last=0) as messages:
        await emitter.subscribe(key, nine, last=3)
        await emitter.publish(key, nine, "live")
        assert await arrived(emitter, messages) == ["live"]
        assert texts(await calls.get(4)) == ["7", "8", "9", "live"]


async def test_subscription_cancelled_during_its_replay_is_undone(
    server: Server, emitter: Emitter, key: str, nine: str
) -> None:
    async with emitter.subscribe(key, nine, last=0) as first:
        with hold_history_replies(server):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(enter, emitter.subscribe(key, nine, last=9))
                await checkpoints()
                tasks.cancel_scope.cancel()
        async with emitter.subscribe(key, nine, last=1) as again:
            assert await arrived(emitter, again) == ["9"]
        assert await arrived(emitter, first) == []


async def test_replay_too_large_to_send_keeps_the_newest_messages(
    emitter: Emitter, key: str, unique: str
) -> None:
    for number in range(9):
        await emitter.publish(key, unique, f"{number:0>16000}", ttl=600)
    async with emitter.subscribe(key, unique, last=0):
        async with emitter.subscribe(key, unique, last=9) as messages:
            found = [int(text[-1]) for text in await arrived(emitter, messages)]
    assert found
    assert found == list(range(9))[-len(found) :]


async def test_message_too_large_for_history_is_not_replayed(
    emitter: Emitter, key: str, unique: str
) -> None:
    await emitter.publish(key, unique, b"x" * 60000, ttl=600, qos=1)
    async with emitter.subscribe(key, unique, last=0):
        async with emitter.subscribe(key, unique, last=1) as messages:
            await emitter.publish(key, unique, "live")
            assert await arrived(emitter, messages) == ["live"]


# Channels without such a replay


@pytest.mark.parametrize("options", [{"last": 1}, {"since": 1700000000}, {"until": 1700000000}])
async def test_wildcard_first_level_cannot_be_replayed_to_a_second_subscriber(
    emitter: Emitter, server: Server, unique: str, options: dict[str, Any]
) -> None:
    wide = (await emitter.keygen(server.secret, f"+/{unique}", "rwl")).key
    narrow = (await emitter.keygen(server.secret, f"a/{unique}", "rwl")).key
    async with emitter.subscribe(narrow, f"a/{unique}", last=0) as messages:
        with pytest.raises(SubscriptionConflictError, match=r"literal first level.*last=0"):
            await enter(emitter.subscribe(wide, f"+/{unique}", **options))
        with pytest.raises(SubscriptionConflictError):
            await emitter.subscribe(wide, f"+/{unique}", **options)
        for live_only in ({}, {"last": 0}):
            arguments: dict[str, Any] = live_only
            async with emitter.subscribe(wide, f"+/{unique}", **arguments) as everything:
                await emitter.publish(narrow, f"a/{unique}", "live")
                assert await arrived(emitter, everything) == ["live"]
                assert await arrived(emitter, messages) == ["live"]
