from __future__ import annotations

from datetime import UTC
from typing import Any

import anyio
import pytest

from emitter_anyio import (
    Emitter,
    Member,
    PresenceEvent,
    PresenceStatus,
    UnauthorizedError,
    connect,
)
from tests.client.tools import Calls, enter, turns
from tests.support.server import Server

pytestmark = pytest.mark.emitter

NO_KEY = "A" * 32

a_status_is_of_one_node = pytest.mark.one_node("a status lists only the clients of its own node")


@pytest.fixture
async def bob(other: Emitter) -> Member:
    """Who the other client is."""
    return Member((await other.me()).id, "bob")


# presence()


@a_status_is_of_one_node
async def test_a_status_tells_who_is_there(
    emitter: Emitter, other: Emitter, bob: Member, key: str, unique: str
) -> None:
    await emitter.subscribe(key, unique)
    await other.subscribe(key, unique)
    status = await emitter.presence(key, unique)
    assert isinstance(status, PresenceStatus)
    assert (status.event, status.channel, status.time.tzinfo) == ("status", unique, UTC)
    assert set(status.who) == {bob, Member((await emitter.me()).id)}


async def test_nobody_is_there(emitter: Emitter, key: str, unique: str) -> None:
    assert (await emitter.presence(key, unique)).who == ()


@a_status_is_of_one_node
@pytest.mark.parametrize(
    ("channel", "there"), [("a/b/", True), ("a/", True), ("a/+/", True), ("a/b/c/", False)]
)
async def test_a_status_tells_whom_a_message_to_the_channel_would_reach(
    emitter: Emitter,
    other: Emitter,
    bob: Member,
    key: str,
    unique: str,
    channel: str,
    there: bool,
) -> None:
    await other.subscribe(key, unique + channel)
    status = await emitter.presence(key, f"{unique}a/b/")
    assert status.who == ((bob,) if there else ())


async def test_a_key_without_the_permission_is_refused(
    emitter: Emitter, server: Server, unique: str
) -> None:
    made = await emitter.keygen(server.secret, unique, "rw")
    with pytest.raises(UnauthorizedError, match="'p' \\(presence\\)") as caught:
        await emitter.presence(made.key, unique)
    error = caught.value
    assert (error.status, error.operation, error.channel) == (401, "presence", unique)
    assert made.key not in str(error)


async def test_a_status_is_an_event_too(emitter: Emitter, key: str, unique: str) -> None:
    calls = Calls()
    emitter.on("presence", calls)
    status = await emitter.presence(key, unique)
    assert await calls.get(1) == [status]


# presence(changes=…)


async def test_changes_tell_of_who_comes_and_goes(
    emitter: Emitter, other: Emitter, bob: Member, key: str, unique: str
) -> None:
    calls = Calls()
    emitter.on("presence", calls)
    await emitter.presence(key, unique, changes=True)
    await other.subscribe(key, unique)
    await other.unsubscribe(key, unique)
    status, came, left = await calls.get(3)
    assert isinstance(status, PresenceStatus)
    assert (came.event, came.channel, came.who) == ("subscribe", unique, (bob,))
    assert (left.event, left.channel, left.who) == ("unsubscribe", unique, (bob,))
    assert came.time.tzinfo is UTC


async def test_who_loses_the_link_has_left(
    server: Server, emitter: Emitter, key: str, unique: str
) -> None:
    calls = Calls()
    emitter.on("presence", calls)
    await emitter.presence(key, unique, changes=True)
    async with connect(server.other_url) as other:
        await other.subscribe(key, unique)
    _, came, left = await calls.get(3)
    assert (came.event, left.event) == ("subscribe", "unsubscribe")
    assert came.who == left.who


async def test_asking_again_leaves_the_changes_on(
    emitter: Emitter, other: Emitter, bob: Member, key: str, unique: str
) -> None:
    calls = Calls()
    await emitter.presence(key, unique, changes=True)
    await emitter.presence(key, unique)
    await emitter.presence(key, unique, changes=True)
    emitter.on("presence", calls)
    await other.subscribe(key, unique)
    (came,) = await calls.get(1)
    assert came.who == (bob,)


async def test_changes_can_be_turned_off(
    server: Server, emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    calls, errors = Calls(), Calls()
    emitter.on("error", errors)
    await emitter.presence(key, unique, changes=True)
    await emitter.presence(key, unique, changes=False)
    emitter.on("presence", calls)
    async with connect(server.url) as witness, witness.watch_presence(key, unique) as feed:
        await other.subscribe(key, unique)
        assert [(await feed.receive()).event, (await feed.receive()).event] == [
            "status",
            "subscribe",
        ]
    await emitter.flush()
    assert calls.values == []
    assert errors.values == []


async def test_turning_changes_off_that_were_never_on_is_fine(
    emitter: Emitter, key: str, unique: str
) -> None:
    assert (await emitter.presence(key, unique, changes=False)).who == ()


async def test_a_change_that_comes_while_they_are_turned_off_is_no_error(
    emitter: Emitter, key: str, unique: str
) -> None:
    errors = Calls()
    emitter.on("error", errors)
    await emitter.presence(key, unique, changes=True)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(subscribe, emitter, key, unique)
        await turns(2)  # enough for it to ask, and not for the answer
        await emitter.presence(key, unique, changes=False)
    await emitter.flush()
    assert errors.values == []


async def test_the_own_coming_is_told_too(emitter: Emitter, key: str, unique: str) -> None:
    calls = Calls()
    await emitter.presence(key, unique, changes=True)
    emitter.on("presence", calls)
    await emitter.subscribe(key, unique)
    (came,) = await calls.get(1)
    assert came.who == (Member((await emitter.me()).id),)


@pytest.mark.parametrize(
    ("channel", "told"), [("", True), ("+/", True), ("a/", True), ("b/", False)]
)
async def test_a_handler_may_ask_for_one_channel(
    emitter: Emitter, other: Emitter, key: str, unique: str, channel: str, told: bool
) -> None:
    calls, everything = Calls(), Calls()
    await emitter.presence(key, unique, changes=True)
    emitter.on("presence", everything)
    emitter.on("presence", calls, channel=unique + channel)
    await other.subscribe(key, f"{unique}a/")
    await everything.get(1)
    await emitter.disconnect()
    assert len(calls.values) == told


# watch_presence()


@a_status_is_of_one_node
async def test_the_feed_begins_with_a_status_of_who_is_there(
    emitter: Emitter, other: Emitter, bob: Member, key: str, unique: str
) -> None:
    await other.subscribe(key, unique)
    async with emitter.watch_presence(key, unique) as feed:
        assert dict(feed.members) == {bob.id: bob}
        status = await feed.receive()
    assert isinstance(status, PresenceStatus)
    assert status.who == (bob,)


async def test_the_feed_tells_of_who_comes_and_goes(
    emitter: Emitter, other: Emitter, bob: Member, key: str, unique: str
) -> None:
    async with emitter.watch_presence(key, unique) as feed:
        assert (await feed.receive()).who == ()
        await other.subscribe(key, unique)
        came = await feed.receive()
        assert (came.event, came.channel, came.who) == ("subscribe", unique, (bob,))
        assert dict(feed.members) == {bob.id: bob}
        await other.unsubscribe(key, unique)
        left = await feed.receive()
        assert (left.event, left.channel, left.who) == ("unsubscribe", unique, (bob,))
        assert dict(feed.members) == {}


async def test_the_feed_tells_of_who_loses_the_link(
    server: Server, emitter: Emitter, key: str, unique: str
) -> None:
    async with emitter.watch_presence(key, unique) as feed:
        async with connect(server.other_url, username="carol") as carol:
            await carol.subscribe(key, unique)
            await feed.receive()
            (member,) = (await feed.receive()).who
            assert member.username == "carol"
        assert (await feed.receive()).event == "unsubscribe"
        assert dict(feed.members) == {}


async def test_the_feed_tells_of_what_happens_below(
    emitter: Emitter, other: Emitter, bob: Member, key: str, unique: str
) -> None:
    async with emitter.watch_presence(key, unique) as feed:
        await other.subscribe(key, f"{unique}a/")
        _, came = await feed.receive(), await feed.receive()
        assert (came.event, came.channel, came.who) == ("subscribe", f"{unique}a/", (bob,))


@a_status_is_of_one_node
async def test_who_leaves_the_channel_and_is_still_reached_is_found_again_by_a_status(
    emitter: Emitter, other: Emitter, bob: Member, key: str, unique: str
) -> None:
    watched = f"{unique}a/"
    await other.subscribe(key, f"{unique}+/")
    async with emitter.watch_presence(key, watched) as feed:
        assert (await feed.receive()).who == (bob,)
        await other.subscribe(key, watched)
        assert (await feed.receive()).event == "subscribe"
        await other.unsubscribe(key, watched)
        assert (await feed.receive()).event == "unsubscribe"
        status = await feed.receive()
        assert (status.event, status.who) == ("status", (bob,))
        assert dict(feed.members) == {bob.id: bob}


async def test_a_fresh_status_does_not_throw_out_who_came_below(
    server: Server, emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    await other.subscribe(key, unique)
    async with emitter.watch_presence(key, unique) as feed, connect(server.other_url) as carol:
        await carol.subscribe(key, f"{unique}a/")
        assert [(await feed.receive()).event for _ in range(2)] == ["status", "subscribe"]
        carols_id = (await carol.me()).id
        before = carols_id in feed.members
        # The feed doubts whether bob is gone altogether, so it asks for a fresh status.
        asked = anyio.Event()

        @emitter.on("presence")
        def handle(event: PresenceEvent) -> None:
            if event.event == "status":
                asked.set()

        await other.unsubscribe(key, unique)
        await asked.wait()
        assert (carols_id in feed.members) == before


async def test_the_members_are_a_view_that_cannot_be_changed(
    emitter: Emitter, key: str, unique: str
) -> None:
    async with emitter.watch_presence(key, unique) as feed:
        members: Any = feed.members
        with pytest.raises(TypeError):
            members["x"] = Member("x")


async def test_two_feeds_of_a_channel_tell_the_same_and_one_goes_on_alone(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    async with emitter.watch_presence(key, unique) as one:
        async with emitter.watch_presence(key, unique) as two:
            await other.subscribe(key, unique)
            for feed in (one, two):
                assert [(await feed.receive()).event for _ in range(2)] == ["status", "subscribe"]
        await other.unsubscribe(key, unique)
        assert (await one.receive()).event == "unsubscribe"


async def test_a_feed_leaves_the_changes_of_presence_on(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    calls = Calls()
    await emitter.presence(key, unique, changes=True)
    async with emitter.watch_presence(key, unique):
        pass
    emitter.on("presence", calls)
    await other.subscribe(key, unique)
    assert (await calls.get(1))[0].event == "subscribe"


async def test_turning_changes_off_leaves_the_feed(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    async with emitter.watch_presence(key, unique) as feed:
        await emitter.presence(key, unique, changes=True)
        await emitter.presence(key, unique, changes=False)
        await other.subscribe(key, unique)
        assert [(await feed.receive()).event for _ in range(2)] == ["status", "subscribe"]


async def test_leaving_the_feed_closes_it(emitter: Emitter, key: str, unique: str) -> None:
    async with emitter.watch_presence(key, unique) as feed:
        pass
    with pytest.raises(anyio.ClosedResourceError):
        await feed.receive()


async def test_closing_the_last_end_inside_ends_the_feed(
    emitter: Emitter, key: str, unique: str
) -> None:
    async with emitter.watch_presence(key, unique) as feed:
        with feed.clone() as clone:
            feed.close()
            assert (await clone.receive()).event == "status"
            async with emitter.subscribe(key, unique):
                assert (await clone.receive()).event == "subscribe"
        async with emitter.stream("presence") as changes, emitter.subscribe(key, unique):
            await emitter.flush()
            assert changes.statistics().received == changes.statistics().current_buffer_used == 0


async def test_a_change_that_comes_while_the_feed_is_left_is_no_error(
    emitter: Emitter, key: str, unique: str
) -> None:
    errors = Calls()
    emitter.on("error", errors)
    async with anyio.create_task_group() as tasks:
        async with emitter.watch_presence(key, unique):
            tasks.start_soon(subscribe, emitter, key, unique)
            await turns(2)  # enough for it to ask, and not for the answer
    await emitter.flush()
    assert errors.values == []


async def test_a_refused_feed_raises_and_leaves_nothing(
    emitter: Emitter, server: Server, unique: str
) -> None:
    made = await emitter.keygen(server.secret, unique, "rw")
    errors = Calls()
    emitter.on("error", errors)
    with pytest.raises(UnauthorizedError) as caught:
        await enter(emitter.watch_presence(made.key, unique))
    assert (caught.value.operation, caught.value.channel) == ("presence", unique)
    await emitter.flush()
    await turns()
    assert errors.values == []


async def test_disconnecting_ends_the_feed_behind_what_is_buffered(
    emitter: Emitter, key: str, unique: str
) -> None:
    async with emitter.watch_presence(key, unique) as feed:
        await emitter.disconnect()
        events: list[PresenceEvent] = [event async for event in feed]
    assert [event.event for event in events] == ["status"]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"buffer": 0}, "buffer"), ({"overflow": "x"}, "overflow"), ({"refresh": 0}, "refresh")],
)
async def test_a_bad_option_is_named(
    emitter: Emitter, unique: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        emitter.watch_presence(NO_KEY, unique, **options)


async def subscribe(emitter: Emitter, key: str, channel: str) -> None:
    await emitter.subscribe(key, channel)
