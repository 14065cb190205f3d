"""Foreign cancellations and interrupts in handlers, key functions and the client's tasks."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from typing import TypeAlias

import anyio
import pytest
from anyio.lowlevel import checkpoint

from emitter_anyio import (
    ConnectionLostError,
    EmitterError,
    EmitterMessage,
    HandlerError,
    ReplyError,
)
from emitter_anyio._backend.tasks import Tasks
from emitter_anyio.testing import Broker
from tests.support.command import run
from tests.support.connections import connect_once, connect_reconnecting, while_disconnected

asyncio_only = pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)

RaiseForeignCancellation: TypeAlias = Callable[[], Awaitable[None]]


async def await_cancelled_task() -> None:
    task = asyncio.create_task(asyncio.sleep(60))
    task.cancel()
    await task


async def await_cancelled_future() -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(future.cancel)
    await future


async def get_result_of_cancelled_future() -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.cancel()
    future.result()


foreign_cancellations = pytest.mark.parametrize(
    "cancel",
    [
        await_cancelled_task,
        await_cancelled_future,
        get_result_of_cancelled_future,
    ],
)


# In user code, a foreign cancellation is an error of that code


@asyncio_only
@foreign_cancellations
async def test_foreign_cancellation_in_a_handler_emits_handler_error(
    broker: Broker, cancel: RaiseForeignCancellation
) -> None:
    emitter = connect_once(broker.url)
    key = broker.keygen("a/", "rw")

    @emitter.on("message")
    async def handle(message: EmitterMessage) -> None:
        await cancel()

    emitter.on("error", lambda error: None)
    async with emitter, emitter.stream("error") as errors:
        await emitter.subscribe(key, "a/")
        for _ in range(2):
            await emitter.publish(key, "a/", "x")
            error = await errors.receive()
            assert isinstance(error, HandlerError)
            assert isinstance(error.__cause__, asyncio.CancelledError)
        assert (await emitter.me()).id


@asyncio_only
async def test_foreign_cancellation_in_a_plain_handler_emits_handler_error(broker: Broker) -> None:
    emitter = connect_once(broker.url)
    key = broker.keygen("a/", "rw")

    @emitter.on("message")
    def handle(message: EmitterMessage) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.cancel()
        future.result()

    async with emitter, emitter.stream("error") as errors:
        await emitter.subscribe(key, "a/")
        await emitter.publish(key, "a/", "x")
        error = await errors.receive()
        assert isinstance(error.__cause__, asyncio.CancelledError)


@asyncio_only
@foreign_cancellations
@pytest.mark.parametrize("event", ["message", "error"])
async def test_foreign_cancellation_without_an_error_handler_is_raised_bare(
    broker: Broker, cancel: RaiseForeignCancellation, event: str
) -> None:
    emitter = connect_once(broker.url)
    key = broker.keygen("a/", "rw")

    async def handle(value: object) -> None:
        await cancel()

    emitter.on("message", handle)
    if event == "error":
        emitter.on("error", handle)
    with pytest.raises(asyncio.CancelledError) as caught:
        async with emitter:
            await emitter.subscribe(key, "a/")
            await emitter.publish(key, "a/", "x")
            await anyio.sleep_forever()
    assert any(event in note for note in caught.value.__notes__)
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()


@asyncio_only
@foreign_cancellations
async def test_foreign_cancellation_in_a_served_request_raises_reply_error(
    broker: Broker, cancel: RaiseForeignCancellation
) -> None:
    key = broker.keygen("a/#/", "rw")

    async def handle(message: EmitterMessage) -> bytes:
        if message.binary == b"cancel":
            await cancel()
        return b"served"

    async with connect_once(broker.url) as emitter, anyio.create_task_group() as tasks:
        await tasks.start(emitter.serve, key, "a/", handle)
        with pytest.raises(ReplyError, match="CancelledError"):
            await emitter.request(key, "a/", "cancel")
        assert (await emitter.request(key, "a/", "x")).binary == b"served"
        tasks.cancel_scope.cancel()


@asyncio_only
@foreign_cancellations
async def test_foreign_cancellation_in_a_key_function_is_raised_by_the_call(
    broker: Broker, cancel: RaiseForeignCancellation
) -> None:
    async def provide() -> str:
        await cancel()
        raise AssertionError("cancellation had no effect")

    async with connect_once(broker.url) as emitter:
        with pytest.raises(EmitterError, match="key function") as caught:
            await emitter.publish(provide, "a/", "x", qos=1)
        assert isinstance(caught.value.__cause__, asyncio.CancelledError)


@asyncio_only
@foreign_cancellations
async def test_foreign_cancellation_while_restoring_is_raised_in_the_stream(
    broker: Broker, cancel: RaiseForeignCancellation
) -> None:
    keys = [broker.keygen("a/", "r", ttl=60)]

    async def provide() -> str:
        if not keys:
            await cancel()
        return keys.pop()

    async with (
        connect_reconnecting(broker.url) as emitter,
        emitter.subscribe(provide, "a/") as messages,
    ):
        async with while_disconnected(emitter, broker):
            broker.advance(61)
        with pytest.raises(EmitterError, match="key function"):
            await messages.receive()
        assert emitter.state == "connected"


@asyncio_only
async def test_handlers_own_deadline_does_not_affect_the_client(broker: Broker) -> None:
    emitter = connect_once(broker.url)
    key = broker.keygen("a/", "rw")
    done = anyio.Event()

    @emitter.on("message")
    async def handle(message: EmitterMessage) -> None:
        with anyio.move_on_after(0):
            await anyio.sleep_forever()
        try:
            async with asyncio.timeout(0):
                await anyio.sleep_forever()
        except TimeoutError:
            done.set()

    async with emitter:
        await emitter.subscribe(key, "a/")
        await emitter.publish(key, "a/", "x")
        await done.wait()


# Task.cancel() on a task of the client ends the client without reconnecting


async def hang(value: object) -> None:
    await anyio.sleep_forever()


@asyncio_only
@pytest.mark.parametrize("name", ["emitter_anyio connection", "emitter_anyio on('message')"])
async def test_native_cancellation_of_a_client_task_ends_the_client(
    broker: Broker, name: str
) -> None:
    emitter = connect_reconnecting(broker.url)
    emitter.on("message", hang)
    key = broker.keygen("a/", "rw")
    with pytest.raises(ConnectionLostError, match=r"Task\.cancel\(\)"):
        async with emitter, emitter.subscribe(key, "a/") as messages:
            await emitter.publish(key, "a/", "x", qos=1)
            (task,) = (task for task in asyncio.all_tasks() if task.get_name() == name)
            task.cancel()
            with anyio.CancelScope(shield=True):
                await emitter.wait_closed()
                await messages.receive()
                with pytest.raises(ConnectionLostError):
                    await messages.receive()
            await anyio.sleep_forever()
    assert emitter.statistics().connections == 1


@asyncio_only
async def test_native_cancellation_of_the_connection_task_while_down_ends_the_client(
    broker: Broker,
) -> None:
    emitter = connect_reconnecting(broker.url)
    own_task = asyncio.current_task()
    with pytest.raises(ConnectionLostError):
        async with emitter, emitter.stream("disconnect") as disconnected:
            others = asyncio.all_tasks()
            with broker.refuse():
                await broker.drop()
                await disconnected.receive()
                (task,) = (one for one in others if one.get_name() == "emitter_anyio connection")
                assert task is not own_task
                task.cancel()
                await anyio.sleep_forever()
    assert emitter.statistics().connections == 1


# A key function, and tasks that it starts, may use a connection that is being restored


async def test_task_of_a_key_function_is_refused_after_the_function_returned(
    broker: Broker,
) -> None:
    ids: list[str] = []
    refused: list[type[Exception]] = []
    keys = {channel: [broker.keygen(channel, "r", ttl=60)] for channel in ("a/", "b/")}
    used, returned, tried = anyio.Event(), anyio.Event(), anyio.Event()

    async def use() -> None:
        ids.append((await emitter.me()).id)
        used.set()
        await returned.wait()
        try:
            await emitter.me()
        except ConnectionLostError as exc:
            refused.append(type(exc))
        tried.set()

    async def provide() -> str:
        if keys["a/"]:
            return keys["a/"].pop()
        tasks.start_soon(use)
        await used.wait()
        key = (await emitter.keygen(broker.secret_key, "a/", "r")).key
        returned.set()
        return key

    async def slow_source() -> str:
        if keys["b/"]:
            return keys["b/"].pop()
        # The connection is being restored until this function returns.
        await tried.wait()
        return broker.keygen("b/", "r")

    async with anyio.create_task_group() as tasks:
        async with connect_reconnecting(broker.url, while_down="raise") as emitter:
            async with emitter.subscribe(provide, "a/"), emitter.subscribe(slow_source, "b/"):
                async with while_disconnected(emitter, broker):
                    broker.advance(61)
    assert len(ids) == 1
    assert refused == [ConnectionLostError]


# Ctrl-C

INTERRUPTED = """
import signal, sys
import anyio
from anyio.from_thread import start_blocking_portal
from emitter_anyio import connect
from emitter_anyio._backend.tasks import Tasks
from emitter_anyio.testing import Broker
from tests.support.command import run


class Interrupting:
    def __init__(self, stream):
        self.stream, self.received = stream, 0

    def __getattr__(self, name):
        return getattr(self.stream, name)

    async def receive(self, size):
        data = await self.stream.receive(size)
        self.received += 1
        if self.received == 2:
            signal.raise_signal(signal.SIGINT)
        return data


class Connectable(anyio.abc.ByteStreamConnectable):
    async def connect(self):
        return Interrupting(await anyio.connect_tcp(broker.host, broker.port))


async def main():
    async with connect(connectable=Connectable(), secure=False) as emitter:
        try:
            await emitter.me()
            await anyio.sleep_forever()
        finally:
            print("left", flush=True)


signal.signal(signal.SIGINT, signal.default_int_handler)
with start_blocking_portal() as portal, portal.wrap_async_context_manager(Broker()) as broker:
    anyio.run(main, backend=sys.argv[1])
"""


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_ctrl_c_in_a_client_task_is_raised_bare(backend: str) -> None:
    done = run("-c", INTERRUPTED, backend)
    assert done.stdout == "left\n"
    assert done.stderr.splitlines()[-1] == "KeyboardInterrupt"
    assert "ExceptionGroup" not in done.stderr


async def fail() -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_interrupt_in_a_failing_report_is_raised_bare(anyio_backend: object) -> None:
    def interrupt(error: BaseException) -> None:
        raise KeyboardInterrupt from error

    tasks = Tasks(interrupt)
    await tasks.open()
    tasks.start_soon(fail)
    with pytest.raises(KeyboardInterrupt):
        await tasks.close()


async def test_exception_in_a_failing_report_is_raised(anyio_backend: object) -> None:
    def fail_to_report(error: BaseException) -> None:
        raise ValueError from error

    tasks = Tasks(fail_to_report)
    await tasks.open()
    tasks.start_soon(fail)
    with pytest.raises(ExceptionGroup) as caught:
        await tasks.close()
    assert [type(error) for error in caught.value.exceptions] == [ValueError]


@asyncio_only
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")  # its coroutine is never awaited
async def test_task_that_is_cancelled_before_it_begins_is_not_awaited(
    anyio_backend: object,
) -> None:
    tasks = Tasks(lambda error: None)
    await tasks.open()
    before = asyncio.all_tasks()
    tasks.start_soon(anyio.sleep_forever)
    (task,) = asyncio.all_tasks() - before
    task.cancel()
    await tasks.stopped()
    await tasks.close()
    del task
    gc.collect()


async def test_tasks_that_have_not_begun_are_awaited_by_all(anyio_backend: object) -> None:
    tasks = Tasks(lambda error: None)
    ended = []

    async def end(second: bool) -> None:
        for _ in range(10):
            await checkpoint()
        if second:
            tasks.start(end, False)
        ended.append(second)

    async def wait() -> None:
        await tasks.stopped()
        assert ended == [True, False]

    await tasks.open()
    async with anyio.create_task_group() as waiting:
        tasks.start(end, True)
        for _ in range(3):
            waiting.start_soon(wait)
    await tasks.close()
