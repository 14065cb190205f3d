from __future__ import annotations

from typing import Any

import pytest

from emitter_anyio import (
    ChannelKey,
    Emitter,
    InvalidChannelError,
    NotFoundError,
    UnauthorizedError,
)
from tests.client.tools import Calls, arrived
from tests.support.server import Server

pytestmark = pytest.mark.emitter

NO_KEY = "A" * 32


async def test_a_key_opens_its_channel_to_read_and_write(
    emitter: Emitter, server: Server, unique: str
) -> None:
    made = await emitter.keygen(server.secret, unique)
    assert made.channel == unique
    async with emitter.subscribe(made.key, unique) as messages:
        await emitter.publish(made.key, unique, "m", qos=1)
        assert await arrived(emitter, messages) == ["m"]


async def test_a_missing_slash_is_added(emitter: Emitter, server: Server, unique: str) -> None:
    made = await emitter.keygen(server.secret, unique.rstrip("/"))
    assert made.channel == unique


@pytest.mark.parametrize("permissions", ["r", "w", "p", "rw", "rwslp", ""])
async def test_a_key_permits_what_it_was_made_for_and_nothing_else(
    emitter: Emitter, server: Server, unique: str, permissions: str
) -> None:
    made = await emitter.keygen(server.secret, unique, permissions)
    permitted = ""
    for letter, verb in (
        ("r", emitter.subscribe(made.key, unique)),
        ("w", emitter.publish(made.key, unique, "m", qos=1)),
        ("p", emitter.presence(made.key, unique)),
    ):
        try:
            await verb
        except UnauthorizedError:
            continue
        permitted += letter
    assert permitted == "".join(letter for letter in "rwp" if letter in permissions)


async def test_a_key_with_a_ttl_opens_while_it_lasts(
    emitter: Emitter, server: Server, unique: str
) -> None:
    made = await emitter.keygen(server.secret, unique, "w", ttl=60)
    await emitter.publish(made.key, unique, "m", qos=1)
    assert made.key != (await emitter.keygen(server.secret, unique, "w")).key


async def test_a_hash_opens_everything_below(emitter: Emitter, server: Server, unique: str) -> None:
    made = await emitter.keygen(server.secret, f"{unique}#/", "w")
    assert made.channel == f"{unique}#/"
    for channel in (unique, f"{unique}a/", f"{unique}a/b/"):
        await emitter.publish(made.key, channel, "m", qos=1)


async def test_a_plus_opens_any_one_level(emitter: Emitter, server: Server, unique: str) -> None:
    made = await emitter.keygen(server.secret, f"{unique}+/b/", "w")
    await emitter.publish(made.key, f"{unique}a/b/", "m", qos=1)
    with pytest.raises(UnauthorizedError):
        await emitter.publish(made.key, f"{unique}a/c/", "m", qos=1)


async def test_a_strict_target_opens_nothing_below(
    emitter: Emitter, server: Server, unique: str
) -> None:
    made = await emitter.keygen(server.secret, unique, "w")
    with pytest.raises(UnauthorizedError):
        await emitter.publish(made.key, f"{unique}a/", "m", qos=1)


# Private channels


async def test_an_extend_key_makes_a_private_channel(
    emitter: Emitter, server: Server, unique: str
) -> None:
    extend = await emitter.keygen(server.secret, unique, "rwe")
    private = await emitter.keygen(extend.key, unique, "rw")
    assert private.channel == f"{unique}{(await emitter.me()).id}/"
    async with emitter.subscribe(private.key, private.channel) as messages:
        await emitter.publish(private.key, private.channel, "secret", qos=1)
        assert await arrived(emitter, messages) == ["secret"]


@pytest.mark.parametrize("operation", ["publish", "subscribe"])
async def test_an_extend_key_serves_for_nothing_else_as_the_hint_says(
    emitter: Emitter, server: Server, unique: str, operation: str
) -> None:
    extend = await emitter.keygen(server.secret, unique, "rwe")
    with pytest.raises(UnauthorizedError, match=r"keygen\(\)") as caught:
        if operation == "publish":
            await emitter.publish(extend.key, unique, "m", qos=1)
        else:
            await emitter.subscribe(extend.key, unique)
    assert caught.value.operation == operation


# Refusals


@pytest.mark.parametrize("secret", [NO_KEY, "short"])
async def test_a_bad_secret_is_refused_and_not_shown(
    emitter: Emitter, unique: str, secret: str
) -> None:
    with pytest.raises((UnauthorizedError, NotFoundError)) as caught:
        await emitter.keygen(secret, unique)
    error = caught.value
    # To one licence in 256, any 32 letters read as a master key of another contract: a 404.
    assert (error.operation, error.channel) == ("keygen", unique)
    assert error.hint is not None
    assert secret not in f"{error} {error!r}"


async def test_a_key_that_may_not_make_keys_is_refused_with_a_hint(
    emitter: Emitter, key: str, unique: str
) -> None:
    with pytest.raises(UnauthorizedError, match=r"extend"):
        await emitter.keygen(key, unique)


async def test_a_target_that_is_too_deep_is_refused_before_it_is_sent(
    emitter: Emitter, server: Server
) -> None:
    deepest = "a/" * 23
    assert (await emitter.keygen(server.secret, deepest)).channel == deepest
    with pytest.raises(InvalidChannelError, match=r"24.*23"):
        await emitter.keygen(server.secret, "a/" * 24)


async def test_unknown_permissions_are_named(emitter: Emitter, server: Server, unique: str) -> None:
    with pytest.raises(ValueError, match=r"'q', 'z'.*r, w, s"):
        await emitter.keygen(server.secret, unique, "rzwq")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("a b/",), "' '"),
        (("a//b/",), "empty level"),
        (("a/", b"rw"), "permissions.*str"),
        (("a/", "rw", -1), "ttl.* 0"),
        (("a/", "rw", 2**31), "ttl.* 0"),
        (("a/", "rw", "60"), "ttl.*str"),
    ],
)
async def test_bad_arguments_are_named(
    emitter: Emitter, arguments: tuple[Any, ...], words: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        await emitter.keygen(NO_KEY, *arguments)


async def test_the_key_is_not_in_its_repr(emitter: Emitter, server: Server, unique: str) -> None:
    made = await emitter.keygen(server.secret, unique)
    assert repr(made) == f"ChannelKey(key=…, channel={unique!r})"
    assert made.key not in f"{made}"


async def test_the_answer_is_an_event_too(emitter: Emitter, server: Server, unique: str) -> None:
    calls = Calls()
    emitter.on("keygen", calls)
    made = await emitter.keygen(server.secret, unique)
    assert await calls.get(1) == [made]
    assert isinstance(made, ChannelKey)
