"""``history()``: reading stored messages."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import anyio
import pytest

from emitter_anyio import (
    Emitter,
    HistoryIncompleteError,
    InvalidChannelError,
    StoredMessage,
    UnauthorizedError,
    connect,
)
from tests.client.tools import relay
from tests.support.server import Server

pytestmark = pytest.mark.emitter

NO_KEY = "A" * 32
AFTER = StoredMessage(bytes(16), datetime.now(UTC), "a/", b"")

ORDERS: tuple[Literal["oldest", "newest"], ...] = ("oldest", "newest")


async def store(emitter: Emitter, key: str, channel: str, *messages: bytes | str | int) -> None:
    """Store messages in this order, quickly, so that most share one second."""
    for message in messages:
        await emitter.publish(key, channel, message, ttl=600)
    await emitter.flush()


async def texts(stored: AsyncIterator[StoredMessage]) -> list[str]:
    return [message.as_string() async for message in stored]


async def numbers(stored: AsyncIterator[StoredMessage]) -> list[int]:
    return [message.as_object() async for message in stored]


@pytest.fixture
async def seven(emitter: Emitter, key: str, unique: str) -> str:
    """A channel with the stored messages 0 to 6."""
    await store(emitter, key, unique, *range(7))
    return unique


# Order


async def test_history_is_in_order_of_time_within_a_second(
    emitter: Emitter, key: str, seven: str
) -> None:
    assert await numbers(emitter.history(key, seven)) == list(range(7))


async def test_history_newest_first(emitter: Emitter, key: str, seven: str) -> None:
    newest = emitter.history(key, seven, order="newest")
    assert await numbers(newest) == list(reversed(range(7)))


@pytest.mark.parametrize("last", [0, 1, 3, 7, 8, 1000, 2**31 - 1])
async def test_last_selects_the_newest_in_both_orders(
    emitter: Emitter, key: str, seven: str, last: int
) -> None:
    expected = list(range(max(0, 7 - last), 7))
    assert await numbers(emitter.history(key, seven, last)) == expected
    newest = emitter.history(key, seven, last, order="newest")
    assert await numbers(newest) == expected[::-1]


async def test_history_is_in_order_across_seconds(
    emitter: Emitter, server: Server, key: str, unique: str
) -> None:
    for start in range(0, 12, 4):
        await store(emitter, key, unique, *range(start, start + 4))
        await next_second(server)
    stored = [message async for message in emitter.history(key, unique)]
    assert [message.as_object() for message in stored] == list(range(12))
    times = [message.time for message in stored]
    assert times == sorted(times)
    assert len(set(times)) >= 3


async def next_second(server: Server) -> None:
    """Move the broker's clock to the next second; with a real broker, wait a second."""
    if server.broker is not None:
        server.broker.advance(1)
    else:
        await anyio.sleep(1)


@pytest.mark.parametrize("order", ORDERS)
async def test_history_of_an_empty_channel_is_empty(
    emitter: Emitter, key: str, unique: str, order: Literal["oldest", "newest"]
) -> None:
    assert await texts(emitter.history(key, unique, order=order)) == []


# Pages


@pytest.mark.parametrize("order", ORDERS)
async def test_pages_neither_repeat_nor_skip_within_a_second(
    emitter: Emitter, key: str, unique: str, order: Literal["oldest", "newest"]
) -> None:
    await store(emitter, key, unique, *range(1000))
    found = await numbers(emitter.history(key, unique, 10000, order=order))
    assert found == list(range(1000))[:: 1 if order == "oldest" else -1]


async def test_last_applies_across_pages(emitter: Emitter, key: str, unique: str) -> None:
    await store(emitter, key, unique, *range(400))
    assert await numbers(emitter.history(key, unique, 300)) == list(range(100, 400))


async def test_pages_contain_several_channels(emitter: Emitter, key: str, unique: str) -> None:
    for number in range(300):
        await emitter.publish(key, f"{unique}{number % 3}/", number, ttl=600)
    await emitter.flush()
    assert await numbers(emitter.history(key, unique, 1000)) == list(range(300))
    found = await numbers(emitter.history(key, f"{unique}1/", 1000))
    assert found == list(range(1, 300, 3))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [1000, 16000, 40000])
async def test_page_size_is_halved_until_the_broker_can_send_the_page(
    emitter: Emitter, key: str, unique: str, size: int, order: Literal["oldest", "newest"]
) -> None:
    large = [f"{number:0>{size}}" for number in range(9)]
    await store(emitter, key, unique, *large)
    found = await texts(emitter.history(key, unique, order=order))
    assert found == large[:: 1 if order == "oldest" else -1]


async def test_small_messages_after_large_ones_are_read(
    emitter: Emitter, key: str, unique: str
) -> None:
    sizes = [1, 40000, 1, 20000, 20000, 1, 1, 30000, 1]
    await store(emitter, key, unique, *(b"x" * size for size in sizes))
    found = [len(message.binary) async for message in emitter.history(key, unique)]
    assert found == sizes


async def read_past_errors(
    stored: AsyncIterator[StoredMessage],
) -> tuple[list[str], list[HistoryIncompleteError]]:
    """Read everything, and continue after each error."""
    found: list[str] = []
    errors: list[HistoryIncompleteError] = []
    while True:
        try:
            async for message in stored:
                found.append(message.as_string())  # noqa: PERF401 - keep the messages before an error
        except HistoryIncompleteError as error:
            found.append("…")
            errors.append(error)
        else:
            return found, errors


async def test_message_too_large_for_the_broker_to_send_raises_in_its_place(
    emitter: Emitter, server: Server, key: str, unique: str
) -> None:
    """60,000 bytes exceed 64 KiB once encoded as base64 inside JSON."""
    await store(emitter, key, unique, "oldest", "older")
    await next_second(server)
    await next_second(server)
    await store(emitter, key, unique, b"x" * 60000)
    await next_second(server)
    await next_second(server)
    await store(emitter, key, unique, "newer")
    found, (error,) = await read_past_errors(emitter.history(key, unique))
    assert found == ["oldest", "older", "…", "newer"]
    assert (error.status, error.operation, error.channel) == (None, "history", unique)
    assert "too large for the broker to send" in str(error)
    (newer,) = [message async for message in emitter.history(key, unique, 1)]
    assert error.since <= error.until < newer.time
    found, _ = await read_past_errors(emitter.history(key, unique, order="newest"))
    assert found == ["newer", "…", "older", "oldest"]
    assert await texts(emitter.history(key, unique, 1)) == ["newer"]


async def test_message_that_hides_older_ones_raises_in_its_place(
    emitter: Emitter, key: str, unique: str
) -> None:
    """A stored message's id grows with the channel's levels, so this one exceeds 64 KiB."""
    deep = unique + "a/" * 12
    await store(emitter, key, unique, "older")
    await store(emitter, key, deep, b"x" * (65536 - 2 - 33 - len(deep) - len("?ttl=600")))
    await store(emitter, key, unique, "newer")
    found, (error,) = await read_past_errors(emitter.history(key, unique))
    assert found == ["older", "…", "newer"]
    assert "64 KiB" in str(error)


async def test_history_newest_first_requests_one_page_at_a_time(
    server: Server, emitter: Emitter, key: str, unique: str
) -> None:
    await store(emitter, key, unique, *range(500))
    async with relay(server) as proxy:
        async with connect(host="127.0.0.1", port=proxy.port, secure=False) as reader:
            history = reader.history(key, unique, 500, order="newest")
            async for message in history:
                if message.as_object() == 400:
                    break
            await reader.flush()
            # All messages share one second, so two pages and that whole second were requested.
            assert proxy.packets().count(3) < 6


async def test_history_can_be_read_by_several_tasks(
    emitter: Emitter, key: str, unique: str
) -> None:
    await store(emitter, key, unique, *range(200))
    found: dict[int, list[int]] = {}

    async def read(last: int) -> None:
        found[last] = await numbers(emitter.history(key, unique, last))

    async with anyio.create_task_group() as tasks:
        for last in (1, 50, 199, 1000):
            tasks.start_soon(read, last)
    assert found == {last: list(range(200))[-last:] for last in (1, 50, 199, 1000)}


async def test_messages_stored_while_reading_do_not_shift_the_pages(
    emitter: Emitter, key: str, unique: str
) -> None:
    await store(emitter, key, unique, *range(300))
    found = []
    async for message in emitter.history(key, unique, 300, order="newest"):
        found.append(message.as_object())
        if len(found) % 100 == 0:
            await store(emitter, key, unique, *range(1000, 1050))
    assert found == list(range(300))[::-1]


# Fields of a stored message


async def test_stored_message_has_channel_payload_time_and_id(
    emitter: Emitter, key: str, unique: str
) -> None:
    channel, binary = f"{unique}a/b/", bytes(range(256))
    before = datetime.now(UTC).replace(microsecond=0)
    await store(emitter, key, channel, binary)
    (message,) = [message async for message in emitter.history(key, unique)]
    after = datetime.now(UTC)
    assert (message.channel, message.binary) == (channel, binary)
    assert before <= message.time <= after
    assert message.time.tzinfo is UTC
    assert len(message.id) >= 16


async def test_empty_messages_are_stored(emitter: Emitter, key: str, unique: str) -> None:
    await store(emitter, key, unique, b"", "m", b"")
    assert await texts(emitter.history(key, unique)) == ["", "m", ""]


async def test_ids_are_unique_and_decrease_with_time(
    emitter: Emitter, key: str, seven: str
) -> None:
    stored = [message async for message in emitter.history(key, seven)]
    ids = [message.id[4:] for message in stored]
    assert ids == sorted(set(ids), reverse=True)


async def test_retained_messages_are_stored(emitter: Emitter, key: str, unique: str) -> None:
    await emitter.publish(key, unique, "retained", retain=True, qos=1)
    await emitter.publish(key, unique, "passing", qos=1)
    assert await texts(emitter.history(key, unique)) == ["retained"]


async def test_history_reads_the_channel_and_its_subchannels_only(
    emitter: Emitter, key: str, unique: str
) -> None:
    for channel in ("", "a/", "a/b/", "c/b/", "c/"):
        await store(emitter, key, unique + channel, channel)
    found = {
        channel: await texts(emitter.history(key, unique + channel))
        for channel in ("", "a/", "a/b/", "+/", "+/b/", "d/", "a/#/")
    }
    assert found == {
        "": ["", "a/", "a/b/", "c/b/", "c/"],
        "a/": ["a/", "a/b/"],
        "a/b/": ["a/b/"],
        "+/": ["a/", "a/b/", "c/b/", "c/"],
        "+/b/": ["a/b/", "c/b/"],
        "d/": [],
        "a/#/": ["a/b/"],
    }


# since and until


async def test_since_and_until_select_a_window(
    emitter: Emitter, server: Server, key: str, unique: str
) -> None:
    for number in range(3):
        await store(emitter, key, unique, number)
        await next_second(server)
        await next_second(server)
    everything = [message async for message in emitter.history(key, unique)]
    first, second, third = (message.time for message in everything)
    history = emitter.history
    assert await numbers(history(key, unique, since=second)) == [1, 2]
    assert await numbers(history(key, unique, until=second)) == [0, 1]
    assert await numbers(history(key, unique, since=second, until=second)) == [1]
    assert await numbers(history(key, unique, since=third + timedelta(seconds=1))) == []
    assert await numbers(history(key, unique, until=first - timedelta(seconds=1))) == []
    assert await numbers(history(key, unique, since=second.timestamp())) == [1, 2]
    assert await numbers(history(key, unique, 1, until=second)) == [1]
    newest = history(key, unique, since=first, until=third, order="newest")
    assert await numbers(newest) == [2, 1, 0]


async def test_window_applies_across_pages(
    emitter: Emitter, server: Server, key: str, unique: str
) -> None:
    await store(emitter, key, unique, "before")
    await next_second(server)
    await next_second(server)
    await store(emitter, key, unique, *range(300))
    (newest,) = [message async for message in emitter.history(key, unique, 1)]
    await next_second(server)
    await next_second(server)
    await store(emitter, key, unique, "after")
    since, until = newest.time - timedelta(seconds=1), newest.time
    found = emitter.history(key, unique, 1000, since=since, until=until)
    assert await numbers(found) == list(range(300))


# Reading on


async def test_after_a_message_the_oldest_come_first_without_a_default_limit(
    emitter: Emitter, server: Server, key: str, unique: str
) -> None:
    await store(emitter, key, unique, *range(60))
    await next_second(server)
    await store(emitter, key, unique, *range(60, 160))
    stored = [message async for message in emitter.history(key, unique, 1000)]
    history = emitter.history
    assert await numbers(history(key, unique, after=stored[9])) == list(range(10, 160))
    assert await numbers(history(key, unique, 70, after=stored[9])) == list(range(10, 80))
    assert await numbers(history(key, unique, 0, after=stored[9])) == []
    assert await numbers(history(key, unique, after=stored[-1])) == []
    until = stored[59].time
    assert await numbers(history(key, unique, after=stored[9], until=until)) == list(range(10, 60))
    assert await numbers(history(key, unique, after=stored[70], until=until)) == []


# Refusals


async def test_key_without_load_permission_is_refused_on_iteration(
    emitter: Emitter, server: Server, unique: str
) -> None:
    created = await emitter.keygen(server.secret, unique, "rws")
    stored = emitter.history(created.key, unique)
    with pytest.raises(UnauthorizedError, match="'l' \\(load\\)") as caught:
        await anext(stored)
    error = caught.value
    assert (error.status, error.operation, error.channel) == (401, "history", unique)
    assert created.key not in str(error)


@pytest.mark.parametrize("channel", ["+/", "+/a/", "#/"])
async def test_wildcard_first_level_is_rejected(emitter: Emitter, channel: str) -> None:
    with pytest.raises(InvalidChannelError, match="literal first level"):
        emitter.history(NO_KEY, channel)


@pytest.mark.parametrize(
    ("arguments", "options", "pattern"),
    [
        ((NO_KEY, "a b/"), {}, "' '"),
        ((NO_KEY, "a/", "5"), {}, "last"),
        ((NO_KEY, "a/", True), {}, "last"),
        ((NO_KEY, "a/", -1), {}, "last.* 0"),
        ((NO_KEY, "a/", 2**31), {}, "last.* 0"),
        ((NO_KEY, "a/"), {"order": "random"}, "order.*'oldest' or 'newest'.*'random'"),
        ((NO_KEY, "a/"), {"since": datetime(2024, 1, 1)}, "since.*naive"),
        ((NO_KEY, "a/"), {"until": 5}, "until.*5"),
        ((NO_KEY, "a/"), {"until": "now"}, "until.*datetime"),
        (("", "a/"), {}, "key.*empty"),
        ((NO_KEY, "a/"), {"after": "now"}, "after='now' is for consume"),
        ((NO_KEY, "a/"), {"after": b"1."}, "after.*StoredMessage or None, not bytes"),
        ((NO_KEY, "a/"), {"after": "1."}, "invalid cursor"),
        ((NO_KEY, "a/"), {"after": AFTER, "order": "newest"}, "after with.*order='newest'"),
        ((NO_KEY, "a/"), {"after": AFTER, "since": 1700000000}, "after with since"),
    ],
)
async def test_bad_arguments_are_rejected_before_iteration(
    emitter: Emitter, arguments: tuple[Any, ...], options: dict[str, Any], pattern: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=pattern):
        emitter.history(*arguments, **options)


async def test_history_reads_the_newest_100_by_default(
    emitter: Emitter, key: str, unique: str
) -> None:
    await store(emitter, key, unique, *range(120))
    assert await numbers(emitter.history(key, unique)) == list(range(20, 120))
    assert await numbers(emitter.history(key, unique, None)) == list(range(20, 120))


@pytest.mark.parametrize("order", ORDERS)
async def test_iteration_can_be_interrupted_and_continued(
    emitter: Emitter, key: str, seven: str, order: Literal["oldest", "newest"]
) -> None:
    stored = emitter.history(key, seven, order=order)
    found = []
    for _ in range(3):
        with anyio.CancelScope() as scope:
            scope.cancel()
            await anext(stored)
        async for message in stored:
            found.append(message.as_object())
            if len(found) in (2, 4):
                break
    assert sorted(found) == list(range(7))
    assert [message async for message in stored] == []


async def test_two_tasks_cannot_iterate_over_the_same_history(
    emitter: Emitter, key: str, seven: str
) -> None:
    stored, started = emitter.history(key, seven), anyio.Event()

    async def read() -> None:
        started.set()
        await numbers(stored)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read)
        await started.wait()
        with pytest.raises(anyio.BusyResourceError):
            await anext(stored)


async def test_cancelled_history_leaves_the_client_usable(
    emitter: Emitter, key: str, seven: str
) -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        await numbers(emitter.history(key, seven))
    assert scope.cancelled_caught
    assert await numbers(emitter.history(key, seven)) == list(range(7))
