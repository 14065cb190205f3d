"""Every way to leave a client: what it raises, and that it leaves no tasks behind."""

from __future__ import annotations

import asyncio
import re
import unittest
from collections.abc import Awaitable, Callable
from typing import TypeAlias

import anyio
import pytest

from emitter_anyio import ClosedError, ConnectError, ConnectionLostError, Emitter
from emitter_anyio.testing import Broker
from tests.support.command import run
from tests.support.connections import connect_once
from tests.support.leaks import client_tasks, running_tasks
from tests.support.never_left import RUNS, SITUATIONS


class UserError(Exception):
    pass


Leave: TypeAlias = Callable[[Emitter, Broker], Awaitable[None]]


async def leave_immediately(emitter: Emitter, broker: Broker) -> None:
    async with emitter:
        pass


async def leave(emitter: Emitter, broker: Broker) -> None:
    async with emitter:
        await emitter.me()


async def raise_in_the_block(emitter: Emitter, broker: Broker) -> None:
    with pytest.raises(UserError):
        async with emitter:
            await emitter.me()
            raise UserError


async def cancel_the_block(emitter: Emitter, broker: Broker) -> None:
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


async def lose_the_connection(emitter: Emitter, broker: Broker) -> None:
    with pytest.raises(ConnectionLostError):
        async with emitter:
            await broker.drop()
            await anyio.sleep_forever()


async def fail_in_a_handler(emitter: Emitter, broker: Broker) -> None:
    def fail(message: object) -> None:
        raise UserError

    emitter.on("message", fail)
    with pytest.raises(UserError):
        async with emitter:
            await emitter.subscribe(broker.keygen("a/"), "a/")
            await broker.publish("a/", "x")
            await anyio.sleep_forever()


async def leave_while_a_handler_hangs(emitter: Emitter, broker: Broker) -> None:
    hanging = anyio.Event()

    async def hang(message: object) -> None:
        hanging.set()
        await anyio.sleep_forever()

    emitter.on("message", hang)
    async with emitter:
        await emitter.subscribe(broker.keygen("a/"), "a/")
        await broker.publish("a/", "x")
        await hanging.wait()


async def fail_to_connect(emitter: Emitter, broker: Broker) -> None:
    with broker.refuse(), pytest.raises(ConnectError):
        async with emitter:
            pass  # pragma: no cover - never reached


async def run_and_cancel(emitter: Emitter, broker: Broker) -> None:
    async with anyio.create_task_group() as tasks:
        await tasks.start(emitter.run)
        await emitter.me()
        tasks.cancel_scope.cancel()


async def run_and_disconnect(emitter: Emitter, broker: Broker) -> None:
    async with anyio.create_task_group() as tasks:
        await tasks.start(emitter.run)
        await emitter.disconnect()


LEAVES = (
    leave_immediately,
    leave,
    raise_in_the_block,
    cancel_the_block,
    leave_while_cancelled,
    disconnect,
    lose_the_connection,
    fail_in_a_handler,
    leave_while_a_handler_hangs,
    fail_to_connect,
    run_and_cancel,
    run_and_disconnect,
)


@pytest.mark.parametrize("leave_client", LEAVES)
async def test_leaving_leaves_no_tasks(broker: Broker, leave_client: Leave) -> None:
    # Trio runs the tasks of a turn in random order.
    for _ in range(5):
        before = running_tasks()
        await leave_client(connect_once(broker.url, disconnect_timeout=0.05), broker)
        assert not client_tasks(before)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_native_cancellation_leaves_no_tasks(broker: Broker) -> None:
    emitter = connect_once(broker.url)
    before = running_tasks()
    task = asyncio.create_task(sleep_in_the_block(emitter))
    await emitter.wait_connected()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not client_tasks(before)


async def sleep_in_the_block(emitter: Emitter) -> None:
    async with emitter:
        await anyio.sleep_forever()


# Clients that are entered and never left


NEVER_LEFT = """
import asyncio, contextlib
import trio
from anyio.from_thread import start_blocking_portal
from emitter_anyio import connect
from emitter_anyio.testing import Broker

async def main():
    stack = contextlib.AsyncExitStack()
    emitter = await stack.enter_async_context(connect(broker.url))
    emitter.on("message", print)
    await emitter.me()
    raise ValueError("the program's own")

with start_blocking_portal() as portal, portal.wrap_async_context_manager(Broker()) as broker:
    {run}
"""


@pytest.mark.parametrize("run_with", ["asyncio.run(main())", "trio.run(main)"])
def test_client_that_is_never_left_does_not_keep_the_program_running(run_with: str) -> None:
    done = run("-c", NEVER_LEFT.format(run=run_with))
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if re.match(r"[\w.]+Error: ", line)]
    assert errors[0] == "ValueError: the program's own"
    if run_with.startswith("asyncio"):
        assert len(errors) == 1
    else:
        # The same as for a bare task group that is never left.
        assert errors[1].startswith("RuntimeError: Nursery stack corrupted")


@pytest.mark.parametrize(
    ("backend", "end"), [("asyncio", "ValueError NoneType"), ("trio", "RuntimeError ValueError")]
)
def test_client_that_is_never_left_does_not_hide_the_exception_of_the_program(
    backend: str, end: str
) -> None:
    done = run("-W", "ignore", "-m", "tests.support.never_left", backend)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(SITUATIONS) * RUNS
    assert [line for line in lines if not line.endswith(f": {end}")] == []


# Leaving in another task than the one that entered


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_client_can_be_left_in_another_task_after_the_entering_task_ended(
    broker: Broker,
) -> None:
    emitter = connect_once(broker.url, disconnect_timeout=0.05)
    emitter.on("message", hang)
    before = running_tasks()
    for _ in range(2):
        await asyncio.create_task(emitter.__aenter__())
        await emitter.subscribe(key := broker.keygen("a/", "rw"), "a/")
        await emitter.publish(key, "a/", "x", qos=1)
        await asyncio.create_task(emitter.__aexit__(None, None, None))
        assert emitter.state == "closed"
        assert not client_tasks(before)


async def hang(message: object) -> None:
    await anyio.sleep_forever()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_leaving_in_another_task_raises_connection_lost_error(broker: Broker) -> None:
    emitter = connect_once(broker.url)
    await asyncio.create_task(emitter.__aenter__())
    await broker.drop()
    await emitter.wait_closed()
    with pytest.raises(ConnectionLostError):
        await emitter.__aexit__(None, None, None)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_failing_handler_ends_a_client_whose_entering_task_has_ended(
    broker: Broker,
) -> None:
    emitter = connect_once(broker.url)
    await asyncio.create_task(emitter.__aenter__())
    error = ValueError("from the handler")

    @emitter.on("message")
    def fail(message: object) -> None:
        raise error

    await emitter.subscribe(key := broker.keygen("a/", "rw"), "a/")
    await emitter.publish(key, "a/", "x", qos=1)
    await emitter.wait_closed()
    with pytest.raises(ValueError, match="from the handler") as caught:
        await emitter.__aexit__(None, None, None)
    assert caught.value is error
    assert not broker.clients


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_broker_can_be_left_in_another_task(anyio_backend: object) -> None:
    broker = Broker()
    for _ in range(2):
        await asyncio.create_task(broker.__aenter__())
        async with connect_once(broker.url) as emitter:
            await emitter.me()
        await broker.__aexit__(None, None, None)


def test_unittest_enters_and_leaves_in_different_tasks() -> None:
    class Case(unittest.IsolatedAsyncioTestCase):
        async def asyncSetUp(self) -> None:
            self.broker = await self.enterAsyncContext(Broker())
            self.emitter = await self.enterAsyncContext(connect_once(self.broker.url))

        async def test(self) -> None:
            key = self.broker.keygen("a/", "rw")
            entering = self.emitter.subscribe(key, "a/")
            messages = await self.enterAsyncContext(entering)
            await self.emitter.publish(key, "a/", "x")
            assert (await messages.receive()).binary == b"x"

    result = Case("test").run()
    assert result is not None
    assert not result.errors
    assert result.wasSuccessful()


async def test_leaving_in_another_task_while_the_entering_task_runs_suggests_run(
    broker: Broker,
) -> None:
    recipe = r"another task.*create_task\(emitter\.run\(\)\).*wait_connected\(\).*disconnect\(\)"

    async def leave() -> None:
        with pytest.raises(RuntimeError, match=recipe) as caught:
            await emitter.__aexit__(None, None, None)
        assert isinstance(caught.value.__cause__, ConnectionLostError)

    emitter = connect_once(broker.url)
    with pytest.raises(ConnectionLostError):
        async with emitter:
            with anyio.CancelScope(shield=True):
                await broker.drop()
                await emitter.wait_closed()
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(leave)


async def test_leaving_a_broker_in_another_task_suggests_run(anyio_backend: object) -> None:
    async def leave() -> None:
        with pytest.raises(RuntimeError, match=r"another task.*start\(broker\.run\)"):
            await broker.__aexit__(None, None, None)

    async with Broker() as broker:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(leave)


async def test_broker_runs_in_a_task(anyio_backend: object) -> None:
    async with anyio.create_task_group() as tasks:
        broker = await tasks.start(Broker().run)
        with pytest.raises(RuntimeError, match="already entered"):
            await broker.__aenter__()
        async with connect_once(broker.url) as emitter:
            await emitter.me()
        tasks.cancel_scope.cancel()
    with pytest.raises(RuntimeError, match="not entered"):
        await broker.__aexit__(None, None, None)


async def test_wait_connected_raises_the_cause_when_connecting_fails(broker: Broker) -> None:
    emitter = connect_once(broker.url)

    async def start() -> None:
        with pytest.raises(ConnectError):
            await emitter.run()

    with broker.refuse():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(start)
            with pytest.raises(ClosedError) as caught:
                await emitter.wait_connected()
    assert isinstance(caught.value.__cause__, ConnectError)
    with pytest.raises(RuntimeError, match="not entered"):
        await emitter.__aexit__(None, None, None)
