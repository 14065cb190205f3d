"""Clients of one link and of many, and the loss of one."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, Final

from emitter_anyio import Backoff, Emitter, connect
from emitter_anyio.testing import Broker

SOON: Final = Backoff(initial=0.001, maximum=0.01)
"""For a test that would like to be done with it."""


def one_link(*args: Any, **options: Any) -> Emitter:
    """``connect()`` with ``reconnect=None``."""
    return connect(*args, reconnect=None, **options)


def many_links(*args: Any, **options: Any) -> Emitter:
    """``connect()`` with a link that is soon back."""
    return connect(*args, reconnect=SOON, **options)


def held(broker: Broker) -> list[str]:
    """What the broker's clients are subscribed to."""
    return sorted(channel for client in broker.clients for channel in client.subscriptions)


async def another_link(emitter: Emitter, broker: Broker) -> None:
    """Cut the link, and wait until there is another one."""
    async with emitter.stream("connect") as connected:
        await broker.drop()
        await connected.receive()


@asynccontextmanager
async def while_away(emitter: Emitter, broker: Broker) -> AsyncGenerator[None]:
    """Cut the link, and let no other one come before the block ends; then wait for it."""
    async with emitter.stream("connect") as connected:
        async with link_away(emitter, broker):
            yield
        await connected.receive()


@asynccontextmanager
async def link_away(emitter: Emitter, broker: Broker) -> AsyncGenerator[None]:
    """Cut the link, and let no other one come before the block ends."""
    async with emitter.stream("disconnect") as gone:
        with broker.refuse():
            await broker.drop()
            await gone.receive()
            yield
