"""``request()`` and ``serve()``: request and reply between clients."""

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
from tests.client.tools import Calls, arrived, checkpoints, relay
from tests.support.connections import connect_once
from tests.support.logs import logged
from tests.support.server import Server

pytestmark = pytest.mark.emitter

NO_KEY = "A" * 32


def upper_case(request: EmitterMessage) -> str:
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


async def test_request_returns_the_reply(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    async with serving(other, key, unique, upper_case):
        reply = await emitter.request(key, unique, "hello")
    assert isinstance(reply, EmitterMessage)
    assert reply.as_string() == "HELLO"


async def test_handler_can_be_a_coroutine_function(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    async def handler(request: EmitterMessage) -> dict[str, Any]:
        await checkpoints()
        return {"asked": request.as_object(), "by": (await other.me()).id}

    async with serving(other, key, unique, handler):
        reply = await emitter.request(key, unique, [1, 2])
    assert reply.as_object() == {"asked": [1, 2], "by": (await other.me()).id}


async def test_awaitable_returned_by_a_handler_is_awaited(
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
async def test_reply_is_encoded_like_a_published_message(
    emitter: Emitter, other: Emitter, key: str, unique: str, returned: object, replied: bytes
) -> None:
    async with serving(other, key, unique, lambda request: returned):
        assert (await emitter.request(key, unique, "")).binary == replied


async def test_empty_request_gets_an_empty_reply(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    async with serving(other, key, unique, lambda request: request.binary):
        assert (await emitter.request(key, unique, b"")).binary == b""


async def test_client_can_send_requests_to_itself(emitter: Emitter, key: str, unique: str) -> None:
    async with serving(emitter, key, unique, upper_case):
        for text in ("one", "two"):
            assert (await emitter.request(key, unique, text)).as_string() == text.upper()


async def test_concurrent_requests_get_their_own_replies_in_any_order(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    all_there = anyio.Event()
    waiting: list[int] = []

    async def handler(request: EmitterMessage) -> int:
        waiting.append(request.as_object())
        if len(waiting) == 20:
            all_there.set()
        await all_there.wait()
        await checkpoints(20 - request.as_object())
        return 2 * int(request.as_object())

    found: dict[int, int] = {}

    async def ask(number: int) -> None:
        found[number] = (await emitter.request(key, unique, number)).as_object()

    async with serving(other, key, unique, handler), anyio.create_task_group() as tasks:
        for number in range(20):
            tasks.start_soon(ask, number)
    assert found == {number: 2 * number for number in range(20)}


async def test_requests_with_two_keys_get_their_own_replies(
    emitter: Emitter, server: Server, other: Emitter, key: str, unique: str
) -> None:
    second = (await emitter.keygen(server.secret, f"{unique}#/", "rw")).key
    found: dict[str, str] = {}

    async def ask(key: str, text: str) -> None:
        found[text] = (await emitter.request(key, unique, text)).as_string()

    async with serving(other, key, unique, upper_case), anyio.create_task_group() as tasks:
        tasks.start_soon(ask, key, "one")
        tasks.start_soon(ask, second, "two")
    assert found == {"one": "ONE", "two": "TWO"}


async def test_two_clients_use_the_same_service(
    server: Server, emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    async with connect(server.other_url) as third, serving(other, key, unique, upper_case):
        assert (await emitter.request(key, unique, "a")).as_string() == "A"
        assert (await third.request(key, unique, "b")).as_string() == "B"


async def test_one_client_can_serve_two_channels(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    a, b = f"{unique}a/", f"{unique}b/"
    async with serving(other, key, a, lambda _: "a"), serving(other, key, b, lambda _: "b"):
        assert (await emitter.request(key, a, "")).as_string() == "a"
        assert (await emitter.request(key, b, "")).as_string() == "b"


async def test_services_on_parent_and_child_channels_get_only_their_own_requests(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    below = f"{unique}below/"
    async with serving(other, key, unique, lambda _: "above"):
        async with serving(other, key, below, lambda _: "below"):
            assert (await emitter.request(key, unique, "")).as_string() == "above"
            assert (await emitter.request(key, below, "")).as_string() == "below"


async def test_first_reply_wins_when_two_clients_serve_a_channel(
    server: Server, emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    go = anyio.Event()

    async def slow(request: EmitterMessage) -> str:
        await go.wait()
        return "slow"

    async with connect(server.other_url) as third, emitter.stream("error") as errors:
        async with serving(third, key, unique, slow), serving(other, key, unique, upper_case):
            assert (await emitter.request(key, unique, "quick")).as_string() == "QUICK"
            async with emitter.subscribe(key, unique, last=0) as everything:
                go.set()
                late = await everything.receive()
                assert late.channel.endswith("/reply/")
                # The late reply is dropped, and is not the next one's.
                assert (await emitter.request(key, unique, "next")).as_string() in ("NEXT", "slow")
        with pytest.raises(anyio.WouldBlock):
            errors.receive_nowait()


async def test_second_reply_to_a_request_is_dropped(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    """The replies are published by hand, as another library might: twice, and for no request."""
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
async def test_handler_exception_is_raised_as_reply_error_by_request(
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
async def test_any_exception_text_reaches_the_requester(
    emitter: Emitter, other: Emitter, key: str, unique: str, text: str
) -> None:
    def handler(request: EmitterMessage) -> str:
        raise OutOfOrderError(text)

    async with serving(other, key, unique, handler):
        with pytest.raises(ReplyError, match="OutOfOrderError:"):
            await emitter.request(key, unique, "")


@pytest.mark.parametrize(
    ("returned", "pattern"),
    [(b"x" * 65536, "MessageTooLargeError"), (object(), "TypeError"), ("\ud800", "ValueError")],
    ids=["too large", "no JSON", "no UTF-8"],
)
async def test_reply_that_cannot_be_sent_raises_reply_error(
    emitter: Emitter, other: Emitter, key: str, unique: str, returned: object, pattern: str
) -> None:
    async with serving(other, key, unique, lambda request: returned):
        with pytest.raises(ReplyError, match=pattern):
            await emitter.request(key, unique, "")


async def test_request_without_a_service_times_out(emitter: Emitter, key: str, unique: str) -> None:
    with pytest.raises(RequestTimeoutError, match=r"0\.05 s"):
        await emitter.request(key, unique, "", timeout=0.05)


async def test_request_uses_the_clients_request_timeout_by_default(
    server: Server, emitter: Emitter, key: str, unique: str
) -> None:
    async with connect(server.other_url, request_timeout=0.06) as impatient:
        await impatient.me(timeout=None)
        with pytest.raises(RequestTimeoutError, match=r"0\.06 s"):
            await impatient.request(key, unique, "")


async def test_request_and_serve_with_a_write_only_key_are_refused(
    emitter: Emitter, server: Server, unique: str
) -> None:
    write_only = (await emitter.keygen(server.secret, f"{unique}#/", "w")).key
    with pytest.raises(UnauthorizedError) as caught:
        await emitter.request(write_only, unique, "")
    assert caught.value.operation == "subscribe"
    with pytest.raises(UnauthorizedError):
        await emitter.serve(write_only, unique, upper_case)


async def test_request_with_a_read_only_key_raises_and_emits_no_error(
    emitter: Emitter, server: Server, unique: str
) -> None:
    errors = Calls()
    emitter.on("error", errors)
    read_only = (await emitter.keygen(server.secret, f"{unique}#/", "r")).key
    with pytest.raises(UnauthorizedError, match="'w' \\(write\\)") as caught:
        await emitter.request(read_only, unique, "")
    assert caught.value.operation == "publish"
    await emitter.flush()
    await checkpoints()
    assert errors.values == []


async def test_serving_with_a_read_only_key_emits_error(
    emitter: Emitter, other: Emitter, server: Server, key: str, unique: str
) -> None:
    errors = Calls()
    other.on("error", errors)
    read_only = (await emitter.keygen(server.secret, f"{unique}#/", "r")).key
    async with serving(other, read_only, unique, upper_case):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(emitter.request, key, unique, "")
            (error,) = await errors.get(1)
            tasks.cancel_scope.cancel()
    assert isinstance(error, UnauthorizedError)


async def test_oversized_request_is_rejected(emitter: Emitter, key: str, unique: str) -> None:
    with pytest.raises(MessageTooLargeError):
        await emitter.request(key, unique, b"x" * 65536)


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ((1, "a/", ""), "key.*int"),
        ((NO_KEY, "a/+/", ""), "wildcard"),
        ((NO_KEY, "a/#/", ""), "wildcard"),
        ((NO_KEY, "a//", ""), "empty level"),
        ((NO_KEY, "a/", object()), "object"),
    ],
)
async def test_request_names_a_bad_argument(
    emitter: Emitter, arguments: tuple[Any, ...], pattern: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=pattern):
        await emitter.request(*arguments)


async def test_serve_rejects_a_wildcard_channel(emitter: Emitter) -> None:
    with pytest.raises(InvalidChannelError):
        await emitter.serve(NO_KEY, "a/+/", upper_case)


# Cancellation


class PendingHandler:
    """A handler that never replies and records its cancellation."""

    def __init__(self) -> None:
        self.started = anyio.Event()
        self.cancelled = anyio.Event()

    async def __call__(self, request: EmitterMessage) -> str:
        self.started.set()
        try:
            await anyio.sleep_forever()
        finally:
            self.cancelled.set()
        raise AssertionError


async def test_cancelling_a_request_cancels_its_handler(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    pending = PendingHandler()
    async with serving(other, key, unique, pending):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(emitter.request, key, unique, "")
            await pending.started.wait()
            tasks.cancel_scope.cancel()
        await pending.cancelled.wait()
    async with serving(other, key, unique, upper_case):
        assert (await emitter.request(key, unique, "still")).as_string() == "STILL"


async def test_request_timeout_cancels_the_handler(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    pending = PendingHandler()
    async with serving(other, key, unique, pending):
        with pytest.raises(RequestTimeoutError):
            # Long enough for the handler to start on a busy machine.
            await emitter.request(key, unique, "", timeout=2)
        await pending.cancelled.wait()


async def test_cancelling_a_request_does_not_cancel_others(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    pending_by_text = {"a": PendingHandler(), "b": PendingHandler()}

    async def handler(request: EmitterMessage) -> str:
        return await pending_by_text[request.as_string()](request)

    async with serving(other, key, unique, handler), anyio.create_task_group() as tasks:
        scope = anyio.CancelScope()

        async def ask() -> None:
            with scope:
                await emitter.request(key, unique, "a")

        tasks.start_soon(ask)
        tasks.start_soon(emitter.request, key, unique, "b")
        for pending in pending_by_text.values():
            await pending.started.wait()
        scope.cancel()
        await pending_by_text["a"].cancelled.wait()
        await other.flush()
        assert not pending_by_text["b"].cancelled.is_set()
        tasks.cancel_scope.cancel()


async def test_cancelling_serve_cancels_its_handlers(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    pending = PendingHandler()
    async with anyio.create_task_group() as tasks:
        async with serving(other, key, unique, pending):
            tasks.start_soon(emitter.request, key, unique, "")
            await pending.started.wait()
        assert pending.cancelled.is_set()
        tasks.cancel_scope.cancel()


async def test_serve_unsubscribes_when_it_ends_and_can_be_called_again(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    for _ in range(3):
        async with serving(other, key, unique, upper_case):
            assert (await emitter.request(key, unique, "a")).as_string() == "A"
    # serve() does not wait for its UNSUBSCRIBE, so make sure that the broker has read it.
    await other.flush()
    await emitter.publish(key, f"{unique}x/1/", "unserved", qos=1)
    await other.flush()
    assert other.statistics().received == 3


# Other messages on a served channel


async def wait_delivered(emitter: Emitter, other: Emitter, key: str, unique: str) -> None:
    """
    Wait until ``other``, which serves ``unique``, has handled everything that ``emitter`` sent.

    Nodes forward messages to each other after they have acknowledged them, in the same order, so
    only a later message shows that the earlier ones have arrived.
    """
    async with other.subscribe(key, f"{unique}barrier/", 0) as messages:
        await emitter.publish(key, f"{unique}barrier/", "")
        await messages.receive()
    await anyio.wait_all_tasks_blocked()


async def test_serve_ignores_messages_that_are_not_requests(
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


async def test_duplicate_request_is_ignored_while_the_first_is_handled(
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
        await wait_delivered(emitter, other, key, unique)
        served.set()
        await replies.receive()
        await emitter.publish(key, f"{unique}x/1/", "three", qos=1)
        await replies.receive()
    assert asked == ["one", "three"]


async def test_request_is_not_echoed_to_the_requesters_streams(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    async with serving(other, key, unique, upper_case):
        async with emitter.subscribe(key, unique) as messages:
            await emitter.request(key, unique, "a")
            assert await arrived(emitter, messages) == ["A"], "the request itself was echoed"


# Losing the connection, and disconnecting


async def test_pending_request_raises_when_the_connection_is_lost(
    server: Server, other: Emitter, key: str, unique: str
) -> None:
    pending = PendingHandler()
    caught: list[Exception] = []

    async def ask(emitter: Emitter) -> None:
        try:
            await emitter.request(key, unique, "")
        except ConnectionLostError as exc:
            caught.append(exc)

    async with (
        relay(server) as proxy,
        serving(other, key, unique, pending),
        anyio.create_task_group() as tasks,
    ):
        with pytest.raises(ConnectionLostError):
            async with connect_once(host="127.0.0.1", port=proxy.port, secure=False) as emitter:
                tasks.start_soon(ask, emitter)
                await pending.started.wait()
                proxy.cut()
                await anyio.sleep_forever()
    assert len(caught) == 1


async def test_serve_raises_connection_lost_error_without_a_group(
    server: Server, emitter: Emitter, key: str, unique: str
) -> None:
    caught: list[BaseException] = []

    async def serve(*, task_status: Any) -> None:
        try:
            await other.serve(key, unique, upper_case, task_status=task_status)
        except ConnectionLostError as exc:
            caught.append(exc)

    async with relay(server) as proxy, anyio.create_task_group() as tasks:
        with pytest.raises(ConnectionLostError):
            async with connect_once(host="127.0.0.1", port=proxy.port, secure=False) as other:
                await tasks.start(serve)
                proxy.cut()
                await anyio.sleep_forever()
    assert len(caught) == 1


async def test_pending_request_raises_when_the_client_disconnects(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    pending = PendingHandler()
    caught: list[Exception] = []

    async def ask() -> None:
        try:
            await emitter.request(key, unique, "", timeout=None)
        except ClosedError as exc:
            caught.append(exc)

    async with serving(other, key, unique, pending), anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        await pending.started.wait()
        await emitter.disconnect()
    assert len(caught) == 1


async def test_serve_ends_when_the_client_disconnects(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    pending = PendingHandler()
    async with anyio.create_task_group() as asking:
        async with anyio.create_task_group() as tasks:

            async def serve(*, task_status: Any) -> None:
                await other.serve(key, unique, pending, task_status=task_status)

            await tasks.start(serve)
            asking.start_soon(emitter.request, key, unique, "")
            await pending.started.wait()
            await other.disconnect()
        assert pending.cancelled.is_set()
        asking.cancel_scope.cancel()


async def test_request_works_after_the_client_is_entered_again(
    server: Server, other: Emitter, key: str, unique: str
) -> None:
    client = connect(server.other_url)
    async with serving(other, key, unique, upper_case):
        for text in ("one", "two"):
            async with client:
                assert (await client.request(key, unique, text)).as_string() == text.upper()


async def test_request_before_entering_raises() -> None:
    emitter = connect("mqtt://127.0.0.1:1")
    with pytest.raises(ClosedError, match="entered"):
        await emitter.request(NO_KEY, "a/", "")


# Concurrency and buffering


async def test_concurrency_limits_the_running_handlers(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    running = peak = 0

    async def handler(request: EmitterMessage) -> bytes:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await checkpoints(10)
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
    assert peak == 3


class GatedHandler:
    """A handler that records its requests and replies after the test sets ``gate``."""

    def __init__(self) -> None:
        self.requests = Calls()
        self.gate = anyio.Event()

    async def __call__(self, request: EmitterMessage) -> str:
        self.requests(request.as_string())
        await self.gate.wait()
        return "done"


async def test_request_cancelled_while_buffered_is_never_handled(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    gated = GatedHandler()
    async with serving(other, key, unique, gated, concurrency=1):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(emitter.request, key, unique, "first")
            await gated.requests.get(1)
            with pytest.raises(RequestTimeoutError):
                await emitter.request(key, unique, "cancelled", timeout=0.01)
            tasks.start_soon(emitter.request, key, unique, "last")
            await wait_delivered(emitter, other, key, unique)
            gated.gate.set()
    assert gated.requests.values == ["first", "last"]


async def test_cancelled_request_frees_its_slot_for_a_buffered_one(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    gated = GatedHandler()
    async with serving(other, key, unique, gated, concurrency=1):
        async with anyio.create_task_group() as tasks, anyio.create_task_group() as first:
            first.start_soon(emitter.request, key, unique, "first")
            await gated.requests.get(1)
            tasks.start_soon(emitter.request, key, unique, "second")
            await wait_delivered(emitter, other, key, unique)
            first.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await gated.requests.get(2)
            gated.gate.set()
    assert gated.requests.values == ["first", "second"]


async def test_requests_beyond_the_buffer_are_dropped_with_a_warning(
    emitter: Emitter,
    other: Emitter,
    key: str,
    unique: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gated = GatedHandler()
    async with serving(other, key, unique, gated, concurrency=1, buffer=1):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(emitter.request, key, unique, "first")
            await gated.requests.get(1)
            tasks.start_soon(emitter.request, key, unique, "second")
            await wait_delivered(emitter, other, key, unique)
            for _ in range(2):
                with pytest.raises(RequestTimeoutError):
                    await emitter.request(key, unique, "too many", timeout=0.01)
            await wait_delivered(emitter, other, key, unique)
            gated.gate.set()
    assert gated.requests.values == ["first", "second"]
    (record,) = logged(caplog, logging.WARNING)
    assert "dropped requests" in record.getMessage()


@pytest.mark.parametrize(
    ("concurrency", "error"),
    [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)],
)
async def test_serve_rejects_a_bad_concurrency(
    emitter: Emitter, key: str, unique: str, concurrency: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match="concurrency must be"):
        await emitter.serve(key, unique, upper_case, concurrency=concurrency)


# Error text from another client


async def test_reply_error_text_is_truncated_and_printable(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    def fails(request: EmitterMessage) -> str:
        raise ValueError("long\n\x1b" * 1000)

    async with serving(other, key, unique, fails):
        with pytest.raises(ReplyError) as caught:
            await emitter.request(key, unique, "")
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()
