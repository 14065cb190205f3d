"""A lost link comes back: what a real broker then has of the client."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from emitter_anyio import Backoff, Emitter, Gap, UnauthorizedError, connect
from tests.client.tools import Calls, Relay, arrived, relay, texts
from tests.support.server import Server

pytestmark = pytest.mark.emitter


@pytest.fixture
async def link(server: Server) -> AsyncIterator[Relay]:
    async with relay(server) as link:
        yield link


@pytest.fixture
async def lost(link: Relay) -> AsyncIterator[Emitter]:
    """A client whose link a test may cut."""
    options = {"host": "127.0.0.1", "port": link.port, "secure": False}
    async with connect(options, username="lost", reconnect=Backoff(0.01, 0.1)) as lost:
        yield lost


async def cut(link: Relay, lost: Emitter) -> None:
    async with lost.stream("connect") as connected:
        link.cut()
        await connected.receive()


async def test_subscriptions_are_there_again(
    link: Relay, lost: Emitter, emitter: Emitter, key: str, unique: str
) -> None:
    calls = Calls()
    lost.on("message", calls, channel=f"{unique}handled/")
    await lost.subscribe(key, f"{unique}handled/", 0)
    async with lost.subscribe(key, f"{unique}streamed/", 0) as messages:
        await cut(link, lost)
        await emitter.publish(key, f"{unique}streamed/", "x", qos=1)
        await emitter.publish(key, f"{unique}handled/", "y", qos=1)
        assert (await messages.receive()).as_string() == "x"
        assert texts(await calls.get(1)) == ["y"]


async def test_what_is_stored_is_not_replayed_again(
    link: Relay, lost: Emitter, key: str, unique: str
) -> None:
    await lost.publish(key, unique, "old", 60, qos=1)
    async with lost.subscribe(key, unique, 5) as messages:
        assert (await messages.receive()).as_string() == "old"
        await cut(link, lost)
        assert await arrived(lost, messages) == []


async def test_groups_are_there_again(
    link: Relay, lost: Emitter, emitter: Emitter, server: Server, key: str, unique: str
) -> None:
    made = await lost.keygen(server.secret, f"$share/g/{unique}", "r")
    async with lost.subscribe(made.key, unique, group="g") as messages:
        await cut(link, lost)
        await emitter.publish(key, unique, "x", qos=1)
        assert (await messages.receive()).as_string() == "x"


async def test_short_links_are_there_again(
    link: Relay, lost: Emitter, emitter: Emitter, key: str, unique: str
) -> None:
    await lost.link(key, unique, "x")
    async with emitter.subscribe(key, unique, 0) as messages:
        await cut(link, lost)
        await lost.publish_with_link("x", "through", qos=1)
        assert (await messages.receive()).as_string() == "through"


@pytest.mark.one_node("who comes on another node meanwhile is in no status, and the event is lost")
async def test_a_watched_room_is_right_again(
    link: Relay, lost: Emitter, server: Server, key: str, unique: str
) -> None:
    async with connect(server.url, username="old") as old, connect(server.other_url) as new:
        await old.subscribe(key, unique, 0)
        async with lost.watch_presence(key, unique) as feed:
            assert (await feed.receive()).event == "status"
            old_id, new_id = (await old.me()).id, (await new.me()).id
            async with lost.stream("connect") as connected:
                async with lost.stream("disconnect") as gone:
                    link.cut()
                    await gone.receive()
                await old.unsubscribe(key, unique)
                await new.subscribe(key, unique, 0)
                await connected.receive()
            # Nobody has told this connection that the old one has left.
            while feed.members[old_id].confirmed or new_id not in feed.members:
                await feed.receive()


async def test_what_was_stored_meanwhile_is_resumed(
    link: Relay, lost: Emitter, emitter: Emitter, key: str, unique: str
) -> None:
    numbers = iter(range(1000))
    received: set[int] = set()

    async def publish(count: int) -> None:
        for _ in range(count):
            await emitter.publish(key, unique, str(next(numbers)), 60)
        await emitter.flush()

    async with lost.subscribe(key, unique, 0, resume=True, mark_gaps=True) as messages:

        async def take_up_to(last: int) -> None:
            while last not in received:
                item = await messages.receive()
                if isinstance(item, Gap):
                    assert item.complete
                else:
                    received.add(int(item.as_string()))

        for round in range(1, 4):
            await publish(5)
            async with lost.stream("disconnect") as gone:
                link.cut()
                await gone.receive()
            await publish(5)
            await take_up_to(10 * round - 1)
            assert received == set(range(10 * round))
            await lost.wait_connected()


async def test_what_may_no_more_raises_in_its_own_stream(
    link: Relay, lost: Emitter, emitter: Emitter, server: Server, key: str, unique: str
) -> None:
    bad = (await emitter.keygen(server.secret, f"{unique}bad/", "r")).key
    async with lost.subscribe(key, unique, 0) as good, lost.subscribe(bad, f"{unique}bad/") as one:
        await emitter.keyban(server.secret, bad)
        await cut(link, lost)
        with pytest.raises(UnauthorizedError):
            await one.receive()
        await emitter.publish(key, unique, "x", qos=1)
        assert (await good.receive()).as_string() == "x"


async def test_keys_that_are_made_by_the_client_itself(
    link: Relay, lost: Emitter, emitter: Emitter, server: Server, key: str, unique: str
) -> None:
    made: list[str] = []

    async def provide() -> str:
        made.append((await lost.keygen(server.secret, unique, "r")).key)
        return made[-1]

    async with lost.subscribe(provide, unique) as messages:
        await emitter.keyban(server.secret, made[0])
        await cut(link, lost)
        await emitter.publish(key, unique, "x", qos=1)
        assert (await messages.receive()).as_string() == "x"
    assert len(made) == 2
