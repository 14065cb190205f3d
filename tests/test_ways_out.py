"""Every way out of a client: what is raised, and that none of its tasks is left."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeAlias

import anyio
import pytest

from emitter_anyio import ClosedError, ConnectError, ConnectionLostError, Emitter
from emitter_anyio.testing import Broker
from tests.support.leaks import living_tasks
from tests.support.links import one_link


class Oops(Exception):
    pass


Way: TypeAlias = Callable[[Emitter, Broker], Awaitable[None]]


async def leave_at_once(emitter: Emitter, broker: Broker) -> None:
    async with emitter:
        pass


async def leave(emitter: Emitter, broker: Broker) -> None:
    async with emitter:
        await emitter.me()


async def raise_in_the_block(emitter: Emitter, broker: Broker) -> None:
    with pytest.raises(Oops):
        async with emitter:
            await emitter.me()
            raise Oops


async def be_cancelled(emitter: Emitter, broker: Broker) -> None:
    with anyio.CancelScope() as scope:
        async with emitter:
            await emitter.me()
            scope.cancel()
            await anyio.sleep_forever()


async def leave_while_cancelled(emitter: Emitter, broker: Broker) -> None:
    with anyio.CancelScope() as scope:
        async with emitter:
            await emitter.me()
            scope.cancel()


async def disconnect(emitter: Emitter, broker: Broker) -> None:
    async with emitter:
        await emitter.me()
        await emitter.disconnect()
        with pytest.raises(ClosedError):
            await emitter.me()


async def lose_the_link(emitter: Emitter, broker: Broker) -> None:
    with pytest.raises(ConnectionLostError):
        async with emitter:
            await broker.drop()
            await anyio.sleep_forever()


async def fail_in_a_handler(emitter: Emitter, broker: Broker) -> None:
    def fail(message: object) -> None:
        raise Oops

    emitter.on("message", fail)
    with pytest.raises(Oops):
        async with emitter:
            await emitter.subscribe(broker.keygen("a/"), "a/")
            await broker.publish("a/", "x")
            await anyio.sleep_forever()


async def leave_one_that_hangs(emitter: Emitter, broker: Broker) -> None:
    hangs = anyio.Event()

    async def hang(message: object) -> None:
        hangs.set()
        await anyio.sleep_forever()

    emitter.on("message", hang)
    async with emitter:
        await emitter.subscribe(broker.keygen("a/"), "a/")
        await broker.publish("a/", "x")
        await hangs.wait()


async def be_refused(emitter: Emitter, broker: Broker) -> None:
    with broker.refuse(), pytest.raises(ConnectError):
        async with emitter:
            pass  # pragma: no cover - it does not come so far


async def run_and_be_cancelled(emitter: Emitter, broker: Broker) -> None:
    async with anyio.create_task_group() as tasks:
        await tasks.start(emitter.run)
        await emitter.me()
        tasks.cancel_scope.cancel()


async def run_and_disconnect(emitter: Emitter, broker: Broker) -> None:
    async with anyio.create_task_group() as tasks:
        await tasks.start(emitter.run)
        await emitter.disconnect()


WAYS = (
    leave_at_once,
    leave,
    raise_in_the_block,
    be_cancelled,
    leave_while_cancelled,
    disconnect,
    lose_the_link,
    fail_in_a_handler,
    leave_one_that_hangs,
    be_refused,
    run_and_be_cancelled,
    run_and_disconnect,
)


@pytest.mark.parametrize("way", WAYS)
async def test_no_task_is_left_when_it_has_been_left(broker: Broker, way: Way) -> None:
    # On Trio, the tasks of a turn run in either order.
    for _ in range(5):
        before = living_tasks()
        await way(one_link(broker.url, disconnect_timeout=0.05), broker)
        assert not tasks_of_clients(before)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_no_task_is_left_when_it_was_cancelled_natively(broker: Broker) -> None:
    emitter = one_link(broker.url)
    before = living_tasks()
    task = asyncio.create_task(leave_when_cancelled(emitter))
    await emitter.wait_connected()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not tasks_of_clients(before)


async def leave_when_cancelled(emitter: Emitter) -> None:
    async with emitter:
        await anyio.sleep_forever()


def tasks_of_clients(before: set[object]) -> list[str]:
    """Name the tasks that have come since, but for those of the broker."""
    names = (str(getattr(task, "name", task)) for task in living_tasks() - before)
    return [name for name in names if "emitter_anyio" in name and ".testing" not in name]
