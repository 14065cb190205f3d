"""Renewing the resume position, so that a gap repeats few messages already received."""

from __future__ import annotations

from typing import Literal

import anyio
import pytest

from emitter_anyio import Backoff, Emitter, connect
from emitter_anyio.testing import Broker
from tests.reconnecting.test_resuming import take

KEYS = "rwls"

RENEWAL_DELAY = 10.0
"""Seconds from a message to the client's request for the newest stored message."""


async def another_link(emitter: Emitter, broker: Broker) -> None:
    async with emitter.stream("connect") as connected:
        await broker.drop()
        await connected.receive()


async def publish(broker: Broker, *texts: str) -> None:
    for text in texts:
        await broker.publish("a/", text, ttl=3600)


@pytest.mark.virtual_time
async def test_messages_received_long_ago_are_not_repeated(anyio_backend: object) -> None:
    async with Broker() as broker:
        async with (
            connect(connectable=broker.connectable(), reconnect=Backoff(1, 1)) as emitter,
            emitter.subscribe(
                broker.keygen("a/", KEYS), "a/", 0, resume=True, mark_gaps=True
            ) as messages,
        ):
            await publish(broker, "1", "2")
            await anyio.sleep(3 * RENEWAL_DELAY)
            await publish(broker, "3")
            await anyio.sleep(RENEWAL_DELAY / 2)
            await another_link(emitter, broker)
            assert await take(messages, 5) == ["1", "2", "3", "gap of 1", "3*"]
            await another_link(emitter, broker)
            assert await take(messages, 1) == ["gap of 0"]


@pytest.mark.virtual_time
async def test_all_messages_are_repeated_before_the_first_confirmed_renewal(
    anyio_backend: object,
) -> None:
    async with Broker() as broker:
        await publish(broker, "0")
        async with (
            connect(connectable=broker.connectable(), reconnect=Backoff(1, 1)) as emitter,
            emitter.subscribe(
                broker.keygen("a/", KEYS), "a/", 0, resume=True, mark_gaps=True
            ) as messages,
        ):
            await publish(broker, "1", "2")
            await anyio.sleep(RENEWAL_DELAY * 1.5)
            # The newest message was requested once, which does not confirm the position yet.
            await another_link(emitter, broker)
            assert await take(messages, 5) == ["1", "2", "gap of 2", "1*", "2*"]


@pytest.mark.virtual_time
async def test_no_renewal_without_messages(anyio_backend: object) -> None:
    async with Broker() as broker:
        async with connect(connectable=broker.connectable(), keepalive=60) as emitter:
            async with emitter.subscribe(broker.keygen("a/", KEYS), "a/", 0, resume=True):
                with broker.hold("reply", "puback"):
                    await anyio.sleep(3590)
                    assert emitter.statistics().pending == 0
                    await publish(broker, "1")
                    await anyio.sleep(RENEWAL_DELAY * 1.1)
                    assert emitter.statistics().pending == 1


@pytest.mark.virtual_time
@pytest.mark.parametrize("while_down", ["wait", "raise"])
async def test_renewal_due_while_disconnected_happens_later(
    anyio_backend: object, while_down: Literal["wait", "raise"]
) -> None:
    async with Broker() as broker:
        async with (
            connect(
                connectable=broker.connectable(), reconnect=Backoff(1, 1), while_down=while_down
            ) as emitter,
            emitter.subscribe(
                broker.keygen("a/", KEYS), "a/", 0, resume=True, mark_gaps=True
            ) as messages,
        ):
            await publish(broker, "1")
            await anyio.sleep(RENEWAL_DELAY / 2)
            async with emitter.stream("connect") as connected:
                with broker.refuse():
                    await broker.drop()
                    await anyio.sleep(RENEWAL_DELAY)
                await connected.receive()
            assert await take(messages, 3) == ["1", "gap of 1", "1*"]
            await publish(broker, "2")
            await anyio.sleep(3 * RENEWAL_DELAY)
            await another_link(emitter, broker)
            assert await take(messages, 2) == ["2", "gap of 0"]
