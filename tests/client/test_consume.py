"""``consume()``: reading every stored message of a channel, across restarts."""

from __future__ import annotations

import pickle
from datetime import UTC, datetime

import anyio
import pytest
from anyio import ClosedResourceError

from emitter_anyio import (
    Consumer,
    Emitter,
    InvalidChannelError,
    StoredMessage,
    UnauthorizedError,
    connect,
)
from tests.client.test_history import next_second, numbers, store
from tests.client.tools import arrived
from tests.support.server import Server

pytestmark = pytest.mark.emitter

NO_KEY = "A" * 32


async def take(log: Consumer, count: int) -> list[int]:
    """Receive messages that are numbers."""
    return [(await anext(log)).as_object() for _ in range(count)]


async def test_stored_messages_come_first_then_further_ones(
    emitter: Emitter, key: str, unique: str
) -> None:
    await store(emitter, key, unique, *range(5))
    async with emitter.consume(key, unique) as log:
        assert await take(log, 5) == list(range(5))
        for number in range(5, 10):
            await emitter.publish(key, unique, number, ttl=60)
            assert await take(log, 1) == [number]
        await store(emitter, key, unique, *range(10, 300))
        assert await take(log, 290) == list(range(10, 300))
        assert log.complete


async def test_messages_of_another_client_wake_it(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    received: list[int] = []

    async def consume() -> None:
        async with emitter.consume(key, unique) as log:
            started.set()
            received.extend(await take(log, 20))

    started = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(consume)
        await started.wait()
        for number in range(20):
            await other.publish(key, unique, number, ttl=60, qos=1)
    assert received == list(range(20))


async def test_it_continues_after_a_cursor(
    emitter: Emitter, server: Server, key: str, unique: str
) -> None:
    received: list[int] = []
    cursor = None
    for life in range(6):
        await store(emitter, key, unique, *range(life * 10, life * 10 + 10))
        if life == 3:
            await next_second(server)
        # Each time it stops in the middle of what is stored.
        async with connect(server.url) as again, again.consume(key, unique, after=cursor) as log:
            received += await take(log, 7)
            cursor = pickle.loads(pickle.dumps(log.cursor))
            assert log.complete
    async with emitter.consume(key, unique, after=cursor) as log:
        received += await take(log, 18)
    assert received == list(range(60))


async def test_a_cursor_is_that_of_the_message_returned_last(
    emitter: Emitter, key: str, unique: str
) -> None:
    await store(emitter, key, unique, *range(4))
    async with emitter.consume(key, unique) as log:
        cursors = [log.cursor]
        for _ in range(4):
            await anext(log)
            cursors.append(log.cursor)
    for number, cursor in enumerate(cursors):
        assert type(cursor) is str
        assert cursor.isascii()
        assert len(cursor) < 100
        assert await numbers(emitter.history(key, unique, after=cursor)) == list(range(number, 4))


async def test_it_begins_after_a_message_or_now(emitter: Emitter, key: str, unique: str) -> None:
    await store(emitter, key, unique, *range(6))
    stored = [message async for message in emitter.history(key, unique)]
    async with emitter.consume(key, unique, after=stored[2]) as log:
        assert await take(log, 3) == [3, 4, 5]
    async with emitter.consume(key, unique, after="now") as log:
        cursor = log.cursor
        await emitter.publish(key, unique, 6, ttl=60)
        assert await take(log, 1) == [6]
    async with emitter.consume(key, unique, after=cursor) as log:
        assert await take(log, 1) == [6]


async def test_now_is_before_the_first_message_of_an_empty_channel(
    emitter: Emitter, key: str, unique: str
) -> None:
    async with emitter.consume(key, unique, after="now") as log:
        cursor = log.cursor
        await emitter.publish(key, unique, 1, ttl=60)
        assert await take(log, 1) == [1]
    async with emitter.consume(key, unique, after=cursor) as log:
        assert await take(log, 1) == [1]


async def test_only_stored_messages_appear(emitter: Emitter, key: str, unique: str) -> None:
    async with emitter.consume(key, unique) as log:
        await emitter.publish(key, unique, 0)
        await emitter.publish(key, unique, 1, ttl=60)
        await emitter.publish(key, unique, 2)
        await emitter.publish(key, unique, 3, retain=True)
        assert await take(log, 2) == [1, 3]


async def test_it_has_the_channels_below(emitter: Emitter, key: str, unique: str) -> None:
    async with emitter.consume(key, f"{unique}+/b/") as log:
        for number, channel in enumerate(("", "a/", "a/b/", "c/b/", "c/", "d/b/e/")):
            await emitter.publish(key, unique + channel, number, ttl=60)
        assert await take(log, 3) == [2, 3, 5]


async def test_a_subscription_to_the_same_channel_gets_its_messages(
    emitter: Emitter, key: str, unique: str
) -> None:
    async with emitter.subscribe(key, unique, 0) as messages:
        async with emitter.consume(key, unique) as log, emitter.consume(key, unique) as twin:
            await store(emitter, key, unique, 1, 2)
            assert await take(log, 2) == await take(twin, 2) == [1, 2]
        await store(emitter, key, unique, 3)
        assert await arrived(emitter, messages) == ["1", "2", "3"]


async def test_leaving_unsubscribes(
    emitter: Emitter, server: Server, key: str, unique: str
) -> None:
    async with emitter.consume(key, unique) as log:
        cursor = log.cursor
        assert len((await emitter.presence(key, unique)).who) == 1
    await emitter.flush()
    assert (await emitter.presence(key, unique)).who == ()
    with pytest.raises(ClosedResourceError, match="consume"):
        await anext(log)
    assert (log.cursor, log.complete) == (cursor, True)


async def test_leaving_ends_an_iteration(emitter: Emitter, key: str, unique: str) -> None:
    async def iterate(log: Consumer) -> None:
        with pytest.raises(ClosedResourceError):
            await anext(log)
        ended.set()

    ended = anyio.Event()
    async with anyio.create_task_group() as tasks:
        async with emitter.consume(key, unique) as log:
            tasks.start_soon(iterate, log)
            await anyio.wait_all_tasks_blocked()
        await ended.wait()


async def test_it_ends_when_the_client_disconnects(
    emitter: Emitter, server: Server, key: str, unique: str
) -> None:
    await store(emitter, key, unique, *range(50))
    async with connect(server.url) as leaving:
        async with leaving.consume(key, unique) as log, anyio.create_task_group() as tasks:
            assert await take(log, 1) == [0]
            await leaving.disconnect()
            # What has been read already is still returned.
            assert [message.as_object() async for message in log] == list(range(1, 50))
            with pytest.raises(StopAsyncIteration):
                await anext(log)
            tasks.cancel_scope.cancel()
    async with connect(server.url) as leaving:
        async with leaving.consume(key, unique, after=log.cursor) as log:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(numbers, log)
                await anyio.wait_all_tasks_blocked()
                await leaving.disconnect()
    async with connect(server.url) as leaving, leaving.consume(key, unique) as log:
        await leaving.disconnect()
        assert [message async for message in log] == []


async def test_cancelling_an_iteration_loses_nothing(
    emitter: Emitter, key: str, unique: str
) -> None:
    await store(emitter, key, unique, *range(20))
    received: list[int] = []
    async with emitter.consume(key, unique) as log:
        for _ in range(20):
            with anyio.CancelScope() as scope:
                scope.cancel()
                await anext(log)
            received += await take(log, 1)
        assert received == list(range(20))
        with anyio.CancelScope() as scope:
            scope.cancel()
            await anext(log)
        await emitter.publish(key, unique, 20, ttl=60)
        assert await take(log, 1) == [20]


async def test_two_tasks_cannot_iterate_together(emitter: Emitter, key: str, unique: str) -> None:
    async with emitter.consume(key, unique) as log, anyio.create_task_group() as tasks:
        tasks.start_soon(anext, log)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(anyio.BusyResourceError):
            await anext(log)
        tasks.cancel_scope.cancel()


async def test_a_message_that_cannot_be_read_makes_it_incomplete(
    emitter: Emitter, server: Server, key: str, unique: str, caplog: pytest.LogCaptureFixture
) -> None:
    await store(emitter, key, unique, 1)
    await next_second(server)
    await store(emitter, key, unique, b"x" * 60_000)
    await next_second(server)
    await store(emitter, key, unique, 2)
    async with emitter.consume(key, unique) as log:
        assert await take(log, 1) == [1]
        assert log.complete
        assert await take(log, 1) == [2]
        assert not log.complete
        assert repr(log) == f"<Consumer {unique!r}, incomplete>"
    assert "too large for the broker to send" in caplog.text


@pytest.mark.parametrize("permissions", ["ws", "wsr", "wsl"])
async def test_a_key_that_permits_too_little_is_refused_on_entering(
    emitter: Emitter, server: Server, unique: str, permissions: str
) -> None:
    made = await emitter.keygen(server.secret, unique, permissions)
    for after in None, "now":
        with pytest.raises(UnauthorizedError):
            async with emitter.consume(made.key, unique, after=after):
                pytest.fail("it was entered")  # pragma: no cover
    assert (await emitter.me()).id


@pytest.mark.parametrize(
    ("channel", "words"), [("+/a/", "literal first level"), ("a/#/", "use 'a/'")]
)
async def test_a_channel_that_would_give_nothing_is_rejected(
    emitter: Emitter, channel: str, words: str
) -> None:
    with pytest.raises(InvalidChannelError, match=words):
        emitter.consume(NO_KEY, channel)


@pytest.mark.parametrize(
    ("after", "words"),
    [
        ("latest", "invalid cursor: it is malformed"),
        ("1.AAAAAA", "invalid cursor: it is malformed"),
        ("1.AAAAAAAA", "invalid cursor: it is malformed"),
        ("2.AAAAAAAA", "newer version"),
        (b"now", "after must be a str, a StoredMessage or None, not bytes"),
        (3, "after must be a str.*not int"),
    ],
)
async def test_a_wrong_position_is_named(emitter: Emitter, after: object, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        emitter.consume(NO_KEY, "a/", after=after)  # type: ignore[arg-type]  # it is wrong


async def test_a_truncated_cursor_is_rejected(emitter: Emitter, key: str, unique: str) -> None:
    await store(emitter, key, unique, *range(3))
    async with emitter.consume(key, unique) as log:
        await take(log, 3)
        cursor = log.cursor
    for length in range(len(cursor)):
        with pytest.raises(ValueError, match="invalid cursor"):
            emitter.consume(key, unique, after=cursor[:length])
    emitter.consume(key, unique, after=f"{cursor}\n")


async def test_an_object_is_entered_once(emitter: Emitter, key: str, unique: str) -> None:
    consuming = emitter.consume(key, unique)
    async with consuming:
        pass
    with pytest.raises(RuntimeError, match="twice"):
        async with consuming:
            pytest.fail("it was entered")  # pragma: no cover


async def test_a_message_with_a_short_id_is_rejected(emitter: Emitter) -> None:
    message = StoredMessage(b"short", datetime.now(UTC), "a/", b"")
    with pytest.raises(ValueError, match="the id of the message has 5 bytes"):
        emitter.consume(NO_KEY, "a/", after=message)
