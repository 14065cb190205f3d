"""``on()``, ``off()`` and ``stream()``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import pytest

from emitter_anyio import (
    ChannelKey,
    Emitter,
    EmitterMessage,
    HandlerError,
    Link,
    Me,
    PresenceStatus,
    SlowConsumerError,
    UnauthorizedError,
    connect,
)
from tests.client.tools import Calls, arrived, texts
from tests.support.server import Server

pytestmark = pytest.mark.emitter

NO_KEY = "A" * 32


class Trigger:
    """One method per event, which makes the client emit it once."""

    def __init__(self, emitter: Emitter, server: Server, unique: str) -> None:
        self.emitter = emitter
        self.server = server
        self.unique = unique

    async def message(self) -> None:
        created = await self.emitter.keygen(self.server.secret, self.unique)
        await self.emitter.subscribe(created.key, self.unique)
        await self.emitter.publish(created.key, self.unique, "m", qos=1)

    async def presence(self) -> None:
        created = await self.emitter.keygen(self.server.secret, self.unique, "p")
        await self.emitter.presence(created.key, self.unique)

    async def keygen(self) -> None:
        await self.emitter.keygen(self.server.secret, self.unique)

    async def keyban(self) -> None:
        async with connect(self.server.url) as keymaker:
            created = await keymaker.keygen(self.server.secret, self.unique)
        await self.emitter.keyban(self.server.secret, created.key)

    async def link(self) -> None:
        await self.emitter.link("A" * 32, self.unique, "a1")

    async def me(self) -> None:
        await self.emitter.me()

    async def error(self) -> None:
        await self.emitter.publish(NO_KEY, self.unique, "m")
        with pytest.raises(UnauthorizedError):
            await self.emitter.flush()

    async def connect(self) -> None:
        assert self.emitter.state == "connected"

    disconnect = connect


VALUE_TYPES: dict[str, type] = {
    "connect": type(None),
    "disconnect": type(None),
    "message": EmitterMessage,
    "presence": PresenceStatus,
    "keygen": ChannelKey,
    "keyban": bool,
    "link": Link,
    "me": Me,
    "error": UnauthorizedError,
}


@pytest.fixture(params=VALUE_TYPES)
def event(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def client(server: Server) -> Emitter:
    """A client that has not been entered."""
    return connect(server.url)


@pytest.fixture
def trigger(client: Emitter, server: Server, unique: str) -> Trigger:
    return Trigger(client, server, unique)


def check(event: str, values: list[Any]) -> None:
    assert len(values) == 1
    assert isinstance(values[0], VALUE_TYPES[event])


# Every event, in each form of registration


async def test_function_handles_each_event(client: Emitter, trigger: Trigger, event: Any) -> None:
    calls = Calls()
    assert client.on(event, calls) is calls
    async with client:
        await getattr(trigger, event)()
    check(event, calls.values)


async def test_coroutine_function_handles_each_event(
    client: Emitter, trigger: Trigger, event: Any
) -> None:
    calls = Calls()

    async def handle(*values: Any) -> None:
        await anyio.lowlevel.checkpoint()
        calls(*values)

    client.on(event, handle)
    async with client:
        await getattr(trigger, event)()
    check(event, calls.values)


async def test_decorated_function_handles_each_event(
    client: Emitter, trigger: Trigger, event: Any
) -> None:
    calls = Calls()

    @client.on(event)
    def handle(*values: Any) -> None:
        calls(*values)

    assert callable(handle)
    async with client:
        await getattr(trigger, event)()
    check(event, calls.values)


async def test_stream_yields_each_event(client: Emitter, trigger: Trigger, event: Any) -> None:
    async with client.stream(event) as stream:
        async with client:
            await getattr(trigger, event)()
        # Leaving the client ends the stream.
        check(event, [value async for value in stream])


async def test_handler_removed_with_off_is_not_called(
    client: Emitter, trigger: Trigger, event: Any
) -> None:
    calls, others = Calls(), Calls()
    client.on(event, calls)
    client.on(event, others)
    client.off(event, calls)
    async with client:
        await getattr(trigger, event)()
    assert calls.values == []
    check(event, others.values)


async def test_on_and_off_work_while_connected(emitter: Emitter, key: str, unique: str) -> None:
    before, after = Calls(), Calls()
    emitter.on("message", before)
    await emitter.subscribe(key, unique)
    await emitter.publish(key, unique, "one")
    await before.get(1)
    emitter.off("message", before)
    emitter.on("message", after)
    await emitter.publish(key, unique, "two")
    assert texts(await after.get(1)) == ["two"]
    assert texts(before.values) == ["one"]


async def test_handler_can_remove_itself(emitter: Emitter, key: str, unique: str) -> None:
    once = []

    @emitter.on("message")
    def handle(message: EmitterMessage) -> None:
        once.append(message.as_string())
        emitter.off("message", handle)

    await emitter.subscribe(key, unique)
    await emitter.publish(key, unique, "one")
    await emitter.publish(key, unique, "two")
    await emitter.flush()
    await emitter.disconnect()
    assert once == ["one"]


async def test_handler_registered_twice_is_called_twice(
    emitter: Emitter, key: str, unique: str
) -> None:
    calls = Calls()
    emitter.on("message", calls)
    emitter.on("message", calls)
    await emitter.subscribe(key, unique)
    await emitter.publish(key, unique, "m")
    assert texts(await calls.get(2)) == ["m", "m"]
    emitter.off("message", calls)
    await emitter.publish(key, unique, "n")
    assert texts(await calls.get(3)) == ["m", "m", "n"]


# channel=


@pytest.mark.parametrize(
    ("channel", "reached"),
    [
        ("", ["", "a/", "a/b/", "b/"]),
        ("a/", ["a/", "a/b/"]),
        ("+/", ["a/", "a/b/", "b/"]),
        ("+/b", ["a/b/"]),
        ("c/", []),
    ],
)
@pytest.mark.parametrize("form", ["on", "stream"])
async def test_channel_filters_messages(
    emitter: Emitter, key: str, unique: str, channel: str, reached: list[str], form: str
) -> None:
    await emitter.subscribe(key, unique)
    calls = Calls()
    async with emitter.stream("message", channel=unique + channel) as stream:
        emitter.on("message", calls, channel=unique + channel)
        for below in ("", "a/", "a/b/", "b/"):
            await emitter.publish(key, unique + below, below)
        if form == "stream":
            assert await arrived(emitter, stream) == reached
        else:
            await emitter.flush()
            await emitter.disconnect()
            assert texts(calls.values) == reached


async def test_on_with_a_channel_does_not_subscribe(
    emitter: Emitter, key: str, unique: str
) -> None:
    calls = Calls()
    emitter.on("message", calls, channel=unique)
    await emitter.publish(key, unique, "m")
    await emitter.flush()
    assert emitter.statistics().received == 0


async def test_closing_the_last_end_in_the_block_stops_an_event_stream(
    emitter: Emitter, key: str, unique: str
) -> None:
    await emitter.subscribe(key, unique)
    async with emitter.stream("message") as stream:
        stream.close()
        await emitter.publish(key, unique, "late")
        await emitter.flush()
        assert emitter.statistics().unhandled == 1


# Arguments that on(), off() and stream() reject


@pytest.mark.parametrize(
    "call",
    [
        lambda emitter: emitter.on("massage", print),
        lambda emitter: emitter.on("massage"),
        lambda emitter: emitter.off("massage", print),
        lambda emitter: emitter.stream("massage"),
    ],
    ids=["on", "decorator", "off", "stream"],
)
async def test_unknown_event_is_rejected(client: Emitter, call: Callable[[Any], object]) -> None:
    with pytest.raises(ValueError, match=r"'massage'.*connect, disconnect, message"):
        call(client)


async def test_channel_is_rejected_for_other_events_than_message_and_presence(
    client: Emitter,
) -> None:
    with pytest.raises(ValueError, match=r"'me'.*channel"):
        client.on("me", print, channel="a/")
    with pytest.raises(ValueError, match=r"'connect'.*channel"):
        client.stream("connect", channel="a/")


async def test_bad_buffer_and_overflow_are_rejected(client: Emitter) -> None:
    with pytest.raises(ValueError, match=r"buffer.*at least 1"):
        client.on("message", print, buffer=0)
    with pytest.raises(ValueError, match=r"overflow.*'raise'"):
        client.stream("message", overflow="x")  # type: ignore[call-overload]  # on purpose


async def test_on_rejects_a_handler_that_is_not_callable(client: Emitter) -> None:
    handler: Any = "print"
    with pytest.raises(TypeError, match=r"handler.*str"):
        client.on("message", handler)


async def test_off_rejects_a_handler_that_is_not_registered(client: Emitter) -> None:
    client.on("me", print)
    with pytest.raises(ValueError, match="'message'"):
        client.off("message", print)


# How handlers run


async def test_handler_can_await_any_method(emitter: Emitter, server: Server, unique: str) -> None:
    results: dict[str, object] = {}
    done = anyio.Event()
    created = await emitter.keygen(server.secret, f"{unique}#/", "rwslp")
    answers = f"{unique}answers/"

    @emitter.on("message", channel=f"{unique}questions/")
    async def handle(message: EmitterMessage) -> None:
        await emitter.publish(created.key, answers, "queued")
        await emitter.publish(created.key, answers, "accepted", qos=1)
        await emitter.flush()
        results["keygen"] = await emitter.keygen(server.secret, unique)
        results["me"] = await emitter.me()
        results["presence"] = await emitter.presence(created.key, unique)
        async with emitter.subscribe(created.key, answers) as messages:
            await emitter.publish(created.key, answers, "received")
            results["subscribe"] = (await messages.receive()).as_string()
        await emitter.subscribe(created.key, answers)
        await emitter.unsubscribe(created.key, answers)
        done.set()

    await emitter.subscribe(created.key, f"{unique}questions/")
    await emitter.publish(created.key, f"{unique}questions/", "?")
    await done.wait()
    assert results["subscribe"] == "received"
    assert isinstance(results["keygen"], ChannelKey)
    assert isinstance(results["me"], Me)
    assert isinstance(results["presence"], PresenceStatus)


async def test_awaitable_returned_by_a_handler_is_awaited(
    emitter: Emitter, key: str, unique: str
) -> None:
    async with emitter.subscribe(key, f"{unique}echo/") as messages:
        emitter.on(
            "message",
            lambda message: emitter.publish(key, f"{unique}echo/", message.binary, qos=1),
            channel=f"{unique}in/",
        )
        await emitter.subscribe(key, f"{unique}in/")
        await emitter.publish(key, f"{unique}in/", "again")
        assert (await messages.receive()).as_string() == "again"


async def test_handler_is_called_in_order_and_one_call_at_a_time(
    server: Server, client: Emitter, unique: str
) -> None:
    log: list[str] = []

    @client.on("message")
    async def handle(message: EmitterMessage) -> None:
        log.append(f"begin {message.as_object()}")
        for _ in range(3):
            await anyio.lowlevel.checkpoint()
        log.append(f"end {message.as_object()}")

    async with client:
        created = await client.keygen(server.secret, unique)
        await client.subscribe(created.key, unique)
        for number in range(5):
            await client.publish(created.key, unique, number)
        await client.flush()
    assert log == [f"{what} {number}" for number in range(5) for what in ("begin", "end")]


async def test_waiting_handler_delays_neither_other_handlers_nor_replies(
    emitter: Emitter, key: str, unique: str
) -> None:
    calls = Calls()
    waiting, go_on = anyio.Event(), anyio.Event()

    @emitter.on("message")
    async def wait(message: EmitterMessage) -> None:
        waiting.set()
        await go_on.wait()

    emitter.on("message", calls)
    await emitter.subscribe(key, unique)
    await emitter.publish(key, unique, "one", qos=1)
    await waiting.wait()
    await emitter.publish(key, unique, "two", qos=1)
    assert (await emitter.me()).id
    assert texts(await calls.get(2)) == ["one", "two"]
    go_on.set()


async def test_full_handler_buffer_emits_slow_consumer_error(
    emitter: Emitter, key: str, unique: str
) -> None:
    errors = Calls()
    handled = []
    waiting, go_on = anyio.Event(), anyio.Event()

    async def handle(message: EmitterMessage) -> None:
        handled.append(message.as_string())
        waiting.set()
        await go_on.wait()

    emitter.on("message", handle, buffer=1)
    emitter.on("error", errors)
    await emitter.subscribe(key, unique)
    await emitter.publish(key, unique, "handled")
    await waiting.wait()
    for text in ("buffered", "dropped", "dropped"):
        await emitter.publish(key, unique, text)
    await emitter.flush()
    go_on.set()
    (error,) = await errors.get(1)
    assert isinstance(error, SlowConsumerError)
    assert error.dropped == 2
    assert handled == ["handled", "buffered"]


async def test_handler_gets_each_message_once_with_overlapping_subscriptions(
    emitter: Emitter, key: str, unique: str
) -> None:
    calls = Calls()
    emitter.on("message", calls)
    await emitter.subscribe(key, unique)
    await emitter.subscribe(key, f"{unique}a/")
    async with emitter.subscribe(key, f"{unique}+/"):
        await emitter.publish(key, f"{unique}a/", "one")
        await emitter.publish(key, f"{unique}a/", "two")
        await emitter.flush()
    await emitter.disconnect()
    assert texts(calls.values) == ["one", "two"]


# Handlers that raise


def raising(error: Exception) -> Callable[..., None]:
    def handle(*values: object) -> None:
        raise error

    return handle


async def test_handler_exception_goes_to_the_error_handler(
    emitter: Emitter, key: str, unique: str
) -> None:
    errors = Calls()
    boom = ValueError("boom")
    emitter.on("message", raising(boom))
    emitter.on("error", errors)
    await emitter.subscribe(key, unique)
    await emitter.publish(key, unique, "m")
    (error,) = await errors.get(1)
    assert isinstance(error, HandlerError)
    assert error.event == "message"
    assert error.__cause__ is boom


async def test_handler_is_called_again_after_it_raised(
    emitter: Emitter, key: str, unique: str
) -> None:
    errors = Calls()
    emitter.on("message", raising(ValueError("boom")))
    emitter.on("error", errors)
    await emitter.subscribe(key, unique)
    for _ in range(3):
        await emitter.publish(key, unique, "m")
    assert len(await errors.get(3)) == 3


async def test_error_stream_receives_handler_errors(
    emitter: Emitter, key: str, unique: str
) -> None:
    emitter.on("message", raising(ValueError("boom")))
    async with emitter.stream("error") as errors:
        await emitter.subscribe(key, unique)
        await emitter.publish(key, unique, "m")
        assert isinstance(await errors.receive(), HandlerError)


def raise_stop_iteration(*values: object) -> None:
    raise StopIteration


async def raise_stop_iteration_in_coroutine(*values: object) -> None:
    raise StopIteration


@pytest.mark.parametrize("handler", [raise_stop_iteration, raise_stop_iteration_in_coroutine])
async def test_handler_that_raises_stop_iteration_is_named(
    client: Emitter, handler: Callable[..., object]
) -> None:
    errors = Calls()
    client.on("connect", handler)
    client.on("error", errors)
    async with client:
        (error,) = await errors.get(1)
    assert str(error) == f"the handler {handler.__name__} of 'connect' raised StopIteration"
    # Python replaces a StopIteration that leaves a coroutine with a RuntimeError.
    assert isinstance(error.__cause__, RuntimeError)
    assert isinstance(error.__cause__.__cause__, StopIteration)


@pytest.mark.parametrize("handler", [raise_stop_iteration, raise_stop_iteration_in_coroutine])
async def test_stop_iteration_without_an_error_handler_is_raised_with_the_handlers_name(
    client: Emitter, handler: Callable[..., object]
) -> None:
    client.on("connect", handler)
    with pytest.raises(RuntimeError, match="raised StopIteration") as caught:
        async with client:
            await anyio.sleep_forever()
    assert f"the handler {handler.__name__} of 'connect'" in "".join(caught.value.__notes__)
    assert isinstance(caught.value.__cause__, StopIteration)


@pytest.mark.parametrize("event", ["connect", "disconnect", "keygen", "me"])
async def test_handler_exception_is_reported_for_each_event(
    client: Emitter, trigger: Trigger, event: Any
) -> None:
    errors = Calls()
    client.on(event, raising(ValueError("boom")))
    client.on("error", errors)
    async with client:
        await getattr(trigger, event)()
    assert [error.event for error in errors.values] == [event]


@pytest.mark.parametrize("event", ["connect", "disconnect", "message", "keygen", "me"])
async def test_handler_exception_without_an_error_handler_is_raised_bare(
    client: Emitter, trigger: Trigger, event: Any
) -> None:
    boom = ValueError("boom")
    client.on(event, raising(boom))
    with pytest.raises(ValueError, match="boom") as caught:
        async with client:
            await getattr(trigger, event)()
            if event != "disconnect":
                await anyio.sleep_forever()
    assert caught.value is boom
    assert f"of '{event}'" in "".join(boom.__notes__)
    assert client.state == "closed"


async def test_exception_of_the_error_handler_is_raised_bare(
    client: Emitter, trigger: Trigger
) -> None:
    boom = ValueError("boom")
    client.on("error", raising(boom))
    with pytest.raises(ValueError, match="boom") as caught:
        async with client:
            await trigger.error()
            await anyio.sleep_forever()
    assert caught.value is boom


async def test_exception_of_the_block_wins_and_notes_the_handlers(
    client: Emitter, caplog: pytest.LogCaptureFixture
) -> None:
    error = KeyError("the block's")
    client.on("connect", raising(ValueError("boom")))
    with pytest.raises(KeyError) as caught:
        async with client:
            try:
                await anyio.sleep_forever()
            finally:
                raise error
    assert caught.value is error
    assert "ValueError('boom')" in "".join(error.__notes__)
    assert any(record.levelname == "ERROR" for record in caplog.records)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
async def test_interrupt_in_a_handler_wins_over_other_exceptions(
    client: Emitter, kind: type[BaseException]
) -> None:
    interrupt = kind()

    @client.on("connect")
    def handle() -> None:
        raise interrupt

    client.on("error", Calls())
    with pytest.raises(kind) as caught:
        async with client:
            try:
                await anyio.sleep_forever()
            finally:
                raise ValueError("the block's")
    assert caught.value is interrupt


async def test_run_raises_a_handlers_exception_in_the_callers_group(client: Emitter) -> None:
    boom = ValueError("boom")
    client.on("connect", raising(boom))
    with pytest.raises(ExceptionGroup) as caught:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.run)
    assert caught.value.exceptions == (boom,)


# Messages


READERS: dict[str, Callable[[EmitterMessage], object]] = {
    "as_string": EmitterMessage.as_string,
    "asString": EmitterMessage.asString,
    "as_binary": EmitterMessage.as_binary,
    "asBinary": EmitterMessage.asBinary,
    "as_object": EmitterMessage.as_object,
    "asObject": EmitterMessage.asObject,
}


@pytest.mark.parametrize("reader", READERS)
async def test_message_is_decoded_by(emitter: Emitter, key: str, unique: str, reader: str) -> None:
    async with emitter.subscribe(key, unique) as messages:
        await emitter.publish(key, unique, ["ü"])
        message = await messages.receive()
    value = {"string": '["ü"]', "binary": '["ü"]'.encode(), "object": ["ü"]}
    assert READERS[reader](message) == value[reader.lower().replace("_", "")[2:]]


@pytest.mark.parametrize("reader", ["as_string", "asString", "as_object", "asObject"])
async def test_decoding_bad_utf8_names_channel_and_length(
    emitter: Emitter, key: str, unique: str, reader: str
) -> None:
    async with emitter.subscribe(key, unique) as messages:
        await emitter.publish(key, unique, b"\xff\xfe\xfd")
        message = await messages.receive()
    with pytest.raises(ValueError, match=f"3 bytes.*'{unique}'"):
        READERS[reader](message)
    assert message.binary == message.as_binary() == b"\xff\xfe\xfd"


async def test_decoding_bad_json_names_channel_and_length(
    emitter: Emitter, key: str, unique: str
) -> None:
    async with emitter.subscribe(key, unique) as messages:
        await emitter.publish(key, unique, "hello")
        message = await messages.receive()
    with pytest.raises(ValueError, match=f"5 bytes.*'{unique}'.*JSON"):
        message.as_object()
