"""A development broker in a thread, for code that blocks the thread of the test."""

from __future__ import annotations

import functools
import ssl
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal

from emitter_anyio import Emitter, connect
from emitter_anyio.testing import Broker

T = TypeVar("T")


class Background:
    """
    A broker and a client in a thread.

    :ivar broker: the broker; only its synchronous methods may be called from other threads
    """

    def __init__(self, portal: BlockingPortal, broker: Broker, emitter: Emitter) -> None:
        self.broker = broker
        self._portal = portal
        self._emitter = emitter

    @property
    def url(self) -> str:
        return self.broker.url

    @property
    def secret(self) -> str:
        return self.broker.secret_key

    def key(self, channel: str, permissions: str) -> str:
        return self.broker.keygen(channel, permissions)

    def publish(self, channel: str, payload: bytes | str, *, ttl: int = 0) -> None:
        self.call(lambda: self.broker.publish(channel, payload, ttl=ttl))

    def call(self, function: Callable[[], Awaitable[T]]) -> T:
        return self._portal.call(function)

    def when_subscribed(self, channel: str, *steps: Callable[[Broker], Awaitable[None]]) -> None:
        """Run one step for each client that subscribes to a channel, in order."""
        self.start_soon(functools.partial(self._follow, channel, steps))

    def start(self, function: Callable[..., Awaitable[None]]) -> Callable[[], object]:
        """Start a task, wait for ``task_status.started()``, and return what cancels the task."""
        future, _ = self._portal.start_task(function)
        return future.cancel

    def start_soon(self, function: Callable[[], Awaitable[None]]) -> None:
        """Start a task in the broker's event loop."""
        self._portal.start_task_soon(function)

    async def _follow(
        self, channel: str, steps: tuple[Callable[[Broker], Awaitable[None]], ...]
    ) -> None:
        key = self.broker.keygen(channel, "p")
        async with self._emitter.watch_presence(key, channel) as changes:
            for step in steps:
                while (await changes.receive()).event != "subscribe":
                    pass
                await step(self.broker)


def publishing(channel: str, *payloads: bytes | str) -> Callable[[Broker], Awaitable[None]]:
    """Return a step for :meth:`Background.when_subscribed` that publishes the payloads."""

    async def publish(broker: Broker) -> None:
        for payload in payloads:
            await broker.publish(channel, payload)

    return publish


def subscriber(broker: Broker) -> str:
    """Return the id of the only client with subscriptions."""
    (id,) = {client.id for client in broker.clients if client.subscriptions}
    return id


@contextmanager
def background(
    *, client_context: ssl.SSLContext | None = None, **options: Any
) -> Iterator[Background]:
    """
    Run a broker with these options in a thread.

    :param client_context: the TLS context of its client, instead of one that trusts the authority
    """
    # Use Trio: blockbuster watches asyncio in every thread.
    with start_blocking_portal("trio") as portal:
        broker = Broker(**options)
        with portal.wrap_async_context_manager(broker):
            emitter = connect(broker.url, **_client_options(options, client_context))
            with portal.wrap_async_context_manager(emitter):
                yield Background(portal, broker, emitter)


def _client_options(options: dict[str, Any], context: ssl.SSLContext | None) -> dict[str, Any]:
    from tests.support import tls

    return {"ssl_context": context or tls.client_context()} if "ssl_context" in options else {}
