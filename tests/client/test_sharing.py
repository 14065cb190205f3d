"""Many subscriptions on one link."""

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
    """Another key of the same channels, which may read, write and load."""
    return (await emitter.keygen(server.secret, f"{unique}#/", "rwl")).key


async def test_each_stream_of_a_channel_gets_each_message_once(
    emitter: Emitter, key: str, unique: str
) -> None:
    async with emitter.subscribe(key, unique) as one, emitter.subscribe(key, unique) as two:
        await emitter.publish(key, unique, "a")
        await emitter.publish(key, unique, "b")
        assert await arrived(emitter, one) == ["a", "b"]
        assert await arrived(emitter, two) == ["a", "b"]


async def test_streams_under_two_keys_get_each_message_once(
    emitter: Emitter, key: str, second_key: str, unique: str
) -> None:
    async with emitter.subscribe(key, unique) as one, emitter.subscribe(second_key, unique) as two:
        await emitter.publish(key, unique, "m")
        assert await arrived(emitter, one) == ["m"]
        assert await arrived(emitter, two) == ["m"]


async def test_a_stream_and_the_handlers_get_each_message_once(
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


async def test_handlers_get_the_messages_of_streams_too(
    emitter: Emitter, key: str, unique: str
) -> None:
    calls = Calls()
    emitter.on("message", calls)
    async with emitter.subscribe(key, unique):
        await emitter.publish(key, unique, "m")
        assert texts(await calls.get(1)) == ["m"]


async def test_the_broker_is_asked_once_for_each_key_and_told_when_the_last_user_has_left(
    server: Server, key: str, second_key: str, unique: str
) -> None:
    async with relay(server) as link:
        async with connect(host="127.0.0.1", port=link.port, secure=False) as emitter:
            async with emitter.subscribe(key, unique, last=0):
                async with (
                    emitter.subscribe(key, unique, last=0),
                    emitter.subscribe(second_key, unique, last=0),
                    emitter.subscribe(second_key, unique, last=0),
                ):
                    await emitter.subscribe(key, unique, last=0)
                await emitter.unsubscribe(key, unique)
                await emitter.flush()
                assert link.packets().count(SUBSCRIBE) == 2
                assert link.packets().count(UNSUBSCRIBE) == 0
            await emitter.flush()
            assert link.packets().count(UNSUBSCRIBE) == 1


async def test_leaving_one_stream_leaves_the_others(
    emitter: Emitter, key: str, second_key: str, unique: str
) -> None:
    async with emitter.subscribe(second_key, unique) as last:
        async with emitter.subscribe(key, unique):
            pass
        async with emitter.subscribe(second_key, unique):
            pass
        await emitter.publish(key, unique, "m")
        assert await arrived(emitter, last) == ["m"]


async def test_leaving_the_first_key_leaves_the_second(
    emitter: Emitter, key: str, second_key: str, unique: str
) -> None:
    await emitter.subscribe(key, unique)
    async with emitter.subscribe(second_key, unique) as messages:
        await emitter.unsubscribe(key, unique)
        await emitter.publish(key, unique, "m")
        assert await arrived(emitter, messages) == ["m"]


async def test_unsubscribing_leaves_the_streams_and_leaving_them_the_handlers(
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


async def test_leaving_the_last_one_ends_the_delivery(
    emitter: Emitter, key: str, second_key: str, unique: str
) -> None:
    await emitter.subscribe(key, unique)
    async with emitter.subscribe(second_key, unique), emitter.subscribe(key, unique):
        await emitter.unsubscribe(key, unique)
    await emitter.publish(key, unique, "late")
    await emitter.flush()
    assert emitter.statistics().received == 0


async def test_a_second_key_that_is_refused_leaves_the_first_working(
    emitter: Emitter, server: Server, key: str, unique: str
) -> None:
    write_only = (await emitter.keygen(server.secret, unique, "w")).key
    async with emitter.subscribe(key, unique) as messages:
        with pytest.raises(UnauthorizedError):
            await enter(emitter.subscribe(write_only, unique))
        await emitter.publish(key, unique, "m")
        assert await arrived(emitter, messages) == ["m"]


async def test_a_refusal_reaches_everyone_who_waits_for_it(
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
async def test_parent_and_child_get_what_reaches_them_once(
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


async def test_a_wildcard_beside_its_channel_gets_each_message_once(
    emitter: Emitter, key: str, unique: str
) -> None:
    async with (
        emitter.subscribe(key, f"{unique}+/b/") as wide,
        emitter.subscribe(key, f"{unique}a/b/") as narrow,
        emitter.subscribe(key, f"{unique}a/") as parent,
    ):
        await emitter.publish(key, f"{unique}a/b/", "m")
        assert [await arrived(emitter, stream) for stream in (wide, narrow, parent)] == [["m"]] * 3


async def test_leaving_the_child_leaves_the_parent(emitter: Emitter, key: str, unique: str) -> None:
    async with emitter.subscribe(key, unique) as messages:
        async with emitter.subscribe(key, f"{unique}a/"):
            pass
        await emitter.publish(key, f"{unique}a/", "m")
        assert await arrived(emitter, messages) == ["m"]


# What is replayed


@pytest.fixture
async def stored(emitter: Emitter, key: str, unique: str) -> str:
    """A channel with the stored messages 1, 2 and 3."""
    for number in ("1", "2", "3"):
        await emitter.publish(key, unique, number, ttl=60, qos=1)
    return unique


async def test_a_further_subscribers_replay_goes_to_it_alone(
    emitter: Emitter, key: str, stored: str
) -> None:
    async with emitter.subscribe(key, stored, last=0) as first:
        async with emitter.subscribe(key, stored, last=2) as second:
            assert await arrived(emitter, second) == ["2", "3"]
        assert await arrived(emitter, first) == []


async def test_a_further_keys_replay_goes_to_it_alone(
    emitter: Emitter, key: str, second_key: str, stored: str
) -> None:
    async with emitter.subscribe(key, stored, last=0) as first:
        async with emitter.subscribe(second_key, stored, last=10) as second:
            assert await arrived(emitter, second) == ["1", "2", "3"]
        assert await arrived(emitter, first) == []


async def test_a_childs_replay_does_not_reach_the_parent(
    emitter: Emitter, key: str, unique: str
) -> None:
    child = f"{unique}a/"
    await emitter.publish(key, child, "stored", ttl=60, qos=1)
    async with emitter.subscribe(key, unique, last=0) as parent:
        async with emitter.subscribe(key, child, last=1) as messages:
            assert await arrived(emitter, messages) == ["stored"]
        assert await arrived(emitter, parent) == []


async def test_a_further_subscriber_is_replayed_the_newest_one_unless_it_says_otherwise(
    emitter: Emitter, key: str, stored: str
) -> None:
    async with (
        emitter.subscribe(key, stored, last=0),
        emitter.subscribe(key, stored) as default,
        emitter.subscribe(key, stored, last=0) as nothing,
    ):
        assert await arrived(emitter, default) == ["3"]
        assert await arrived(emitter, nothing) == []


async def test_a_further_key_without_the_permission_to_load_is_replayed_nothing(
    emitter: Emitter, server: Server, key: str, stored: str
) -> None:
    read_only = (await emitter.keygen(server.secret, stored, "r")).key
    async with (
        emitter.subscribe(key, stored, last=0),
        emitter.subscribe(read_only, stored, last=3) as messages,
    ):
        await emitter.publish(key, stored, "live")
        assert await arrived(emitter, messages) == ["live"]


async def test_an_awaited_subscription_beside_a_stream_replays_to_the_handlers_alone(
    emitter: Emitter, key: str, stored: str
) -> None:
    calls = Calls()
    emitter.on("message", calls)
    async with emitter.subscribe(key, stored, last=0) as messages:
        await emitter.subscribe(key, stored, last=2)
        assert texts(await calls.get(2)) == ["2", "3"]
        assert await arrived(emitter, messages) == []


async def test_subscribers_at_the_same_time_get_their_own_replay(
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


async def test_a_further_subscriber_misses_nothing_that_is_live(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    """One that is stored meanwhile may come twice, none is missed."""

    async def publish() -> None:
        for number in range(20):
            await other.publish(key, unique, number, ttl=60, qos=1)

    async with emitter.subscribe(key, unique, last=0) as first:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(publish)
            await first.receive()
            async with emitter.subscribe(key, unique, last=20) as second:
                assert sorted(set(await until(second, 19))) == list(range(20))
        assert await until(first, 19) == list(range(1, 20))


async def until(messages: EventStream[EmitterMessage], last: int) -> list[int]:
    found: list[int] = []
    while last not in found:
        found.append((await messages.receive()).as_object())
    return found
