from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
import trio
from anyio.abc import ByteStream, ByteStreamConnectable

from emitter_anyio import ClosedError, ConnectError, ConnectionLostError, Emitter, connect
from tests.client.tools import Calls, enter, relay
from tests.support.connections import connect_once
from tests.support.server import Server

pytestmark = pytest.mark.emitter

METHODS: dict[str, Callable[[Emitter], Awaitable[object]]] = {
    "publish": lambda emitter: emitter.publish("key", "a/", "m"),
    "publish with qos=1": lambda emitter: emitter.publish("key", "a/", "m", qos=1),
    "flush": lambda emitter: emitter.flush(),
    "subscribe, awaited": lambda emitter: emitter.subscribe("key", "a/"),
    "subscribe, entered": lambda emitter: enter(emitter.subscribe("key", "a/")),
    "unsubscribe": lambda emitter: emitter.unsubscribe("key", "a/"),
    "keygen": lambda emitter: emitter.keygen("key", "a/"),
    "publish_with_link": lambda emitter: emitter.publish_with_link("a1", "m"),
    "keyban": lambda emitter: emitter.keyban("key", "target"),
    "link": lambda emitter: emitter.link("key", "a/", "a1"),
    "me": lambda emitter: emitter.me(),
    "presence": lambda emitter: emitter.presence("key", "a/"),
    "watch_presence": lambda emitter: enter(emitter.watch_presence("key", "a/")),
}


class GatedConnectable(ByteStreamConnectable):
    """A connectable that connects to the broker after ``allowed`` is set."""

    def __init__(self, server: Server) -> None:
        self.attempted = anyio.Event()
        self.allowed = anyio.Event()
        self._server = server

    async def connect(self) -> ByteStream:
        self.attempted.set()
        await self.allowed.wait()
        address = (self._server.host, self._server.port)
        return await anyio.as_connectable(address, tls=self._server.secure).connect()


# Entering and leaving


async def test_state_follows_the_life_cycle(server: Server) -> None:
    gated = GatedConnectable(server)
    emitter = connect(connectable=gated)
    states: list[str] = [emitter.state]
    emitter.on("disconnect", lambda: states.append(emitter.state))

    async def allow() -> None:
        await gated.attempted.wait()
        states.append(emitter.state)
        gated.allowed.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(allow)
        async with emitter:
            states.append(emitter.state)
    states.append(emitter.state)
    assert states == ["closed", "connecting", "connected", "closing", "closed"]


async def test_client_can_be_entered_again_after_it_ended(server: Server) -> None:
    emitter = connect(server.url)
    calls = Calls()
    emitter.on("connect", calls)
    async with emitter:
        first = await emitter.me()
    async with emitter:
        second = await emitter.me()
    assert first.id != second.id
    assert len(calls.values) == 2


async def test_entering_an_entered_client_raises_and_suggests_connect(
    server: Server,
) -> None:
    async with connect(server.url) as emitter:
        with pytest.raises(RuntimeError, match=r"entered.*connect\(\)"):
            async with emitter:
                pytest.fail("entered twice")
        assert (await emitter.me()).id


async def test_run_of_an_entered_client_raises(emitter: Emitter) -> None:
    with pytest.raises(RuntimeError, match="entered"):
        await emitter.run()


@pytest.mark.parametrize("method", METHODS)
async def test_method_called_before_entering_raises(method: str, server: Server) -> None:
    emitter = connect(server.url)
    with pytest.raises(ClosedError, match=r"async with connect"):
        await METHODS[method](emitter)


@pytest.mark.parametrize("method", METHODS)
async def test_method_called_after_leaving_raises(method: str, server: Server) -> None:
    async with connect(server.url) as emitter:
        pass
    with pytest.raises(ClosedError, match="closed") as caught:
        await METHODS[method](emitter)
    assert isinstance(caught.value, anyio.ClosedResourceError)


async def test_messages_published_before_leaving_arrive(
    server: Server, other: Emitter, unique: str
) -> None:
    created = await other.keygen(server.secret, unique)
    async with other.subscribe(created.key, unique) as messages:
        async with connect(server.url) as emitter:
            for number in range(20):
                await emitter.publish(created.key, unique, number)
        numbers = [(await messages.receive()).as_object() for _ in range(20)]
    assert numbers == list(range(20))


async def test_leaving_waits_for_handlers_to_finish_their_buffered_messages(
    server: Server, unique: str
) -> None:
    handled = []
    emitter = connect(server.url)

    @emitter.on("message")
    async def handle(message: Any) -> None:
        await anyio.lowlevel.checkpoint()
        handled.append(message.as_object())

    async with emitter:
        created = await emitter.keygen(server.secret, unique)
        await emitter.subscribe(created.key, unique)
        for number in range(10):
            await emitter.publish(created.key, unique, number)
        await emitter.flush()
    assert handled == list(range(10))


async def test_exception_of_the_block_is_raised_as_the_same_object(server: Server) -> None:
    cause, error = KeyError("cause"), ValueError("error")
    with pytest.raises(ValueError, match="error") as caught:
        async with connect(server.url):
            try:
                raise LookupError("context")
            except LookupError:
                raise error from cause
    assert caught.value is error
    assert error.__cause__ is cause
    assert isinstance(error.__context__, LookupError)


async def test_exception_group_of_the_block_is_not_wrapped(server: Server) -> None:
    group = ExceptionGroup("mine", [ValueError("one")])
    with pytest.raises(ExceptionGroup) as caught:
        async with connect(server.url):
            raise group
    assert caught.value is group
    assert len(group.exceptions) == 1


async def test_cancelling_the_block_leaves_the_client(server: Server) -> None:
    emitter = connect(server.url)
    with anyio.CancelScope() as scope:
        async with emitter:
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert emitter.state == "closed"


async def test_cancelling_while_connecting(server: Server) -> None:
    gated = GatedConnectable(server)
    emitter = connect(connectable=gated)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(emitter.run)
        await gated.attempted.wait()
        tasks.cancel_scope.cancel()
    assert emitter.state == "closed"


# run()


async def test_run_in_a_task_group(server: Server) -> None:
    emitter = connect(server.url)
    async with anyio.create_task_group() as tasks:
        assert await tasks.start(emitter.run) is emitter
        assert (await emitter.me()).id
        await emitter.disconnect()
    assert emitter.state == "closed"


async def test_run_in_a_cancelled_task_group(server: Server) -> None:
    emitter = connect(server.url)
    async with anyio.create_task_group() as tasks:
        await tasks.start(emitter.run)
        tasks.cancel_scope.cancel()
    assert emitter.state == "closed"


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_run_in_a_trio_nursery(server: Server) -> None:
    emitter = connect(server.url)
    async with trio.open_nursery() as nursery:
        assert await nursery.start(emitter.run) is emitter
        assert (await emitter.me()).id
        await emitter.disconnect()
    assert emitter.state == "closed"


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_run_in_a_cancelled_trio_nursery(server: Server) -> None:
    emitter = connect(server.url)
    async with trio.open_nursery() as nursery:
        await nursery.start(emitter.run)
        nursery.cancel_scope.cancel()
    assert emitter.state == "closed"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_run_in_an_asyncio_task_group(server: Server) -> None:
    emitter = connect(server.url)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(emitter.run())
        await emitter.wait_connected()
        assert (await emitter.me()).id
        await emitter.disconnect()
    assert emitter.state == "closed"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_native_cancellation_ends_run(server: Server) -> None:
    emitter = connect(server.url)
    task = asyncio.create_task(emitter.run())
    await emitter.wait_connected()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert emitter.state == "closed"


async def test_start_of_run_raises_connect_error() -> None:
    async with anyio.create_task_group() as tasks:
        with pytest.raises(ConnectError):
            await tasks.start(connect(host="/there/is/no/such/socket").run)


async def await_main(main: Callable[[], Awaitable[str]]) -> str:
    return await main()


RUNNERS: dict[str, Callable[[Callable[[], Awaitable[str]]], str]] = {
    "trio.run": trio.run,
    "asyncio.run": lambda main: asyncio.run(await_main(main)),
    "anyio.run": anyio.run,
    "anyio.run on Trio": lambda main: anyio.run(main, backend="trio"),
}


@pytest.mark.parametrize("runner", RUNNERS)
async def test_program_runs_with(runner: str, server: Server, unique: str) -> None:
    async def main() -> str:
        async with connect(server.url) as emitter:
            created = await emitter.keygen(server.secret, unique)
            async with emitter.subscribe(created.key, unique) as messages:
                await emitter.publish(created.key, unique, "hello")
                return (await messages.receive()).as_string()

    assert await anyio.to_thread.run_sync(RUNNERS[runner], main) == "hello"


# disconnect()


async def test_disconnect_in_the_block_closes_the_connection_and_continues_the_block(
    server: Server,
) -> None:
    async with connect(server.url) as emitter:
        await emitter.disconnect()
        assert emitter.state == "closed"
        assert emitter.connection is None
        with pytest.raises(ClosedError, match="disconnected"):
            await emitter.me()
        await emitter.disconnect()


async def test_disconnect_before_entering_and_after_leaving_does_nothing(server: Server) -> None:
    emitter = connect(server.url)
    await emitter.disconnect()
    async with emitter:
        assert (await emitter.me()).id
    await emitter.disconnect()
    assert emitter.state == "closed"


async def test_disconnect_from_another_task_ends_the_streams(server: Server, unique: str) -> None:
    async with connect(server.url) as emitter, anyio.create_task_group() as tasks:
        created = await emitter.keygen(server.secret, unique)
        async with emitter.subscribe(created.key, unique) as messages:
            await emitter.publish(created.key, unique, "buffered")
            await emitter.flush()
            tasks.start_soon(emitter.disconnect)
            tasks.start_soon(emitter.disconnect)
            await emitter.wait_closed()
            assert [message.as_string() async for message in messages] == ["buffered"]
            with pytest.raises(anyio.EndOfStream):
                await messages.receive()


@pytest.mark.parametrize("form", ["a plain handler that returns it", "a handler that awaits it"])
async def test_disconnect_from(form: str, server: Server, unique: str) -> None:
    emitter = connect(server.url)
    if form.startswith("a plain"):
        emitter.on("message", lambda message: emitter.disconnect())
    else:

        @emitter.on("message")
        async def leave(message: object) -> None:
            await emitter.disconnect()
            assert emitter.state == "closed"

    async with emitter:
        created = await emitter.keygen(server.secret, unique)
        await emitter.subscribe(created.key, unique)
        await emitter.publish(created.key, unique, "go")
        await emitter.wait_closed()
    assert emitter.state == "closed"


async def test_disconnect_while_connecting(server: Server) -> None:
    gated = GatedConnectable(server)
    emitter = connect(connectable=gated)

    async def disconnect() -> None:
        await gated.attempted.wait()
        await emitter.disconnect()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(disconnect)
        with pytest.raises(ClosedError, match=r"disconnect\(\) was called"):
            async with emitter:
                pytest.fail("connected")
    assert emitter.state == "closed"


async def test_disconnect_waits_for_a_pending_reply(server: Server) -> None:
    replies = []

    async def ask() -> None:
        replies.append(await emitter.me())

    async with connect(server.url) as emitter, anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        while not emitter.statistics().pending:
            await anyio.lowlevel.checkpoint()
        await emitter.disconnect()
    assert len(replies) == 1


# wait_connected(), wait_closed() and statistics()


async def test_wait_connected_waits_until_the_client_is_entered(server: Server) -> None:
    gated = GatedConnectable(server)
    emitter = connect(connectable=gated)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(emitter.run)
        await gated.attempted.wait()
        gated.allowed.set()
        await emitter.wait_connected()
        assert emitter.state == "connected"
        await emitter.wait_connected()
        await emitter.disconnect()


async def test_wait_connected_raises_after_leaving(server: Server) -> None:
    async with connect(server.url) as emitter:
        pass
    with pytest.raises(ClosedError):
        await emitter.wait_connected()


async def test_wait_closed_returns_when_the_client_is_closed(server: Server) -> None:
    emitter = connect(server.url)
    await emitter.wait_closed()
    closed = Calls()

    async def wait() -> None:
        await emitter.wait_closed()
        closed(emitter.state)

    async with anyio.create_task_group() as tasks:
        async with emitter:
            tasks.start_soon(wait)
            await emitter.me()
            assert not closed.values
        assert await closed.get(1) == ["closed"]


async def test_statistics_count_received_and_dropped_messages(
    emitter: Emitter, key: str, unique: str
) -> None:
    async with emitter.subscribe(key, unique, buffer=1, overflow="drop_newest") as messages:
        for _ in range(3):
            await emitter.publish(key, unique, "m")
        await emitter.flush()
        assert messages.statistics().current_buffer_used == 1
        figures = emitter.statistics()
    assert (figures.received, figures.unhandled, figures.dropped) == (3, 0, 2)
    assert (figures.nonsense, figures.queued_bytes, figures.pending) == (0, 0, 0)
    assert emitter.statistics().dropped == 2


async def test_unhandled_messages_are_counted_with_one_warning(
    emitter: Emitter, key: str, unique: str, caplog: pytest.LogCaptureFixture
) -> None:
    await emitter.subscribe(key, unique)
    for _ in range(3):
        await emitter.publish(key, unique, "m")
    await emitter.flush()
    assert emitter.statistics().unhandled == 3
    warnings = [record for record in caplog.records if record.name == "emitter_anyio"]
    assert [unique in record.getMessage() for record in warnings] == [True]


# Losing the connection


async def test_lost_connection_is_raised_bare_from_the_block(server: Server) -> None:
    async with relay(server) as proxy:
        emitter = connect_once(host="127.0.0.1", port=proxy.port, secure=False)
        calls = Calls()
        emitter.on("disconnect", calls)
        with pytest.raises(ConnectionLostError, match=f"127.0.0.1:{proxy.port}") as caught:
            async with emitter:
                proxy.cut()
                await anyio.sleep_forever()
    assert isinstance(caught.value, anyio.BrokenResourceError)
    assert calls.values == [None]
    assert emitter.state == "closed"


async def test_connection_lost_error_has_the_unread_messages(server: Server, unique: str) -> None:
    async with relay(server) as proxy:
        with pytest.raises(ConnectionLostError) as caught:
            async with connect_once(host="127.0.0.1", port=proxy.port, secure=False) as emitter:
                created = await emitter.keygen(server.secret, unique)
                async with emitter.subscribe(created.key, unique):
                    await emitter.publish(created.key, unique, "unread")
                    await emitter.flush()
                    proxy.cut()
                    await anyio.sleep_forever()
    assert [message.as_string() for message in caught.value.unread] == ["unread"]


async def test_run_raises_connection_lost_error(server: Server) -> None:
    async with relay(server) as proxy:
        emitter = connect_once(host="127.0.0.1", port=proxy.port, secure=False)
        with pytest.raises(ExceptionGroup) as caught:
            async with anyio.create_task_group() as tasks:
                await tasks.start(emitter.run)
                proxy.cut()
    assert isinstance(caught.value.exceptions[0], ConnectionLostError)
    with pytest.raises(ConnectionLostError):
        await emitter.me()
