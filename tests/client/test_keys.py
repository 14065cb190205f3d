"""Channel keys: permissions, targets, private channels and bans."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from emitter_anyio import (
    BadRequestError,
    ClosedError,
    Emitter,
    InvalidChannelError,
    UnauthorizedError,
    connect,
)
from tests.client.tools import Calls, arrived
from tests.support.server import Server

pytestmark = pytest.mark.emitter

NO_KEY = "A" * 32


async def is_permitted(call: Awaitable[object]) -> bool:
    try:
        await call
    except UnauthorizedError:
        return False
    return True


async def stored(emitter: Emitter, key: str, channel: str) -> list[str]:
    return [message.as_string() async for message in emitter.history(key, channel)]


# Permissions


@pytest.mark.parametrize("permissions", [*"rwslpx", "rwslpx", "rl", "ws", ""])
async def test_each_permission_allows_its_own_methods(
    emitter: Emitter, server: Server, key: str, unique: str, permissions: str
) -> None:
    created = await emitter.keygen(server.secret, unique, permissions)
    found = {
        "r": await is_permitted(emitter.subscribe(created.key, unique, last=0)),
        "w": await is_permitted(emitter.publish(created.key, unique, "m", ttl=60, qos=1)),
        "l": await is_permitted(stored(emitter, created.key, unique)),
        "p": await is_permitted(emitter.presence(created.key, unique)),
    }
    assert found == {letter: letter in permissions for letter in "rwlp"}
    stored_texts = await stored(emitter, key, unique)
    assert stored_texts == (["m"] if {"w", "s"} <= set(permissions) else [])


@pytest.mark.parametrize("letter", "rwslpx")
async def test_private_channel_key_has_only_the_permissions_of_its_extend_key(
    emitter: Emitter, server: Server, unique: str, letter: str
) -> None:
    extend = await emitter.keygen(server.secret, unique, f"e{letter}")
    private = await emitter.keygen(extend.key, unique, "rwslpx")
    key, channel = private.key, private.channel
    found = {
        "r": await is_permitted(emitter.subscribe(key, channel, last=0)),
        "w": await is_permitted(emitter.publish(key, channel, "m", qos=1)),
        "l": await is_permitted(stored(emitter, key, channel)),
        "p": await is_permitted(emitter.presence(key, channel)),
    }
    assert found == {permission: permission == letter for permission in "rwlp"}


async def test_key_does_not_work_for_another_channel(
    emitter: Emitter, server: Server, unique: str
) -> None:
    created = await emitter.keygen(server.secret, f"{unique}a/", "rwlp")
    other = f"{unique}b/"
    calls: list[Awaitable[object]] = [
        emitter.subscribe(created.key, other),
        emitter.publish(created.key, other, "m", qos=1),
        stored(emitter, created.key, other),
        emitter.presence(created.key, other),
    ]
    assert [await is_permitted(call) for call in calls] == [False] * 4


# Targets


@pytest.mark.parametrize(
    ("target", "covered", "uncovered"),
    [
        ("a/", ["a/"], ["", "a/b/", "b/"]),
        ("a/#/", ["a/", "a/b/", "a/b/c/d/"], ["", "b/"]),
        ("+/b/", ["a/b/", "c/b/"], ["b/", "a/b/c/", "a/a/"]),
        ("+/b/#/", ["a/b/", "a/b/c/", "c/b/c/d/"], ["b/", "a/c/"]),
        ("a/+/c/", ["a/b/c/", "a/a/c/"], ["a/c/", "a/b/b/"]),
    ],
)
async def test_target_covers_the_matching_channels(
    emitter: Emitter,
    server: Server,
    unique: str,
    target: str,
    covered: list[str],
    uncovered: list[str],
) -> None:
    created = await emitter.keygen(server.secret, unique + target, "w")
    assert created.channel == unique + target
    found = {
        channel: await is_permitted(emitter.publish(created.key, unique + channel, "m", qos=1))
        for channel in covered + uncovered
    }
    assert found == dict.fromkeys(covered, True) | dict.fromkeys(uncovered, False)


@pytest.mark.parametrize(("target", "subscribed"), [("a/#/", "a/+/b/"), ("a/+/b/", "a/+/b/")])
async def test_key_allows_wildcard_subscriptions_within_its_target(
    emitter: Emitter, server: Server, unique: str, target: str, subscribed: str
) -> None:
    created = await emitter.keygen(server.secret, unique + target, "r")
    assert await is_permitted(emitter.subscribe(created.key, unique + subscribed))


async def test_target_ending_in_plus_is_refused_with_a_hint(
    emitter: Emitter, server: Server, unique: str
) -> None:
    created = await emitter.keygen(server.secret, f"{unique}+/", "rw")
    with pytest.raises(UnauthorizedError, match=r"'\+/'"):
        await emitter.publish(created.key, f"{unique}a/", "m", qos=1)


@pytest.mark.parametrize("target", ["+/", "#/"])
async def test_wildcard_target_covers_every_channel(
    emitter: Emitter, server: Server, unique: str, target: str
) -> None:
    created = await emitter.keygen(server.secret, target, "w")
    await emitter.publish(created.key, unique, "m", qos=1)
    deeper = emitter.publish(created.key, f"{unique}a/", "m", qos=1)
    assert await is_permitted(deeper) == (target == "#/")


async def test_deepest_possible_target(emitter: Emitter, server: Server, unique: str) -> None:
    deepest = unique + "a/" * 22
    strict = await emitter.keygen(server.secret, deepest, "w")
    await emitter.publish(strict.key, deepest, "m", qos=1)
    wide = await emitter.keygen(server.secret, f"{deepest}#/", "w")
    assert wide.channel == f"{deepest}#/"
    await emitter.publish(wide.key, f"{deepest}b/c/", "m", qos=1)


async def test_channel_can_be_deeper_than_any_target(
    emitter: Emitter, key: str, unique: str
) -> None:
    deep = unique + "a/" * 60
    async with emitter.subscribe(key, deep) as messages:
        await emitter.publish(key, deep, "m", qos=1)
        assert await arrived(emitter, messages) == ["m"]


async def test_hash_target_with_too_many_levels_is_rejected(
    emitter: Emitter,
) -> None:
    with pytest.raises(InvalidChannelError, match=r"24.*23"):
        await emitter.keygen(NO_KEY, "a/" * 24 + "#/")


# Expiry


@pytest.mark.parametrize("ttl", [3600, 86400, 2**31 - 1])
async def test_key_expires_after_its_ttl(
    emitter: Emitter, server: Server, unique: str, ttl: int
) -> None:
    created = await emitter.keygen(server.secret, unique, "w", ttl)
    await emitter.publish(created.key, unique, "m", qos=1)
    if server.broker is not None:
        server.broker.advance(ttl + 1)
        with pytest.raises(UnauthorizedError, match="expired"):
            await emitter.publish(created.key, unique, "m", qos=1)


# Private channels


@pytest.fixture
async def extend(emitter: Emitter, server: Server, unique: str) -> str:
    return (await emitter.keygen(server.secret, unique, "rwslpe")).key


@pytest.mark.parametrize("below", ["", "#/"])
async def test_private_channel_is_named_after_the_connection(
    emitter: Emitter, extend: str, unique: str, below: str
) -> None:
    private = await emitter.keygen(extend, unique + below, "rw")
    own = f"{unique}{(await emitter.me()).id}/"
    assert private.channel == own + below
    await emitter.publish(private.key, own, "m", qos=1)
    deeper = emitter.publish(private.key, f"{own}a/", "m", qos=1)
    assert await is_permitted(deeper) == bool(below)


async def test_private_channel_can_be_shared_by_key_and_name(
    emitter: Emitter, other: Emitter, extend: str, unique: str
) -> None:
    private = await emitter.keygen(extend, unique, "rw")
    key, channel = private.key, private.channel
    async with emitter.subscribe(key, channel) as messages:
        await other.publish(key, channel, "psst", qos=1)
        assert await arrived(emitter, messages) == ["psst"]


async def test_each_connection_has_its_own_private_channel(
    emitter: Emitter, other: Emitter, extend: str, unique: str
) -> None:
    own = await emitter.keygen(extend, unique, "rw")
    theirs = await other.keygen(extend, unique, "rw")
    assert own.channel != theirs.channel
    with pytest.raises(UnauthorizedError):
        await other.publish(theirs.key, own.channel, "m", qos=1)


async def test_extend_key_does_not_extend_another_channel(emitter: Emitter, extend: str) -> None:
    with pytest.raises(UnauthorizedError, match="'e' \\(extend\\)"):
        await emitter.keygen(extend, "elsewhere/", "rw")


async def test_private_channel_with_a_wildcard_is_refused(
    emitter: Emitter, server: Server, unique: str
) -> None:
    wide = await emitter.keygen(server.secret, f"{unique}#/", "rwe")
    with pytest.raises(BadRequestError) as caught:
        await emitter.keygen(wide.key, f"{unique}+/a/", "rw")
    assert (caught.value.operation, caught.value.channel) == ("keygen", f"{unique}+/a/")


# Bans


@pytest.fixture
async def ban_key(
    emitter: Emitter, server: Server, unique: str
) -> AsyncIterator[Callable[[str], Awaitable[bool]]]:
    """A function that bans a key until the end of the test."""
    keys: list[str] = []

    async def ban(key: str) -> bool:
        keys.append(key)
        return await emitter.keyban(server.secret, key)

    yield ban
    for key in keys:
        assert await emitter.keyban(server.secret, key, False) is False


async def test_banned_key_is_refused_everywhere(
    emitter: Emitter, key: str, unique: str, ban_key: Callable[[str], Awaitable[bool]]
) -> None:
    await emitter.publish(key, unique, "m", qos=1)
    assert await ban_key(key) is True
    calls: list[Awaitable[object]] = [
        emitter.subscribe(key, unique),
        emitter.publish(key, unique, "m", qos=1),
        stored(emitter, key, unique),
        emitter.presence(key, unique),
    ]
    assert [await is_permitted(call) for call in calls] == [False] * 4


async def test_ban_applies_to_all_clients_and_only_to_that_key(
    emitter: Emitter,
    other: Emitter,
    server: Server,
    key: str,
    unique: str,
    ban_key: Callable[[str], Awaitable[bool]],
) -> None:
    second = (await emitter.keygen(server.secret, unique, "w")).key
    await ban_key(key)
    assert not await is_permitted(other.publish(key, unique, "m", qos=1))
    assert await is_permitted(other.publish(second, unique, "m", qos=1))


async def test_subscription_made_with_a_key_banned_later_continues(
    emitter: Emitter,
    server: Server,
    key: str,
    unique: str,
    ban_key: Callable[[str], Awaitable[bool]],
) -> None:
    second = (await emitter.keygen(server.secret, unique, "w")).key
    async with emitter.subscribe(key, unique) as messages:
        await ban_key(key)
        await emitter.publish(second, unique, "m", qos=1)
        assert await arrived(emitter, messages) == ["m"]


async def test_ban_can_be_lifted(emitter: Emitter, server: Server, key: str) -> None:
    # No check that the key works again: a real broker may cache the ban for a minute.
    assert await emitter.keyban(server.secret, key) is True
    assert await emitter.keyban(server.secret, key, banned=False) is False


async def test_ban_is_also_emitted_as_keyban(emitter: Emitter, server: Server, key: str) -> None:
    calls = Calls()
    emitter.on("keyban", calls)
    await emitter.keyban(server.secret, key)
    await emitter.keyban(server.secret, key, False)
    assert await calls.get(2) == [True, False]


async def test_keyban_with_a_channel_key_is_refused(
    emitter: Emitter, server: Server, key: str
) -> None:
    with pytest.raises(UnauthorizedError, match="same") as caught:
        await emitter.keyban(key, key)
    assert (caught.value.operation, caught.value.channel) == ("keyban", None)
    assert key not in str(caught.value)


async def test_keyban_of_a_string_that_is_not_a_key_is_refused(
    emitter: Emitter, server: Server
) -> None:
    with pytest.raises(UnauthorizedError) as caught:
        await emitter.keyban(server.secret, NO_KEY)
    assert server.secret not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (("", NO_KEY), "key.*empty"),
        ((NO_KEY, ""), "key.*empty"),
        ((None, NO_KEY), "key.*NoneType"),
        ((NO_KEY, b"k"), "key.*bytes"),
        ((NO_KEY, NO_KEY, 1), "banned.*int"),
        ((NO_KEY, NO_KEY, None), "banned.*NoneType"),
    ],
)
async def test_bad_arguments_of_keyban_are_rejected(
    emitter: Emitter, arguments: tuple[Any, ...], pattern: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=pattern):
        await emitter.keyban(*arguments)


async def test_keyban_before_entering_raises() -> None:
    emitter = connect("mqtt://127.0.0.1:1")
    with pytest.raises(ClosedError, match="entered"):
        await emitter.keyban(NO_KEY, NO_KEY)
