"""Share groups: each message goes to one member of each group."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

import pytest

from emitter_anyio import (
    Emitter,
    EmitterMessage,
    EventStream,
    InvalidChannelError,
    SubscriptionConflictError,
    UnauthorizedError,
    connect,
)
from tests.client.tools import Calls, arrived, enter
from tests.support.server import Server

pytestmark = pytest.mark.emitter

NO_KEY = "A" * 32


@pytest.fixture
async def group_key(emitter: Emitter, server: Server, unique: str) -> str:
    """A key for the group ``g`` of ``unique`` and of the channels below it."""
    return (await emitter.keygen(server.secret, f"$share/g/{unique}#/", "r")).key


@pytest.fixture
async def any_group_key(emitter: Emitter, server: Server, unique: str) -> str:
    """A key for every group of ``unique``."""
    return (await emitter.keygen(server.secret, f"$share/+/{unique}", "r")).key


async def publish(emitter: Emitter, key: str, channel: str, count: int) -> None:
    for number in range(count):
        await emitter.publish(key, channel, str(number))
    await emitter.flush()


async def test_each_message_goes_to_one_member_of_a_group(
    server: Server, emitter: Emitter, key: str, group_key: str, unique: str
) -> None:
    async with AsyncExitStack() as stack:
        members: list[tuple[Emitter, EventStream[EmitterMessage]]] = []
        for _ in range(3):
            member = await stack.enter_async_context(connect(server.url))
            shared = member.subscribe(group_key, unique, group="g")
            members.append((member, await stack.enter_async_context(shared)))
        await publish(emitter, key, unique, 90)
        found = [await arrived(member, messages) for member, messages in members]
    assert sorted(int(text) for texts in found for text in texts) == list(range(90))
    # The chance that one of three members gets none of 90 messages is 1 in 10¹⁵.
    assert all(found)
    assert all(texts == sorted(texts, key=int) for texts in found)


async def test_each_group_and_each_plain_subscriber_gets_each_message(
    server: Server, emitter: Emitter, other: Emitter, key: str, any_group_key: str, unique: str
) -> None:
    async with (
        connect(server.other_url) as third,
        emitter.subscribe(any_group_key, unique, group="g") as one,
        other.subscribe(any_group_key, unique, group="h") as two,
        third.subscribe(key, unique) as plain,
    ):
        await publish(emitter, key, unique, 5)
        expected = [str(number) for number in range(5)]
        assert await arrived(emitter, one) == expected
        assert await arrived(other, two) == expected
        assert await arrived(third, plain) == expected


async def test_message_of_a_group_has_the_plain_channel(
    emitter: Emitter, key: str, group_key: str, unique: str
) -> None:
    async with emitter.subscribe(group_key, unique, group="g") as messages:
        await emitter.publish(key, f"{unique}a/", "m")
        assert (await messages.receive()).channel == f"{unique}a/"


async def test_group_can_be_given_in_the_channel(
    emitter: Emitter, key: str, group_key: str, unique: str
) -> None:
    async with emitter.subscribe(group_key, f"$share/g/{unique}") as messages:
        await publish(emitter, key, unique, 1)
        assert await arrived(emitter, messages) == ["0"]


async def test_handlers_share_until_unsubscribe(
    emitter: Emitter, key: str, group_key: str, unique: str
) -> None:
    calls = Calls()
    emitter.on("message", calls)
    await emitter.subscribe(group_key, unique, group="g")
    await publish(emitter, key, unique, 2)
    assert len(await calls.get(2)) == 2
    await emitter.unsubscribe(group_key, unique, group="g")
    await publish(emitter, key, unique, 2)
    assert emitter.statistics().received == 2


async def test_member_that_left_the_group_gets_no_messages(
    emitter: Emitter, other: Emitter, key: str, group_key: str, unique: str
) -> None:
    async with emitter.subscribe(group_key, unique, group="g") as messages:
        async with other.subscribe(group_key, unique, group="g"):
            pass
        await other.flush()
        await publish(emitter, key, unique, 20)
        assert len(await arrived(emitter, messages)) == 20


async def test_streams_of_one_client_in_one_group_get_the_same_messages(
    emitter: Emitter, key: str, group_key: str, unique: str
) -> None:
    async with (
        emitter.subscribe(group_key, unique, group="g") as one,
        emitter.subscribe(group_key, unique, group="g") as two,
    ):
        await publish(emitter, key, unique, 3)
        assert await arrived(emitter, one) == await arrived(emitter, two) == ["0", "1", "2"]


async def test_group_of_a_wildcard_channel(
    emitter: Emitter, key: str, group_key: str, unique: str
) -> None:
    async with emitter.subscribe(group_key, f"{unique}+/b/", group="g") as messages:
        await publish(emitter, key, f"{unique}a/b/", 1)
        await publish(emitter, key, f"{unique}a/c/", 1)
        assert await arrived(emitter, messages) == ["0"]


async def test_publish_without_echo_goes_to_another_member(
    emitter: Emitter, other: Emitter, key: str, group_key: str, unique: str
) -> None:
    async with (
        emitter.subscribe(group_key, unique, group="g") as own,
        other.subscribe(group_key, unique, group="g") as theirs,
    ):
        for number in range(20):
            await emitter.publish(key, unique, str(number), echo=False)
        assert await arrived(emitter, own) == []
        assert len(await arrived(other, theirs)) == 20


async def test_group_gets_no_replay(
    emitter: Emitter, server: Server, key: str, unique: str
) -> None:
    load_key = (await emitter.keygen(server.secret, f"$share/g/{unique}", "rl")).key
    await emitter.publish(key, unique, "stored", ttl=60, qos=1)
    async with emitter.subscribe(load_key, unique, group="g") as messages:
        assert await arrived(emitter, messages) == []


# Subscriptions that the broker cannot tell apart on one connection


async def test_group_conflicts_with_an_overlapping_subscription(
    emitter: Emitter, key: str, group_key: str, unique: str
) -> None:
    for plain in (unique, f"{unique}a/", "+/"):
        async with emitter.subscribe(group_key, f"{unique}a/", group="g") as messages:
            with pytest.raises(SubscriptionConflictError, match="second Emitter"):
                await enter(emitter.subscribe(key, plain))
            await publish(emitter, key, f"{unique}a/", 1)
            assert await arrived(emitter, messages) == ["0"]
    async with emitter.subscribe(key, unique):
        with pytest.raises(SubscriptionConflictError, match="second Emitter"):
            await emitter.subscribe(group_key, f"{unique}a/", group="g")


async def test_two_groups_of_one_channel_conflict(
    emitter: Emitter, any_group_key: str, unique: str
) -> None:
    async with emitter.subscribe(any_group_key, unique, group="g"):
        with pytest.raises(SubscriptionConflictError):
            await enter(emitter.subscribe(any_group_key, unique, group="h"))


async def test_group_does_not_conflict_with_another_channel(
    emitter: Emitter, key: str, group_key: str, unique: str
) -> None:
    async with (
        emitter.subscribe(group_key, f"{unique}a/", group="g") as shared,
        emitter.subscribe(key, f"{unique}b/") as plain,
    ):
        await publish(emitter, key, f"{unique}a/", 1)
        await publish(emitter, key, f"{unique}b/", 2)
        assert await arrived(emitter, shared) == ["0"]
        assert await arrived(emitter, plain) == ["0", "1"]


# Refusals


async def test_refusal_hint_says_that_a_group_needs_its_own_key(
    emitter: Emitter, key: str, unique: str
) -> None:
    needed = f"a group requires a key for '\\$share/g/{unique}' itself"
    with pytest.raises(UnauthorizedError, match=needed) as caught:
        await enter(emitter.subscribe(key, unique, group="g"))
    assert (caught.value.operation, caught.value.channel) == ("subscribe", f"$share/g/{unique}")
    with pytest.raises(UnauthorizedError, match=needed):
        await emitter.unsubscribe(key, unique, group="g")


async def test_key_for_another_group_is_refused(
    emitter: Emitter, group_key: str, unique: str
) -> None:
    with pytest.raises(UnauthorizedError):
        await emitter.subscribe(group_key, unique, group="h")


@pytest.mark.parametrize(
    "options",
    [{"last": 1}, {"since": 1700000000}, {"until": 1700000000}, {"last": 5, "until": 2e9}],
)
async def test_subscribe_rejects_replay_options_with_a_group(
    emitter: Emitter, unique: str, options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"last.*group"):
        emitter.subscribe(NO_KEY, unique, group="g", **options)


@pytest.mark.parametrize("group", ["", "a/b", "+", "#", "a b", "/"])
async def test_subscribe_rejects_a_bad_group_name(
    emitter: Emitter, unique: str, group: str
) -> None:
    with pytest.raises(InvalidChannelError):
        emitter.subscribe(NO_KEY, unique, group=group)


async def test_subscribe_rejects_a_group_that_is_not_a_str(emitter: Emitter, unique: str) -> None:
    group: Any = 1
    with pytest.raises(TypeError, match="str"):
        emitter.subscribe(NO_KEY, unique, group=group)
