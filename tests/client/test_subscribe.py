from __future__ import annotations

import re
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import pytest

from emitter_anyio import (
    Emitter,
    EmitterMessage,
    EventStream,
    InvalidChannelError,
    SlowConsumerError,
    SubscriptionConflictError,
    UnauthorizedError,
    connect,
)
from tests.client.tools import Calls, arrived, checkpoints, enter, texts
from tests.support.server import Server

pytestmark = pytest.mark.emitter

NO_KEY = "A" * 32


# Entered


async def test_entered_subscription_is_a_stream(emitter: Emitter, key: str, unique: str) -> None:
    async with emitter.subscribe(key, unique) as messages:
        await emitter.publish(key, unique, "one")
        await emitter.publish(key, unique, "two")
        received = []
        async for message in messages:
            received.append(message.as_string())
            if len(received) == 2:
                break
    assert received == ["one", "two"]


async def test_leaving_the_stream_unsubscribes_and_closes_it(
    emitter: Emitter, key: str, unique: str
) -> None:
    async with emitter.subscribe(key, unique) as messages:
        pass
    await emitter.publish(key, unique, "late")
    await emitter.flush()
    assert emitter.statistics().received == 0
    with pytest.raises(anyio.ClosedResourceError):
        await messages.receive()


async def test_task_waiting_in_a_stream_raises_when_it_is_left(
    emitter: Emitter, key: str, unique: str
) -> None:
    async def receive(messages: EventStream[EmitterMessage]) -> None:
        with pytest.raises(anyio.ClosedResourceError):
            await messages.receive()

    async with anyio.create_task_group() as tasks:
        async with emitter.subscribe(key, unique) as messages:
            tasks.start_soon(receive, messages)
            await anyio.wait_all_tasks_blocked()


async def test_closing_the_last_end_in_the_block_unsubscribes(
    emitter: Emitter, key: str, unique: str
) -> None:
    async with emitter.subscribe(key, unique, buffer=1) as messages:
        clone = messages.clone()
        await messages.aclose()
        await emitter.publish(key, unique, "one")
        await emitter.publish(key, unique, "dropped")
        await emitter.flush()
        assert (await clone.receive()).as_string() == "one"
        await clone.aclose()
        assert emitter.statistics().dropped == 1, "drops are counted before the block is left"
        await emitter.publish(key, unique, "late")
        await emitter.flush()
        assert emitter.statistics().received == 2
    assert emitter.statistics().dropped == 1


async def test_clone_of_a_left_stream_gets_the_buffered_messages(
    emitter: Emitter, key: str, unique: str
) -> None:
    async with emitter.subscribe(key, unique) as messages:
        clone = messages.clone()
        await emitter.publish(key, unique, "buffered")
        await emitter.flush()
    await emitter.publish(key, unique, "late")
    await emitter.flush()
    with clone:
        assert [message.as_string() async for message in clone] == ["buffered"]
        with pytest.raises(anyio.EndOfStream):
            await clone.receive()


async def test_channel_can_be_subscribed_again(emitter: Emitter, key: str, unique: str) -> None:
    for text in ("one", "two"):
        async with emitter.subscribe(key, unique) as messages:
            await emitter.publish(key, unique, text)
            assert await arrived(emitter, messages) == [text]


async def test_subscription_gets_messages_of_subchannels(
    emitter: Emitter, key: str, unique: str
) -> None:
    async with emitter.subscribe(key, unique) as messages:
        await emitter.publish(key, f"{unique}a/b/", "below")
        message = await messages.receive()
    assert (message.channel, message.as_string()) == (f"{unique}a/b/", "below")


async def test_missing_slash_is_added(emitter: Emitter, key: str, unique: str) -> None:
    async with emitter.subscribe(key, unique.rstrip("/")) as messages:
        await emitter.publish(key, unique, "m")
        assert await arrived(emitter, messages) == ["m"]


# Awaited


async def test_messages_of_an_awaited_subscription_go_to_handlers(
    emitter: Emitter, key: str, unique: str
) -> None:
    calls = Calls()
    emitter.on("message", calls)
    await emitter.subscribe(key, unique)
    await emitter.publish(key, unique, "m")
    assert texts(await calls.get(1)) == ["m"]


async def test_awaited_subscription_is_idempotent(emitter: Emitter, key: str, unique: str) -> None:
    await emitter.publish(key, unique, "stored", ttl=60, qos=1)
    async with emitter.stream("message") as messages:
        await emitter.subscribe(key, unique, last=1)
        await emitter.subscribe(key, unique, last=1)
        await emitter.publish(key, unique, "live")
        assert await arrived(emitter, messages) == ["stored", "live"]
        await emitter.unsubscribe(key, unique)
        await emitter.publish(key, unique, "late")
        assert await arrived(emitter, messages) == []


async def test_two_tasks_can_await_the_same_subscription(
    emitter: Emitter, key: str, unique: str
) -> None:
    async def subscribe() -> None:
        await emitter.subscribe(key, unique)

    async with emitter.stream("message") as messages:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(subscribe)
            tasks.start_soon(subscribe)
        await emitter.publish(key, unique, "m")
        assert await arrived(emitter, messages) == ["m"]
        await emitter.unsubscribe(key, unique)
        await emitter.publish(key, unique, "late")
        assert await arrived(emitter, messages) == []


async def test_channel_can_be_subscribed_again_after_unsubscribe(
    emitter: Emitter, key: str, unique: str
) -> None:
    async with emitter.stream("message") as messages:
        for _ in range(2):
            await emitter.subscribe(key, unique)
            await emitter.unsubscribe(key, unique)
        await emitter.subscribe(key, unique)
        await emitter.publish(key, unique, "m")
        assert await arrived(emitter, messages) == ["m"]


async def test_unsubscribe_without_a_subscription_succeeds(
    emitter: Emitter, key: str, unique: str
) -> None:
    await emitter.unsubscribe(key, unique)
    assert await emitter.flush() > 0


async def test_unsubscribe_with_a_bad_key_raises(emitter: Emitter, unique: str) -> None:
    with pytest.raises(UnauthorizedError) as caught:
        await emitter.unsubscribe(NO_KEY, unique)
    assert (caught.value.operation, caught.value.channel) == ("unsubscribe", unique)


# Replay


@pytest.fixture
async def stored(emitter: Emitter, key: str, unique: str) -> str:
    """A channel with the stored messages 1, 2 and 3."""
    for number in ("1", "2", "3"):
        await emitter.publish(key, unique, number, ttl=60, qos=1)
    return unique


@pytest.mark.parametrize(
    ("last", "replayed"),
    [(None, ["3"]), (0, []), (1, ["3"]), (2, ["2", "3"]), (10, ["1", "2", "3"])],
)
async def test_last_limits_the_replayed_messages(
    emitter: Emitter, key: str, stored: str, last: int | None, replayed: list[str]
) -> None:
    async with emitter.subscribe(key, stored, last) as messages:
        # Within one second, the broker replays the newest message first.
        assert sorted(await arrived(emitter, messages)) == replayed


async def test_replay_comes_before_live_messages(emitter: Emitter, key: str, stored: str) -> None:
    async with emitter.subscribe(key, stored, last=2) as messages:
        await emitter.publish(key, stored, "live")
        *replayed, live = await arrived(emitter, messages)
    assert sorted(replayed) == ["2", "3"]
    assert live == "live"


async def test_replay_is_not_limited_by_the_buffer(emitter: Emitter, key: str, stored: str) -> None:
    async with emitter.subscribe(key, stored, last=3, buffer=1) as messages:
        await emitter.publish(key, stored, "live")
        assert len(await arrived(emitter, messages)) == 4


async def test_awaited_subscription_replays_to_handlers(
    emitter: Emitter, key: str, stored: str
) -> None:
    calls = Calls()
    emitter.on("message", calls)
    await emitter.subscribe(key, stored, last=3)
    assert sorted(texts(await calls.get(3))) == ["1", "2", "3"]


async def test_key_without_load_permission_gets_no_replay(
    emitter: Emitter, server: Server, stored: str
) -> None:
    made = await emitter.keygen(server.secret, stored, "r")
    async with emitter.subscribe(made.key, stored, last=3) as messages:
        assert await arrived(emitter, messages) == []


HOUR = timedelta(hours=1)


@pytest.mark.parametrize(
    ("since", "until", "count"),
    [(-HOUR, None, 3), (HOUR, None, 0), (None, -HOUR, 0), (None, HOUR, 3), (-HOUR, HOUR, 3)],
)
@pytest.mark.parametrize("form", ["datetime", "unix seconds"])
async def test_since_and_until_limit_the_replay(
    emitter: Emitter,
    key: str,
    stored: str,
    since: timedelta | None,
    until: timedelta | None,
    count: int,
    form: str,
) -> None:
    def point(offset: timedelta | None) -> Any:
        if offset is None:
            return None
        if form == "datetime":
            return datetime.now(UTC) + offset
        return time.time() + offset.total_seconds()

    async with emitter.subscribe(
        key, stored, last=10, since=point(since), until=point(until)
    ) as messages:
        assert len(await arrived(emitter, messages)) == count


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"last": -1}, "last"),
        ({"last": "1"}, "last"),
        ({"since": datetime(2030, 1, 1)}, "since.*naive"),
        ({"until": 5}, "until"),
        ({"buffer": 0}, "buffer.*at least 1"),
        ({"overflow": "explode"}, "overflow.*'raise'"),
    ],
)
async def test_bad_option_is_rejected(
    emitter: Emitter, unique: str, options: dict[str, Any], pattern: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=pattern):
        emitter.subscribe(NO_KEY, unique, **options)


# Wildcards


async def test_plus_matches_one_level(emitter: Emitter, key: str, unique: str) -> None:
    async with emitter.subscribe(key, f"{unique}+/c/") as messages:
        for channel in ("a/c/", "b/c/d/", "a/b/", "c/"):
            await emitter.publish(key, unique + channel, channel)
        assert await arrived(emitter, messages) == ["a/c/", "b/c/d/"]


async def test_plus_can_have_options(emitter: Emitter, key: str, unique: str) -> None:
    await emitter.publish(key, f"{unique}a/c/", "stored", ttl=60, qos=1)
    async with emitter.subscribe(key, f"{unique}+/c/", last=5) as messages:
        await emitter.publish(key, f"{unique}b/c/", "live")
        assert await arrived(emitter, messages) == ["stored", "live"]


async def test_plus_at_the_start_can_have_options(
    emitter: Emitter, server: Server, unique: str
) -> None:
    made = await emitter.keygen(server.secret, "#/", "rwslp")
    async with emitter.subscribe(made.key, f"+/x{unique}", last=5) as messages:
        await emitter.publish(made.key, f"{unique}x{unique}", "m")
        assert await arrived(emitter, messages) == ["m"]


@pytest.mark.parametrize(
    ("channel", "parent"),
    [
        ("chat/#/", "chat/"),
        ("chat/#", "chat/"),
        ("a/+/#/", "a/+/"),
        ("#/", "+/"),
        ("$share/g/a/#/", "$share/g/a/"),
        ("$share/g/#/", "$share/g/+/"),
    ],
)
@pytest.mark.parametrize("method", ["subscribe", "on", "stream", "watch_presence", "serve"])
async def test_hash_is_rejected_with_the_parent_channel(
    emitter: Emitter, method: str, channel: str, parent: str
) -> None:
    with pytest.raises(InvalidChannelError, match=f"use {re.escape(repr(parent))}"):
        match method:
            case "subscribe":
                emitter.subscribe(NO_KEY, channel)
            case "on":
                emitter.on("message", print, channel=channel)
            case "stream":
                emitter.stream("presence", channel=channel)
            case "watch_presence":
                emitter.watch_presence(NO_KEY, channel)
            case "serve":
                await emitter.serve(NO_KEY, channel, lambda request: request.binary)


async def test_hash_with_a_group_suggests_the_channel_alone(emitter: Emitter) -> None:
    with pytest.raises(InvalidChannelError, match="use 'jobs/', which"):
        emitter.subscribe(NO_KEY, "jobs/#/", group="g")


async def test_hash_is_accepted_by_keygen_and_history(
    emitter: Emitter, server: Server, unique: str
) -> None:
    key = await emitter.keygen(server.secret, f"{unique}#/", "wsl")
    await emitter.publish(key, f"{unique}a/", "stored", ttl=60, qos=1)
    assert [one.binary async for one in emitter.history(key, f"{unique}#/")] == [b"stored"]


@pytest.mark.parametrize(
    ("channel", "pattern"),
    [("", "empty"), ("a//b/", "empty level"), ("a b/", "' '"), ("a/#/b/", "'#'")],
)
async def test_bad_channel_is_rejected_with_a_reason(
    emitter: Emitter, channel: str, pattern: str
) -> None:
    with pytest.raises(InvalidChannelError, match=pattern):
        emitter.subscribe(NO_KEY, channel)


# Refusals and conflicts


@pytest.mark.parametrize("form", ["awaited", "entered"])
async def test_refused_subscription_raises_and_has_no_effect(
    emitter: Emitter, server: Server, key: str, unique: str, form: str
) -> None:
    write_only = (await emitter.keygen(server.secret, unique, "w")).key
    errors = Calls()
    emitter.on("error", errors)
    with pytest.raises(UnauthorizedError, match="'r' \\(read\\)") as caught:
        if form == "awaited":
            await emitter.subscribe(write_only, unique)
        else:
            await enter(emitter.subscribe(write_only, unique))
    assert (caught.value.status, caught.value.operation) == (401, "subscribe")
    assert caught.value.channel == unique
    assert write_only not in str(caught.value)
    # The channel can be used as before.
    async with emitter.subscribe(key, unique) as messages:
        await emitter.publish(key, unique, "m")
        assert await arrived(emitter, messages) == ["m"]
    await emitter.flush()
    assert errors.values == []


async def test_key_for_a_target_ending_in_plus_is_refused_with_a_hint(
    emitter: Emitter, server: Server, unique: str
) -> None:
    made = await emitter.keygen(server.secret, f"{unique}+/", "r")
    with pytest.raises(UnauthorizedError, match=r"ends in '\+/'"):
        await emitter.subscribe(made.key, f"{unique}a/")


async def test_channels_with_equal_hashes_conflict(emitter: Emitter, key: str, unique: str) -> None:
    one, two = f"{unique}p/q/", f"{unique}q/p/"
    async with emitter.subscribe(key, one) as messages:
        with pytest.raises(SubscriptionConflictError, match="second Emitter") as caught:
            await emitter.subscribe(key, two)
        assert one in str(caught.value)
        assert two in str(caught.value)
        await emitter.publish(key, one, "m")
        assert await arrived(emitter, messages) == ["m"]
    # The first subscription has ended, so the second no longer conflicts.
    async with emitter.subscribe(key, two) as messages:
        await emitter.publish(key, two, "m")
        assert await arrived(emitter, messages) == ["m"]


async def test_allow_collisions_permits_equal_hashes(server: Server, key: str, unique: str) -> None:
    async with connect(server.url, allow_collisions=True) as emitter:
        async with emitter.subscribe(key, f"{unique}p/q/") as messages:
            await emitter.subscribe(key, f"{unique}q/p/")
            await emitter.publish(key, f"{unique}p/q/", "m")
            assert await arrived(emitter, messages) == ["m"]


# subscribe() itself


async def test_subscribe_object_can_be_used_once(emitter: Emitter, key: str, unique: str) -> None:
    subscribing = emitter.subscribe(key, unique)
    await subscribing
    with pytest.raises(RuntimeError, match="twice"):
        await subscribing
    with pytest.raises(RuntimeError, match="twice"):
        await enter(subscribing)


async def test_unused_subscribe_object_warns_and_names_both_forms(
    emitter: Emitter, unique: str
) -> None:
    subscribing = emitter.subscribe(NO_KEY, unique)
    with pytest.warns(
        RuntimeWarning, match=r"await emitter.subscribe.*async with emitter"
    ) as warned:
        del subscribing
    assert len(warned) == 1


async def test_subscription_cancelled_while_entering_is_undone(
    emitter: Emitter, key: str, unique: str
) -> None:
    async def subscribe() -> None:
        async with emitter.subscribe(key, unique):
            await anyio.sleep_forever()

    for count in range(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(subscribe)
            await checkpoints(count)
            tasks.cancel_scope.cancel()
        await emitter.publish(key, unique, "unsubscribed")
        await emitter.flush()
    assert emitter.statistics().received == 0


# A full buffer


async def test_full_buffer_raises_in_place_of_the_dropped_messages(
    emitter: Emitter, key: str, unique: str
) -> None:
    async with emitter.subscribe(key, unique, buffer=2) as messages:
        for number in range(5):
            await emitter.publish(key, unique, str(number))
        await emitter.flush()
        assert texts([await messages.receive(), await messages.receive()]) == ["0", "1"]
        with pytest.raises(SlowConsumerError, match="3 ") as caught:
            await messages.receive()
        await emitter.publish(key, unique, "after the gap")
        assert (await messages.receive()).as_string() == "after the gap"
    assert caught.value.dropped == 3
    assert unique in str(caught.value)


@pytest.mark.parametrize(
    ("overflow", "kept"), [("drop_oldest", ["3", "4"]), ("drop_newest", ["0", "1"])]
)
async def test_full_buffer_drops_and_counts(
    emitter: Emitter, key: str, unique: str, overflow: Any, kept: list[str]
) -> None:
    async with emitter.subscribe(key, unique, buffer=2, overflow=overflow) as messages:
        for number in range(5):
            await emitter.publish(key, unique, str(number))
        assert await arrived(emitter, messages) == kept
        figures = messages.statistics()
    assert (figures.dropped, figures.received, figures.current_buffer_used) == (3, 2, 0)


async def test_full_buffer_blocks_the_connection(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    async with other.subscribe(key, unique, buffer=1, overflow="block") as messages:
        for number in range(20):
            await emitter.publish(key, unique, number)
        await emitter.flush()
        numbers = [(await messages.receive()).as_object() for _ in range(20)]
        assert messages.statistics().dropped == 0
    assert numbers == list(range(20))


async def test_busy_consumer_loses_nothing(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    received: list[object] = []

    async def consume() -> None:
        async for message in messages:
            received.append(message.as_object())
            await anyio.lowlevel.checkpoint()
            if len(received) == 500:
                return

    async with other.subscribe(key, unique, buffer=4) as messages:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(consume)
            for number in range(500):
                await emitter.publish(key, unique, number)
    assert received == list(range(500))


async def test_several_tasks_can_share_a_stream(emitter: Emitter, key: str, unique: str) -> None:
    received: list[object] = []

    async def consume() -> None:
        message = await messages.receive()
        received.append(message.as_string())

    async with emitter.subscribe(key, unique) as messages:
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(consume)
            for text in ("a", "b", "c"):
                await emitter.publish(key, unique, text)
    assert sorted(map(str, received)) == ["a", "b", "c"]
