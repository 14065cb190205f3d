"""What keys open: permissions, targets, private channels and bans."""

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


async def permitted(verb: Awaitable[object]) -> bool:
    try:
        await verb
    except UnauthorizedError:
        return False
    return True


async def stored(emitter: Emitter, key: str, channel: str) -> list[str]:
    return [message.as_string() async for message in emitter.history(key, channel)]


# Permissions


@pytest.mark.parametrize("permissions", [*"rwslpx", "rwslpx", "rl", "ws", ""])
async def test_each_permission_opens_its_own_verbs(
    emitter: Emitter, server: Server, key: str, unique: str, permissions: str
) -> None:
    made = await emitter.keygen(server.secret, unique, permissions)
    found = {
        "r": await permitted(emitter.subscribe(made.key, unique, last=0)),
        "w": await permitted(emitter.publish(made.key, unique, "m", ttl=60, qos=1)),
        "l": await permitted(stored(emitter, made.key, unique)),
        "p": await permitted(emitter.presence(made.key, unique)),
    }
    assert found == {letter: letter in permissions for letter in "rwlp"}
    kept = await stored(emitter, key, unique)
    assert kept == (["m"] if {"w", "s"} <= set(permissions) else [])


@pytest.mark.parametrize("letter", "rwslpx")
async def test_a_private_channel_has_what_its_extend_key_has_and_no_more(
    emitter: Emitter, server: Server, unique: str, letter: str
) -> None:
    extend = await emitter.keygen(server.secret, unique, f"e{letter}")
    private = await emitter.keygen(extend.key, unique, "rwslpx")
    key, channel = private.key, private.channel
    found = {
        "r": await permitted(emitter.subscribe(key, channel, last=0)),
        "w": await permitted(emitter.publish(key, channel, "m", qos=1)),
        "l": await permitted(stored(emitter, key, channel)),
        "p": await permitted(emitter.presence(key, channel)),
    }
    assert found == {each: each == letter for each in "rwlp"}


async def test_a_key_opens_no_other_channel(emitter: Emitter, server: Server, unique: str) -> None:
    made = await emitter.keygen(server.secret, f"{unique}a/", "rwlp")
    other = f"{unique}b/"
    verbs: list[Awaitable[object]] = [
        emitter.subscribe(made.key, other),
        emitter.publish(made.key, other, "m", qos=1),
        stored(emitter, made.key, other),
        emitter.presence(made.key, other),
    ]
    assert [await permitted(verb) for verb in verbs] == [False] * 4


# Targets


@pytest.mark.parametrize(
    ("target", "opened", "closed"),
    [
        ("a/", ["a/"], ["", "a/b/", "b/"]),
        ("a/#/", ["a/", "a/b/", "a/b/c/d/"], ["", "b/"]),
        ("+/b/", ["a/b/", "c/b/"], ["b/", "a/b/c/", "a/a/"]),
        ("+/b/#/", ["a/b/", "a/b/c/", "c/b/c/d/"], ["b/", "a/c/"]),
        ("a/+/c/", ["a/b/c/", "a/a/c/"], ["a/c/", "a/b/b/"]),
    ],
)
async def test_a_target_opens_what_it_says(
    emitter: Emitter, server: Server, unique: str, target: str, opened: list[str], closed: list[str]
) -> None:
    made = await emitter.keygen(server.secret, unique + target, "w")
    assert made.channel == unique + target
    found = {
        channel: await permitted(emitter.publish(made.key, unique + channel, "m", qos=1))
        for channel in opened + closed
    }
    assert found == dict.fromkeys(opened, True) | dict.fromkeys(closed, False)


@pytest.mark.parametrize(
    ("target", "subscribed"), [("a/", "a/#/"), ("a/#/", "a/+/b/"), ("a/+/b/", "a/+/b/")]
)
async def test_a_key_opens_wildcards_of_its_target(
    emitter: Emitter, server: Server, unique: str, target: str, subscribed: str
) -> None:
    made = await emitter.keygen(server.secret, unique + target, "r")
    assert await permitted(emitter.subscribe(made.key, unique + subscribed))


async def test_a_target_that_ends_in_a_plus_opens_nothing_as_the_hint_says(
    emitter: Emitter, server: Server, unique: str
) -> None:
    made = await emitter.keygen(server.secret, f"{unique}+/", "rw")
    with pytest.raises(UnauthorizedError, match=r"'\+/'"):
        await emitter.publish(made.key, f"{unique}a/", "m", qos=1)


@pytest.mark.parametrize("target", ["+/", "#/"])
async def test_a_target_opens_everything(
    emitter: Emitter, server: Server, unique: str, target: str
) -> None:
    made = await emitter.keygen(server.secret, target, "w")
    await emitter.publish(made.key, unique, "m", qos=1)
    deeper = emitter.publish(made.key, f"{unique}a/", "m", qos=1)
    assert await permitted(deeper) == (target == "#/")


async def test_the_deepest_target(emitter: Emitter, server: Server, unique: str) -> None:
    deepest = unique + "a/" * 22
    strict = await emitter.keygen(server.secret, deepest, "w")
    await emitter.publish(strict.key, deepest, "m", qos=1)
    wide = await emitter.keygen(server.secret, f"{deepest}#/", "w")
    assert wide.channel == f"{deepest}#/"
    await emitter.publish(wide.key, f"{deepest}b/c/", "m", qos=1)


async def test_a_channel_may_be_deeper_than_a_target(
    emitter: Emitter, key: str, unique: str
) -> None:
    deep = unique + "a/" * 60
    async with emitter.subscribe(key, deep) as messages:
        await emitter.publish(key, deep, "m", qos=1)
        assert await arrived(emitter, messages) == ["m"]


async def test_a_target_under_a_hash_that_is_too_deep_is_refused_before_it_is_sent(
    emitter: Emitter,
) -> None:
    with pytest.raises(InvalidChannelError, match=r"24.*23"):
        await emitter.keygen(NO_KEY, "a/" * 24 + "#/")


# How long a key lasts


@pytest.mark.parametrize("ttl", [3600, 86400, 2**31 - 1])
async def test_a_key_lasts_for_its_ttl(
    emitter: Emitter, server: Server, unique: str, ttl: int
) -> None:
    made = await emitter.keygen(server.secret, unique, "w", ttl)
    await emitter.publish(made.key, unique, "m", qos=1)
    if server.broker is not None:
        server.broker.advance(ttl + 1)
        with pytest.raises(UnauthorizedError, match="expired"):
            await emitter.publish(made.key, unique, "m", qos=1)


# Private channels


@pytest.fixture
async def extend(emitter: Emitter, server: Server, unique: str) -> str:
    return (await emitter.keygen(server.secret, unique, "rwslpe")).key


@pytest.mark.parametrize("below", ["", "#/"])
async def test_a_private_channel_is_named_after_the_connection(
    emitter: Emitter, extend: str, unique: str, below: str
) -> None:
    private = await emitter.keygen(extend, unique + below, "rw")
    mine = f"{unique}{(await emitter.me()).id}/"
    assert private.channel == mine + below
    await emitter.publish(private.key, mine, "m", qos=1)
    deeper = emitter.publish(private.key, f"{mine}a/", "m", qos=1)
    assert await permitted(deeper) == bool(below)


async def test_a_private_channel_is_shared_by_handing_over_key_and_name(
    emitter: Emitter, other: Emitter, extend: str, unique: str
) -> None:
    private = await emitter.keygen(extend, unique, "rw")
    key, channel = private.key, private.channel
    async with emitter.subscribe(key, channel) as messages:
        await other.publish(key, channel, "psst", qos=1)
        assert await arrived(emitter, messages) == ["psst"]


async def test_each_connection_has_a_private_channel_of_its_own(
    emitter: Emitter, other: Emitter, extend: str, unique: str
) -> None:
    mine = await emitter.keygen(extend, unique, "rw")
    theirs = await other.keygen(extend, unique, "rw")
    assert mine.channel != theirs.channel
    with pytest.raises(UnauthorizedError):
        await other.publish(theirs.key, mine.channel, "m", qos=1)


async def test_an_extend_key_does_not_extend_another_channel(emitter: Emitter, extend: str) -> None:
    with pytest.raises(UnauthorizedError, match="'e' \\(extend\\)"):
        await emitter.keygen(extend, "elsewhere/", "rw")


async def test_a_private_channel_has_no_wildcard_in_it(
    emitter: Emitter, server: Server, unique: str
) -> None:
    wide = await emitter.keygen(server.secret, f"{unique}#/", "rwe")
    with pytest.raises(BadRequestError) as caught:
        await emitter.keygen(wide.key, f"{unique}+/a/", "rw")
    assert (caught.value.operation, caught.value.channel) == ("keygen", f"{unique}+/a/")


# Bans


@pytest.fixture
async def banned(
    emitter: Emitter, server: Server, unique: str
) -> AsyncIterator[Callable[[str], Awaitable[bool]]]:
    """Bans a key, and takes that back when the test is over."""
    keys: list[str] = []

    async def ban(key: str) -> bool:
        keys.append(key)
        return await emitter.keyban(server.secret, key)

    yield ban
    for key in keys:
        assert await emitter.keyban(server.secret, key, False) is False


async def test_a_banned_key_opens_nothing(
    emitter: Emitter, key: str, unique: str, banned: Callable[[str], Awaitable[bool]]
) -> None:
    await emitter.publish(key, unique, "m", qos=1)
    assert await banned(key) is True
    verbs: list[Awaitable[object]] = [
        emitter.subscribe(key, unique),
        emitter.publish(key, unique, "m", qos=1),
        stored(emitter, key, unique),
        emitter.presence(key, unique),
    ]
    assert [await permitted(verb) for verb in verbs] == [False] * 4


async def test_a_ban_is_for_everybody_and_leaves_other_keys(
    emitter: Emitter,
    other: Emitter,
    server: Server,
    key: str,
    unique: str,
    banned: Callable[[str], Awaitable[bool]],
) -> None:
    second = (await emitter.keygen(server.secret, unique, "w")).key
    await banned(key)
    assert not await permitted(other.publish(key, unique, "m", qos=1))
    assert await permitted(other.publish(second, unique, "m", qos=1))


async def test_what_was_subscribed_with_a_banned_key_goes_on(
    emitter: Emitter,
    server: Server,
    key: str,
    unique: str,
    banned: Callable[[str], Awaitable[bool]],
) -> None:
    second = (await emitter.keygen(server.secret, unique, "w")).key
    async with emitter.subscribe(key, unique) as messages:
        await banned(key)
        await emitter.publish(second, unique, "m", qos=1)
        assert await arrived(emitter, messages) == ["m"]


async def test_a_ban_can_be_taken_back(emitter: Emitter, server: Server, key: str) -> None:
    # That the key opens again the real broker may take a minute to believe.
    assert await emitter.keyban(server.secret, key) is True
    assert await emitter.keyban(server.secret, key, banned=False) is False


async def test_a_ban_is_an_event_too(emitter: Emitter, server: Server, key: str) -> None:
    calls = Calls()
    emitter.on("keyban", calls)
    await emitter.keyban(server.secret, key)
    await emitter.keyban(server.secret, key, False)
    assert await calls.get(2) == [True, False]


async def test_only_the_secret_bans(emitter: Emitter, server: Server, key: str) -> None:
    with pytest.raises(UnauthorizedError, match="same") as caught:
        await emitter.keyban(key, key)
    assert (caught.value.operation, caught.value.channel) == ("keyban", None)
    assert key not in str(caught.value)


async def test_what_is_banned_has_to_be_a_key(emitter: Emitter, server: Server) -> None:
    with pytest.raises(UnauthorizedError) as caught:
        await emitter.keyban(server.secret, NO_KEY)
    assert server.secret not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("", NO_KEY), "key.*empty"),
        ((NO_KEY, ""), "key.*empty"),
        ((None, NO_KEY), "key.*NoneType"),
        ((NO_KEY, b"k"), "key.*bytes"),
        ((NO_KEY, NO_KEY, 1), "banned.*int"),
        ((NO_KEY, NO_KEY, None), "banned.*NoneType"),
    ],
)
async def test_bad_arguments_of_keyban_are_named(
    emitter: Emitter, arguments: tuple[Any, ...], words: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        await emitter.keyban(*arguments)


async def test_a_client_that_is_not_entered_bans_nobody() -> None:
    emitter = connect("mqtt://127.0.0.1:1")
    with pytest.raises(ClosedError, match="entered"):
        await emitter.keyban(NO_KEY, NO_KEY)
