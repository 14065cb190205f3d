"""
A program that enters clients and never leaves them, and prints how each of its runs ends.

``python -m tests.support.never_left BACKEND``. On Trio, the tasks of a turn run in either order, so
each situation is tried several times.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, TypeAlias
from unittest import mock

import anyio
import trio
from anyio.from_thread import BlockingPortal, start_blocking_portal
from anyio.lowlevel import checkpoint

from emitter_anyio import Backoff, Emitter, connect
from emitter_anyio.outbox import Outbox
from emitter_anyio.testing import Broker, FaultProxy
from tests.support.ports import unanswered_port

RUNS: Final = 10

SOON: Final = Backoff(initial=0.001, maximum=0.01)


class Around:
    """
    What a situation needs besides the client.

    :ivar never_left: contexts that are entered and never left
    :ivar left_later: contexts that are left when the run has ended
    """

    def __init__(self, portal: BlockingPortal, broker: Broker, proxy: FaultProxy) -> None:
        self.broker = broker
        self._proxy = proxy
        self.key = broker.keygen("a/", "rwslp")
        self.never_left = AsyncExitStack()
        self.left_later = ExitStack()
        self._portal = portal

    def stall(self) -> None:
        """Let the broker read nothing."""
        self._portal.call(self._proxy.stall, "to_broker")

    def clear(self) -> None:
        """Have the next client meet a broker that works."""
        self.left_later.close()
        self._portal.call(self._proxy.resume)

    async def lose_connection(self, emitter: Emitter, until: Any = "disconnect") -> None:
        """Have the broker drop the client, and wait for an event."""
        async with emitter.stream(until) as events:
            self._portal.call(self.broker.drop)
            await events.receive()


Situation: TypeAlias = Callable[[Emitter, Around], Awaitable[None]]


async def entered(emitter: Emitter, around: Around) -> None:
    pass


async def idle(emitter: Emitter, around: Around) -> None:
    await emitter.me()
    await anyio.wait_all_tasks_blocked()


async def subscribed(emitter: Emitter, around: Around) -> None:
    for _ in range(20):
        await emitter.publish(around.key, "a/", "x" * 1000)
    await emitter.subscribe(around.key, "a/")


async def sending(emitter: Emitter, around: Around) -> None:
    for _ in range(20):
        await emitter.publish(around.key, "a/", "x" * 60_000)


async def sending_to_a_peer_that_does_not_read(emitter: Emitter, around: Around) -> None:
    around.stall()
    waits = False
    while not waits:
        with anyio.move_on_after(0.1) as scope:
            await emitter.publish(around.key, "a/", "x" * 60_000)
        waits = scope.cancelled_caught


async def waiting_to_reconnect(emitter: Emitter, around: Around) -> None:
    await around.lose_connection(emitter)
    await anyio.wait_all_tasks_blocked()


async def waiting_for_connack(emitter: Emitter, around: Around) -> None:
    around.left_later.enter_context(around.broker.lose("connack"))
    await around.lose_connection(emitter)
    await anyio.sleep(0.03)


async def trying_several_addresses(emitter: Emitter, around: Around) -> None:
    port = around.left_later.enter_context(unanswered_port())
    found = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("127.0.0.1", port))
    look_up = mock.patch.object(socket, "getaddrinfo", return_value=[found, found])
    around.left_later.enter_context(look_up)
    await around.lose_connection(emitter)
    await anyio.sleep(0.03)


async def restoring(emitter: Emitter, around: Around) -> None:
    await emitter.subscribe(around.key, "a/")
    around.left_later.enter_context(around.broker.lose("suback"))
    await around.lose_connection(emitter)
    while not emitter.statistics().pending:
        await checkpoint()
    await anyio.wait_all_tasks_blocked()


async def restored(emitter: Emitter, around: Around) -> None:
    await emitter.subscribe(around.key, "a/")
    await around.lose_connection(emitter, until="connect")
    for _ in range(20):
        await emitter.publish(around.key, "a/", "x" * 1000)


async def idle_on_a_restored_connection(emitter: Emitter, around: Around) -> None:
    await restored(emitter, around)
    await emitter.flush()
    await anyio.wait_all_tasks_blocked()


async def keeping_a_watermark(emitter: Emitter, around: Around) -> None:
    await emitter.subscribe(around.key, "a/", resume=True)
    await emitter.publish(around.key, "a/", "x", ttl=60, qos=1)
    await emitter.flush()


async def watching_presence(emitter: Emitter, around: Around) -> None:
    entering = emitter.watch_presence(around.key, "a/")
    await (await around.never_left.enter_async_context(entering)).receive()
    await anyio.wait_all_tasks_blocked()


async def held_up_by_a_full_stream(emitter: Emitter, around: Around) -> None:
    entering = emitter.subscribe(around.key, "a/", buffer=1, overflow="block")
    await around.never_left.enter_async_context(entering)
    for _ in range(5):
        await emitter.publish(around.key, "a/", "x")
    with anyio.move_on_after(0.03):
        await emitter.flush()
    await anyio.wait_all_tasks_blocked()


async def with_an_outbox(emitter: Emitter, around: Around) -> None:
    path = Path(around.left_later.enter_context(TemporaryDirectory()), "out.db")
    box = await around.never_left.enter_async_context(Outbox(path, emitter, around.key))
    await box.publish("a/", "x")
    while box.statistics().waiting:  # noqa: ASYNC110 - the figures have no event
        await anyio.sleep(0.001)


async def with_an_outbox_that_writes(emitter: Emitter, around: Around) -> None:
    path = Path(around.left_later.enter_context(TemporaryDirectory()), "out.db")
    box = await around.never_left.enter_async_context(Outbox(path, emitter, around.key))
    for _ in range(5):
        await box.publish("a/", "x")


SITUATIONS: Final[dict[Situation, dict[str, Any]]] = {
    entered: {},
    idle: {},
    subscribed: {},
    sending: {},
    sending_to_a_peer_that_does_not_read: {},
    waiting_to_reconnect: {"reconnect": Backoff(initial=30, maximum=30)},
    waiting_for_connack: {},
    trying_several_addresses: {},
    restoring: {},
    restored: {},
    idle_on_a_restored_connection: {},
    keeping_a_watermark: {},
    watching_presence: {},
    held_up_by_a_full_stream: {},
    with_an_outbox: {},
    with_an_outbox_that_writes: {},
}
"""The situations, with the options of the client."""


async def main(situation: Situation, around: Around, url: str) -> None:
    options = {"reconnect": SOON, **SITUATIONS[situation]}
    if situation is waiting_for_connack:
        # After the first server, the second one is not tried any more.
        emitter = connect(servers=[url, url], **options)
    else:
        emitter = connect(url, **options)
    await around.never_left.enter_async_context(emitter)
    emitter.on("connect", lambda: None)
    await situation(emitter, around)
    raise ValueError("the program's own")


def run(backend: str, situation: Situation, around: Around, url: str) -> str:
    try:
        if backend == "trio":
            trio.run(main, situation, around, url)
        else:
            asyncio.run(main(situation, around, url))
    except BaseException as exc:
        return f"{type(exc).__name__} {type(exc.__context__).__name__}"
    finally:
        around.clear()
    raise AssertionError("the program's own exception is lost")


def run_all(backend: str) -> None:
    logging.disable()
    arounds = []  # so that what is never left is not collected while others run
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(Broker()) as broker,
        portal.wrap_async_context_manager(FaultProxy(broker.host, broker.port)) as proxy,
    ):
        for scheme in ("mqtt", "ws"):
            url = proxy.url.replace("mqtt:", f"{scheme}:")
            for situation in SITUATIONS:
                for _ in range(RUNS):
                    around = Around(portal, broker, proxy)
                    arounds.append(around)
                    end = run(backend, situation, around, url)
                    sys.stdout.write(f"{scheme} {situation.__name__}: {end}\n")


if __name__ == "__main__":
    run_all(sys.argv[1])
