"""Clients that reconnect quickly or not at all, and ways to interrupt their connections."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, Final

from emitter_anyio import Backoff, Emitter, connect
from emitter_anyio.testing import Broker

QUICK_BACKOFF: Final = Backoff(initial=0.001, maximum=0.01)
"""A back-off with short delays, so that tests that reconnect are fast."""


def connect_once(*args: Any, **options: Any) -> Emitter:
    """Call ``connect()`` with ``reconnect=None``."""
    return connect(*args, reconnect=None, **options)


def connect_reconnecting(*args: Any, **options: Any) -> Emitter:
    """Call ``connect()`` with ``reconnect=QUICK_BACKOFF``."""
    return connect(*args, reconnect=QUICK_BACKOFF, **options)


def subscribed_channels(broker: Broker) -> list[str]:
    """Return the channels to which the broker's clients are subscribed."""
    return sorted(channel for client in broker.clients for channel in client.subscriptions)


async def force_reconnect(emitter: Emitter, broker: Broker) -> None:
    """Drop the connection and wait until the client has reconnected."""
    async with emitter.stream("connect") as connected:
        await broker.drop()
        await connected.receive()


@asynccontextmanager
async def while_disconnected(emitter: Emitter, broker: Broker) -> AsyncGenerator[None]:
    """Drop the connection, refuse others until the block ends, then wait for the next one."""
    async with emitter.stream("connect") as connected:
        async with while_disconnected_nowait(emitter, broker):
            yield
        await connected.receive()


@asynccontextmanager
async def while_disconnected_nowait(emitter: Emitter, broker: Broker) -> AsyncGenerator[None]:
    """Drop the connection and refuse others until the block ends."""
    async with emitter.stream("disconnect") as disconnected:
        with broker.refuse():
            await broker.drop()
            await disconnected.receive()
            yield
