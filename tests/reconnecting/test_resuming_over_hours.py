"""How far a subscription has come, so that a gap brings little of what has come before."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import anyio
import pytest

from emitter_anyio import Backoff, Emitter, connect
from emitter_anyio.testing import Broker
from tests.reconnecting.test_resuming import take
from tests.support.memory import MemoryConnectable

KEYS = "rwls"

RENEWED = 10.0
"""So many seconds after a message has come, the client looks at what is stored."""


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
