"""Reconnecting: the client's state on a real broker after the connection was replaced."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from emitter_anyio import Backoff, Emitter, Gap, UnauthorizedError, connect
from tests.client.tools import Calls, Relay, arrived, relay, texts
from tests.support.server import Server

pytestmark = pytest.mark.emitter


@pytest.fixture
async def proxy(server: Server) -> AsyncIterator[Relay]:
    async with relay(server) as proxy:
        yield proxy


@pytest.fixture
async def client(proxy: Relay) -> AsyncIterator[Emitter]:
    """A client whose connection the test can cut."""
    options = {"host": "127.0.0.1", "port": proxy.port, "secure": False}
    async with connect(options, username="client", reconnect=Backoff(0.01, 0.1)) as client:
        yield client


async def reconnect(proxy: Relay, client: Emitter) -> None:
    async with client.stream("connect") as connected:
        proxy.cut()
        await connected.receive()


async def test_subscriptions_are_restored(
    proxy: Relay, client: Emitter, emitter: Emitter, key: str, unique: str
) -> None:
    calls = Calls()
    client.on("message", calls, channel=f"{unique}handled/")
    await client.subscribe(key, f"{unique}handled/", 0)
    async with client.subscribe(key, f"{unique}streamed/", 0) as messages:
        await reconnect(proxy, client)
        await emitter.publish(key, f"{unique}streamed/", "x", qos=1)
        await emitter.publish(key, f"{unique}handled/", "y", qos=1)
        assert (await messages.receive()).as_string() == "x"
        assert texts(await calls.get(1)) == ["y"]


async def test_stored_messages_are_not_replayed_again(
    proxy: Relay, client: Emitter, key: str, unique: str
) -> None:
    await client.publish(key, unique, "old", 60, qos=1)
    async with client.subscribe(key, unique, 5) as messages:
        assert (await messages.receive()).as_string() == "old"
        await reconnect(proxy, client)
        assert await arrived(client, messages) == []


async def test_groups_are_restored(
    proxy: Relay, client: Emitter, emitter: Emitter, server: Server, key: str, unique: str
) -> None:
    created = await client.keygen(server.secret, f"$share/g/{unique}", "r")
    async with client.subscribe(created.key, unique, group="g") as messages:
        await reconnect(proxy, client)
        await emitter.publish(key, unique, "x", qos=1)
        assert (await messages.receive()).as_string() == "x"


async def test_links_are_restored(
    proxy: Relay, client: Emitter, emitter: Emitter, key: str, unique: str
) -> None:
    await client.link(key, unique, "x")
    async with emitter.subscribe(key, unique, 0) as messages:
        await reconnect(proxy, client)
        await client.publish_with_link("x", "through", qos=1)
        assert (await messages.receive()).as_string() == "through"


@pytest.mark.one_node(
    "a client that joins on another node during the outage is in no status and no event"
)
async def test_presence_feed_is_restored(
    proxy: Relay, client: Emitter, server: Server, key: str, unique: str
) -> None:
    async with connect(server.url, username="old") as old, connect(server.other_url) as new:
        await old.subscribe(key, unique, 0)
        async with client.watch_presence(key, unique) as feed:
            assert (await feed.receive()).event == "status"
            old_id, new_id = (await old.me()).id, (await new.me()).id
            async with client.stream("connect") as connected:
                async with client.stream("disconnect") as disconnected:
                    proxy.cut()
                    await disconnected.receive()
                await old.unsubscribe(key, unique)
                await new.subscribe(key, unique, 0)
                await connected.receive()
            # No event reports that the old client left, so it stays an unconfirmed member.
            while feed.members[old_id].confirmed or new_id not in feed.members:
                await feed.receive()


async def test_messages_stored_during_the_outage_are_resumed(
    proxy: Relay, client: Emitter, emitter: Emitter, key: str, unique: str
) -> None:
    numbers = iter(range(1000))
    received: set[int] = set()

    async def publish(count: int) -> None:
        for _ in range(count):
            await emitter.publish(key, unique, str(next(numbers)), 60)
        await emitter.flush()

    async with client.subscribe(key, unique, 0, resume=True, mark_gaps=True) as messages:

        async def receive_until(last: int) -> None:
            while last not in received:
                item = await messages.receive()
                if isinstance(item, Gap):
                    assert item.complete
                else:
                    received.add(int(item.as_string()))

        for round in range(1, 4):
            await publish(5)
            async with client.stream("disconnect") as disconnected:
                proxy.cut()
                await disconnected.receive()
            await publish(5)
            await receive_until(10 * round - 1)
            assert received == set(range(10 * round))
            await client.wait_connected()


async def test_refused_restore_raises_in_its_own_stream(
    proxy: Relay, client: Emitter, emitter: Emitter, server: Server, key: str, unique: str
) -> None:
    banned_key = (await emitter.keygen(server.secret, f"{unique}bad/", "r")).key
    async with (
        client.subscribe(key, unique, 0) as good,
        client.subscribe(banned_key, f"{unique}bad/") as refused,
    ):
        await emitter.keyban(server.secret, banned_key)
        await reconnect(proxy, client)
        with pytest.raises(UnauthorizedError):
            await refused.receive()
        await emitter.publish(key, unique, "x", qos=1)
        assert (await good.receive()).as_string() == "x"


async def test_key_function_that_uses_the_client(
    proxy: Relay, client: Emitter, emitter: Emitter, server: Server, key: str, unique: str
) -> None:
    created: list[str] = []

    async def provide() -> str:
        created.append((await client.keygen(server.secret, unique, "r")).key)
        return created[-1]

    async with client.subscribe(provide, unique) as messages:
        await emitter.keyban(server.secret, created[0])
        await reconnect(proxy, client)
        await emitter.publish(key, unique, "x", qos=1)
        assert (await messages.receive()).as_string() == "x"
    assert len(created) == 2
