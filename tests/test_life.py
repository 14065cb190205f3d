"""What comes out of the block, what a lost link does, and how the client leaves."""

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


class Oops(Exception):
    pass


# What comes out


async def test_the_bodys_exception_leaves_as_the_same_object(broker: Broker) -> None:
    cause, context = ValueError("cause"), KeyError("context")
    error = Oops("body")
    error.__cause__, error.__context__ = cause, context
    with pytest.raises(Oops) as caught:
        async with connect_once(broker.url):
            raise error
    assert caught.value is error
    assert error.__cause__ is cause
    assert error.__context__ is context
    assert not hasattr(error, "__notes__")


async def test_a_group_that_the_body_raised_stays_that_group(broker: Broker) -> None:
    group = ExceptionGroup("mine", [Oops("one"), ValueError("two")])
    with pytest.raises(ExceptionGroup) as caught:
        async with connect_once(broker.url):
            raise group
    assert caught.value is group


async def test_a_task_group_in_the_body_raises_its_own_group(broker: Broker) -> None:
    async def fail() -> None:
        raise Oops("child")

    with pytest.raises(ExceptionGroup) as caught:
        async with connect_once(broker.url), anyio.create_task_group() as tasks:
            tasks.start_soon(fail)
            await anyio.sleep_forever()
    assert [type(exc) for exc in caught.value.exceptions] == [Oops]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
async def test_an_interrupt_in_the_body_leaves_bare(
    broker: Broker, kind: type[BaseException]
) -> None:
    error = kind("body")
    with pytest.raises(kind) as caught:
        async with connect_once(broker.url):
            raise error
    assert caught.value is error


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
async def test_an_interrupt_in_a_handler_wins_over_the_bodys_exception(
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
                raise Oops("body")
    assert caught.value is error


async def test_a_failing_handler_ends_the_client_and_leaves_bare(broker: Broker) -> None:
    error = Oops("handler")

    async def fail(message: EmitterMessage) -> None:
        await checkpoint()
        raise error

    emitter = connect_once(broker.url)
    emitter.on("message", fail)
    with pytest.raises(Oops) as caught:
        async with emitter:
            await emitter.subscribe(broker.keygen("a/"), "a/")
            await broker.publish("a/", "x")
            await anyio.sleep_forever()
    assert caught.value is error
    assert any("'message'" in note for note in error.__notes__)
    assert not broker.clients


async def test_an_error_handler_that_fails_ends_the_client(broker: Broker) -> None:
    error = Oops("error handler")

    def fail(value: object) -> None:
        raise error

    emitter = connect_once(broker.url)
    emitter.on("error", fail)
    emitter.on("message", fail)
    with pytest.raises(Oops) as caught:
        async with emitter:
            await emitter.subscribe(broker.keygen("a/"), "a/")
            await broker.publish("a/", "x")
            await anyio.sleep_forever()
    assert caught.value is error


async def test_a_handlers_failure_is_noted_on_the_bodys_exception(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    emitter = connect_once(broker.url)
    error = Oops("body")

    def fail(message: EmitterMessage) -> None:
        raise ValueError("handler")

    emitter.on("message", fail)
    with pytest.raises(Oops) as caught:
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


# A lost link


async def test_a_program_of_handlers_that_sleeps_ends_when_the_link_is_lost(
    broker: Broker,
) -> None:
    emitter = connect_once(broker.url)
    gone = []
    emitter.on("disconnect", lambda: gone.append(emitter.state))
    with pytest.raises(ConnectionLostError, match="lost") as caught:
        async with emitter:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(broker.drop)
                await anyio.sleep_forever()
    assert gone
    assert isinstance(caught.value, anyio.BrokenResourceError)
    assert caught.value.__cause__ is not None
    assert emitter.state == "closed"
    assert emitter.connection is None


async def test_what_was_received_and_not_read_is_in_unread(broker: Broker) -> None:
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


async def test_what_an_end_that_was_closed_had_not_read_is_in_unread(broker: Broker) -> None:
    key = broker.keygen("a/")
    with pytest.raises(ConnectionLostError) as caught:
        async with connect_once(broker.url) as emitter, emitter.subscribe(key, "a/") as messages:
            await emitter.publish(key, "a/", "x")
            await emitter.flush()
            async with messages:
                await broker.drop()
                await anyio.sleep_forever()
    assert [message.binary for message in caught.value.unread] == [b"x"]


async def test_what_a_clone_can_still_read_is_not_in_unread(broker: Broker) -> None:
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


async def test_pending_calls_raise_when_the_link_is_lost(broker: Broker) -> None:
    key = broker.keygen("a/")
    outcomes: list[type[BaseException]] = []

    async def call(what: Callable[[], Awaitable[object]]) -> None:
        try:
            await what()
        except ConnectionLostError as exc:
            outcomes.append(type(exc))
            raise

    emitter = connect_once(broker.url)
    with broker.hold("puback", "suback", "unsuback", "answer", "pingresp"):
        with pytest.raises(ExceptionGroup) as caught:
            async with anyio.create_task_group() as tasks:
                await tasks.start(emitter.run)
                for what in (
                    partial(emitter.publish, key, "a/", "x", qos=1),
                    partial(emitter.keygen, broker.secret_key, "a/"),
                    partial(emitter.subscribe, key, "b/"),
                    partial(emitter.unsubscribe, key, "c/"),
                    emitter.flush,
                    emitter.me,
                ):
                    tasks.start_soon(call, what)
                await anyio.wait_all_tasks_blocked()
                await broker.drop()
    assert len(outcomes) == 6
    assert all(isinstance(exc, ConnectionLostError) for exc in caught.value.exceptions)


async def test_a_call_that_raises_in_the_body_leaves_with_what_was_unread(broker: Broker) -> None:
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


async def test_streams_give_what_is_buffered_before_they_raise(broker: Broker) -> None:
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


async def test_handlers_finish_what_they_have_when_the_link_is_lost(broker: Broker) -> None:
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


async def test_disconnect_in_the_body_leaves_the_body_running(broker: Broker) -> None:
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
            with pytest.raises(ClosedError, match="connecting"):
                await emitter.__aenter__()
    assert emitter.state == "closed"


async def test_a_cancelled_disconnect_leaves_all_the_same(broker: Broker) -> None:
    async with connect_once(broker.url) as emitter:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await emitter.disconnect()
        await emitter.wait_closed()
        assert emitter.state == "closed"


async def test_handlers_finish_what_is_queued_before_the_goodbye(broker: Broker) -> None:
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


async def test_cancelling_the_block_closes_the_link_at_once(broker: Broker) -> None:
    with anyio.CancelScope() as scope:
        async with connect_once(broker.url) as emitter:
            await emitter.subscribe(broker.keygen("a/"), "a/")
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert emitter.state == "closed"


async def test_a_deadline_around_the_block_raises_timeout_error(broker: Broker) -> None:
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
    came = []
    emitter.on("message", lambda message: came.append(message.binary))
    key = broker.keygen("a/")
    for text in (b"one", b"two"):
        async with emitter:
            await emitter.subscribe(key, "a/")
            await emitter.publish(key, "a/", text)
            await emitter.flush()
    assert came == [b"one", b"two"]


async def test_entering_twice_at_once_is_an_error(broker: Broker) -> None:
    async with connect_once(broker.url) as emitter:
        with pytest.raises(RuntimeError, match=r"entered.*connect\(\)"):
            async with emitter:
                pass  # pragma: no cover - it does not come so far
        await emitter.me()


async def test_use_before_entering_names_the_way_in(anyio_backend: object) -> None:
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
async def test_a_trio_nursery_holds_the_client(broker: Broker) -> None:
    async with trio.open_nursery() as nursery:
        emitter = await nursery.start(connect_once(broker.url).run)
        assert (await emitter.me()).id
        await emitter.disconnect()


async def test_a_handler_that_never_ends_holds_the_goodbye_for_the_timeout_only(
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


async def test_handlers_are_told_though_the_body_never_waits(broker: Broker) -> None:
    told: list[str] = []
    emitter = connect_once(broker.url)
    emitter.on("connect", lambda: told.append("connect"))
    emitter.on("disconnect", lambda: told.append("disconnect"))
    # Trio runs the tasks of a turn in either order, and these in many more.
    for _ in range(20):
        async with emitter:
            pass
    assert told == ["connect", "disconnect"] * 20


@pytest.mark.parametrize("link", ["unix", "memory"])
async def test_a_handler_that_comes_while_the_link_ends_does_not_keep_it(
    anyio_backend: object, caplog: pytest.LogCaptureFixture, link: str
) -> None:
    class Coming(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("disconnected"):
                come.append(emitter.on("disconnect", anyio.sleep_forever))

    come: list[object] = []
    logger, coming = logging.getLogger("emitter_anyio"), Coming()
    caplog.set_level(logging.INFO, logger.name)
    logger.addHandler(coming)
    try:
        async with serving(link, Peer.serve) as options:
            emitter = connect_once(disconnect_timeout=0.05, **options)
            async with emitter:
                pass
    finally:
        logger.removeHandler(coming)
    assert come
    assert emitter.state == "closed"


async def test_handlers_survive_an_opening_that_failed(broker: Broker) -> None:
    emitter = connect_once(broker.url)
    came: list[str] = []
    emitter.on("connect", lambda: came.append("connect"))
    with broker.refuse(), pytest.raises(ConnectError):
        await emitter.__aenter__()
    async with emitter:
        await emitter.me()
    assert came == ["connect"]


async def test_of_two_failing_handlers_the_first_one_counts(broker: Broker) -> None:
    first, second = Oops("first"), Oops("second")
    emitter = connect_once(broker.url)

    @emitter.on("message")
    def fail(message: EmitterMessage) -> None:
        raise first

    @emitter.on("disconnect")
    def fail_too() -> None:
        raise second

    with pytest.raises(Oops) as caught:
        async with emitter:
            await emitter.subscribe(broker.keygen("a/"), "a/")
            await broker.publish("a/", "x")
            await anyio.sleep_forever()
    assert caught.value is first
