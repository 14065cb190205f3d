"""on(), off() and stream()."""

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


class Session:
    """What makes each event happen once or more."""

    def __init__(self, emitter: Emitter, server: Server, unique: str) -> None:
        self.emitter = emitter
        self.server = server
        self.unique = unique

    async def message(self) -> None:
        made = await self.emitter.keygen(self.server.secret, self.unique)
        await self.emitter.subscribe(made.key, self.unique)
        await self.emitter.publish(made.key, self.unique, "m", qos=1)

    async def presence(self) -> None:
        made = await self.emitter.keygen(self.server.secret, self.unique, "p")
        await self.emitter.presence(made.key, self.unique)

    async def keygen(self) -> None:
        await self.emitter.keygen(self.server.secret, self.unique)

    async def keyban(self) -> None:
        async with connect(self.server.url) as maker:
            made = await maker.keygen(self.server.secret, self.unique)
        await self.emitter.keyban(self.server.secret, made.key)

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


KINDS: dict[str, type] = {
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


@pytest.fixture(params=KINDS)
def event(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def client(server: Server) -> Emitter:
    """A client that is not entered yet."""
    return connect(server.url)


@pytest.fixture
def session(client: Emitter, server: Server, unique: str) -> Session:
    return Session(client, server, unique)


def check(event: str, values: list[Any]) -> None:
    assert len(values) == 1
    assert isinstance(values[0], KINDS[event])


# Each event in each form


async def test_a_function_handles_it(client: Emitter, session: Session, event: Any) -> None:
    calls = Calls()
    assert client.on(event, calls) is calls
    async with client:
        await getattr(session, event)()
    check(event, calls.values)


async def test_a_coroutine_function_handles_it(
    client: Emitter, session: Session, event: Any
) -> None:
    calls = Calls()

    async def handle(*values: Any) -> None:
        await anyio.lowlevel.checkpoint()
        calls(*values)

    client.on(event, handle)
    async with client:
        await getattr(session, event)()
    check(event, calls.values)


async def test_a_decorated_function_handles_it(
    client: Emitter, session: Session, event: Any
) -> None:
    calls = Calls()

    @client.on(event)
    def handle(*values: Any) -> None:
        calls(*values)

    assert callable(handle)
    async with client:
        await getattr(session, event)()
    check(event, calls.values)


async def test_a_stream_gives_it(client: Emitter, session: Session, event: Any) -> None:
    async with client.stream(event) as stream:
        async with client:
            await getattr(session, event)()
        # Left by its client, it ends.
        check(event, [value async for value in stream])


async def test_a_handler_that_was_taken_away_is_not_called(
    client: Emitter, session: Session, event: Any
) -> None:
    calls, others = Calls(), Calls()
    client.on(event, calls)
    client.on(event, others)
    client.off(event, calls)
    async with client:
        await getattr(session, event)()
    assert calls.values == []
    check(event, others.values)


async def test_a_handler_may_be_registered_and_taken_away_while_connected(
    emitter: Emitter, key: str, unique: str
) -> None:
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


async def test_a_handler_may_take_itself_away(emitter: Emitter, key: str, unique: str) -> None:
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


async def test_a_handler_registered_twice_is_called_twice(
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
async def test_a_channel_narrows_what_messages_come(
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


async def test_a_handler_for_a_channel_subscribes_to_nothing(
    emitter: Emitter, key: str, unique: str
) -> None:
    calls = Calls()
    emitter.on("message", calls, channel=unique)
    await emitter.publish(key, unique, "m")
    await emitter.flush()
    assert emitter.statistics().received == 0


async def test_closing_the_last_end_inside_ends_a_stream_of_events(
    emitter: Emitter, key: str, unique: str
) -> None:
    await emitter.subscribe(key, unique)
    async with emitter.stream("message") as stream:
        stream.close()
        await emitter.publish(key, unique, "late")
        await emitter.flush()
        assert emitter.statistics().unhandled == 1


# What on(), off() and stream() refuse


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
async def test_an_unknown_event_is_named(client: Emitter, call: Callable[[Any], object]) -> None:
    with pytest.raises(ValueError, match=r"'massage'.*connect, disconnect, message"):
        call(client)


async def test_a_channel_goes_with_messages_and_presence_alone(client: Emitter) -> None:
    with pytest.raises(ValueError, match=r"'me'.*channel"):
        client.on("me", print, channel="a/")
    with pytest.raises(ValueError, match=r"'connect'.*channel"):
        client.stream("connect", channel="a/")


async def test_a_bad_buffer_is_named(client: Emitter) -> None:
    with pytest.raises(ValueError, match=r"buffer.*at least 1"):
        client.on("message", print, buffer=0)
    with pytest.raises(ValueError, match=r"overflow.*'raise'"):
        client.stream("message", overflow="x")  # type: ignore[call-overload]  # on purpose


async def test_what_is_no_function_is_no_handler(client: Emitter) -> None:
    handler: Any = "print"
    with pytest.raises(TypeError, match=r"handler.*str"):
        client.on("message", handler)


async def test_taking_away_what_is_not_registered_is_an_error(client: Emitter) -> None:
    client.on("me", print)
    with pytest.raises(ValueError, match="'message'"):
        client.off("message", print)


# How handlers run


async def test_a_handler_may_await_any_verb(emitter: Emitter, server: Server, unique: str) -> None:
    results: dict[str, object] = {}
    done = anyio.Event()
    made = await emitter.keygen(server.secret, f"{unique}#/", "rwslp")
    answers = f"{unique}answers/"

    @emitter.on("message", channel=f"{unique}questions/")
    async def handle(message: EmitterMessage) -> None:
        await emitter.publish(made.key, answers, "queued")
        await emitter.publish(made.key, answers, "accepted", qos=1)
        await emitter.flush()
        results["keygen"] = await emitter.keygen(server.secret, unique)
        results["me"] = await emitter.me()
        results["presence"] = await emitter.presence(made.key, unique)
        async with emitter.subscribe(made.key, answers) as messages:
            await emitter.publish(made.key, answers, "heard")
            results["subscribe"] = (await messages.receive()).as_string()
        await emitter.subscribe(made.key, answers)
        await emitter.unsubscribe(made.key, answers)
        done.set()

    await emitter.subscribe(made.key, f"{unique}questions/")
    await emitter.publish(made.key, f"{unique}questions/", "?")
    await done.wait()
    assert results["subscribe"] == "heard"
    assert isinstance(results["keygen"], ChannelKey)
    assert isinstance(results["me"], Me)
    assert isinstance(results["presence"], PresenceStatus)


async def test_a_handler_that_returns_an_awaitable_has_it_awaited(
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


async def test_the_calls_of_a_handler_come_in_order_and_one_at_a_time(
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
        made = await client.keygen(server.secret, unique)
        await client.subscribe(made.key, unique)
        for number in range(5):
            await client.publish(made.key, unique, number)
        await client.flush()
    assert log == [f"{what} {number}" for number in range(5) for what in ("begin", "end")]


async def test_a_handler_that_waits_delays_no_other_and_no_answer(
    emitter: Emitter, key: str, unique: str
) -> None:
    calls = Calls()
    waiting, go_on = anyio.Event(), anyio.Event()

    @emitter.on("message")
    async def waits(message: EmitterMessage) -> None:
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


async def test_a_handler_whose_buffer_is_full_has_the_gap_reported(
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


async def test_every_message_comes_once_whatever_is_subscribed(
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


async def test_what_a_handler_raises_goes_to_the_error_handler(
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


async def test_a_handler_that_has_raised_is_called_again(
    emitter: Emitter, key: str, unique: str
) -> None:
    errors = Calls()
    emitter.on("message", raising(ValueError("boom")))
    emitter.on("error", errors)
    await emitter.subscribe(key, unique)
    for _ in range(3):
        await emitter.publish(key, unique, "m")
    assert len(await errors.get(3)) == 3


async def test_the_error_handler_may_be_a_stream(emitter: Emitter, key: str, unique: str) -> None:
    emitter.on("message", raising(ValueError("boom")))
    async with emitter.stream("error") as errors:
        await emitter.subscribe(key, unique)
        await emitter.publish(key, unique, "m")
        assert isinstance(await errors.receive(), HandlerError)


def stop(*values: object) -> None:
    raise StopIteration


async def stop_as_a_coroutine(*values: object) -> None:
    raise StopIteration


@pytest.mark.parametrize("handler", [stop, stop_as_a_coroutine])
async def test_a_handler_that_raises_stopiteration_is_named(
    client: Emitter, handler: Callable[..., object]
) -> None:
    errors = Calls()
    client.on("connect", handler)
    client.on("error", errors)
    async with client:
        (error,) = await errors.get(1)
    assert str(error) == f"the handler {handler.__name__} of 'connect' raised StopIteration"
    # No coroutine can raise StopIteration.
    assert isinstance(error.__cause__, RuntimeError)
    assert isinstance(error.__cause__.__cause__, StopIteration)


@pytest.mark.parametrize("handler", [stop, stop_as_a_coroutine])
async def test_stopiteration_that_no_handler_takes_leaves_with_the_handlers_name(
    client: Emitter, handler: Callable[..., object]
) -> None:
    client.on("connect", handler)
    with pytest.raises(RuntimeError, match="raised StopIteration") as caught:
        async with client:
            await anyio.sleep_forever()
    assert f"the handler {handler.__name__} of 'connect'" in "".join(caught.value.__notes__)
    assert isinstance(caught.value.__cause__, StopIteration)


@pytest.mark.parametrize("event", ["connect", "disconnect", "keygen", "me"])
async def test_what_it_raises_is_reported_whenever_it_is_called(
    client: Emitter, session: Session, event: Any
) -> None:
    errors = Calls()
    client.on(event, raising(ValueError("boom")))
    client.on("error", errors)
    async with client:
        await getattr(session, event)()
    assert [error.event for error in errors.values] == [event]


@pytest.mark.parametrize("event", ["connect", "disconnect", "message", "keygen", "me"])
async def test_without_an_error_handler_it_ends_the_client_and_comes_out_bare(
    client: Emitter, session: Session, event: Any
) -> None:
    boom = ValueError("boom")
    client.on(event, raising(boom))
    with pytest.raises(ValueError, match="boom") as caught:
        async with client:
            await getattr(session, event)()
            if event != "disconnect":
                await anyio.sleep_forever()
    assert caught.value is boom
    assert f"of '{event}'" in "".join(boom.__notes__)
    assert client.state == "closed"


async def test_what_the_error_handler_raises_ends_the_client_and_comes_out_bare(
    client: Emitter, session: Session
) -> None:
    boom = ValueError("boom")
    client.on("error", raising(boom))
    with pytest.raises(ValueError, match="boom") as caught:
        async with client:
            await session.error()
            await anyio.sleep_forever()
    assert caught.value is boom


async def test_when_the_body_raises_too_the_bodys_wins_and_has_the_other_noted(
    client: Emitter, caplog: pytest.LogCaptureFixture
) -> None:
    error = KeyError("the body's")
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
async def test_an_interrupt_in_a_handler_wins_over_all(
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
                raise ValueError("the body's")
    assert caught.value is interrupt


async def test_run_raises_it_in_the_callers_group(client: Emitter) -> None:
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
async def test_a_message_is_read_by(emitter: Emitter, key: str, unique: str, reader: str) -> None:
    async with emitter.subscribe(key, unique) as messages:
        await emitter.publish(key, unique, ["ü"])
        message = await messages.receive()
    value = {"string": '["ü"]', "binary": '["ü"]'.encode(), "object": ["ü"]}
    assert READERS[reader](message) == value[reader.lower().replace("_", "")[2:]]


@pytest.mark.parametrize("reader", ["as_string", "asString", "as_object", "asObject"])
async def test_bytes_that_do_not_decode_are_an_error_that_names_channel_and_length(
    emitter: Emitter, key: str, unique: str, reader: str
) -> None:
    async with emitter.subscribe(key, unique) as messages:
        await emitter.publish(key, unique, b"\xff\xfe\xfd")
        message = await messages.receive()
    with pytest.raises(ValueError, match=f"3 bytes.*'{unique}'"):
        READERS[reader](message)
    assert message.binary == message.as_binary() == b"\xff\xfe\xfd"


async def test_text_that_is_no_json_is_an_error_that_names_channel_and_length(
    emitter: Emitter, key: str, unique: str
) -> None:
    async with emitter.subscribe(key, unique) as messages:
        await emitter.publish(key, unique, "hello")
        message = await messages.receive()
    with pytest.raises(ValueError, match=f"5 bytes.*'{unique}'.*JSON"):
        message.as_object()
