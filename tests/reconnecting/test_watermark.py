"""How far a subscription has come, so that a gap brings little of what has come before."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import anyio
import pytest

from emitter_anyio import Backoff, Emitter, StoredMessage, connect
from emitter_anyio._watermark import RENEWED, Watermark
from emitter_anyio.testing import Broker
from tests.reconnecting.test_resuming import take
from tests.support.memory import MemoryConnectable

KEYS = "rwls"


def stored(second: int, count: int = 0, node: bytes = b"node") -> StoredMessage:
    id = bytes(4) + (2**32 - 1 - second).to_bytes(4, "big") + (2**32 - 1 - count).to_bytes(4, "big")
    return StoredMessage(id + node + bytes(8), datetime.fromtimestamp(second, UTC), "a/", b"")


# The value


def test_at_first_everything_may_be_missing() -> None:
    watermark = Watermark("a/")
    assert watermark.since is None
    assert watermark.behind(stored(1))
    watermark.close()


def test_what_is_later_is_behind_it() -> None:
    watermark = Watermark("a/")
    watermark.begin(stored(5, 3))
    assert watermark.since == 5
    assert [
        watermark.behind(stored(*when)) for when in [(4, 9), (5, 2), (5, 3), (5, 4), (6, 0)]
    ] == [
        False,
        False,
        False,
        True,
        True,
    ]
    watermark.close()


def test_within_a_second_nodes_of_a_cluster_have_no_order() -> None:
    watermark = Watermark("a/")
    watermark.begin(stored(5, 3))
    assert watermark.behind(stored(5, 1, b"else"))
    assert not watermark.behind(stored(4, 9, b"else"))
    watermark.close()


async def test_what_is_newest_is_believed_the_next_time(anyio_backend: object) -> None:
    watermark = Watermark("a/")
    watermark.begin(stored(1))
    watermark.renew(stored(5))
    assert watermark.since == 1
    assert watermark.stale.is_set()
    watermark.renew(stored(5))
    assert watermark.since == 5
    assert not watermark.stale.is_set()
    watermark.close()


async def test_what_was_not_believed_yet_is_forgotten_with_the_link(anyio_backend: object) -> None:
    watermark = Watermark("a/")
    watermark.begin(stored(1))
    watermark.renew(stored(5))
    watermark.doubt()
    watermark.renew(stored(9))
    assert watermark.since == 1
    watermark.close()


async def test_where_nothing_can_be_told_the_old_one_stays(anyio_backend: object) -> None:
    watermark = Watermark("a/")
    watermark.begin(stored(1))
    for _ in range(2):
        watermark.renew(None)
        assert watermark.since == 1
    assert not watermark.stale.is_set()
    watermark.close()


# Over the hours


@asynccontextmanager
async def in_memory() -> AsyncGenerator[tuple[Broker, MemoryConnectable]]:
    """A broker behind links in memory, for whom virtual time is real."""
    broker, connectable = Broker(), MemoryConnectable()

    async def serve() -> None:
        while True:
            tasks.start_soon(broker._serve, await connectable.accept())

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(serve)
            yield broker, connectable
            tasks.cancel_scope.cancel()
    finally:
        connectable.close()


async def another_link(emitter: Emitter, broker: Broker) -> None:
    async with emitter.stream("connect") as connected:
        await broker.drop()
        await connected.receive()


async def publish(broker: Broker, *texts: str) -> None:
    for text in texts:
        await broker.publish("a/", text, ttl=3600)


@pytest.mark.virtual_time
async def test_what_came_long_ago_does_not_come_again(anyio_backend: object) -> None:
    async with in_memory() as (broker, connectable):
        async with (
            connect(connectable=connectable, reconnect=Backoff(1, 1)) as emitter,
            emitter.subscribe(
                broker.keygen("a/", KEYS), "a/", 0, resume=True, mark_gaps=True
            ) as messages,
        ):
            await publish(broker, "1", "2")
            await anyio.sleep(3 * RENEWED)
            await publish(broker, "3")
            await anyio.sleep(RENEWED / 2)
            await another_link(emitter, broker)
            assert await take(messages, 5) == ["1", "2", "3", "gap of 1", "3*"]
            await another_link(emitter, broker)
            assert await take(messages, 1) == ["gap of 0"]


@pytest.mark.virtual_time
async def test_without_a_renewal_yet_all_since_the_beginning_comes_again(
    anyio_backend: object,
) -> None:
    async with in_memory() as (broker, connectable):
        await publish(broker, "0")
        async with (
            connect(connectable=connectable, reconnect=Backoff(1, 1)) as emitter,
            emitter.subscribe(
                broker.keygen("a/", KEYS), "a/", 0, resume=True, mark_gaps=True
            ) as messages,
        ):
            await publish(broker, "1", "2")
            await anyio.sleep(RENEWED * 1.5)
            # Once the newest one is known, and not believed yet.
            await another_link(emitter, broker)
            assert await take(messages, 5) == ["1", "2", "gap of 2", "1*", "2*"]


@pytest.mark.virtual_time
async def test_nobody_asks_while_nothing_comes(anyio_backend: object) -> None:
    async with in_memory() as (broker, connectable):
        async with connect(connectable=connectable, keepalive=60) as emitter:
            async with emitter.subscribe(broker.keygen("a/", KEYS), "a/", 0, resume=True):
                with broker.hold("answer", "puback"):
                    await anyio.sleep(3590)
                    assert emitter.statistics().pending == 0
                    await publish(broker, "1")
                    await anyio.sleep(RENEWED * 1.1)
                    assert emitter.statistics().pending == 1


@pytest.mark.virtual_time
@pytest.mark.parametrize("while_down", ["wait", "raise"])
async def test_a_renewal_that_meets_no_link_is_made_up_for(
    anyio_backend: object, while_down: str
) -> None:
    async with in_memory() as (broker, connectable):
        async with (
            connect(
                connectable=connectable, reconnect=Backoff(1, 1), while_down=while_down
            ) as emitter,
            emitter.subscribe(
                broker.keygen("a/", KEYS), "a/", 0, resume=True, mark_gaps=True
            ) as messages,
        ):
            await publish(broker, "1")
            await anyio.sleep(RENEWED / 2)
            async with emitter.stream("connect") as connected:
                with broker.refuse():
                    await broker.drop()
                    await anyio.sleep(RENEWED)
                await connected.receive()
            assert await take(messages, 3) == ["1", "gap of 1", "1*"]
            await publish(broker, "2")
            await anyio.sleep(3 * RENEWED)
            await another_link(emitter, broker)
            assert await take(messages, 2) == ["2", "gap of 0"]
