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
from tests.client.tools import Calls, checkpoints, enter
from tests.support.server import Server

pytestmark = pytest.mark.emitter

NO_KEY = "A" * 32

lists_one_node = pytest.mark.one_node("a status lists only the clients of a single node")


@pytest.fixture
async def bob(other: Emitter) -> Member:
    """The other client, as presence lists it."""
    return Member((await other.me()).id, "bob")


# presence()


@lists_one_node
async def test_status_lists_the_subscribers(
    emitter: Emitter, other: Emitter, bob: Member, key: str, unique: str
) -> None:
    await emitter.subscribe(key, unique)
    await other.subscribe(key, unique)
    status = await emitter.presence(key, unique)
    assert isinstance(status, PresenceStatus)
    assert (status.event, status.channel, status.time.tzinfo) == ("status", unique, UTC)
    assert set(status.who) == {bob, Member((await emitter.me()).id)}


async def test_status_of_an_empty_channel_is_empty(emitter: Emitter, key: str, unique: str) -> None:
    assert (await emitter.presence(key, unique)).who == ()


@lists_one_node
@pytest.mark.parametrize(
    ("channel", "listed"), [("a/b/", True), ("a/", True), ("a/+/", True), ("a/b/c/", False)]
)
async def test_status_lists_the_clients_that_a_message_would_reach(
    emitter: Emitter,
    other: Emitter,
    bob: Member,
    key: str,
    unique: str,
    channel: str,
    listed: bool,
) -> None:
    await other.subscribe(key, unique + channel)
    status = await emitter.presence(key, f"{unique}a/b/")
    assert status.who == ((bob,) if listed else ())


async def test_key_without_presence_permission_is_refused(
    emitter: Emitter, server: Server, unique: str
) -> None:
    created = await emitter.keygen(server.secret, unique, "rw")
    with pytest.raises(UnauthorizedError, match="'p' \\(presence\\)") as caught:
        await emitter.presence(created.key, unique)
    error = caught.value
    assert (error.status, error.operation, error.channel) == (401, "presence", unique)
    assert created.key not in str(error)


async def test_status_is_also_emitted_as_presence(emitter: Emitter, key: str, unique: str) -> None:
    calls = Calls()
    emitter.on("presence", calls)
    status = await emitter.presence(key, unique)
    assert await calls.get(1) == [status]


# presence(changes=…)


async def test_changes_report_subscribe_and_unsubscribe(
    emitter: Emitter, other: Emitter, bob: Member, key: str, unique: str
) -> None:
    calls = Calls()
    emitter.on("presence", calls)
    await emitter.presence(key, unique, changes=True)
    await other.subscribe(key, unique)
    await other.unsubscribe(key, unique)
    status, joined, left = await calls.get(3)
    assert isinstance(status, PresenceStatus)
    assert (joined.event, joined.channel, joined.who) == ("subscribe", unique, (bob,))
    assert (left.event, left.channel, left.who) == ("unsubscribe", unique, (bob,))
    assert joined.time.tzinfo is UTC


async def test_changes_report_a_client_that_disconnects(
    server: Server, emitter: Emitter, key: str, unique: str
) -> None:
    calls = Calls()
    emitter.on("presence", calls)
    await emitter.presence(key, unique, changes=True)
    async with connect(server.other_url) as other:
        await other.subscribe(key, unique)
    _, joined, left = await calls.get(3)
    assert (joined.event, left.event) == ("subscribe", "unsubscribe")
    assert joined.who == left.who


async def test_further_presence_calls_leave_changes_on(
    emitter: Emitter, other: Emitter, bob: Member, key: str, unique: str
) -> None:
    calls = Calls()
    await emitter.presence(key, unique, changes=True)
    await emitter.presence(key, unique)
    await emitter.presence(key, unique, changes=True)
    emitter.on("presence", calls)
    await other.subscribe(key, unique)
    (joined,) = await calls.get(1)
    assert joined.who == (bob,)


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


async def test_turning_changes_off_without_turning_them_on(
    emitter: Emitter, key: str, unique: str
) -> None:
    assert (await emitter.presence(key, unique, changes=False)).who == ()


async def test_change_that_arrives_while_changes_are_turned_off_is_ignored(
    emitter: Emitter, key: str, unique: str
) -> None:
    errors = Calls()
    emitter.on("error", errors)
    await emitter.presence(key, unique, changes=True)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(subscribe, emitter, key, unique)
        await checkpoints(2)  # enough to send the request, not enough for its reply
        await emitter.presence(key, unique, changes=False)
    await emitter.flush()
    assert errors.values == []


async def test_changes_include_the_client_itself(emitter: Emitter, key: str, unique: str) -> None:
    calls = Calls()
    await emitter.presence(key, unique, changes=True)
    emitter.on("presence", calls)
    await emitter.subscribe(key, unique)
    (joined,) = await calls.get(1)
    assert joined.who == (Member((await emitter.me()).id),)


@pytest.mark.parametrize(
    ("channel", "delivered"), [("", True), ("+/", True), ("a/", True), ("b/", False)]
)
async def test_handler_for_a_channel_filters_presence(
    emitter: Emitter, other: Emitter, key: str, unique: str, channel: str, delivered: bool
) -> None:
    calls, all_events = Calls(), Calls()
    await emitter.presence(key, unique, changes=True)
    emitter.on("presence", all_events)
    emitter.on("presence", calls, channel=unique + channel)
    await other.subscribe(key, f"{unique}a/")
    await all_events.get(1)
    await emitter.disconnect()
    assert len(calls.values) == delivered


# watch_presence()


@lists_one_node
async def test_feed_starts_with_a_status(
    emitter: Emitter, other: Emitter, bob: Member, key: str, unique: str
) -> None:
    await other.subscribe(key, unique)
    async with emitter.watch_presence(key, unique) as feed:
        assert dict(feed.members) == {bob.id: bob}
        status = await feed.receive()
    assert isinstance(status, PresenceStatus)
    assert status.who == (bob,)


async def test_feed_reports_subscribe_and_unsubscribe(
    emitter: Emitter, other: Emitter, bob: Member, key: str, unique: str
) -> None:
    async with emitter.watch_presence(key, unique) as feed:
        assert (await feed.receive()).who == ()
        await other.subscribe(key, unique)
        joined = await feed.receive()
        assert (joined.event, joined.channel, joined.who) == ("subscribe", unique, (bob,))
        assert dict(feed.members) == {bob.id: bob}
        await other.unsubscribe(key, unique)
        left = await feed.receive()
        assert (left.event, left.channel, left.who) == ("unsubscribe", unique, (bob,))
        assert dict(feed.members) == {}


async def test_feed_reports_a_client_that_disconnects(
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


async def test_feed_includes_subchannels(
    emitter: Emitter, other: Emitter, bob: Member, key: str, unique: str
) -> None:
    async with emitter.watch_presence(key, unique) as feed:
        await other.subscribe(key, f"{unique}a/")
        _, joined = await feed.receive(), await feed.receive()
        assert (joined.event, joined.channel, joined.who) == ("subscribe", f"{unique}a/", (bob,))


@lists_one_node
async def test_member_that_unsubscribes_but_is_still_reached_is_restored_by_a_status(
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


async def test_fresh_status_keeps_members_of_subchannels(
    server: Server, emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    await other.subscribe(key, unique)
    async with emitter.watch_presence(key, unique) as feed, connect(server.other_url) as carol:
        await carol.subscribe(key, f"{unique}a/")
        assert [(await feed.receive()).event for _ in range(2)] == ["status", "subscribe"]
        carols_id = (await carol.me()).id
        before = carols_id in feed.members
        # Bob might still be reached through another subscription, so the feed requests a status.
        refreshed = anyio.Event()

        @emitter.on("presence")
        def handle(event: PresenceEvent) -> None:
            if event.event == "status":
                refreshed.set()

        await other.unsubscribe(key, unique)
        await refreshed.wait()
        assert (carols_id in feed.members) == before


async def test_members_are_a_read_only_view(emitter: Emitter, key: str, unique: str) -> None:
    async with emitter.watch_presence(key, unique) as feed:
        members: Any = feed.members
        with pytest.raises(TypeError):
            members["x"] = Member("x")


async def test_two_feeds_of_a_channel_get_the_same_events_and_end_independently(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    async with emitter.watch_presence(key, unique) as one:
        async with emitter.watch_presence(key, unique) as two:
            await other.subscribe(key, unique)
            for feed in (one, two):
                assert [(await feed.receive()).event for _ in range(2)] == ["status", "subscribe"]
        await other.unsubscribe(key, unique)
        assert (await one.receive()).event == "unsubscribe"


async def test_leaving_a_feed_leaves_changes_on(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    calls = Calls()
    await emitter.presence(key, unique, changes=True)
    async with emitter.watch_presence(key, unique):
        pass
    emitter.on("presence", calls)
    await other.subscribe(key, unique)
    assert (await calls.get(1))[0].event == "subscribe"


async def test_turning_changes_off_does_not_stop_a_feed(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    async with emitter.watch_presence(key, unique) as feed:
        await emitter.presence(key, unique, changes=True)
        await emitter.presence(key, unique, changes=False)
        await other.subscribe(key, unique)
        assert [(await feed.receive()).event for _ in range(2)] == ["status", "subscribe"]


async def test_leaving_a_feed_closes_it(emitter: Emitter, key: str, unique: str) -> None:
    async with emitter.watch_presence(key, unique) as feed:
        pass
    with pytest.raises(anyio.ClosedResourceError):
        await feed.receive()


async def test_closing_the_last_end_in_the_block_stops_the_feed(
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


async def test_change_that_arrives_while_a_feed_is_left_is_ignored(
    emitter: Emitter, key: str, unique: str
) -> None:
    errors = Calls()
    emitter.on("error", errors)
    async with anyio.create_task_group() as tasks:
        async with emitter.watch_presence(key, unique):
            tasks.start_soon(subscribe, emitter, key, unique)
            await checkpoints(2)  # enough to send the request, not enough for its reply
    await emitter.flush()
    assert errors.values == []


async def test_refused_feed_raises_and_emits_no_error(
    emitter: Emitter, server: Server, unique: str
) -> None:
    created = await emitter.keygen(server.secret, unique, "rw")
    errors = Calls()
    emitter.on("error", errors)
    with pytest.raises(UnauthorizedError) as caught:
        await enter(emitter.watch_presence(created.key, unique))
    assert (caught.value.operation, caught.value.channel) == ("presence", unique)
    await emitter.flush()
    await checkpoints()
    assert errors.values == []


async def test_disconnect_ends_a_feed_after_its_buffered_events(
    emitter: Emitter, key: str, unique: str
) -> None:
    async with emitter.watch_presence(key, unique) as feed:
        await emitter.disconnect()
        events: list[PresenceEvent] = [event async for event in feed]
    assert [event.event for event in events] == ["status"]


@pytest.mark.parametrize(
    ("options", "pattern"),
    [({"buffer": 0}, "buffer"), ({"overflow": "x"}, "overflow"), ({"refresh": 0}, "refresh")],
)
async def test_bad_option_is_rejected(
    emitter: Emitter, unique: str, options: dict[str, Any], pattern: str
) -> None:
    with pytest.raises(ValueError, match=pattern):
        emitter.watch_presence(NO_KEY, unique, **options)


async def subscribe(emitter: Emitter, key: str, channel: str) -> None:
    await emitter.subscribe(key, channel)
