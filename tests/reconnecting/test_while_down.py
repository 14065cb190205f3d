"""Calls, handlers and leaving while the client is disconnected."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import Any

import anyio
import pytest
from anyio import ClosedResourceError, EndOfStream
from anyio.lowlevel import checkpoint

from emitter_anyio import (
    Backoff,
    ClosedError,
    ConnectError,
    ConnectionLostError,
    Emitter,
    EmitterMessage,
    HandlerError,
    connect,
)
from emitter_anyio.testing import Broker
from tests.client.tools import Calls
from tests.support.connections import (
    connect_once,
    connect_reconnecting,
    force_reconnect,
    subscribed_channels,
    while_disconnected,
    while_disconnected_nowait,
)


def calls_of(emitter: Emitter, broker: Broker, key: str) -> list[Callable[[], Awaitable[object]]]:
    async def enter() -> None:
        async with emitter.subscribe(key, "b/"):
            pass

    async def watch() -> None:
        async with emitter.watch_presence(key, "b/"):
            pass

    async def read() -> None:
        assert [message async for message in emitter.history(key, "b/")] == []

    return [
        partial(emitter.publish, key, "a/", "x"),
        partial(emitter.publish, key, "a/", "x", qos=1),
        partial(emitter.publish_with_link, "x", "x"),
        partial(emitter.keygen, broker.secret_key, "a/"),
        partial(emitter.keyban, broker.secret_key, key, False),
        partial(emitter.link, key, "a/", "x"),
        partial(emitter.presence, key, "a/"),
        partial(emitter.unsubscribe, key, "c/"),
        lambda: emitter.subscribe(key, "a/"),
        emitter.flush,
        emitter.me,
        enter,
        watch,
        read,
    ]


# Calls


async def test_calls_wait_for_the_next_connection(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    await emitter.subscribe(key, "a/")
    await emitter.link(key, "a/", "x")
    done: list[int] = []

    async def call(number: int, method: Callable[[], Awaitable[object]]) -> None:
        await method()
        done.append(number)

    async with anyio.create_task_group() as tasks:
        async with while_disconnected(emitter, broker):
            calls = calls_of(emitter, broker, key)
            for number, method in enumerate(calls):
                tasks.start_soon(call, number, method)
            for _ in range(10):
                await checkpoint()
            assert not done
            assert emitter.state == "connecting"
            assert emitter.connection is None
    assert sorted(done) == list(range(len(calls)))


async def test_calls_raise_with_while_down_raise(broker: Broker, key: str) -> None:
    async with connect_reconnecting(broker.url, while_down="raise") as emitter:
        await emitter.subscribe(key, "a/")
        async with while_disconnected(emitter, broker):
            for call in calls_of(emitter, broker, key):
                with pytest.raises(ConnectionLostError, match="reconnecting"):
                    await call()
        await emitter.me()
        assert subscribed_channels(broker) == ["a/"]


async def test_waiting_call_respects_its_callers_deadline(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    async with while_disconnected(emitter, broker):
        for call in calls_of(emitter, broker, key):
            with pytest.raises(TimeoutError):
                with anyio.fail_after(0.001):
                    await call()
    await emitter.flush()
    assert subscribed_channels(broker) == []
    assert emitter.statistics().pending == 0
    assert emitter.statistics().uncertain == 0


async def test_pending_calls_raise_and_the_client_continues(
    broker: Broker, emitter: Emitter, key: str
) -> None:
    lost: list[ConnectionLostError] = []

    async def call(method: Callable[[], Awaitable[object]]) -> None:
        with pytest.raises(ConnectionLostError, match="unknown") as exc:
            await method()
        lost.append(exc.value)

    async with anyio.create_task_group() as tasks:
        with broker.hold("puback", "suback", "unsuback", "reply", "pingresp"):
            calls = calls_of(emitter, broker, key)
            del calls[2], calls[0]  # a publish with qos=0 returns once it is queued
            for method in calls:
                tasks.start_soon(call, method)
            await anyio.wait_all_tasks_blocked()
            await broker.drop()
    assert len(lost) == len(calls)
    assert all(isinstance(error.__cause__, EOFError | OSError) for error in lost)
    await emitter.flush()
    assert subscribed_channels(broker) == []
    assert not any(client.peer.watched for client in broker.clients)


async def test_wait_connected_while_down(broker: Broker) -> None:
    emitter = connect_reconnecting(broker.url)
    connected: list[str] = []

    async def wait() -> None:
        await emitter.wait_connected()
        connected.append(emitter.state)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        async with emitter:
            await emitter.wait_connected()
            async with while_disconnected(emitter, broker):
                tasks.start_soon(wait)
                for _ in range(10):
                    await checkpoint()
                assert connected == ["connected"]
            while len(connected) < 2:
                await checkpoint()
        with pytest.raises(ClosedError):
            await emitter.wait_connected()


async def test_waiting_calls_raise_when_reconnecting_is_given_up(broker: Broker, key: str) -> None:
    emitter = connect(broker.url, reconnect=Backoff(0, 0, tries=3))
    waiting: list[Callable[[], Awaitable[object]]] = [
        emitter.wait_connected,
        partial(emitter.publish, key, "a/", "x"),
        emitter.me,
    ]
    lost: list[BaseException | None] = []

    async def wait(method: Callable[[], Awaitable[object]]) -> None:
        with pytest.raises(ConnectionLostError, match="3 tries") as exc:
            await method()
        lost.append(exc.value.__cause__)

    async with anyio.create_task_group() as tasks:
        with pytest.raises(ConnectionLostError, match="3 tries"):
            async with emitter, emitter.stream("disconnect") as disconnected:
                with broker.refuse():
                    await broker.drop()
                    await disconnected.receive()
                    for method in waiting:
                        tasks.start_soon(wait, method)
                    await anyio.sleep_forever()
    assert len(lost) == len(waiting)
    assert all(isinstance(cause, ConnectError) for cause in lost)


async def test_streams_can_be_read_to_the_end_after_reconnecting_is_given_up(
    broker: Broker, key: str
) -> None:
    emitter = connect(broker.url, reconnect=Backoff(0, 0, tries=1))
    with pytest.raises(ConnectionLostError) as caught:
        async with emitter, emitter.subscribe(key, "a/") as messages:
            for text in "xyz":
                await emitter.publish(key, "a/", text)
            await emitter.flush()
            with broker.refuse():
                await broker.drop()
                with anyio.CancelScope(shield=True):
                    await emitter.wait_closed()
                    assert (await messages.receive()).binary == b"x"
            await checkpoint()
    assert [message.binary for message in caught.value.unread] == [b"y", b"z"]


# Leaving


async def test_disconnect_while_down_returns_immediately(broker: Broker, key: str) -> None:
    async with (
        connect_reconnecting(broker.url) as emitter,
        emitter.subscribe(key, "a/") as messages,
    ):
        async with while_disconnected_nowait(emitter, broker):
            await emitter.disconnect()
            await emitter.disconnect()
            assert emitter.state == "closed"
            assert [message async for message in messages] == []
            with pytest.raises(ClosedError):
                await emitter.me()


@pytest.mark.parametrize("error", [None, KeyError("block")])
async def test_block_can_end_while_down(broker: Broker, error: Exception | None) -> None:
    emitter = connect_reconnecting(broker.url)
    raised = None
    async with AsyncExitStack() as stack:
        try:
            async with emitter:
                await stack.enter_async_context(while_disconnected_nowait(emitter, broker))
                if error is not None:
                    raise error
        except KeyError as exc:
            raised = exc
        assert emitter.state == "closed"
    assert raised is error


async def test_waiting_calls_raise_closed_error_on_disconnect(broker: Broker, key: str) -> None:
    emitter = connect_reconnecting(broker.url)

    async def publish() -> None:
        with pytest.raises(ClosedError):
            await emitter.publish(key, "a/", "x")

    async with anyio.create_task_group() as tasks, emitter:
        async with while_disconnected_nowait(emitter, broker):
            tasks.start_soon(publish)
            for _ in range(10):
                await checkpoint()
            await emitter.disconnect()


@pytest.mark.parametrize("losses", [1, 2])
async def test_handler_can_disconnect_while_down(broker: Broker, losses: int) -> None:
    emitter = connect_reconnecting(broker.url)
    states = []
    lost_count = 0

    @emitter.on("disconnect")
    async def leave() -> None:
        nonlocal lost_count
        lost_count += 1
        if lost_count == losses:
            states.append(emitter.state)
            await emitter.disconnect()
            states.append(emitter.state)

    async with emitter:
        for opened in range(1, losses):
            await broker.drop()
            while emitter.statistics().connections == opened:
                await checkpoint()
        with broker.refuse():
            await broker.drop()
            await emitter.wait_closed()
    assert states == ["connecting", "closed"]


async def test_another_task_can_disconnect_while_down(broker: Broker) -> None:
    emitter = connect_reconnecting(broker.url)
    async with anyio.create_task_group() as tasks:
        await tasks.start(emitter.run)
        async with while_disconnected_nowait(emitter, broker):
            tasks.start_soon(emitter.disconnect)
            await emitter.disconnect()
    assert emitter.state == "closed"


async def test_cancelling_the_block_while_down(broker: Broker) -> None:
    emitter = connect_reconnecting(broker.url)
    with anyio.CancelScope() as scope:
        async with emitter:
            async with while_disconnected_nowait(emitter, broker):
                scope.cancel()
                await checkpoint()
    assert scope.cancelled_caught
    assert emitter.state == "closed"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_native_cancellation_while_down(broker: Broker) -> None:
    emitter = connect_reconnecting(broker.url)

    async def live() -> None:
        async with emitter:
            await anyio.sleep_forever()

    task = asyncio.create_task(live())
    await emitter.wait_connected()
    async with while_disconnected_nowait(emitter, broker):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert emitter.state == "closed"


@pytest.mark.parametrize("kind", ["reply", "suback"])
async def test_leaving_while_restoring(broker: Broker, key: str, kind: str) -> None:
    emitter = connect_reconnecting(broker.url, disconnect_timeout=0.05)
    async with emitter:
        await emitter.subscribe(key, "a/")
        await emitter.link(key, "a/", "x")
        with broker.hold("suback", "puback", "reply"):
            await broker.drop()
            while not subscribed_channels(broker):
                await checkpoint()
            if kind == "suback":
                await emitter.disconnect()
            else:
                with anyio.CancelScope() as scope:
                    scope.cancel()
                    await emitter.disconnect()
                await emitter.wait_closed()
    assert emitter.statistics().connections == 1


async def test_leaving_while_restoring_waits_for_the_subscriptions(
    broker: Broker, key: str
) -> None:
    emitter = connect_reconnecting(broker.url)
    async with emitter:
        await emitter.subscribe(key, "a/")
        async with anyio.create_task_group() as tasks:
            with broker.hold("suback"):
                await broker.drop()
                while not subscribed_channels(broker):
                    await checkpoint()
                tasks.start_soon(emitter.disconnect)
                while emitter.state != "closing":
                    await checkpoint()
    assert emitter.statistics().connections == 2
    assert not broker.clients


# Handlers


async def test_connection_lost_in_a_handlers_call_emits_error(broker: Broker, key: str) -> None:
    emitter = connect_reconnecting(broker.url)
    errors = Calls()
    emitter.on("error", errors)
    handled = []

    @emitter.on("message")
    async def handle(message: EmitterMessage) -> None:
        handled.append(message.binary)
        if message.binary == b"ask":
            await emitter.me()

    async with emitter:
        await emitter.subscribe(key, "a/")
        with broker.hold("reply"):
            await broker.publish("a/", "ask")
            while not emitter.statistics().pending:
                await checkpoint()
            await force_reconnect(emitter, broker)
        await broker.publish("a/", "next")
        while len(handled) < 2:
            await checkpoint()
    (error,) = errors.values
    assert isinstance(error, HandlerError)
    assert isinstance(error.__cause__, ConnectionLostError)


async def test_connection_lost_in_a_handlers_call_is_logged_without_an_error_handler(
    broker: Broker, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    emitter = connect_reconnecting(broker.url)

    @emitter.on("message")
    async def handle(message: EmitterMessage) -> None:
        # The task group wraps the exception in a group.
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(emitter.me)

    async with emitter:
        await emitter.subscribe(key, "a/")
        with broker.hold("reply"):
            await broker.publish("a/", "ask")
            while not emitter.statistics().pending:
                await checkpoint()
            await force_reconnect(emitter, broker)
        await emitter.me()
    assert "ExceptionGroup" in caplog.text


async def test_other_exception_in_a_handler_ends_the_client_while_down(broker: Broker) -> None:
    emitter = connect_reconnecting(broker.url)
    error = KeyError("handler")

    @emitter.on("disconnect")
    def fail() -> None:
        raise error

    with pytest.raises(KeyError) as caught:
        async with emitter:
            with broker.refuse():
                await broker.drop()
                await anyio.sleep_forever()
    assert caught.value is error
    assert emitter.state == "closed"


async def test_connection_lost_in_a_handlers_call_without_reconnect_ends_the_client(
    broker: Broker, key: str
) -> None:
    emitter = connect_once(broker.url)

    @emitter.on("message")
    async def ask(message: EmitterMessage) -> None:
        await emitter.me()

    with broker.hold("reply"), pytest.raises(ConnectionLostError, match="lost"):
        async with emitter:
            await emitter.subscribe(key, "a/")
            await broker.publish("a/", "ask")
            while not emitter.statistics().pending:
                await checkpoint()
            await broker.drop()
            await anyio.sleep_forever()


# Loops that call again after an error

CALLS = 16


def call_of(number: int, emitter: Emitter, broker: Broker, key: str) -> Callable[[], Any]:
    """Return one of the calls that need a connection."""

    async def serve() -> None:
        await emitter.serve(key, "d/", lambda request: request.binary)

    calls = calls_of(emitter, broker, key)
    calls += [partial(emitter.request, key, "d/", "x"), serve]
    assert len(calls) == CALLS
    return calls[number]


async def insist(call: Callable[[], Awaitable[object]], error: type[Exception]) -> None:
    """Make a call again and again, until cancelled."""
    while True:
        with suppress(error):
            await call()


async def cancel_after_a_turn(
    call: Callable[[], Awaitable[object]], error: type[Exception]
) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(insist, call, error)
        for _ in range(3):
            await checkpoint()
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("number", range(CALLS))
async def test_loop_in_a_cancelled_block_ends(broker: Broker, key: str, number: int) -> None:
    with pytest.raises(ConnectionLostError):
        async with connect_once(broker.url) as emitter:
            call = call_of(number, emitter, broker, key)
            await broker.drop()
            await insist(call, ConnectionLostError)


@pytest.mark.parametrize("number", range(CALLS))
async def test_loop_without_a_connection_lets_other_tasks_run(
    broker: Broker, key: str, number: int
) -> None:
    async with connect_reconnecting(broker.url, while_down="raise") as emitter:
        call = call_of(number, emitter, broker, key)
        async with while_disconnected_nowait(emitter, broker):
            await cancel_after_a_turn(call, ConnectionLostError)
    await cancel_after_a_turn(call, ClosedError)


async def test_loop_over_an_ended_stream_lets_other_tasks_run(broker: Broker, key: str) -> None:
    async with connect(broker.url) as emitter, emitter.subscribe(key, "a/") as messages:
        await emitter.disconnect()
        await cancel_after_a_turn(messages.receive, EndOfStream)
        messages.close()
        await cancel_after_a_turn(messages.receive, ClosedResourceError)
