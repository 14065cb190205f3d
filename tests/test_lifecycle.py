"""What the block raises, the loss of the connection, and leaving."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial

import anyio
import pytest
import trio
from anyio.lowlevel import checkpoint

from emitter_anyio import (
    ClosedError,
    ConnectError,
    ConnectionLostError,
    Emitter,
    EmitterMessage,
)
from emitter_anyio.testing import Broker
from tests.support.connections import connect_once
from tests.support.peer import Peer, serving


class UserError(Exception):
    pass


# Exceptions


async def test_exception_of_the_block_is_raised_as_the_same_object(broker: Broker) -> None:
    cause, context = ValueError("cause"), KeyError("context")
    error = UserError("block")
    error.__cause__, error.__context__ = cause, context
    with pytest.raises(UserError) as caught:
        async with connect_once(broker.url):
            raise error
    assert caught.value is error
    assert error.__cause__ is cause
    assert error.__context__ is context
    assert not hasattr(error, "__notes__")


async def test_exception_group_of_the_block_is_not_wrapped(broker: Broker) -> None:
    group = ExceptionGroup("mine", [UserError("one"), ValueError("two")])
    with pytest.raises(ExceptionGroup) as caught:
        async with connect_once(broker.url):
            raise group
    assert caught.value is group


async def test_task_group_in_the_block_raises_its_own_group(broker: Broker) -> None:
    async def fail() -> None:
        raise UserError("child")

    with pytest.raises(ExceptionGroup) as caught:
        async with connect_once(broker.url), anyio.create_task_group() as tasks:
            tasks.start_soon(fail)
            await anyio.sleep_forever()
    assert [type(exc) for exc in caught.value.exceptions] == [UserError]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
async def test_interrupt_in_the_block_is_raised_bare(
    broker: Broker, kind: type[BaseException]
) -> None:
    error = kind("block")
    with pytest.raises(kind) as caught:
        async with connect_once(broker.url):
            raise error
    assert caught.value is error


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
async def test_interrupt_in_a_handler_wins_over_the_exception_of_the_block(
    broker: Broker, kind: type[BaseException]
) -> None:
    error = kind("handler")

    def interrupt(message: EmitterMessage) -> None:
        raise error

    emitter = connect_once(broker.url)
    emitter.on("message", interrupt)
    with pytest.raises(kind) as caught:
        async with emitter:
            await emitter.subscribe(broker.keygen("a/", "rw"), "a/")
            await broker.publish("a/", "x")
            try:
                await anyio.sleep_forever()
            finally:
                raise UserError("block")
    assert caught.value is error


async def test_exception_of_a_handler_ends_the_client_and_is_raised_bare(broker: Broker) -> None:
    error = UserError("handler")

    async def fail(message: EmitterMessage) -> None:
        await checkpoint()
        raise error

    emitter = connect_once(broker.url)
    emitter.on("message", fail)
    with pytest.raises(UserError) as caught:
        async with emitter:
            await emitter.subscribe(broker.keygen("a/"), "a/")
            await broker.publish("a/", "x")
            await anyio.sleep_forever()
    assert caught.value is error
    assert any("'message'" in note for note in error.__notes__)
    assert not broker.clients


async def test_exception_of_the_error_handler_ends_the_client(broker: Broker) -> None:
    error = UserError("error handler")

    def fail(value: object) -> None:
        raise error

    emitter = connect_once(broker.url)
    emitter.on("error", fail)
    emitter.on("message", fail)
    with pytest.raises(UserError) as caught:
        async with emitter:
            await emitter.subscribe(broker.keygen("a/"), "a/")
            await broker.publish("a/", "x")
            await anyio.sleep_forever()
    assert caught.value is error


async def test_handlers_exception_is_noted_on_the_exception_of_the_block(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    emitter = connect_once(broker.url)
    error = UserError("block")

    def fail(message: EmitterMessage) -> None:
        raise ValueError("handler")

    emitter.on("message", fail)
    with pytest.raises(UserError) as caught:
        async with emitter:
            await emitter.subscribe(broker.keygen("a/"), "a/")
            await broker.publish("a/", "x")
            try:
                await anyio.sleep_forever()
            except anyio.get_cancelled_exc_class():
                raise error from None
    assert caught.value is error
    assert any("ValueError" in note for note in error.__notes__)
    assert any(record.levelno == logging.ERROR for record in caplog.records)


# Losing the connection


async def test_sleeping_block_ends_when_the_connection_is_lost(
    broker: Broker,
) -> None:
    emitter = connect_once(broker.url)
    states = []
    emitter.on("disconnect", lambda: states.append(emitter.state))
    with pytest.raises(ConnectionLostError, match="lost") as caught:
        async with emitter:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(broker.drop)
                await anyio.sleep_forever()
    assert states
    assert isinstance(caught.value, anyio.BrokenResourceError)
    assert caught.value.__cause__ is not None
    assert emitter.state == "closed"
    assert emitter.connection is None


async def test_unread_messages_are_in_unread(broker: Broker) -> None:
    key = broker.keygen("a/")
    with pytest.raises(ConnectionLostError) as caught:
        async with connect_once(broker.url) as emitter, emitter.subscribe(key, "a/") as messages:
            for text in "xyz":
                await emitter.publish(key, "a/", text)
            await emitter.flush()
            assert (await messages.receive()).binary == b"x"
            await broker.drop()
            await anyio.sleep_forever()
    assert [message.binary for message in caught.value.unread] == [b"y", b"z"]


async def test_messages_of_a_closed_end_are_in_unread(broker: Broker) -> None:
    key = broker.keygen("a/")
    with pytest.raises(ConnectionLostError) as caught:
        async with connect_once(broker.url) as emitter, emitter.subscribe(key, "a/") as messages:
            await emitter.publish(key, "a/", "x")
            await emitter.flush()
            async with messages:
                await broker.drop()
                await anyio.sleep_forever()
    assert [message.binary for message in caught.value.unread] == [b"x"]


async def test_messages_that_a_clone_can_read_are_not_in_unread(broker: Broker) -> None:
    key = broker.keygen("a/")
    clones = []
    with pytest.raises(ConnectionLostError) as caught:
        async with connect_once(broker.url) as emitter, emitter.subscribe(key, "a/") as messages:
            clones.append(messages.clone())
            await emitter.publish(key, "a/", "x")
            await emitter.flush()
            await broker.drop()
            await anyio.sleep_forever()
    assert caught.value.unread == []
    with clones[0] as clone:
        assert clone.receive_nowait().binary == b"x"
        for _ in range(2):
            with pytest.raises(ConnectionLostError):
                await clone.receive()


async def test_pending_calls_raise_when_the_connection_is_lost(broker: Broker) -> None:
    key = broker.keygen("a/")
    outcomes: list[type[BaseException]] = []

    async def call(method: Callable[[], Awaitable[object]]) -> None:
        try:
            await method()
        except ConnectionLostError as exc:
            outcomes.append(type(exc))
            raise

    emitter = connect_once(broker.url)
    with broker.hold("puback", "suback", "unsuback", "reply", "pingresp"):
        with pytest.raises(ExceptionGroup) as caught:
            async with anyio.create_task_group() as tasks:
                await tasks.start(emitter.run)
                for method in (
                    partial(emitter.publish, key, "a/", "x", qos=1),
                    partial(emitter.keygen, broker.secret_key, "a/"),
                    partial(emitter.subscribe, key, "b/"),
                    partial(emitter.unsubscribe, key, "c/"),
                    emitter.flush,
                    emitter.me,
                ):
                    tasks.start_soon(call, method)
                await anyio.wait_all_tasks_blocked()
                await broker.drop()
    assert len(outcomes) == 6
    assert all(isinstance(exc, ConnectionLostError) for exc in caught.value.exceptions)


async def test_exception_of_a_call_in_the_block_has_unread(broker: Broker) -> None:
    key = broker.keygen("a/")
    with broker.hold("puback"), pytest.raises(ConnectionLostError) as caught:
        async with connect_once(broker.url) as emitter, emitter.subscribe(key, "a/"):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(cut_after_delivery, broker, emitter)
                with anyio.CancelScope(shield=True):
                    await emitter.publish(key, "a/", "x", qos=1)
    unread = getattr(caught.value, "unread", None)
    assert unread is not None
    assert [message.binary for message in unread] == [b"x"]


async def cut_after_delivery(broker: Broker, emitter: Emitter) -> None:
    while not emitter.statistics().received:
        await checkpoint()
    await broker.drop()


async def test_run_raises_into_the_callers_task_group(broker: Broker) -> None:
    emitter = connect_once(broker.url)
    with pytest.raises(ExceptionGroup) as caught:
        async with anyio.create_task_group() as tasks:
            assert await tasks.start(emitter.run) is emitter
            await broker.drop()
            await anyio.sleep_forever()
    assert [type(exc) for exc in caught.value.exceptions] == [ConnectionLostError]


async def test_streams_return_buffered_messages_before_they_raise(broker: Broker) -> None:
    key = broker.keygen("a/")
    emitter = connect_once(broker.url)
    read = []

    async def consume() -> None:
        async with emitter.subscribe(key, "a/") as messages:
            await emitter.publish(key, "a/", "x")
            await emitter.flush()
            await broker.drop()
            await emitter.wait_closed()
            with pytest.raises(ConnectionLostError):
                while True:
                    read.append(await messages.receive())
            with pytest.raises(ConnectionLostError):
                await messages.receive()

    async def live() -> None:
        with pytest.raises(ConnectionLostError):
            await emitter.run()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(live)
        await emitter.wait_connected()
        await consume()
    assert [message.binary for message in read] == [b"x"]
    with pytest.raises(ConnectionLostError):
        await emitter.publish(key, "a/", "x")


async def test_handlers_finish_their_message_when_the_connection_is_lost(broker: Broker) -> None:
    handled: list[bytes] = []
    emitter = connect_once(broker.url)

    @emitter.on("message")
    async def handle(message: EmitterMessage) -> None:
        if not handled:
            await broker.drop()
        handled.append(message.binary)

    with pytest.raises(ConnectionLostError):
        async with emitter:
            key = broker.keygen("a/")
            await emitter.subscribe(key, "a/")
            for text in "xyz":
                await emitter.publish(key, "a/", text)
            await anyio.sleep_forever()
    assert handled[:1] == [b"x"]


# Leaving


async def test_disconnect_in_the_block_does_not_end_the_block(broker: Broker) -> None:
    key = broker.keygen("a/")
    async with connect_once(broker.url) as emitter:
        async with emitter.subscribe(key, "a/") as messages:
            await emitter.publish(key, "a/", "x")
            await emitter.flush()
            await emitter.disconnect()
            assert emitter.state == "closed"
            await emitter.disconnect()
            assert [message.binary async for message in messages] == [b"x"]
            with pytest.raises(ClosedError, match="closed"):
                await emitter.publish(key, "a/", "y")
            with pytest.raises(ClosedError):
                await emitter.wait_connected()
        await emitter.wait_closed()


async def test_disconnect_from_a_handler(broker: Broker) -> None:
    emitter = connect_once(broker.url)
    steps: list[str] = []

    @emitter.on("message")
    async def leave(message: EmitterMessage) -> None:
        await emitter.disconnect()
        steps.append(emitter.state)
        await checkpoint()
        steps.append("after")

    emitter.on("disconnect", lambda: steps.append("disconnect"))
    async with emitter:
        key = broker.keygen("a/")
        await emitter.subscribe(key, "a/")
        await emitter.publish(key, "a/", "x")
        await emitter.wait_closed()
    assert steps == ["disconnect", "closed", "after"]


async def test_disconnect_from_another_task_ends_run(broker: Broker) -> None:
    emitter = connect_once(broker.url)
    async with anyio.create_task_group() as tasks:
        await tasks.start(emitter.run)
        await emitter.disconnect()
    assert emitter.state == "closed"


async def test_disconnect_while_connecting_ends_the_opening(anyio_backend: object) -> None:
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        emitter = connect_once(host="127.0.0.1", port=port, secure=False)

        async def leave() -> None:
            await anyio.wait_all_tasks_blocked()
            await emitter.disconnect()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(leave)
            with pytest.raises(ClosedError, match=r"disconnect\(\) was called"):
                await emitter.__aenter__()
    assert emitter.state == "closed"


async def test_cancelled_disconnect_closes_the_client(broker: Broker) -> None:
    async with connect_once(broker.url) as emitter:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await emitter.disconnect()
        await emitter.wait_closed()
        assert emitter.state == "closed"


async def test_leaving_waits_for_handlers_to_finish_their_buffered_messages(broker: Broker) -> None:
    handled = []
    emitter = connect_once(broker.url)
    key = broker.keygen("a/")

    @emitter.on("message")
    async def handle(message: EmitterMessage) -> None:
        await checkpoint()
        if message.binary != b"answer":
            await emitter.publish(key, "a/", b"answer", qos=1)
        handled.append(message.binary)

    async with emitter:
        await emitter.subscribe(key, "a/")
        for text in "xyz":
            await emitter.publish(key, "a/", text)
        await emitter.flush()
    assert [payload for payload in handled if payload != b"answer"] == [b"x", b"y", b"z"]


async def test_cancelling_the_block_closes_the_connection(broker: Broker) -> None:
    with anyio.CancelScope() as scope:
        async with connect_once(broker.url) as emitter:
            await emitter.subscribe(broker.keygen("a/"), "a/")
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert emitter.state == "closed"


async def test_deadline_around_the_block_raises_timeout_error(broker: Broker) -> None:
    with pytest.raises(TimeoutError):
        with anyio.fail_after(0.01):
            async with connect_once(broker.url) as emitter:
                await emitter.me()
                await anyio.sleep_forever()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_native_cancellation_of_the_block(broker: Broker) -> None:
    emitter = connect_once(broker.url)

    async def live() -> None:
        async with emitter:
            await anyio.sleep_forever()

    task = asyncio.create_task(live())
    await emitter.wait_connected()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()
    assert emitter.state == "closed"


async def test_entering_again_after_it_ended(broker: Broker) -> None:
    emitter = connect_once(broker.url)
    received = []
    emitter.on("message", lambda message: received.append(message.binary))
    key = broker.keygen("a/")
    for text in (b"one", b"two"):
        async with emitter:
            await emitter.subscribe(key, "a/")
            await emitter.publish(key, "a/", text)
            await emitter.flush()
    assert received == [b"one", b"two"]


async def test_entering_an_entered_client_raises(broker: Broker) -> None:
    async with connect_once(broker.url) as emitter:
        with pytest.raises(RuntimeError, match=r"entered.*connect\(\)"):
            async with emitter:
                pass  # pragma: no cover - never reached
        await emitter.me()


async def test_call_before_entering_raises_with_advice(anyio_backend: object) -> None:
    emitter = connect_once("mqtt://127.0.0.1:1")
    with pytest.raises(ClosedError, match="async with"):
        await emitter.publish("key", "a/", "x")
    with pytest.raises(ClosedError, match="async with"):
        await emitter.keygen("key", "a/")
    with pytest.raises(ClosedError, match="async with"):
        await emitter.flush()
    await emitter.wait_closed()
    await emitter.disconnect()
    assert emitter.connection is None


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_run_in_a_trio_nursery(broker: Broker) -> None:
    async with trio.open_nursery() as nursery:
        emitter = await nursery.start(connect_once(broker.url).run)
        assert (await emitter.me()).id
        await emitter.disconnect()


async def test_hanging_handler_delays_leaving_for_disconnect_timeout_only(
    broker: Broker,
) -> None:
    emitter = connect_once(broker.url, disconnect_timeout=0.05)
    started = anyio.Event()

    @emitter.on("message")
    async def hang(message: EmitterMessage) -> None:
        started.set()
        await anyio.sleep_forever()

    async with emitter:
        key = broker.keygen("a/")
        await emitter.subscribe(key, "a/")
        await emitter.publish(key, "a/", "x")
        await started.wait()
    assert emitter.state == "closed"


async def test_connect_and_disconnect_are_handled_if_the_block_never_waits(broker: Broker) -> None:
    events: list[str] = []
    emitter = connect_once(broker.url)
    emitter.on("connect", lambda: events.append("connect"))
    emitter.on("disconnect", lambda: events.append("disconnect"))
    # Repeated because Trio runs the tasks of a turn in random order.
    for _ in range(20):
        async with emitter:
            pass
    assert events == ["connect", "disconnect"] * 20


@pytest.mark.parametrize("transport", ["unix", "memory"])
async def test_handler_added_while_disconnecting_does_not_delay_it(
    anyio_backend: object, caplog: pytest.LogCaptureFixture, transport: str
) -> None:
    class AddHandler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("disconnected"):
                added.append(emitter.on("disconnect", anyio.sleep_forever))

    added: list[object] = []
    logger, log_handler = logging.getLogger("emitter_anyio"), AddHandler()
    caplog.set_level(logging.INFO, logger.name)
    logger.addHandler(log_handler)
    try:
        async with serving(transport, Peer.serve) as options:
            emitter = connect_once(disconnect_timeout=0.05, **options)
            async with emitter:
                pass
    finally:
        logger.removeHandler(log_handler)
    assert added
    assert emitter.state == "closed"


async def test_handlers_survive_connect_error(broker: Broker) -> None:
    emitter = connect_once(broker.url)
    received: list[str] = []
    emitter.on("connect", lambda: received.append("connect"))
    with broker.refuse(), pytest.raises(ConnectError):
        await emitter.__aenter__()
    async with emitter:
        await emitter.me()
    assert received == ["connect"]


async def test_first_of_two_handler_exceptions_is_raised(broker: Broker) -> None:
    first, second = UserError("first"), UserError("second")
    emitter = connect_once(broker.url)

    @emitter.on("message")
    def fail(message: EmitterMessage) -> None:
        raise first

    @emitter.on("disconnect")
    def fail_too() -> None:
        raise second

    with pytest.raises(UserError) as caught:
        async with emitter:
            await emitter.subscribe(broker.keygen("a/"), "a/")
            await broker.publish("a/", "x")
            await anyio.sleep_forever()
    assert caught.value is first
