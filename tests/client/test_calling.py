"""Request and reply between clients."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from emitter_anyio import (
    ClosedError,
    ConnectionLostError,
    Emitter,
    EmitterMessage,
    InvalidChannelError,
    MessageTooLargeError,
    ReplyError,
    RequestTimeoutError,
    UnauthorizedError,
    connect,
)
from tests.client.tools import Calls, arrived, relay, turns
from tests.support.connections import connect_once
from tests.support.logs import logged
from tests.support.server import Server

pytestmark = pytest.mark.emitter

NO_KEY = "A" * 32


def shout(request: EmitterMessage) -> str:
    return request.as_string().upper()


@asynccontextmanager
async def serving(
    emitter: Emitter, key: str, channel: str, handler: Any, **options: Any
) -> AsyncGenerator[None]:
    async with anyio.create_task_group() as tasks:

        async def serve(*, task_status: Any) -> None:
            await emitter.serve(key, channel, handler, task_status=task_status, **options)

        await tasks.start(serve)
        yield
        tasks.cancel_scope.cancel()


# Replies


async def test_a_request_is_replied_to(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    async with serving(other, key, unique, shout):
        reply = await emitter.request(key, unique, "hello")
    assert isinstance(reply, EmitterMessage)
    assert reply.as_string() == "HELLO"


async def test_a_handler_may_be_asynchronous(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    async def handler(request: EmitterMessage) -> dict[str, Any]:
        await turns()
        return {"asked": request.as_object(), "by": (await other.me()).id}

    async with serving(other, key, unique, handler):
        reply = await emitter.request(key, unique, [1, 2])
    assert reply.as_object() == {"asked": [1, 2], "by": (await other.me()).id}


async def test_what_a_handler_returns_is_awaited_if_it_can_be(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    async def later() -> bytes:
        return b"later"

    async with serving(other, key, unique, lambda request: later()):
        assert (await emitter.request(key, unique, "")).binary == b"later"


@pytest.mark.parametrize(
    ("returned", "replied"),
    [(b"\x00\xff", b"\x00\xff"), ("é", "é".encode()), ({"a": 1}, b'{"a":1}'), (None, b"null")],
)
async def test_a_reply_is_what_could_be_published(
    emitter: Emitter, other: Emitter, key: str, unique: str, returned: object, replied: bytes
) -> None:
    async with serving(other, key, unique, lambda request: returned):
        assert (await emitter.request(key, unique, "")).binary == replied


async def test_an_empty_request_has_an_empty_reply(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    async with serving(other, key, unique, lambda request: request.binary):
        assert (await emitter.request(key, unique, b"")).binary == b""


async def test_a_client_may_ask_itself(emitter: Emitter, key: str, unique: str) -> None:
    async with serving(emitter, key, unique, shout):
        for text in ("one", "two"):
            assert (await emitter.request(key, unique, text)).as_string() == text.upper()


async def test_several_requests_at_once_have_their_own_replies_in_any_order(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    all_there = anyio.Event()
    waiting: list[int] = []

    async def handler(request: EmitterMessage) -> int:
        waiting.append(request.as_object())
        if len(waiting) == 20:
            all_there.set()
        await all_there.wait()
        await turns(20 - request.as_object())
        return 2 * int(request.as_object())

    found: dict[int, int] = {}

    async def ask(number: int) -> None:
        found[number] = (await emitter.request(key, unique, number)).as_object()

    async with serving(other, key, unique, handler), anyio.create_task_group() as tasks:
        for number in range(20):
            tasks.start_soon(ask, number)
    assert found == {number: 2 * number for number in range(20)}


async def test_requests_under_two_keys_have_their_own_replies(
    emitter: Emitter, server: Server, other: Emitter, key: str, unique: str
) -> None:
    second = (await emitter.keygen(server.secret, f"{unique}#/", "rw")).key
    found: dict[str, str] = {}

    async def ask(key: str, text: str) -> None:
        found[text] = (await emitter.request(key, unique, text)).as_string()

    async with serving(other, key, unique, shout), anyio.create_task_group() as tasks:
        tasks.start_soon(ask, key, "one")
        tasks.start_soon(ask, second, "two")
    assert found == {"one": "ONE", "two": "TWO"}


async def test_two_clients_ask_one(
    server: Server, emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    async with connect(server.other_url) as third, serving(other, key, unique, shout):
        assert (await emitter.request(key, unique, "a")).as_string() == "A"
        assert (await third.request(key, unique, "b")).as_string() == "B"


async def test_services_on_channels_of_one_client_are_apart(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    a, b = f"{unique}a/", f"{unique}b/"
    async with serving(other, key, a, lambda _: "a"), serving(other, key, b, lambda _: "b"):
        assert (await emitter.request(key, a, "")).as_string() == "a"
        assert (await emitter.request(key, b, "")).as_string() == "b"


async def test_a_service_below_a_service_does_not_hear_what_is_not_its_own(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    below = f"{unique}below/"
    async with serving(other, key, unique, lambda _: "above"):
        async with serving(other, key, below, lambda _: "below"):
            assert (await emitter.request(key, unique, "")).as_string() == "above"
            assert (await emitter.request(key, below, "")).as_string() == "below"


async def test_of_two_that_serve_the_first_reply_counts(
    server: Server, emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    go = anyio.Event()

    async def slow(request: EmitterMessage) -> str:
        await go.wait()
        return "slow"

    async with connect(server.other_url) as third, emitter.stream("error") as errors:
        async with serving(third, key, unique, slow), serving(other, key, unique, shout):
            assert (await emitter.request(key, unique, "quick")).as_string() == "QUICK"
            async with emitter.subscribe(key, unique, last=0) as everything:
                go.set()
                late = await everything.receive()
                assert late.channel.endswith("/reply/")
                # The late reply is dropped, and is not the next one's.
                assert (await emitter.request(key, unique, "next")).as_string() in ("NEXT", "slow")
        with pytest.raises(anyio.WouldBlock):
            errors.receive_nowait()


async def test_a_second_reply_to_one_request_is_dropped(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    """The peer is another library's, by hand: it replies twice, and to what nobody asked."""
    async with other.subscribe(key, unique) as requests, anyio.create_task_group() as tasks:

        async def reply_by_hand() -> None:
            asked = (await requests.receive()).channel
            await other.publish(key, f"{asked}reply/", "first")
            await other.publish(key, f"{asked}reply/", "second")
            await other.publish(key, f"{asked}error/", "third")
            await other.publish(key, f"{asked}what/", "fourth")
            await other.publish(key, asked.removesuffix("1/") + "99/reply/", "fifth", qos=1)

        tasks.start_soon(reply_by_hand)
        assert (await emitter.request(key, unique, "")).as_string() == "first"
    await emitter.flush()
    assert emitter.statistics().unhandled == 0


# Errors


class OutOfOrderError(Exception):
    pass


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_what_the_handler_raises_is_raised_where_it_was_asked(
    emitter: Emitter,
    other: Emitter,
    key: str,
    unique: str,
    asynchronous: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def handler(request: EmitterMessage) -> str:
        if request.as_string() == "bad":
            raise OutOfOrderError("come back tomorrow")
        return "fine"

    async def handle(request: EmitterMessage) -> str:
        return handler(request)

    async with serving(other, key, unique, handle if asynchronous else handler):
        with pytest.raises(ReplyError, match="OutOfOrderError: come back tomorrow") as caught:
            await emitter.request(key, unique, "bad")
        assert repr(unique) in str(caught.value)
        assert (await emitter.request(key, unique, "good")).as_string() == "fine"
    (record,) = logged(caplog, logging.WARNING)
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], OutOfOrderError)


@pytest.mark.parametrize("text", ["\ud800", "é" * 10000, ""], ids=["no UTF-8", "long", "empty"])
async def test_words_of_any_kind_cross(
    emitter: Emitter, other: Emitter, key: str, unique: str, text: str
) -> None:
    def handler(request: EmitterMessage) -> str:
        raise OutOfOrderError(text)

    async with serving(other, key, unique, handler):
        with pytest.raises(ReplyError, match="OutOfOrderError:"):
            await emitter.request(key, unique, "")


@pytest.mark.parametrize(
    ("returned", "words"),
    [(b"x" * 65536, "MessageTooLargeError"), (object(), "TypeError"), ("\ud800", "ValueError")],
    ids=["too large", "no JSON", "no UTF-8"],
)
async def test_a_reply_that_cannot_be_sent_is_an_error(
    emitter: Emitter, other: Emitter, key: str, unique: str, returned: object, words: str
) -> None:
    async with serving(other, key, unique, lambda request: returned):
        with pytest.raises(ReplyError, match=words):
            await emitter.request(key, unique, "")


async def test_nobody_serves(emitter: Emitter, key: str, unique: str) -> None:
    with pytest.raises(RequestTimeoutError, match=r"0\.05 s"):
        await emitter.request(key, unique, "", timeout=0.05)


async def test_the_time_is_the_clients_request_timeout_unless_said(
    server: Server, emitter: Emitter, key: str, unique: str
) -> None:
    async with connect(server.other_url, request_timeout=0.06) as impatient:
        await impatient.me(timeout=None)
        with pytest.raises(RequestTimeoutError, match=r"0\.06 s"):
            await impatient.request(key, unique, "")


async def test_a_key_that_may_not_read_is_refused(
    emitter: Emitter, server: Server, unique: str
) -> None:
    write_only = (await emitter.keygen(server.secret, f"{unique}#/", "w")).key
    with pytest.raises(UnauthorizedError) as caught:
        await emitter.request(write_only, unique, "")
    assert caught.value.operation == "subscribe"
    with pytest.raises(UnauthorizedError):
        await emitter.serve(write_only, unique, shout)


async def test_a_key_that_may_not_write_is_refused_once(
    emitter: Emitter, server: Server, unique: str
) -> None:
    errors = Calls()
    emitter.on("error", errors)
    read_only = (await emitter.keygen(server.secret, f"{unique}#/", "r")).key
    with pytest.raises(UnauthorizedError, match="'w' \\(write\\)") as caught:
        await emitter.request(read_only, unique, "")
    assert caught.value.operation == "publish"
    await emitter.flush()
    await turns()
    assert errors.values == []


async def test_who_serves_without_the_permission_to_write_is_told(
    emitter: Emitter, other: Emitter, server: Server, key: str, unique: str
) -> None:
    errors = Calls()
    other.on("error", errors)
    read_only = (await emitter.keygen(server.secret, f"{unique}#/", "r")).key
    async with serving(other, read_only, unique, shout):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(emitter.request, key, unique, "")
            (error,) = await errors.get(1)
            tasks.cancel_scope.cancel()
    assert isinstance(error, UnauthorizedError)


async def test_a_request_too_large_is_refused_before_it_is_sent(
    emitter: Emitter, key: str, unique: str
) -> None:
    with pytest.raises(MessageTooLargeError):
        await emitter.request(key, unique, b"x" * 65536)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((1, "a/", ""), "key.*int"),
        ((NO_KEY, "a/+/", ""), "wildcard"),
        ((NO_KEY, "a/#/", ""), "wildcard"),
        ((NO_KEY, "a//", ""), "empty level"),
        ((NO_KEY, "a/", object()), "object"),
    ],
)
async def test_bad_arguments_are_named(
    emitter: Emitter, arguments: tuple[Any, ...], words: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        await emitter.request(*arguments)


async def test_bad_channels_to_serve_are_named(emitter: Emitter) -> None:
    with pytest.raises(InvalidChannelError):
        await emitter.serve(NO_KEY, "a/+/", shout)


# Cancellation


class Handling:
    """A handler that never replies, and notes how it ends."""

    def __init__(self) -> None:
        self.began = anyio.Event()
        self.cancelled = anyio.Event()

    async def __call__(self, request: EmitterMessage) -> str:
        self.began.set()
        try:
            await anyio.sleep_forever()
        finally:
            self.cancelled.set()
        raise AssertionError


async def test_cancelling_a_request_cancels_its_handler(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    handling = Handling()
    async with serving(other, key, unique, handling):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(emitter.request, key, unique, "")
            await handling.began.wait()
            tasks.cancel_scope.cancel()
        await handling.cancelled.wait()
    async with serving(other, key, unique, shout):
        assert (await emitter.request(key, unique, "still")).as_string() == "STILL"


async def test_a_timeout_cancels_the_handler(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    handling = Handling()
    async with serving(other, key, unique, handling):
        with pytest.raises(RequestTimeoutError):
            # Time enough for the handler to begin on a busy machine.
            await emitter.request(key, unique, "", timeout=2)
        await handling.cancelled.wait()


async def test_cancelling_one_request_leaves_the_others(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    handlings = {"a": Handling(), "b": Handling()}

    async def handler(request: EmitterMessage) -> str:
        return await handlings[request.as_string()](request)

    async with serving(other, key, unique, handler), anyio.create_task_group() as tasks:
        scope = anyio.CancelScope()

        async def ask() -> None:
            with scope:
                await emitter.request(key, unique, "a")

        tasks.start_soon(ask)
        tasks.start_soon(emitter.request, key, unique, "b")
        for handling in handlings.values():
            await handling.began.wait()
        scope.cancel()
        await handlings["a"].cancelled.wait()
        await other.flush()
        assert not handlings["b"].cancelled.is_set()
        tasks.cancel_scope.cancel()


async def test_no_more_serving_cancels_the_handlers(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    handling = Handling()
    async with anyio.create_task_group() as tasks:
        async with serving(other, key, unique, handling):
            tasks.start_soon(emitter.request, key, unique, "")
            await handling.began.wait()
        assert handling.cancelled.is_set()
        tasks.cancel_scope.cancel()


async def test_serving_is_given_back_and_can_be_begun_again(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    for _ in range(3):
        async with serving(other, key, unique, shout):
            assert (await emitter.request(key, unique, "a")).as_string() == "A"
    # The broker has taken the last UNSUBSCRIBE, which nobody waits for.
    await other.flush()
    await emitter.publish(key, f"{unique}x/1/", "to nobody", qos=1)
    await other.flush()
    assert other.statistics().received == 3


# What reaches a service without being a request


async def test_other_messages_are_no_requests(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    asked: list[str] = []

    def handler(request: EmitterMessage) -> str:
        asked.append(request.channel)
        return ""

    async with serving(other, key, unique, handler):
        for channel in ("", "a/", "a/b/c/", "a/b/cancel/", "a/b/c/d/"):
            await emitter.publish(key, unique + channel, "m")
        await emitter.request(key, unique, "")
    assert len(asked) == 1


async def test_one_request_that_comes_twice_is_served_once_at_a_time(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    served = anyio.Event()
    asked: list[str] = []

    async def handler(request: EmitterMessage) -> str:
        asked.append(request.as_string())
        await served.wait()
        return "done"

    async with (
        serving(other, key, unique, handler),
        emitter.subscribe(key, f"{unique}x/1/reply/") as replies,
    ):
        for text in ("one", "two"):
            await emitter.publish(key, f"{unique}x/1/", text, qos=1)
        await other.flush()
        await turns()
        served.set()
        await replies.receive()
        await emitter.publish(key, f"{unique}x/1/", "three", qos=1)
        await replies.receive()
    assert asked == ["one", "three"]


async def test_the_requests_of_others_are_not_messages_of_the_asker(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    async with serving(other, key, unique, shout):
        async with emitter.subscribe(key, unique) as messages:
            await emitter.request(key, unique, "a")
            assert await arrived(emitter, messages) == ["A"], "its own request has no echo"


# The end of the link


async def test_a_request_under_way_when_the_link_is_lost_raises(
    server: Server, other: Emitter, key: str, unique: str
) -> None:
    handling = Handling()
    caught: list[Exception] = []

    async def ask(emitter: Emitter) -> None:
        try:
            await emitter.request(key, unique, "")
        except ConnectionLostError as exc:
            caught.append(exc)

    async with (
        relay(server) as link,
        serving(other, key, unique, handling),
        anyio.create_task_group() as tasks,
    ):
        with pytest.raises(ConnectionLostError):
            async with connect_once(host="127.0.0.1", port=link.port, secure=False) as emitter:
                tasks.start_soon(ask, emitter)
                await handling.began.wait()
                link.cut()
                await anyio.sleep_forever()
    assert len(caught) == 1


async def test_serving_ends_bare_when_the_link_is_lost(
    server: Server, emitter: Emitter, key: str, unique: str
) -> None:
    caught: list[BaseException] = []

    async def serve(*, task_status: Any) -> None:
        try:
            await other.serve(key, unique, shout, task_status=task_status)
        except ConnectionLostError as exc:
            caught.append(exc)

    async with relay(server) as link, anyio.create_task_group() as tasks:
        with pytest.raises(ConnectionLostError):
            async with connect_once(host="127.0.0.1", port=link.port, secure=False) as other:
                await tasks.start(serve)
                link.cut()
                await anyio.sleep_forever()
    assert len(caught) == 1


async def test_a_request_under_way_when_the_client_disconnects_raises(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    handling = Handling()
    caught: list[Exception] = []

    async def ask() -> None:
        try:
            await emitter.request(key, unique, "", timeout=None)
        except ClosedError as exc:
            caught.append(exc)

    async with serving(other, key, unique, handling), anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        await handling.began.wait()
        await emitter.disconnect()
    assert len(caught) == 1


async def test_serving_ends_when_the_client_disconnects(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    handling = Handling()
    async with anyio.create_task_group() as asking:
        async with anyio.create_task_group() as tasks:

            async def serve(*, task_status: Any) -> None:
                await other.serve(key, unique, handling, task_status=task_status)

            await tasks.start(serve)
            asking.start_soon(emitter.request, key, unique, "")
            await handling.began.wait()
            await other.disconnect()
        assert handling.cancelled.is_set()
        asking.cancel_scope.cancel()


async def test_a_client_asks_again_in_its_next_life(
    server: Server, other: Emitter, key: str, unique: str
) -> None:
    again = connect(server.other_url)
    async with serving(other, key, unique, shout):
        for text in ("one", "two"):
            async with again:
                assert (await again.request(key, unique, text)).as_string() == text.upper()


async def test_a_client_that_is_not_entered_asks_nobody() -> None:
    emitter = connect("mqtt://127.0.0.1:1")
    with pytest.raises(ClosedError, match="entered"):
        await emitter.request(NO_KEY, "a/", "")


# How many requests are served at the same time


async def test_no_more_requests_are_handled_at_the_same_time_than_the_limit(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    running = most = 0

    async def handler(request: EmitterMessage) -> bytes:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await turns(10)
        running -= 1
        return request.binary

    replies: list[str] = []

    async def ask(text: str) -> None:
        replies.append((await emitter.request(key, unique, text)).as_string())

    async with serving(other, key, unique, handler, concurrency=3):
        async with anyio.create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(ask, str(number))
    assert sorted(map(int, replies)) == list(range(20))
    assert most == 3


class Busy:
    """A handler that notes what it is asked, and is done when the test says so."""

    def __init__(self) -> None:
        self.asked = Calls()
        self.free = anyio.Event()

    async def __call__(self, request: EmitterMessage) -> str:
        self.asked(request.as_string())
        await self.free.wait()
        return "done"


async def came(emitter: Emitter, other: Emitter) -> None:
    """Wait until another client has taken in what this one has sent."""
    await emitter.flush()
    await other.flush()
    await anyio.wait_all_tasks_blocked()


async def test_a_request_cancelled_while_it_waits_is_never_handled(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    busy = Busy()
    async with serving(other, key, unique, busy, concurrency=1):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(emitter.request, key, unique, "first")
            await busy.asked.get(1)
            with pytest.raises(RequestTimeoutError):
                await emitter.request(key, unique, "cancelled", timeout=0.01)
            tasks.start_soon(emitter.request, key, unique, "last")
            await came(emitter, other)
            busy.free.set()
    assert busy.asked.values == ["first", "last"]


async def test_a_request_cancelled_makes_room_for_one_that_waits(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    busy = Busy()
    async with serving(other, key, unique, busy, concurrency=1):
        async with anyio.create_task_group() as tasks, anyio.create_task_group() as first:
            first.start_soon(emitter.request, key, unique, "first")
            await busy.asked.get(1)
            tasks.start_soon(emitter.request, key, unique, "second")
            await came(emitter, other)
            first.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await busy.asked.get(2)
            busy.free.set()
    assert busy.asked.values == ["first", "second"]


async def test_requests_are_dropped_when_as_many_wait_as_may(
    emitter: Emitter,
    other: Emitter,
    key: str,
    unique: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    busy = Busy()
    async with serving(other, key, unique, busy, concurrency=1, buffer=1):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(emitter.request, key, unique, "first")
            await busy.asked.get(1)
            tasks.start_soon(emitter.request, key, unique, "second")
            await came(emitter, other)
            for _ in range(2):
                with pytest.raises(RequestTimeoutError):
                    await emitter.request(key, unique, "too many", timeout=0.01)
            await came(emitter, other)
            busy.free.set()
    assert busy.asked.values == ["first", "second"]
    (record,) = logged(caplog, logging.WARNING)
    assert "dropped requests" in record.getMessage()


@pytest.mark.parametrize(
    ("concurrency", "error"),
    [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)],
)
async def test_a_concurrency_that_is_none(
    emitter: Emitter, key: str, unique: str, concurrency: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match="concurrency must be"):
        await emitter.serve(key, unique, shout, concurrency=concurrency)


# What others have written in an error


async def test_the_words_of_a_reply_are_cut(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    def fails(request: EmitterMessage) -> str:
        raise ValueError("long\n\x1b" * 1000)

    async with serving(other, key, unique, fails):
        with pytest.raises(ReplyError) as caught:
            await emitter.request(key, unique, "")
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()
