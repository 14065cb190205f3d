"""Requests to many clients, and services that share them."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager

import anyio
import pytest

from emitter_anyio import (
    ClosedError,
    ConnectionLostError,
    Emitter,
    EmitterMessage,
    MessageTooLargeError,
    ReplyError,
    RequestTimeoutError,
    SlowConsumerError,
    SubscriptionConflictError,
    UnauthorizedError,
    connect,
)
from tests.client.test_request_reply import PendingHandler, serving, upper_case
from tests.client.tools import checkpoints, relay
from tests.support.server import Server

pytestmark = pytest.mark.emitter

NO_KEY = "A" * 32


@asynccontextmanager
async def services(server: Server, key: str, channel: str, count: int) -> AsyncGenerator[None]:
    """Serve a channel with several clients, each of which replies its number."""
    async with AsyncExitStack() as stack:
        for number in range(count):
            url = server.other_url if number % 2 else server.url
            client = await stack.enter_async_context(connect(url))

            def reply(request: EmitterMessage, number: int = number) -> int:
                return number

            await stack.enter_async_context(serving(client, key, channel, reply))
        yield


# Replies


async def test_each_service_replies_until_the_count(
    server: Server, emitter: Emitter, key: str, unique: str
) -> None:
    async with services(server, key, unique, 3):
        for _ in range(2):
            async with emitter.request_many(key, unique, "who?", count=3) as replies:
                found = [reply async for reply in replies]
            assert sorted(reply.as_object() for reply in found) == [0, 1, 2]
            assert len({reply.channel for reply in found}) == 1


async def test_a_count_that_is_lower_than_the_number_of_replies_ends_the_stream(
    server: Server, emitter: Emitter, key: str, unique: str
) -> None:
    async with services(server, key, unique, 3):
        async with emitter.request_many(key, unique, "", count=1) as replies:
            assert len([reply async for reply in replies]) == 1
            with pytest.raises(anyio.EndOfStream):
                await replies.receive()


async def test_the_stream_ends_at_the_deadline(
    server: Server, emitter: Emitter, key: str, unique: str
) -> None:
    async with services(server, key, unique, 2):
        async with emitter.request_many(key, unique, "", count=3, timeout=2) as replies:
            assert len([reply async for reply in replies]) == 2


async def test_the_deadline_is_the_clients_request_timeout_by_default(
    server: Server, key: str, unique: str
) -> None:
    async with connect(server.other_url, request_timeout=0.5) as impatient:
        await impatient.me(timeout=None)
        async with impatient.request_many(key, unique, "") as replies:
            assert [reply async for reply in replies] == []


async def test_the_stream_ends_when_no_reply_has_arrived_for_the_idle_time(
    server: Server, emitter: Emitter, key: str, unique: str
) -> None:
    asking = emitter.request_many(key, unique, "", idle=0.5, timeout=None)
    async with services(server, key, unique, 2), asking as replies:
        assert len([reply async for reply in replies]) == 2


async def test_the_idle_time_starts_with_the_first_reply(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    replying = anyio.Event()

    async def handler(request: EmitterMessage) -> str:
        await replying.wait()
        return "late"

    async with serving(other, key, unique, handler):
        async with emitter.request_many(key, unique, "", idle=0.01, timeout=None) as replies:
            await anyio.sleep(0.1)  # ten times the idle time
            assert replies.statistics().open_send_streams == 1
            replying.set()
            assert [reply.as_string() async for reply in replies] == ["late"]


async def test_each_reply_restarts_the_idle_time(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    """The peer replies by hand, as many times as it likes."""
    async with other.subscribe(key, unique, last=0) as requests:
        async with emitter.request_many(key, unique, "", idle=1, timeout=None) as replies:
            where = (await requests.receive()).channel
            for _ in range(5):
                await other.publish(key, f"{where}reply/", "", qos=1)
                await anyio.sleep(0.3)
            assert replies.statistics().open_send_streams == 1
            assert len([reply async for reply in replies]) == 5


async def test_a_stream_can_gather_replies_without_end(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    async with serving(other, key, unique, upper_case):
        async with emitter.request_many(key, unique, "a", timeout=None) as replies:
            assert (await replies.receive()).as_string() == "A"
            with pytest.raises(anyio.WouldBlock):
                replies.receive_nowait()


async def test_several_requests_have_their_own_replies(
    server: Server, emitter: Emitter, key: str, unique: str
) -> None:
    async with (
        services(server, key, unique, 2),
        emitter.request_many(key, unique, "", count=2) as one,
        emitter.request_many(key, unique, "", count=2) as two,
    ):
        assert (await emitter.request(key, unique, "")).as_object() in (0, 1)
        for replies in (one, two):
            assert sorted([reply.as_object() async for reply in replies]) == [0, 1]


async def test_a_client_may_gather_its_own_reply(emitter: Emitter, key: str, unique: str) -> None:
    async with serving(emitter, key, unique, upper_case):
        async with emitter.request_many(key, unique, "a", count=1) as replies:
            assert [reply.as_string() async for reply in replies] == ["A"]


async def test_replies_that_do_not_fit_are_dropped(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    async with other.subscribe(key, unique, last=0) as requests:
        async with emitter.request_many(key, unique, "", count=3, buffer=1) as replies:
            where = (await requests.receive()).channel
            for number in range(3):
                await other.publish(key, f"{where}reply/", number, qos=1)
            while replies.statistics().open_send_streams:
                await emitter.flush()
            assert (await replies.receive()).as_object() == 0
            with pytest.raises(SlowConsumerError) as caught:
                await replies.receive()
            assert caught.value.dropped == 2
    assert emitter.statistics().dropped == 2


# Errors


async def test_the_error_of_a_handler_is_raised_in_the_place_of_its_reply(
    emitter: Emitter,
    other: Emitter,
    key: str,
    unique: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL)

    def fail(request: EmitterMessage) -> str:
        raise LookupError("not here")

    async with serving(other, key, unique, fail), serving(emitter, key, unique, upper_case):
        async with emitter.request_many(key, unique, "a", count=2) as replies:
            found: list[str] = []
            while True:
                try:
                    async for reply in replies:
                        found.append(reply.as_string())  # noqa: PERF401 - the list is kept
                    break
                except ReplyError as exc:
                    found.append(str(exc))
    assert sorted(found) == [
        "A",
        f"request {unique!r}: the handler raised LookupError: not here",
    ]


async def test_entering_raises_a_refusal(emitter: Emitter, server: Server, unique: str) -> None:
    for permissions, operation in (("w", "subscribe"), ("r", "publish")):
        key = (await emitter.keygen(server.secret, f"{unique}#/", permissions)).key
        with pytest.raises(UnauthorizedError) as caught:
            async with emitter.request_many(key, unique, ""):
                pytest.fail("it was accepted")  # pragma: no cover
        assert caught.value.operation == operation
    await emitter.flush()
    assert emitter.statistics().pending == 0


async def test_a_key_function_is_called_again_after_a_refusal(
    emitter: Emitter, other: Emitter, server: Server, key: str, unique: str
) -> None:
    read_only = (await emitter.keygen(server.secret, f"{unique}#/", "r")).key
    keys = [read_only, key]

    async def next_key() -> str:
        return keys.pop(0)

    async with serving(other, key, unique, upper_case):
        async with emitter.request_many(next_key, unique, "a", count=1) as replies:
            assert [reply.as_string() async for reply in replies] == ["A"]
    assert keys == []


async def test_a_request_that_is_too_large_is_rejected(
    emitter: Emitter, key: str, unique: str
) -> None:
    with pytest.raises(MessageTooLargeError):
        emitter.request_many(key, unique, b"x" * 65536)


async def test_idle_and_count_are_checked(emitter: Emitter) -> None:
    with pytest.raises(ValueError, match="idle must be more than 0"):
        emitter.request_many(NO_KEY, "a/", "", idle=0)
    with pytest.raises(ValueError, match="count must be from 1"):
        emitter.request_many(NO_KEY, "a/", "", count=0)


async def test_outside_the_block_it_is_closed(emitter: Emitter, key: str, unique: str) -> None:
    await emitter.disconnect()
    with pytest.raises(ClosedError):
        async with emitter.request_many(key, unique, ""):
            pytest.fail("it was entered")  # pragma: no cover


# The end


async def test_leaving_the_block_cancels_the_handlers(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    pending = PendingHandler()
    async with serving(other, key, unique, pending):
        async with emitter.request_many(key, unique, ""):
            await pending.started.wait()
        await pending.cancelled.wait()


async def test_the_deadline_cancels_the_handlers_in_the_block(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    pending = PendingHandler()
    async with serving(other, key, unique, pending):
        async with emitter.request_many(key, unique, "", timeout=2) as replies:
            with pytest.raises(anyio.EndOfStream):
                await replies.receive()
            await pending.cancelled.wait()


async def test_cancelling_leaves_nothing_behind(
    emitter: Emitter, other: Emitter, key: str, unique: str
) -> None:
    pending = PendingHandler()
    async with serving(other, key, unique, pending), anyio.create_task_group() as tasks:

        async def gather() -> None:
            async with emitter.request_many(key, unique, "") as replies:
                await replies.receive()

        tasks.start_soon(gather)
        await pending.started.wait()
        tasks.cancel_scope.cancel()
    await emitter.flush()
    assert emitter.statistics().pending == 0


async def test_a_lost_connection_ends_the_stream_after_the_replies(
    server: Server, other: Emitter, key: str, unique: str
) -> None:
    async with relay(server) as proxy, connect(f"mqtt://127.0.0.1:{proxy.port}") as emitter:
        async with serving(other, key, unique, upper_case):
            async with emitter.request_many(key, unique, "a", timeout=None) as replies:
                while not replies.statistics().current_buffer_used:
                    await emitter.flush()
                async with emitter.stream("disconnect") as losses:
                    proxy.cut()
                    await losses.receive()
                assert (await replies.receive()).as_string() == "A"
                for _ in range(2):
                    with pytest.raises(ConnectionLostError, match="before a reply"):
                        await replies.receive()
                await emitter.wait_connected()
                assert (await emitter.request(key, unique, "b")).as_string() == "B"


async def test_the_final_loss_leaves_the_block_bare(
    server: Server, other: Emitter, key: str, unique: str
) -> None:
    pending = PendingHandler()
    async with relay(server) as proxy, serving(other, key, unique, pending):
        with pytest.raises(ConnectionLostError) as caught:
            url = f"mqtt://127.0.0.1:{proxy.port}"
            async with connect(url, reconnect=None) as emitter:
                async with emitter.request_many(key, unique, "", timeout=None) as replies:
                    await pending.started.wait()
                    proxy.cut()
                    await replies.receive()
        assert not hasattr(caught.value, "__notes__")


async def test_disconnecting_ends_the_stream(
    server: Server, other: Emitter, key: str, unique: str
) -> None:
    async with connect(server.url) as emitter, serving(other, key, unique, upper_case):
        async with emitter.request_many(key, unique, "a", timeout=None) as replies:
            while not replies.statistics().current_buffer_used:
                await emitter.flush()
            await emitter.disconnect()
            assert (await replies.receive()).as_string() == "A"
            with pytest.raises(ClosedError):
                await replies.receive()


# Groups


@pytest.fixture
async def group_key(emitter: Emitter, server: Server, unique: str) -> str:
    return (await emitter.keygen(server.secret, f"$share/g/{unique}", "r")).key


async def test_each_request_to_a_group_is_handled_by_one_member(
    server: Server, emitter: Emitter, key: str, group_key: str, unique: str
) -> None:
    handled = [0, 0]

    def count(member: int) -> None:
        handled[member] += 1

    async with connect(server.url) as one, connect(server.url) as two:
        group = {"group": "g", "group_key": group_key}
        async with (
            serving(one, key, unique, lambda request: count(0), **group),
            serving(two, key, unique, lambda request: count(1), **group),
        ):
            for _ in range(40):
                await emitter.request(key, unique, "")
    assert sum(handled) == 40
    # One member handles all of them once in 10¹² runs.
    assert all(handled)


async def test_a_key_for_everything_serves_in_a_group(
    server: Server, emitter: Emitter, other: Emitter, unique: str
) -> None:
    everything = (await emitter.keygen(server.secret, "#/", "rw")).key
    async with serving(other, everything, unique, upper_case, group="g"):
        assert (await emitter.request(everything, unique, "a")).as_string() == "A"


async def test_a_group_needs_its_own_key(other: Emitter, key: str, unique: str) -> None:
    with pytest.raises(UnauthorizedError, match="share"):
        await other.serve(key, unique, upper_case, group="g")
    with pytest.raises(ValueError, match="group_key without group"):
        await other.serve(key, unique, upper_case, group_key=key)


async def test_a_member_cannot_request_from_its_own_group(
    other: Emitter, key: str, group_key: str, unique: str
) -> None:
    async with serving(other, key, unique, upper_case, group="g", group_key=group_key):
        with pytest.raises(SubscriptionConflictError, match="second Emitter"):
            await other.request(key, unique, "")


async def test_the_only_member_of_a_group_is_cancelled(
    emitter: Emitter, other: Emitter, key: str, group_key: str, unique: str
) -> None:
    pending = PendingHandler()
    async with serving(other, key, unique, pending, group="g", group_key=group_key):
        with pytest.raises(RequestTimeoutError):
            await emitter.request(key, unique, "", timeout=2)
        await pending.cancelled.wait()
        await checkpoints()
