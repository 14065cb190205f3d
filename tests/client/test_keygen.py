from __future__ import annotations

from typing import Any

import anyio
import pytest

from emitter_anyio import (
    ChannelKey,
    Emitter,
    EmitterMessage,
    InvalidChannelError,
    NotFoundError,
    UnauthorizedError,
    Will,
    connect,
)
from tests.client.tools import Calls, arrived
from tests.support.server import Server

pytestmark = pytest.mark.emitter

NO_KEY = "A" * 32


def double(request: EmitterMessage) -> object:
    return 2 * request.as_object()


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
    made = await emitter.keygen(server.secret, unique)
    shown = f"ChannelKey(key=…, channel={unique!r})"
    assert [repr(made), str(made), f"{made}"] == [shown] * 3


async def test_channel_key_is_accepted_wherever_a_key_is(
    emitter: Emitter, server: Server, unique: str
) -> None:
    key = await emitter.keygen(server.secret, f"{unique}#/", "rwslp")
    extend = await emitter.keygen(server.secret, unique, "rwe")
    private = await emitter.keygen(extend, unique, "rw")

    async def get_key() -> ChannelKey:
        return private

    async with (
        connect(server.url, will=Will(key, f"{unique}will/", "gone")) as mortal,
        emitter.subscribe(key, unique, last=0) as messages,
        emitter.subscribe(get_key, private.channel, last=0),
        emitter.watch_presence(key, unique) as feed,
        anyio.create_task_group() as tasks,
    ):
        await feed.receive()
        await tasks.start(emitter.serve, key, f"{unique}double/", double)
        for qos in (0, 1):
            await emitter.publish(key, unique, "m", ttl=60, qos=qos)
        await emitter.publish(get_key, private.channel, "m", qos=1)
        assert (await emitter.request(key, f"{unique}double/", 4)).as_object() == 8
        assert (await emitter.presence(key, unique)).channel == unique
        assert [stored.channel async for stored in emitter.history(key, unique)] == [unique] * 2
        await emitter.link(key, f"{unique}link/", "k1", subscribe=True)
        await emitter.publish_with_link("k1", "m", qos=1)
        await mortal.disconnect()
        expected = {unique, private.channel, f"{unique}link/", f"{unique}will/"}
        while expected:
            expected.discard((await messages.receive()).channel)
        tasks.cancel_scope.cancel()


async def test_unsubscribe_accepts_the_key_of_a_channel_key(
    emitter: Emitter, server: Server, unique: str
) -> None:
    calls = Calls()
    emitter.on("message", calls)
    key = await emitter.keygen(server.secret, unique)
    await emitter.subscribe(key, unique)
    await emitter.publish(key, unique, "before", qos=1)
    await emitter.unsubscribe(key.key, unique)
    await emitter.publish(key, unique, "after", qos=1)
    await emitter.flush()
    assert [message.as_string() for message in calls.values] == ["before"]


async def test_channel_key_can_be_banned(emitter: Emitter, server: Server, unique: str) -> None:
    secret = ChannelKey(server.secret, "")
    key = await emitter.keygen(secret, unique)
    assert await emitter.keyban(secret, key) is True
    with pytest.raises(UnauthorizedError):
        await emitter.publish(key, unique, "m", qos=1)
    assert await emitter.keyban(secret, key, False) is False


async def test_channel_of_a_channel_key_is_not_compared(
    emitter: Emitter, server: Server, unique: str
) -> None:
    key = await emitter.keygen(server.secret, unique)
    await emitter.publish(ChannelKey(key.key, "elsewhere/"), unique, "m", qos=1)
    with pytest.raises(UnauthorizedError):
        await emitter.publish(key, f"{unique}a/", "m", qos=1)


async def test_reply_is_also_emitted_as_keygen(
    emitter: Emitter, server: Server, unique: str
) -> None:
    calls = Calls()
    emitter.on("keygen", calls)
    created = await emitter.keygen(server.secret, unique)
    assert await calls.get(1) == [created]
    assert isinstance(created, ChannelKey)
