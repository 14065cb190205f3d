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


async def test_key_allows_read_and_write_by_default(
    emitter: Emitter, server: Server, unique: str
) -> None:
    created = await emitter.keygen(server.secret, unique)
    assert created.channel == unique
    async with emitter.subscribe(created.key, unique) as messages:
        await emitter.publish(created.key, unique, "m", qos=1)
        assert await arrived(emitter, messages) == ["m"]


async def test_missing_slash_is_added(emitter: Emitter, server: Server, unique: str) -> None:
    created = await emitter.keygen(server.secret, unique.rstrip("/"))
    assert created.channel == unique


@pytest.mark.parametrize("permissions", ["r", "w", "p", "rw", "rwslp", ""])
async def test_key_permits_only_its_permissions(
    emitter: Emitter, server: Server, unique: str, permissions: str
) -> None:
    created = await emitter.keygen(server.secret, unique, permissions)
    permitted = ""
    for letter, call in (
        ("r", emitter.subscribe(created.key, unique)),
        ("w", emitter.publish(created.key, unique, "m", qos=1)),
        ("p", emitter.presence(created.key, unique)),
    ):
        try:
            await call
        except UnauthorizedError:
            continue
        permitted += letter
    assert permitted == "".join(letter for letter in "rwp" if letter in permissions)


async def test_key_with_a_ttl_works_before_it_expires(
    emitter: Emitter, server: Server, unique: str
) -> None:
    created = await emitter.keygen(server.secret, unique, "w", ttl=60)
    await emitter.publish(created.key, unique, "m", qos=1)
    assert created.key != (await emitter.keygen(server.secret, unique, "w")).key


async def test_hash_target_covers_all_subchannels(
    emitter: Emitter, server: Server, unique: str
) -> None:
    created = await emitter.keygen(server.secret, f"{unique}#/", "w")
    assert created.channel == f"{unique}#/"
    for channel in (unique, f"{unique}a/", f"{unique}a/b/"):
        await emitter.publish(created.key, channel, "m", qos=1)


async def test_plus_target_covers_one_level(emitter: Emitter, server: Server, unique: str) -> None:
    created = await emitter.keygen(server.secret, f"{unique}+/b/", "w")
    await emitter.publish(created.key, f"{unique}a/b/", "m", qos=1)
    with pytest.raises(UnauthorizedError):
        await emitter.publish(created.key, f"{unique}a/c/", "m", qos=1)


async def test_plain_target_covers_no_subchannels(
    emitter: Emitter, server: Server, unique: str
) -> None:
    created = await emitter.keygen(server.secret, unique, "w")
    with pytest.raises(UnauthorizedError):
        await emitter.publish(created.key, f"{unique}a/", "m", qos=1)


# Private channels


async def test_extend_key_creates_a_private_channel(
    emitter: Emitter, server: Server, unique: str
) -> None:
    extend = await emitter.keygen(server.secret, unique, "rwe")
    private = await emitter.keygen(extend.key, unique, "rw")
    assert private.channel == f"{unique}{(await emitter.me()).id}/"
    async with emitter.subscribe(private.key, private.channel) as messages:
        await emitter.publish(private.key, private.channel, "secret", qos=1)
        assert await arrived(emitter, messages) == ["secret"]


@pytest.mark.parametrize("operation", ["publish", "subscribe"])
async def test_refusal_of_an_extend_key_hints_at_keygen(
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
async def test_bad_secret_is_refused_and_not_shown(
    emitter: Emitter, unique: str, secret: str
) -> None:
    with pytest.raises((UnauthorizedError, NotFoundError)) as caught:
        await emitter.keygen(secret, unique)
    error = caught.value
    # With one licence in 256, any 32 letters decode to a secret key of another contract: 404.
    assert (error.operation, error.channel) == ("keygen", unique)
    assert error.hint is not None
    assert secret not in f"{error} {error!r}"


async def test_keygen_with_a_channel_key_is_refused_with_a_hint(
    emitter: Emitter, key: str, unique: str
) -> None:
    with pytest.raises(UnauthorizedError, match=r"extend"):
        await emitter.keygen(key, unique)


async def test_target_with_too_many_levels_is_rejected(emitter: Emitter, server: Server) -> None:
    deepest = "a/" * 23
    assert (await emitter.keygen(server.secret, deepest)).channel == deepest
    with pytest.raises(InvalidChannelError, match=r"24.*23"):
        await emitter.keygen(server.secret, "a/" * 24)


async def test_unknown_permissions_are_rejected(
    emitter: Emitter, server: Server, unique: str
) -> None:
    with pytest.raises(ValueError, match=r"'q', 'z'.*r, w, s"):
        await emitter.keygen(server.secret, unique, "rzwq")


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (("a b/",), "' '"),
        (("a//b/",), "empty level"),
        (("a/", b"rw"), "permissions.*str"),
        (("a/", "rw", -1), "ttl.* 0"),
        (("a/", "rw", 2**31), "ttl.* 0"),
        (("a/", "rw", "60"), "ttl.*str"),
    ],
)
async def test_bad_arguments_are_rejected(
    emitter: Emitter, arguments: tuple[Any, ...], pattern: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=pattern):
        await emitter.keygen(NO_KEY, *arguments)


async def test_key_is_not_in_the_repr(emitter: Emitter, server: Server, unique: str) -> None:
    created = await emitter.keygen(server.secret, unique)
    assert repr(created) == f"ChannelKey(key=…, channel={unique!r})"
    assert created.key not in f"{created}"


async def test_reply_is_also_emitted_as_keygen(
    emitter: Emitter, server: Server, unique: str
) -> None:
    calls = Calls()
    emitter.on("keygen", calls)
    created = await emitter.keygen(server.secret, unique)
    assert await calls.get(1) == [created]
    assert isinstance(created, ChannelKey)
