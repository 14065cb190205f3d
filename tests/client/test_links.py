"""``link()``, ``publish_with_link()`` and ``me()``."""

from __future__ import annotations

from typing import Any

import pytest

from emitter_anyio import (
    BadRequestError,
    Emitter,
    InvalidChannelError,
    Link,
    Me,
    MessageTooLargeError,
    RequestError,
    UnauthorizedError,
    connect,
)
from tests.client.tools import Calls, arrived
from tests.support.server import Server

pytestmark = pytest.mark.emitter

NO_KEY = "A" * 32


async def stored(emitter: Emitter, key: str, channel: str) -> list[str]:
    return [message.as_string() async for message in emitter.history(key, channel)]


async def test_publish_with_link_reaches_its_channel(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    assert await emitter.link(key, unique, "a1") == Link("a1", unique)
    async with other.subscribe(key, unique) as messages:
        await emitter.publish_with_link("a1", "acknowledged", qos=1)
        await emitter.publish_with_link("a1", {"not": "acknowledged"})
        await emitter.flush()
        assert await arrived(other, messages) == ["acknowledged", '{"not":"acknowledged"}']


@pytest.mark.parametrize("name", ["a", "Z", "0", "zz", "9A"])
async def test_valid_link_names(emitter: Emitter, key: str, unique: str, name: str) -> None:
    await emitter.link(key, unique, name)
    await emitter.publish_with_link(name, "m", qos=1)


async def test_link_without_echo_does_not_reach_its_own_client(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    created = await emitter.link(key, unique, "a", echo=False)
    assert created == Link("a", f"{unique}?me=0")
    async with emitter.subscribe(key, unique) as own, other.subscribe(key, unique) as theirs:
        await emitter.publish_with_link("a", "m", qos=1)
        assert await arrived(emitter, own) == []
        assert await arrived(other, theirs) == ["m"]


async def test_link_with_a_ttl_stores_its_messages(emitter: Emitter, key: str, unique: str) -> None:
    created = await emitter.link(key, unique, "a", ttl=60)
    assert created.channel == f"{unique}?ttl=60"
    await emitter.link(key, unique, "b", ttl=0)
    await emitter.link(key, unique, "c")
    for name in "abc":
        await emitter.publish_with_link(name, name, qos=1)
    await emitter.publish_with_link("c", "retained", qos=1, retain=True)
    assert await stored(emitter, key, unique) == ["a", "retained"]


async def test_ttl_of_a_link_is_in_seconds(
    emitter: Emitter, server: Server, key: str, unique: str
) -> None:
    await emitter.link(key, unique, "a", ttl=30)
    await emitter.publish_with_link("a", "m", qos=1)
    assert await stored(emitter, key, unique) == ["m"]
    if server.broker is not None:
        server.broker.advance(31)
        assert await stored(emitter, key, unique) == []


async def test_link_can_subscribe(emitter: Emitter, other: Emitter, key: str, unique: str) -> None:
    calls = Calls()
    emitter.on("message", calls)
    await emitter.publish(key, unique, "before", ttl=60, qos=1)
    await emitter.link(key, unique, "a", subscribe=True)
    await emitter.publish_with_link("a", "m", qos=1)
    await other.publish(key, unique, "theirs", qos=1)
    assert [message.as_string() for message in await calls.get(2)] == ["m", "theirs"]


async def test_subscription_of_a_link_ends_with_unsubscribe(
    emitter: Emitter, key: str, unique: str
) -> None:
    calls = Calls()
    emitter.on("message", calls)
    await emitter.link(key, unique, "a", subscribe=True)
    await emitter.unsubscribe(key, unique)
    await emitter.publish_with_link("a", "m", qos=1)
    assert calls.values == []


async def test_unsubscribing_a_link_leaves_a_stream_subscribed(
    emitter: Emitter, key: str, unique: str
) -> None:
    async with emitter.subscribe(key, unique) as messages:
        await emitter.link(key, unique, "a", subscribe=True)
        await emitter.unsubscribe(key, unique)
        await emitter.publish_with_link("a", "m", qos=1)
        assert await arrived(emitter, messages) == ["m"]


async def test_link_exists_although_its_subscription_was_refused(
    emitter: Emitter, server: Server, unique: str
) -> None:
    write_only = (await emitter.keygen(server.secret, unique, "w")).key
    with pytest.raises(UnauthorizedError, match="'r' \\(read\\)"):
        await emitter.link(write_only, unique, "a", subscribe=True)
    await emitter.publish_with_link("a", "m", qos=1)


async def test_link_name_can_be_reassigned(emitter: Emitter, key: str, unique: str) -> None:
    async with emitter.subscribe(key, unique) as messages:
        await emitter.link(key, f"{unique}a/", "a")
        await emitter.link(key, f"{unique}b/", "a")
        await emitter.publish_with_link("a", "m", qos=1)
        await emitter.flush()
        assert (await messages.receive()).channel == f"{unique}b/"


async def test_link_is_unknown_to_another_connection(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    await emitter.link(key, unique, "a")
    with pytest.raises(BadRequestError, match=r"link\(\)"):
        await other.publish_with_link("a", "m", qos=1)


async def test_link_ends_with_the_connection(server: Server, key: str, unique: str) -> None:
    emitter = connect(server.url)
    async with emitter:
        await emitter.link(key, unique, "a")
    async with emitter:
        with pytest.raises(BadRequestError):
            await emitter.publish_with_link("a", "m", qos=1)


async def test_key_of_a_link_is_checked_when_publishing(
    emitter: Emitter, server: Server, unique: str
) -> None:
    read_only = (await emitter.keygen(server.secret, unique, "r")).key
    await emitter.link(read_only, unique, "a")
    with pytest.raises(UnauthorizedError, match="'w'") as caught:
        await emitter.publish_with_link("a", "m", qos=1)
    error = caught.value
    assert (error.operation, error.channel) == ("publish_with_link", unique)
    assert read_only not in str(error)


async def test_flush_raises_the_refusal_of_a_link_with_a_bad_key(
    emitter: Emitter, unique: str
) -> None:
    errors = Calls()
    emitter.on("error", errors)
    await emitter.link(NO_KEY, unique, "a")
    await emitter.publish_with_link("a", "m")
    with pytest.raises(UnauthorizedError):
        await emitter.flush()
    (error,) = await errors.get(1)
    assert isinstance(error, UnauthorizedError)


# Message size


async def test_largest_message_through_a_link(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    await emitter.link(key, unique, "a")
    largest = b"x" * (65528 - len(unique))
    async with other.subscribe(key, unique) as messages:
        await emitter.publish_with_link("a", largest, qos=1)
        assert (await messages.receive()).binary == largest
    with pytest.raises(MessageTooLargeError, match="65,529 bytes"):
        await emitter.publish_with_link("a", largest + b"x", qos=1)
    await emitter.flush()


async def test_oversized_message_is_rejected_for_an_unknown_link(
    emitter: Emitter,
) -> None:
    with pytest.raises(MessageTooLargeError, match="65536"):
        await emitter.publish_with_link("a", b"x" * 65534)


# me()


async def test_me_returns_id_and_links(emitter: Emitter, key: str, unique: str) -> None:
    me = await emitter.me()
    assert (len(me.id), dict(me.links)) == (26, {})
    await emitter.link(key, unique, "a")
    await emitter.link(key, f"{unique}b/", "b2", ttl=5, echo=False)
    assert await emitter.me() == Me(me.id, {"a": unique, "b2": f"{unique}b/?ttl=5&me=0"})
    connection = emitter.connection
    assert connection is not None
    assert connection.id == me.id


async def test_me_is_immutable(emitter: Emitter) -> None:
    me: Any = await emitter.me()
    with pytest.raises(TypeError):
        me.links["a"] = "b/"
    with pytest.raises(AttributeError):
        me.id = "x"


async def test_each_connection_has_its_own_id(
    server: Server, emitter: Emitter, other: Emitter
) -> None:
    reentered = connect(server.url)
    ids = {(await emitter.me()).id, (await other.me()).id}
    for _ in range(2):
        async with reentered:
            ids.add((await reentered.me()).id)
    assert len(ids) == 4


async def test_replies_are_also_emitted_as_link_and_me(
    emitter: Emitter, key: str, unique: str
) -> None:
    links, mes = Calls(), Calls()
    emitter.on("link", links)
    emitter.on("me", mes)
    created = await emitter.link(key, unique, "a")
    me = await emitter.me()
    assert await links.get(1) == [created]
    assert await mes.get(1) == [me]


# Argument checks


@pytest.mark.parametrize("name", ["", "abc", "a_", "ä", "a/", "+"])
async def test_bad_link_name_is_rejected(
    emitter: Emitter, key: str, unique: str, name: str
) -> None:
    sent = emitter.statistics().pending
    with pytest.raises(ValueError, match="letters or digits"):
        await emitter.link(key, unique, name)
    with pytest.raises(ValueError, match="letters or digits"):
        await emitter.publish_with_link(name, "m")
    assert emitter.statistics().pending == sent


@pytest.mark.parametrize(
    ("arguments", "options", "pattern"),
    [
        ((NO_KEY, "a/", 1), {}, "name.*int"),
        ((NO_KEY, 1, "a"), {}, "channel.*int"),
        ((1, "a/", "a"), {}, "key.*int"),
        ((NO_KEY, "a/", "a"), {"ttl": -1}, "ttl.* 0"),
        ((NO_KEY, "a/", "a"), {"ttl": "60"}, "ttl.*str"),
    ],
)
async def test_bad_arguments_are_rejected(
    emitter: Emitter, arguments: tuple[Any, ...], options: dict[str, Any], pattern: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=pattern):
        await emitter.link(*arguments, **options)


@pytest.mark.parametrize("channel", ["a/+/", "a/#/", "a//", "a b/", "", "a/?ttl=5"])
async def test_bad_channel_is_rejected(emitter: Emitter, channel: str) -> None:
    with pytest.raises(InvalidChannelError):
        await emitter.link(NO_KEY, channel, "a")


async def test_flush_raises_the_refusal_of_an_unknown_link(emitter: Emitter) -> None:
    emitter.on("error", lambda error: None)
    await emitter.publish_with_link("zz", "m")
    with pytest.raises(RequestError) as caught:
        await emitter.flush()
    assert caught.value.status == 400
