"""Several subscriptions on one connection."""

from __future__ import annotations

import anyio
import pytest

from emitter_anyio import Emitter, EmitterMessage, EventStream, UnauthorizedError, connect
from tests.client.tools import Calls, arrived, enter, relay, texts
from tests.support.server import Server

pytestmark = pytest.mark.emitter

SUBSCRIBE, UNSUBSCRIBE = 8, 10


@pytest.fixture
async def second_key(emitter: Emitter, server: Server, unique: str) -> str:
    """Another key for the same channels, with permissions to read, write and load."""
    return (await emitter.keygen(server.secret, f"{unique}#/", "rwl")).key


async def test_each_stream_of_a_channel_gets_each_message_once(
    emitter: Emitter, key: str, unique: str
) -> None:
    async with emitter.subscribe(key, unique) as one, emitter.subscribe(key, unique) as two:
        await emitter.publish(key, unique, "a")
        await emitter.publish(key, unique, "b")
        assert await arrived(emitter, one) == ["a", "b"]
        assert await arrived(emitter, two) == ["a", "b"]


async def test_streams_with_two_keys_get_each_message_once(
    emitter: Emitter, key: str, second_key: str, unique: str
) -> None:
    async with emitter.subscribe(key, unique) as one, emitter.subscribe(second_key, unique) as two:
        await emitter.publish(key, unique, "m")
        assert await arrived(emitter, one) == ["m"]
        assert await arrived(emitter, two) == ["m"]


async def test_stream_and_handlers_get_each_message_once(
    emitter: Emitter, key: str, unique: str
) -> None:
    calls = Calls()
    emitter.on("message", calls)
    await emitter.subscribe(key, unique)
    async with emitter.subscribe(key, unique) as messages:
        await emitter.publish(key, unique, "a")
        await emitter.publish(key, unique, "b")
        assert await arrived(emitter, messages) == ["a", "b"]
        assert texts(await calls.get(2)) == ["a", "b"]


async def test_handlers_also_get_the_messages_of_streams(
    emitter: Emitter, key: str, unique: str
) -> None:
    calls = Calls()
    emitter.on("message", calls)
    async with emitter.subscribe(key, unique):
        await emitter.publish(key, unique, "m")
        assert texts(await calls.get(1)) == ["m"]


async def test_one_subscribe_per_key_and_one_unsubscribe_after_the_last_user(
    server: Server, key: str, second_key: str, unique: str
) -> None:
    async with relay(server) as proxy:
        async with connect(host="127.0.0.1", port=proxy.port, secure=False) as emitter:
            async with emitter.subscribe(key, unique, last=0):
                async with (
                    emitter.subscribe(key, unique, last=0),
                    emitter.subscribe(second_key, unique, last=0),
                    emitter.subscribe(second_key, unique, last=0),
                ):
                    await emitter.subscribe(key, unique, last=0)
                await emitter.unsubscribe(key, unique)
                await emitter.flush()
                assert proxy.packets().count(SUBSCRIBE) == 2
                assert proxy.packets().count(UNSUBSCRIBE) == 0
            await emitter.flush()
            assert proxy.packets().count(UNSUBSCRIBE) == 1


async def test_leaving_a_stream_does_not_end_others(
    emitter: Emitter, key: str, second_key: str, unique: str
) -> None:
    async with emitter.subscribe(second_key, unique) as last:
        async with emitter.subscribe(key, unique):
            pass
        async with emitter.subscribe(second_key, unique):
            pass
        await emitter.publish(key, unique, "m")
        assert await arrived(emitter, last) == ["m"]


async def test_unsubscribing_the_first_key_does_not_end_the_second(
    emitter: Emitter, key: str, second_key: str, unique: str
) -> None:
    await emitter.subscribe(key, unique)
    async with emitter.subscribe(second_key, unique) as messages:
        await emitter.unsubscribe(key, unique)
        await emitter.publish(key, unique, "m")
        assert await arrived(emitter, messages) == ["m"]


async def test_handlers_and_streams_of_a_channel_unsubscribe_independently(
    emitter: Emitter, key: str, unique: str
) -> None:
    async with emitter.stream("message") as all_messages:
        await emitter.subscribe(key, unique)
        async with emitter.subscribe(key, unique):
            pass
        await emitter.publish(key, unique, "handlers")
        assert await arrived(emitter, all_messages) == ["handlers"]
        async with emitter.subscribe(key, unique) as messages:
            await emitter.unsubscribe(key, unique)
            await emitter.publish(key, unique, "stream")
            assert await arrived(emitter, messages) == ["stream"]


async def test_delivery_ends_after_the_last_subscriber_left(
    emitter: Emitter, key: str, second_key: str, unique: str
) -> None:
    await emitter.subscribe(key, unique)
    async with emitter.subscribe(second_key, unique), emitter.subscribe(key, unique):
        await emitter.unsubscribe(key, unique)
    await emitter.publish(key, unique, "late")
    await emitter.flush()
    assert emitter.statistics().received == 0


async def test_refused_second_key_does_not_affect_the_first(
    emitter: Emitter, server: Server, key: str, unique: str
) -> None:
    write_only = (await emitter.keygen(server.secret, unique, "w")).key
    async with emitter.subscribe(key, unique) as messages:
        with pytest.raises(UnauthorizedError):
            await enter(emitter.subscribe(write_only, unique))
        await emitter.publish(key, unique, "m")
        assert await arrived(emitter, messages) == ["m"]


async def test_refusal_is_raised_in_every_waiting_subscriber(
    emitter: Emitter, server: Server, unique: str
) -> None:
    write_only = (await emitter.keygen(server.secret, unique, "w")).key
    refused = []
    errors = Calls()
    emitter.on("error", errors)

    async def subscribe() -> None:
        with pytest.raises(UnauthorizedError):
            await enter(emitter.subscribe(write_only, unique))
        refused.append(True)

    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(subscribe)
    await emitter.flush()
    assert len(refused) == 3
    assert errors.values == []


# Parents, children and wildcards


@pytest.mark.parametrize("order", ["parent first", "child first"])
async def test_parent_and_child_get_matching_messages_once(
    emitter: Emitter, key: str, unique: str, order: str
) -> None:
    parent, child = unique, f"{unique}a/"
    first, second = (parent, child) if order == "parent first" else (child, parent)
    async with emitter.subscribe(key, first) as one, emitter.subscribe(key, second) as two:
        await emitter.publish(key, parent, "parent")
        await emitter.publish(key, child, "child")
        of_parent, of_child = (one, two) if order == "parent first" else (two, one)
        assert await arrived(emitter, of_parent) == ["parent", "child"]
        assert await arrived(emitter, of_child) == ["child"]


async def test_wildcard_and_its_channel_get_each_message_once(
    emitter: Emitter, key: str, unique: str
) -> None:
    async with (
        emitter.subscribe(key, f"{unique}+/b/") as wide,
        emitter.subscribe(key, f"{unique}a/b/") as narrow,
        emitter.subscribe(key, f"{unique}a/") as parent,
    ):
        await emitter.publish(key, f"{unique}a/b/", "m")
        assert [await arrived(emitter, stream) for stream in (wide, narrow, parent)] == [["m"]] * 3


async def test_leaving_the_child_does_not_end_the_parent(
    emitter: Emitter, key: str, unique: str
) -> None:
    async with emitter.subscribe(key, unique) as messages:
        async with emitter.subscribe(key, f"{unique}a/"):
            pass
        await emitter.publish(key, f"{unique}a/", "m")
        assert await arrived(emitter, messages) == ["m"]


# Replay


@pytest.fixture
async def stored(emitter: Emitter, key: str, unique: str) -> str:
    """A channel with the stored messages 1, 2 and 3."""
    for number in ("1", "2", "3"):
        await emitter.publish(key, unique, number, ttl=60, qos=1)
    return unique


async def test_replay_goes_only_to_the_second_subscriber(
    emitter: Emitter, key: str, stored: str
) -> None:
    async with emitter.subscribe(key, stored, last=0) as first:
        async with emitter.subscribe(key, stored, last=2) as second:
            assert await arrived(emitter, second) == ["2", "3"]
        assert await arrived(emitter, first) == []


async def test_replay_goes_only_to_the_subscriber_with_a_second_key(
    emitter: Emitter, key: str, second_key: str, stored: str
) -> None:
    async with emitter.subscribe(key, stored, last=0) as first:
        async with emitter.subscribe(second_key, stored, last=10) as second:
            assert await arrived(emitter, second) == ["1", "2", "3"]
        assert await arrived(emitter, first) == []


async def test_replay_of_a_child_does_not_reach_the_parent(
    emitter: Emitter, key: str, unique: str
) -> None:
    child = f"{unique}a/"
    await emitter.publish(key, child, "stored", ttl=60, qos=1)
    async with emitter.subscribe(key, unique, last=0) as parent:
        async with emitter.subscribe(key, child, last=1) as messages:
            assert await arrived(emitter, messages) == ["stored"]
        assert await arrived(emitter, parent) == []


async def test_second_subscriber_gets_the_newest_message_by_default(
    emitter: Emitter, key: str, stored: str
) -> None:
    async with (
        emitter.subscribe(key, stored, last=0),
        emitter.subscribe(key, stored) as default,
        emitter.subscribe(key, stored, last=0) as nothing,
    ):
        assert await arrived(emitter, default) == ["3"]
        assert await arrived(emitter, nothing) == []


async def test_second_key_without_load_permission_gets_no_replay(
    emitter: Emitter, server: Server, key: str, stored: str
) -> None:
    read_only = (await emitter.keygen(server.secret, stored, "r")).key
    async with (
        emitter.subscribe(key, stored, last=0),
        emitter.subscribe(read_only, stored, last=3) as messages,
    ):
        await emitter.publish(key, stored, "live")
        assert await arrived(emitter, messages) == ["live"]


async def test_replay_of_an_awaited_subscription_goes_only_to_the_handlers(
    emitter: Emitter, key: str, stored: str
) -> None:
    calls = Calls()
    emitter.on("message", calls)
    async with emitter.subscribe(key, stored, last=0) as messages:
        await emitter.subscribe(key, stored, last=2)
        assert texts(await calls.get(2)) == ["2", "3"]
        assert await arrived(emitter, messages) == []


async def test_concurrent_subscribers_get_their_own_replay(
    emitter: Emitter, key: str, stored: str
) -> None:
    found: dict[int, list[str]] = {}

    async def subscribe(last: int) -> None:
        async with emitter.subscribe(key, stored, last=last) as messages:
            found[last] = sorted(await arrived(emitter, messages))

    async with anyio.create_task_group() as tasks:
        for last in range(4):
            tasks.start_soon(subscribe, last)
    assert found == {0: [], 1: ["3"], 2: ["2", "3"], 3: ["1", "2", "3"]}


async def test_second_subscriber_misses_no_live_message(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    """A message stored during the replay might arrive twice, but none is missed."""

    async def publish() -> None:
        for number in range(20):
            await other.publish(key, unique, number, ttl=60, qos=1)

    async with emitter.subscribe(key, unique, last=0) as first:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(publish)
            await first.receive()
            async with emitter.subscribe(key, unique, last=20) as second:
                assert sorted(set(await receive_until(second, 19))) == list(range(20))
        assert await receive_until(first, 19) == list(range(1, 20))


async def receive_until(messages: EventStream[EmitterMessage], last: int) -> list[int]:
    found: list[int] = []
    while last not in found:
        found.append((await messages.receive()).as_object())
    return found
