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

VERBS: dict[str, Callable[[Emitter], Awaitable[object]]] = {
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


class Slow(ByteStreamConnectable):
    """Reaches the broker when it is allowed to."""

    def __init__(self, server: Server) -> None:
        self.asked = anyio.Event()
        self.allowed = anyio.Event()
        self._server = server

    async def connect(self) -> ByteStream:
        self.asked.set()
        await self.allowed.wait()
        place = (self._server.host, self._server.port)
        return await anyio.as_connectable(place, tls=self._server.secure).connect()


# Entering and leaving


async def test_the_state_follows_its_life(server: Server) -> None:
    slow = Slow(server)
    emitter = connect(connectable=slow)
    states: list[str] = [emitter.state]
    emitter.on("disconnect", lambda: states.append(emitter.state))

    async def allow() -> None:
        await slow.asked.wait()
        states.append(emitter.state)
        slow.allowed.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(allow)
        async with emitter:
            states.append(emitter.state)
    states.append(emitter.state)
    assert states == ["closed", "connecting", "connected", "closing", "closed"]


async def test_it_can_be_entered_again_after_it_ended(server: Server) -> None:
    emitter = connect(server.url)
    calls = Calls()
    emitter.on("connect", calls)
    async with emitter:
        first = await emitter.me()
    async with emitter:
        second = await emitter.me()
    assert first.id != second.id
    assert len(calls.values) == 2


async def test_entering_it_twice_at_once_is_an_error_that_names_the_way_out(
    server: Server,
) -> None:
    async with connect(server.url) as emitter:
        with pytest.raises(RuntimeError, match=r"entered.*connect\(\)"):
            async with emitter:
                pytest.fail("it was entered twice")
        assert (await emitter.me()).id


async def test_run_while_it_is_entered_is_an_error(emitter: Emitter) -> None:
    with pytest.raises(RuntimeError, match="entered"):
        await emitter.run()


@pytest.mark.parametrize("verb", VERBS)
async def test_using_it_before_entering(verb: str, server: Server) -> None:
    emitter = connect(server.url)
    with pytest.raises(ClosedError, match=r"async with connect"):
        await VERBS[verb](emitter)


@pytest.mark.parametrize("verb", VERBS)
async def test_using_it_after_leaving(verb: str, server: Server) -> None:
    async with connect(server.url) as emitter:
        pass
    with pytest.raises(ClosedError, match="closed") as caught:
        await VERBS[verb](emitter)
    assert isinstance(caught.value, anyio.ClosedResourceError)


async def test_what_was_published_before_leaving_arrives(
    server: Server, other: Emitter, unique: str
) -> None:
    made = await other.keygen(server.secret, unique)
    async with other.subscribe(made.key, unique) as messages:
        async with connect(server.url) as emitter:
            for number in range(20):
                await emitter.publish(made.key, unique, number)
        numbers = [(await messages.receive()).as_object() for _ in range(20)]
    assert numbers == list(range(20))


async def test_handlers_finish_what_waits_for_them_before_it_is_left(
    server: Server, unique: str
) -> None:
    handled = []
    emitter = connect(server.url)

    @emitter.on("message")
    async def handle(message: Any) -> None:
        await anyio.lowlevel.checkpoint()
        handled.append(message.as_object())

    async with emitter:
        made = await emitter.keygen(server.secret, unique)
        await emitter.subscribe(made.key, unique)
        for number in range(10):
            await emitter.publish(made.key, unique, number)
        await emitter.flush()
    assert handled == list(range(10))


async def test_the_exception_of_the_body_comes_out_as_the_same_object(server: Server) -> None:
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


async def test_a_group_that_the_body_raised_stays_that_group(server: Server) -> None:
    group = ExceptionGroup("mine", [ValueError("one")])
    with pytest.raises(ExceptionGroup) as caught:
        async with connect(server.url):
            raise group
    assert caught.value is group
    assert len(group.exceptions) == 1


async def test_cancelling_the_body_leaves(server: Server) -> None:
    emitter = connect(server.url)
    with anyio.CancelScope() as scope:
        async with emitter:
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert emitter.state == "closed"


async def test_cancelling_it_while_it_connects(server: Server) -> None:
    slow = Slow(server)
    emitter = connect(connectable=slow)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(emitter.run)
        await slow.asked.wait()
        tasks.cancel_scope.cancel()
    assert emitter.state == "closed"


# run()


async def test_running_in_a_task_group(server: Server) -> None:
    emitter = connect(server.url)
    async with anyio.create_task_group() as tasks:
        assert await tasks.start(emitter.run) is emitter
        assert (await emitter.me()).id
        await emitter.disconnect()
    assert emitter.state == "closed"


async def test_running_in_a_task_group_that_is_cancelled(server: Server) -> None:
    emitter = connect(server.url)
    async with anyio.create_task_group() as tasks:
        await tasks.start(emitter.run)
        tasks.cancel_scope.cancel()
    assert emitter.state == "closed"


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_running_in_a_nursery(server: Server) -> None:
    emitter = connect(server.url)
    async with trio.open_nursery() as nursery:
        assert await nursery.start(emitter.run) is emitter
        assert (await emitter.me()).id
        await emitter.disconnect()
    assert emitter.state == "closed"


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_running_in_a_nursery_that_is_cancelled(server: Server) -> None:
    emitter = connect(server.url)
    async with trio.open_nursery() as nursery:
        await nursery.start(emitter.run)
        nursery.cancel_scope.cancel()
    assert emitter.state == "closed"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_running_in_a_task_group_of_asyncio(server: Server) -> None:
    emitter = connect(server.url)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(emitter.run())
        await emitter.wait_connected()
        assert (await emitter.me()).id
        await emitter.disconnect()
    assert emitter.state == "closed"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_native_cancellation_ends_run(server: Server) -> None:
    emitter = connect(server.url)
    task = asyncio.create_task(emitter.run())
    await emitter.wait_connected()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert emitter.state == "closed"


async def test_start_raises_what_kept_run_from_connecting() -> None:
    async with anyio.create_task_group() as tasks:
        with pytest.raises(ConnectError):
            await tasks.start(connect(host="/there/is/no/such/socket").run)


async def awaited(main: Callable[[], Awaitable[str]]) -> str:
    return await main()


RUNS: dict[str, Callable[[Callable[[], Awaitable[str]]], str]] = {
    "trio.run": trio.run,
    "asyncio.run": lambda main: asyncio.run(awaited(main)),
    "anyio.run": anyio.run,
    "anyio.run on Trio": lambda main: anyio.run(main, backend="trio"),
}


@pytest.mark.parametrize("run", RUNS)
async def test_the_program_runs_by(run: str, server: Server, unique: str) -> None:
    async def main() -> str:
        async with connect(server.url) as emitter:
            made = await emitter.keygen(server.secret, unique)
            async with emitter.subscribe(made.key, unique) as messages:
                await emitter.publish(made.key, unique, "hello")
                return (await messages.receive()).as_string()

    assert await anyio.to_thread.run_sync(RUNS[run], main) == "hello"


# disconnect()


async def test_disconnecting_from_the_body_ends_the_link_and_not_the_body(server: Server) -> None:
    async with connect(server.url) as emitter:
        await emitter.disconnect()
        assert emitter.state == "closed"
        assert emitter.connection is None
        with pytest.raises(ClosedError, match="disconnected"):
            await emitter.me()
        await emitter.disconnect()


async def test_disconnecting_before_entering_and_after_leaving_is_nothing(server: Server) -> None:
    emitter = connect(server.url)
    await emitter.disconnect()
    async with emitter:
        assert (await emitter.me()).id
    await emitter.disconnect()
    assert emitter.state == "closed"


async def test_disconnecting_from_another_task_ends_the_streams(
    server: Server, unique: str
) -> None:
    async with connect(server.url) as emitter, anyio.create_task_group() as tasks:
        made = await emitter.keygen(server.secret, unique)
        async with emitter.subscribe(made.key, unique) as messages:
            await emitter.publish(made.key, unique, "buffered")
            await emitter.flush()
            tasks.start_soon(emitter.disconnect)
            tasks.start_soon(emitter.disconnect)
            await emitter.wait_closed()
            assert [message.as_string() async for message in messages] == ["buffered"]
            with pytest.raises(anyio.EndOfStream):
                await messages.receive()


@pytest.mark.parametrize("form", ["a plain handler that returns it", "a handler that awaits it"])
async def test_disconnecting_from(form: str, server: Server, unique: str) -> None:
    emitter = connect(server.url)
    if form.startswith("a plain"):
        emitter.on("message", lambda message: emitter.disconnect())
    else:

        @emitter.on("message")
        async def leave(message: object) -> None:
            await emitter.disconnect()
            assert emitter.state == "closed"

    async with emitter:
        made = await emitter.keygen(server.secret, unique)
        await emitter.subscribe(made.key, unique)
        await emitter.publish(made.key, unique, "go")
        await emitter.wait_closed()
    assert emitter.state == "closed"


async def test_disconnecting_while_it_connects(server: Server) -> None:
    slow = Slow(server)
    emitter = connect(connectable=slow)

    async def disconnect() -> None:
        await slow.asked.wait()
        await emitter.disconnect()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(disconnect)
        with pytest.raises(ClosedError, match="connecting"):
            async with emitter:
                pytest.fail("it has connected")
    assert emitter.state == "closed"


async def test_an_answer_that_is_awaited_comes_before_the_goodbye(server: Server) -> None:
    answers = []

    async def ask() -> None:
        answers.append(await emitter.me())

    async with connect(server.url) as emitter, anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        while not emitter.statistics().pending:
            await anyio.lowlevel.checkpoint()
        await emitter.disconnect()
    assert len(answers) == 1


# Waiting, and figures


async def test_wait_connected_waits_for_a_client_that_is_not_entered_yet(server: Server) -> None:
    slow = Slow(server)
    emitter = connect(connectable=slow)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(emitter.run)
        await slow.asked.wait()
        slow.allowed.set()
        await emitter.wait_connected()
        assert emitter.state == "connected"
        await emitter.wait_connected()
        await emitter.disconnect()


async def test_wait_connected_raises_after_leaving(server: Server) -> None:
    async with connect(server.url) as emitter:
        pass
    with pytest.raises(ClosedError):
        await emitter.wait_connected()


async def test_wait_closed_returns_when_the_link_is_closed(server: Server) -> None:
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


async def test_statistics_count_what_came(emitter: Emitter, key: str, unique: str) -> None:
    async with emitter.subscribe(key, unique, buffer=1, overflow="drop_newest") as messages:
        for _ in range(3):
            await emitter.publish(key, unique, "m")
        await emitter.flush()
        assert messages.statistics().current_buffer_used == 1
        figures = emitter.statistics()
    assert (figures.received, figures.unhandled, figures.dropped) == (3, 0, 2)
    assert (figures.nonsense, figures.queued_bytes, figures.pending) == (0, 0, 0)
    assert emitter.statistics().dropped == 2


async def test_a_message_that_nobody_takes_is_counted_with_one_warning(
    emitter: Emitter, key: str, unique: str, caplog: pytest.LogCaptureFixture
) -> None:
    await emitter.subscribe(key, unique)
    for _ in range(3):
        await emitter.publish(key, unique, "m")
    await emitter.flush()
    assert emitter.statistics().unhandled == 3
    warnings = [record for record in caplog.records if record.name == "emitter_anyio"]
    assert [unique in record.getMessage() for record in warnings] == [True]


# The link is lost


async def test_when_the_link_is_lost_the_block_raises_it_bare(server: Server) -> None:
    async with relay(server) as link:
        emitter = connect_once(host="127.0.0.1", port=link.port, secure=False)
        calls = Calls()
        emitter.on("disconnect", calls)
        with pytest.raises(ConnectionLostError, match=f"127.0.0.1:{link.port}") as caught:
            async with emitter:
                link.cut()
                await anyio.sleep_forever()
    assert isinstance(caught.value, anyio.BrokenResourceError)
    assert calls.values == [None]
    assert emitter.state == "closed"


async def test_when_the_link_is_lost_what_was_not_read_is_on_the_error(
    server: Server, unique: str
) -> None:
    async with relay(server) as link:
        with pytest.raises(ConnectionLostError) as caught:
            async with connect_once(host="127.0.0.1", port=link.port, secure=False) as emitter:
                made = await emitter.keygen(server.secret, unique)
                async with emitter.subscribe(made.key, unique):
                    await emitter.publish(made.key, unique, "unread")
                    await emitter.flush()
                    link.cut()
                    await anyio.sleep_forever()
    assert [message.as_string() for message in caught.value.unread] == ["unread"]


async def test_when_the_link_is_lost_run_raises_it(server: Server) -> None:
    async with relay(server) as link:
        emitter = connect_once(host="127.0.0.1", port=link.port, secure=False)
        with pytest.raises(ExceptionGroup) as caught:
            async with anyio.create_task_group() as tasks:
                await tasks.start(emitter.run)
                link.cut()
    assert isinstance(caught.value.exceptions[0], ConnectionLostError)
    with pytest.raises(ConnectionLostError):
        await emitter.me()
