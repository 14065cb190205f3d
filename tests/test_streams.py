from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import fields, replace
from datetime import UTC, datetime
from typing import Any, get_args

import anyio
import pytest
import sniffio
from anyio import ClosedResourceError, EndOfStream, WouldBlock
from anyio.abc import ObjectReceiveStream
from anyio.lowlevel import checkpoint
from anyio.streams.memory import MemoryObjectReceiveStream
from hypothesis import given
from hypothesis import strategies as st

from emitter_anyio._backend import Owner
from emitter_anyio._streams import (
    MAX_BYTES,
    SKIPPED,
    Entering,
    EventStream,
    Overflow,
    Receiver,
    Sender,
    StreamStatistics,
    check_buffer,
    weight_of,
)
from emitter_anyio._values.errors import ConnectionLostError, SlowConsumerError
from emitter_anyio._values.messages import ITEM_OVERHEAD_BYTES, EmitterMessage, Gap
from emitter_anyio._values.requests import Member, PresenceEvent

Ends = tuple[Sender[Any], EventStream[Any]]
MakeStream = Callable[..., Ends]


@pytest.fixture
def make() -> Iterator[MakeStream]:
    """A function that creates streams, whose receive ends are closed after the test."""
    created: list[EventStream[Any]] = []

    def make(
        buffer: int = 3, overflow: Overflow = "raise", decode: Callable[[Any], Any] | None = None
    ) -> Ends:
        send: Sender[Any] = Sender("subscribe('a/')", buffer, overflow)
        created.append(EventStream(send, decode))
        return send, created[-1]

    yield make
    for stream in created:
        stream.close()


def fill(send: Sender[Any], *items: object) -> None:
    """Push items, applying the overflow policy to those that have no space."""
    for item in items:
        send.push_or_drop(item)


def filled(ends: Ends, *items: object) -> Ends:
    fill(ends[0], *items)
    return ends


def read(stream: EventStream[Any]) -> list[object]:
    """Receive everything available; a gap becomes a text with its size."""
    items: list[object] = []
    while True:
        try:
            items.append(stream.receive_nowait())
        except SlowConsumerError as exc:
            items.append(f"{exc.dropped} missing")
        except (WouldBlock, EndOfStream):
            return items


async def use_up_turns(send: Sender[Any]) -> None:
    """Let it wait for its consumer, after which it yields no more turns before waiting."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(send.wait_for_space)
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()


async def cancel_when_blocked(scope: anyio.CancelScope) -> None:
    await anyio.wait_all_tasks_blocked()
    scope.cancel()


async def in_scope(scope: anyio.CancelScope, function: Callable[[], Awaitable[None]]) -> None:
    with scope:
        await function()


def figures(stream: EventStream[Any]) -> tuple[int, int, int, int]:
    """Return how many items and bytes are buffered, and how many were received and dropped."""
    all = stream.statistics()
    return all.current_buffer_used, all.buffered_bytes, all.received, all.dropped


class TestReceiving:
    async def test_buffered_items_are_received(self, make: MakeStream) -> None:
        _send, stream = filled(make(), 1, 2, 3)
        assert [await stream.receive() for _ in range(3)] == [1, 2, 3]

    def test_receive_nowait_of_an_empty_stream_raises_would_block(self, make: MakeStream) -> None:
        with pytest.raises(WouldBlock):
            make()[1].receive_nowait()

    async def test_receive_waits_for_an_item(self, make: MakeStream) -> None:
        send, stream = make()
        received = []

        async def receive() -> None:
            received.append(await stream.receive())
            received.append(await stream.receive())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive)
            await anyio.wait_all_tasks_blocked()
            assert received == []
            send.push("first")
            await anyio.wait_all_tasks_blocked()
            assert received == ["first"]
            send.push("second")
        assert received == ["first", "second"]

    async def test_stream_is_an_object_receive_stream_and_an_iterator(
        self, make: MakeStream
    ) -> None:
        send, stream = filled(make(), 1, 2, 3)
        send.end()
        assert isinstance(stream, ObjectReceiveStream)
        assert [item async for item in stream] == [1, 2, 3]

    async def test_several_tasks_can_share_a_stream(self, make: MakeStream) -> None:
        send, stream = make(buffer=1000)
        received: dict[str, list[int]] = {"a": [], "b": [], "c": []}

        async def receive(name: str) -> None:
            async for item in stream:
                received[name].append(item)
                await checkpoint()

        async with anyio.create_task_group() as tasks:
            for name in received:
                tasks.start_soon(receive, name)
            await anyio.wait_all_tasks_blocked()
            for number in range(300):
                send.push(number)
                if number % 7 == 0:
                    await checkpoint()
            send.end()
        assert sorted(item for items in received.values() for item in items) == list(range(300))
        assert all(items == sorted(items) for items in received.values())
        assert all(received.values()), "a task received nothing"

    @pytest.mark.parametrize("count", [1, 2])
    async def test_each_item_goes_to_one_of_the_waiting_tasks(
        self, make: MakeStream, count: int
    ) -> None:
        send, stream = make()
        received = []

        async def receive() -> None:
            received.append(await stream.receive())

        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(receive)
            await anyio.wait_all_tasks_blocked()
            fill(send, *range(count))
            await anyio.wait_all_tasks_blocked()
            assert sorted(received) == list(range(count))
            tasks.cancel_scope.cancel()

    async def test_receive_yields_at_least_every_64_items(self, make: MakeStream) -> None:
        send, stream = filled(make(buffer=1000), *range(1000))
        send.end()
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await checkpoint()

        received: list[int] = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(other)
            received += [item async for item in stream]
            tasks.cancel_scope.cancel()
        assert len(received) == 1000
        # Trio runs ready tasks in random order, so the last turn might come too late.
        assert turns >= 1000 // 64 - 1

    async def test_receive_checks_for_cancellation_at_least_every_64_items(
        self, make: MakeStream
    ) -> None:
        _send, stream = filled(make(buffer=1000), *range(1000))
        received = []
        with anyio.CancelScope() as scope:
            scope.cancel()
            async for item in stream:
                received.append(item)  # noqa: PERF401 - a cancelled comprehension would return nothing
        assert len(received) <= 64
        assert read(stream) == list(range(len(received), 1000)), "an item was lost"


class TestCancellation:
    """An item stays in the stream until its receiver runs."""

    @pytest.mark.parametrize("order", ["item, cancel", "cancel, item"])
    @pytest.mark.parametrize("natively", [False, True])
    async def test_cancelled_in_the_turn_in_which_an_item_arrives(
        self, make: MakeStream, order: str, natively: bool
    ) -> None:
        send, stream = make()
        received = []

        async def receive() -> None:
            received.append(await stream.receive())

        def put() -> None:
            send.push("item")

        scope = anyio.CancelScope()

        async def in_scope() -> None:
            with scope:
                await receive()

        async with anyio.create_task_group() as tasks:
            if natively and sniffio.current_async_library() == "asyncio":
                cancel: Callable[[], object] = asyncio.ensure_future(receive()).cancel
            else:  # Trio has cancel scopes only
                tasks.start_soon(in_scope)
                cancel = scope.cancel
            await anyio.wait_all_tasks_blocked()
            for action in (put, cancel) if order == "item, cancel" else (cancel, put):
                action()
            await anyio.wait_all_tasks_blocked()
        assert received + read(stream) == ["item"]

    @pytest.mark.parametrize("turns", range(4))
    async def test_cancelled_some_turns_after_an_item_arrived(
        self, make: MakeStream, turns: int
    ) -> None:
        send, stream = make()
        received = []
        async with anyio.create_task_group() as tasks:

            async def receive() -> None:
                received.append(await stream.receive())

            tasks.start_soon(receive)
            await anyio.wait_all_tasks_blocked()
            send.push("item")
            for _ in range(turns):
                await checkpoint()
            tasks.cancel_scope.cancel()
        assert received + read(stream) == ["item"]

    @pytest.mark.parametrize("turns", range(4))
    async def test_natively_cancelled_some_turns_after_an_item_arrived(
        self, make: MakeStream, turns: int
    ) -> None:
        if sniffio.current_async_library() != "asyncio":
            return  # Trio has cancel scopes only
        send, stream = make()
        task = asyncio.ensure_future(stream.receive())
        await anyio.wait_all_tasks_blocked()
        send.push("item")
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        received = [] if task.cancelled() else [task.result()]
        assert received + read(stream) == ["item"]

    async def test_cancelled_receiver_wakes_no_other_and_leaves_nothing_behind(
        self, make: MakeStream
    ) -> None:
        send, stream = make()
        received = []

        async def receive_patiently() -> None:
            received.append(await stream.receive())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive_patiently)
            await anyio.wait_all_tasks_blocked()
            for _ in range(3):
                with anyio.CancelScope() as scope:
                    tasks.start_soon(cancel_when_blocked, scope)
                    await stream.receive()
            assert received == []
            assert stream.statistics().tasks_waiting_receive == 1
            send.push("item")
        assert received == ["item"]
        assert stream.statistics().tasks_waiting_receive == 0

    async def test_receiver_cancelled_in_the_turn_of_its_item_passes_it_on(
        self, make: MakeStream
    ) -> None:
        send, stream = make()
        received = []

        async def receive() -> None:
            received.append(await stream.receive())

        async with anyio.create_task_group() as tasks:
            if sniffio.current_async_library() == "asyncio":
                cancel: Callable[[], object] = asyncio.ensure_future(receive()).cancel
            else:
                scope = anyio.CancelScope()
                tasks.start_soon(in_scope, scope, receive)
                cancel = scope.cancel
            await anyio.wait_all_tasks_blocked()
            tasks.start_soon(receive)
            await anyio.wait_all_tasks_blocked()
            send.push("item")
            cancel()
            await anyio.wait_all_tasks_blocked()
            assert received == ["item"]
            tasks.cancel_scope.cancel()

    async def test_item_of_a_cancelled_receiver_goes_to_another(self, make: MakeStream) -> None:
        send, stream = make()
        received = []
        scope = anyio.CancelScope()

        async def receive_and_be_cancelled() -> None:
            with scope:
                received.append(await stream.receive())

        async def receive_patiently() -> None:
            received.append(await stream.receive())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive_and_be_cancelled)
            await anyio.wait_all_tasks_blocked()
            tasks.start_soon(receive_patiently)
            await anyio.wait_all_tasks_blocked()
            send.push("item")
            scope.cancel()
            with anyio.CancelScope(shield=True):
                await anyio.wait_all_tasks_blocked()
            # If the first task received the item after all, the second needs another one.
            send.push("next")
        assert received[0] == "item"
        assert len(received) + len(read(stream)) == 2


class TestOverflow:
    @pytest.mark.parametrize(
        ("overflow", "left"),
        [
            ("raise", [1, 2, 3, "2 missing"]),
            ("drop_newest", [1, 2, 3]),
            ("drop_oldest", [3, 4, 5]),
            # push_or_drop() does not wait, so it acts like "raise".
            ("block", [1, 2, 3, "2 missing"]),
        ],
    )
    def test_full_buffer_by_policy(
        self, make: MakeStream, overflow: Overflow, left: list[object]
    ) -> None:
        send, stream = filled(make(overflow=overflow), 1, 2, 3, 4, 5)
        assert send.dropped == stream.statistics().dropped == 2
        assert read(stream) == left
        received = sum(isinstance(item, int) for item in left)
        assert figures(stream) == (0, 0, received, 2)

    def test_push_returns_whether_there_was_space(self, make: MakeStream) -> None:
        send, stream = make(buffer=2)
        assert [send.push(number) for number in range(3)] == [True, True, False]
        assert read(stream) == [0, 1]

    def test_slow_consumer_error_is_raised_in_place_of_the_missing_messages(
        self, make: MakeStream
    ) -> None:
        send, stream = filled(make(buffer=2), 1, 2, 3)
        assert stream.receive_nowait() == 1
        fill(send, 4)
        assert stream.receive_nowait() == 2
        with pytest.raises(SlowConsumerError) as caught:
            stream.receive_nowait()
        assert caught.value.dropped == 1
        assert "subscribe('a/')" in str(caught.value)
        assert "buffer=2" in str(caught.value)
        fill(send, 5, 6, 7)
        assert read(stream) == [4, 5, "2 missing"]

    def test_messages_dropped_at_the_end_extend_the_last_gap(self, make: MakeStream) -> None:
        send, stream = filled(make(buffer=1), 1, 2)
        assert stream.receive_nowait() == 1
        fill(send, 3)
        fill(send, 4, 5)
        assert read(stream) == ["1 missing", 3, "2 missing"]

    def test_gap_that_was_read_is_not_extended(self, make: MakeStream) -> None:
        send, stream = filled(make(buffer=1), 1, 2)
        assert read(stream) == [1, "1 missing"]
        fill(send, 3, 4, 5)
        assert read(stream) == [3, "2 missing"]

    def test_message_dropped_after_a_read_gap_starts_a_new_gap(self, make: MakeStream) -> None:
        send, stream = filled(make(buffer=1), 1, 2)
        assert read(stream) == [1, "1 missing"]
        big = EmitterMessage("a/", bytes(MAX_BYTES))
        fill(send, big, 3)
        assert read(stream) == [big, "1 missing"]

    async def test_iteration_can_continue_after_a_gap(self, make: MakeStream) -> None:
        send, stream = filled(make(), 1, 2, 3, 4)
        received = []
        with pytest.raises(SlowConsumerError):
            async for item in stream:
                received.append(item)  # noqa: PERF401 - keep the items before the error
        fill(send, 5)
        send.end()
        received += [item async for item in stream]
        assert received == [1, 2, 3, 5]

    @pytest.mark.parametrize("overflow", get_args(Overflow))
    @given(
        buffer=st.integers(1, 4),
        actions=st.lists(st.sampled_from(["push"] * 4 + ["take"] * 3 + ["extra"]), max_size=40),
    )
    def test_every_message_is_received_or_counted(
        self, overflow: Overflow, buffer: int, actions: list[str]
    ) -> None:
        send: Sender[int] = Sender("x", buffer, overflow)
        stream = EventStream[int](send)
        pushed = 0
        taken: list[int] = []
        reported = 0

        def take() -> bool:
            nonlocal reported
            try:
                item = stream.receive_nowait()
            except WouldBlock:
                return False
            except SlowConsumerError as exc:
                reported += exc.dropped
                missing.append((taken[-1] if taken else -1, exc.dropped))
                return True
            if missing and missing[-1][0] == (taken[-1] if taken else -1):
                # The gap has exactly the size of what is missing here.
                assert item == missing[-1][0] + missing[-1][1] + 1
            elif overflow in ("raise", "block"):
                assert item == (taken[-1] if taken else -1) + 1
            taken.append(item)
            return True

        missing: list[tuple[int, int]] = []
        for action in actions:
            if action == "push":
                send.push_or_drop(pushed)
                pushed += 1
            elif action == "extra":
                assert send.push(pushed, extra=True)
                pushed += 1
            else:
                take()
            assert stream.statistics().current_buffer_used <= buffer + actions.count("extra")
            assert stream.statistics().received == len(taken)
        newest = pushed - 1
        while take():
            pass
        assert taken == sorted(set(taken))
        assert len(taken) + send.dropped == pushed
        assert reported == (send.dropped if overflow in ("raise", "block") else 0)
        if overflow == "drop_oldest" and taken:
            assert taken[-1] == newest
        assert figures(stream) == (0, 0, len(taken), send.dropped)
        stream.close()


class TestBytes:
    def test_buffer_is_limited_to_8_mib(self, make: MakeStream) -> None:
        send, stream = make(buffer=1000)
        # A message weighs its payload, its channel and 128 bytes.
        half = EmitterMessage("a/", bytes(MAX_BYTES // 2 - len("a/") - 128))
        assert MAX_BYTES == 8 * 1024 * 1024
        assert send.push(half)
        assert send.push(half)
        assert figures(stream) == (2, MAX_BYTES, 0, 0)
        assert not send.push(EmitterMessage("a/", b""))
        assert stream.receive_nowait() is half
        assert figures(stream) == (1, MAX_BYTES // 2, 1, 0)
        assert send.push(EmitterMessage("a/", b""))

    def test_drop_oldest_drops_until_there_is_space(self, make: MakeStream) -> None:
        send, stream = make(buffer=1000, overflow="drop_oldest")
        small = [EmitterMessage("a/", b"x") for _ in range(3)]
        big = EmitterMessage("a/", bytes(MAX_BYTES))
        fill(send, *small, big)
        last = EmitterMessage("a/", b"last")
        fill(send, last)
        assert read(stream) == [last]
        assert send.dropped == 4

    def test_empty_message_has_a_weight(self, make: MakeStream) -> None:
        send, stream = make(buffer=10**6)
        taken = send.push_many([EmitterMessage("a/", b"")] * 10**5)
        assert taken == -(-MAX_BYTES // 130)
        assert stream.statistics().buffered_bytes == 130 * taken

    def test_other_items_weigh_128_bytes(self, make: MakeStream) -> None:
        _send, stream = filled(make(), "text", EmitterMessage("a/", b"x"))
        assert figures(stream) == (2, 2 * 128 + 3, 0, 0)

    def test_presence_event_weighs_its_members(self, make: MakeStream) -> None:
        who = (Member("id", "ann"), Member("id", None))
        event = PresenceEvent(datetime.now(UTC), "subscribe", "a/", who)
        assert figures(filled(make(), event)[1]) == (1, 3 * 128 + 7, 0, 0)

    def test_items_put_in_front_do_not_use_the_buffers_bytes(self, make: MakeStream) -> None:
        send, stream = make(buffer=1000)
        big = EmitterMessage("a/", bytes(MAX_BYTES))
        send.put_in_front([big])
        assert send.push(big)
        assert not send.push(EmitterMessage("a/", b""))
        assert stream.receive_nowait() is big
        assert not send.push(EmitterMessage("a/", b""))
        assert stream.receive_nowait() is big
        assert send.push(EmitterMessage("a/", b""))


class TestExtraItems:
    def test_extra_items_do_not_use_the_buffer(self, make: MakeStream) -> None:
        send, stream = make(buffer=2)
        for number in range(5):
            assert send.push(number, extra=True)
        assert send.push(5)
        assert send.push(6)
        assert not send.push(7)
        assert stream.statistics().current_buffer_used == 7
        assert read(stream) == list(range(7))

    def test_buffer_has_its_size_after_extra_items_are_read(self, make: MakeStream) -> None:
        send, stream = make(buffer=2)
        for number in range(3):
            send.push(number, extra=True)
        assert read(stream) == [0, 1, 2]
        assert [send.push(number) for number in range(3)] == [True, True, False]

    def test_extra_item_is_accepted_by_a_full_buffer(self, make: MakeStream) -> None:
        send, _stream = filled(make(buffer=1), 1)
        assert send.push(2, extra=True)
        assert not send.push(3)

    @pytest.mark.parametrize("count", [3, 5000])
    def test_one_overflow_drops_one_extra_item(self, make: MakeStream, count: int) -> None:
        send, stream = make(buffer=1, overflow="drop_oldest")
        for number in range(count):
            send.push(number, extra=True)
        fill(send, "one", "two")
        assert send.dropped == 1
        assert read(stream) == [*range(1, count), "one", "two"]


class TestPutInFront:
    def test_items_come_before_buffered_ones(self, make: MakeStream) -> None:
        send, stream = filled(make(), 1, 2, 3)
        send.put_in_front(["a", "b"])
        assert stream.statistics().current_buffer_used == 5
        assert not send.push(4), "an item was pushed into a full buffer"
        assert read(stream) == ["a", "b", 1, 2, 3]

    def test_no_items(self, make: MakeStream) -> None:
        send, stream = filled(make(), 1)
        send.put_in_front([])
        assert read(stream) == [1]

    def test_gap_keeps_its_place(self, make: MakeStream) -> None:
        send, stream = filled(make(buffer=1), 1, 2)
        send.put_in_front(["a"])
        fill(send, 3)
        assert read(stream) == ["a", 1, "2 missing"]

    def test_put_in_front_of_an_ended_stream_does_nothing(self, make: MakeStream) -> None:
        send, stream = filled(make(), 1)
        send.end()
        send.put_in_front(["a"])
        assert read(stream) == [1]
        stream.close()
        send.put_in_front(["a"])

    async def test_put_in_front_wakes_a_receiver(self, make: MakeStream) -> None:
        send, stream = make()
        received = []

        async def receive() -> None:
            received.append(await stream.receive())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive)
            await anyio.wait_all_tasks_blocked()
            send.put_in_front(["a"])
        assert received == ["a"]


@pytest.mark.parametrize("weight", [None, 3 + len("a/") + 128])
def test_given_weight_counts_like_a_computed_one(make: MakeStream, weight: int | None) -> None:
    send, stream = make(buffer=2)
    assert send.push_many([EmitterMessage("a/", b"one")] * 3, weight) == 2
    assert stream.statistics().buffered_bytes == 2 * 133
    assert len(read(stream)) == 2
    assert stream.statistics().buffered_bytes == 0


class TestWaitForSpace:
    async def test_returns_immediately_when_there_is_space(self, make: MakeStream) -> None:
        send, _stream = make(overflow="block")
        with anyio.CancelScope() as scope:
            scope.cancel()
            await send.wait_for_space()  # would be cancelled if it waited
            assert not send.blocks
        assert not scope.cancelled_caught

    @pytest.mark.parametrize("pauses", [0, 1, 2])
    @pytest.mark.parametrize("overflow", get_args(Overflow))
    async def test_busy_consumer_loses_nothing(
        self, make: MakeStream, overflow: Overflow, pauses: int
    ) -> None:
        send, stream = make(buffer=5, overflow=overflow)
        received = []

        async def consume() -> None:
            async for item in stream:
                received.append(item)
                for _ in range(pauses):
                    await checkpoint()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(consume)
            for number in range(500):
                if not send.push(number):
                    await send.wait_for_space()
                    send.push_or_drop(number)
            send.end()
        assert received == list(range(500))
        assert send.dropped == 0

    @pytest.mark.parametrize("overflow", ["raise", "drop_oldest", "drop_newest"])
    async def test_consumer_that_awaits_something_else_delays_no_other(
        self, make: MakeStream, overflow: Overflow
    ) -> None:
        send, stream = filled(make(overflow=overflow), 1, 2, 3)
        assert not send.blocks
        await send.wait_for_space()
        with anyio.CancelScope() as scope:
            scope.cancel()
            # A consumer that did not receive in its turns gets no more of them.
            await send.wait_for_space()
        assert not scope.cancelled_caught
        stream.receive_nowait()
        fill(send, 4)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await send.wait_for_space()
        assert scope.cancelled_caught, "a consumer that receives again gets its turns again"

    @pytest.mark.parametrize(
        "take", [EventStream.receive_nowait, EventStream.receive, EventStream.__anext__]
    )
    async def test_block_waits_until_the_consumer_receives(
        self, make: MakeStream, take: Callable[[EventStream[int]], Any]
    ) -> None:
        send, stream = filled(make(overflow="block"), 1, 2, 3)
        assert send.blocks
        done = []

        async def wait(name: str) -> None:
            await send.wait_for_space()
            done.append(name)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait, "reader")
            tasks.start_soon(wait, "another")
            await anyio.wait_all_tasks_blocked()
            assert done == []
            taken = take(stream)
            assert (await taken if inspect.isawaitable(taken) else taken) == 1
        assert sorted(done) == ["another", "reader"]
        assert not send.blocks

    @pytest.mark.parametrize("take", [EventStream.receive, EventStream.__anext__])
    async def test_receiver_that_yields_first_makes_space_afterwards(
        self, make: MakeStream, take: Callable[[EventStream[int]], Any]
    ) -> None:
        send, stream = make(buffer=2, overflow="block")
        for number in range(64):
            fill(send, number)
            await take(stream)
        fill(send, 64, 65)
        await use_up_turns(send)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send.wait_for_space)
            await anyio.wait_all_tasks_blocked()
            assert stream.statistics().tasks_waiting_send == 1
            tasks.start_soon(take, stream)
        assert not send.blocks
        assert stream.statistics().tasks_waiting_send == 0

    async def test_sender_that_finds_the_space_taken_waits_again(self, make: MakeStream) -> None:
        send, stream = filled(make(buffer=1, overflow="block"), 1)
        done = []

        async def put(item: int) -> None:
            await send.wait_for_space()
            assert send.push(item)
            done.append(item)

        async with anyio.create_task_group() as tasks:
            for item in (2, 3):
                tasks.start_soon(put, item)
            await anyio.wait_all_tasks_blocked()
            assert stream.receive_nowait() == 1
            await anyio.wait_all_tasks_blocked()
            assert len(done) == 1
            assert stream.receive_nowait() == done[0]
        assert sorted(done) == [2, 3]
        assert stream.receive_nowait() == done[1]

    @pytest.mark.parametrize("end", ["end", "close"])
    async def test_end_releases_waiting_senders(self, make: MakeStream, end: str) -> None:
        send, stream = filled(make(overflow="block"), 1, 2, 3)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send.wait_for_space)
            await anyio.wait_all_tasks_blocked()
            (send.end if end == "end" else stream.close)()
        assert not send.blocks
        assert send.push(4), "items after the end are discarded"

    async def test_waiting_can_be_cancelled(self, make: MakeStream) -> None:
        send, stream = filled(make(overflow="block"), 1, 2, 3)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send.wait_for_space)
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        assert read(stream) == [1, 2, 3]
        fill(send, 4, 5, 6)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send.wait_for_space)
            await anyio.wait_all_tasks_blocked()
            stream.receive_nowait()


class TestEnd:
    async def test_end_of_stream_comes_after_buffered_items(self, make: MakeStream) -> None:
        send, stream = filled(make(), 1, 2, 3, 4)
        send.end()
        assert send.push(5)
        assert [await stream.receive() for _ in range(3)] == [1, 2, 3]
        with pytest.raises(SlowConsumerError):
            await stream.receive()
        for _ in range(2):
            with pytest.raises(EndOfStream):
                await stream.receive()
            with pytest.raises(EndOfStream):
                stream.receive_nowait()

    async def test_final_error_comes_after_buffered_items(self, make: MakeStream) -> None:
        send, stream = filled(make(), 1)
        send.end(lambda: ConnectionLostError("gone"))
        send.end(ZeroDivisionError)
        assert await stream.receive() == 1
        caught = []
        for _ in range(2):
            with pytest.raises(ConnectionLostError, match="gone") as info:
                await stream.receive()
            caught.append(info.value)
        assert caught[0] is not caught[1], "the same error object was raised twice"
        assert caught[0].__context__ is None

    @pytest.mark.parametrize("error", [None, lambda: ConnectionLostError("gone")])
    async def test_end_wakes_all_receivers(self, make: MakeStream, error: Any) -> None:
        send, stream = make()
        ended = []

        async def receive() -> None:
            with pytest.raises((EndOfStream, ConnectionLostError)) as caught:
                await stream.receive()
            ended.append(caught.type)

        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(receive)
            await anyio.wait_all_tasks_blocked()
            send.end(error)
        assert ended == [EndOfStream if error is None else ConnectionLostError] * 3

    async def test_end_comes_after_items_that_waiting_receivers_take(
        self, make: MakeStream
    ) -> None:
        send, stream = make()
        taken: list[object] = []

        async def receive() -> None:
            taken.append(await stream.receive())

        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(receive)
            await anyio.wait_all_tasks_blocked()
            send.push_many([1, 2])
            send.end()
        assert sorted(map(str, taken)) == ["1", "2"]


class TestClosing:
    """Closing an end, and the effect on its clones and on the client."""

    @pytest.mark.parametrize("method", ["close", "aclose", "with", "async with"])
    async def test_closed_end_raises(self, make: MakeStream, method: str) -> None:
        _, stream = filled(make(), 1, 2)
        with anyio.CancelScope() as scope:
            scope.cancel()
            if method == "close":
                stream.close()
            elif method == "aclose":
                await stream.aclose()
            elif method == "with":
                with stream as entered:
                    assert entered is stream
            else:
                async with stream as entered:
                    assert entered is stream
            stream.close()
        assert not scope.cancelled_caught, "closing waited"
        for _ in range(2):
            with pytest.raises(ClosedResourceError, match=r"subscribe\('a/'\).*closed"):
                await stream.receive()
            with pytest.raises(ClosedResourceError):
                stream.receive_nowait()
            with pytest.raises(ClosedResourceError):
                await anext(stream)
            with pytest.raises(ClosedResourceError):
                stream.clone()

    @pytest.mark.parametrize("clones", [0, 1])
    async def test_task_waiting_in_a_closed_end_raises(self, make: MakeStream, clones: int) -> None:
        send, stream = make()
        others = [stream.clone() for _ in range(clones)]
        raised = []

        async def receive() -> None:
            with pytest.raises(ClosedResourceError):
                await stream.receive()
            raised.append(stream)

        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(receive)
            await anyio.wait_all_tasks_blocked()
            stream.close()
        assert len(raised) == 2
        send.push(1)
        for other in others:
            assert other.receive_nowait() == 1
            other.close()

    async def test_task_yielding_in_a_closed_end_raises(self, make: MakeStream) -> None:
        _, stream = filled(make(buffer=100), *range(100))
        clone = stream.clone()
        for _ in range(64):
            await stream.receive()

        async def receive() -> None:
            with pytest.raises(ClosedResourceError):
                await stream.receive()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive)
            tasks.start_soon(stream.aclose)
        assert read(clone) == list(range(64, 100))
        clone.close()

    async def test_clones_get_buffered_and_later_items(self, make: MakeStream) -> None:
        send, stream = filled(make(), 1, 2)
        clone = stream.clone()
        other = clone.clone()
        stream.close()
        fill(send, 3)
        assert [await clone.receive(), other.receive_nowait()] == [1, 2]
        clone.close()
        send.end()
        assert [item async for item in other] == [3]
        with pytest.raises(EndOfStream):
            await other.receive()
        other.close()

    async def test_item_for_a_closed_end_goes_to_a_clone(self, make: MakeStream) -> None:
        """The end is closed in the turn in which the item arrives for it."""
        send, stream = make()
        clone = stream.clone()
        received = []

        async def receive(end: EventStream[Any]) -> None:
            with suppress(ClosedResourceError):
                received.append(await end.receive())

        async with anyio.create_task_group() as tasks:
            for end in (stream, clone):
                tasks.start_soon(receive, end)
                await anyio.wait_all_tasks_blocked()
            send.push("item")
            stream.close()
        assert received == ["item"]
        clone.close()

    async def test_slow_consumer_error_goes_to_the_end_that_receives_next(
        self, make: MakeStream
    ) -> None:
        _, stream = filled(make(buffer=1), 1, 2)
        with stream.clone() as clone:
            assert stream.receive_nowait() == 1
            with pytest.raises(SlowConsumerError):
                clone.receive_nowait()
            with pytest.raises(WouldBlock):
                stream.receive_nowait()

    async def test_final_error_is_raised_at_every_end_each_time(self, make: MakeStream) -> None:
        send, stream = filled(make(), 1)
        send.end(lambda: ConnectionLostError("gone"))
        with stream.clone() as clone:
            assert clone.receive_nowait() == 1
            for end in (stream, clone) * 2:
                with pytest.raises(ConnectionLostError):
                    await end.receive()
                with pytest.raises(ConnectionLostError):
                    end.receive_nowait()
                with pytest.raises(ConnectionLostError):
                    await anext(end)

    def test_closing_the_last_end_calls_back_once(self) -> None:
        unread = []

        def left(send: Sender[Any]) -> None:
            assert send.ended
            unread.append(send.drain())

        send: Sender[Any] = Sender("x", 3, "raise", left)
        stream = EventStream[Any](send)
        clone = stream.clone()
        fill(send, 1, 2, 3, 4)
        stream.close()
        assert unread == []
        assert send.drain() == [], "a clone could still receive the items"
        clone.close()
        send.leave()
        assert unread == [[1, 2, 3]]

    def test_leaving_keeps_buffered_items_for_clones(self) -> None:
        unread = []
        send: Sender[Any] = Sender("x", 3, "raise", lambda send: unread.append(send.drain()))
        with EventStream[Any](send) as stream:
            clone = stream.clone()
            fill(send, 1)
        send.leave()
        assert unread == [[]]
        assert clone.receive_nowait() == 1
        with pytest.raises(EndOfStream):
            clone.receive_nowait()
        clone.close()

    def test_left_stream_keeps_nothing(self, make: MakeStream) -> None:
        send, stream = filled(make(), 1, EmitterMessage("a/", b"xy"), 3, 4)
        assert figures(stream) == (3, 3 * 128 + len("a/xy"), 0, 1)
        stream.close()
        assert send.push(3)
        fill(send, 4)
        send.put_in_front([5])
        assert figures(stream) == (0, 0, 0, 1)
        assert repr(stream) == "<EventStream subscribe('a/'), closed, 0 buffered>"

    def test_unclosed_end_warns(self) -> None:
        send: Sender[Any] = Sender("x", 3, "raise")
        stream = EventStream[Any](send)
        with pytest.warns(ResourceWarning, match="unclosed.*EventStream x, open"):
            del stream


class TestDecode:
    async def test_items_are_decoded_when_received(self, make: MakeStream) -> None:
        decoded = []

        def decode(item: int) -> str:
            decoded.append(item)
            return str(item)

        send, stream = filled(make(decode=decode), 1, 2, 3, 4)
        assert decoded == [], "decoded too early"
        assert [await stream.receive(), stream.receive_nowait(), await anext(stream)] == [*"123"]
        with pytest.raises(SlowConsumerError):
            await stream.receive()
        fill(send, 5)
        with stream.clone() as clone:
            assert await clone.receive() == "5"

    async def test_what_decode_raises_is_raised_in_the_place_of_the_item(
        self, make: MakeStream
    ) -> None:
        _, stream = filled(make(decode=lambda item: 6 // item), 1, 0, 2)
        assert await stream.receive() == 6
        with pytest.raises(ZeroDivisionError):
            await stream.receive()
        assert await stream.receive() == 3

    async def test_a_skipped_item_is_not_received(self, make: MakeStream) -> None:
        send, stream = make(buffer=9, decode=lambda item: item if item % 2 else SKIPPED)
        fill(send, 0, 1, 2, 3, 4, 5, 6)
        assert await stream.receive() == 1
        assert stream.receive_nowait() == 3
        assert await anext(stream) == 5
        with pytest.raises(anyio.WouldBlock):
            stream.receive_nowait()
        async with anyio.create_task_group() as tasks:
            for receive in (stream.receive, stream.__anext__):
                tasks.start_soon(receive)
                await anyio.wait_all_tasks_blocked()
                fill(send, 8)
                await anyio.wait_all_tasks_blocked()
                assert stream.statistics().tasks_waiting_receive == 1
                fill(send, 9)
                await anyio.wait_all_tasks_blocked()
        fill(send, 10)
        send.end()
        with pytest.raises(anyio.EndOfStream):
            stream.receive_nowait()


class TestStatistics:
    def test_first_fields_are_those_of_anyio(self) -> None:
        send, receive = anyio.create_memory_object_stream[int](3)
        with send, receive:
            names = receive.statistics()._fields
        assert tuple(field.name for field in fields(StreamStatistics))[: len(names)] == names

    async def test_statistics_of_an_open_and_an_ended_stream(self, make: MakeStream) -> None:
        send, stream = filled(make(buffer=2), 1, 2, 3)
        stream.receive_nowait()
        send.note_gap()
        send.note_undecoded()
        with stream.clone() as clone:
            since = stream.statistics().waiting_since
            expected = StreamStatistics(1, 2, 1, 2, 0, 0, 128, 1, 1, 1, 2, since, 1)
            assert stream.statistics() == clone.statistics() == expected
            send.end()
            assert clone.statistics() == replace(expected, open_send_streams=0)

    async def test_statistics_count_waiting_tasks(self, make: MakeStream) -> None:
        _, stream = make()
        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(stream.receive)
            await anyio.wait_all_tasks_blocked()
            assert stream.statistics().tasks_waiting_receive == 2
            tasks.cancel_scope.cancel()
        assert stream.statistics().tasks_waiting_receive == 0

    def test_peak_counts_items_that_were_buffered_together(self, make: MakeStream) -> None:
        send, stream = make(buffer=4)
        peaks = [stream.statistics().peak]
        for count in (1, 2, 1):
            send.push_many(list(range(count)))
            peaks.append(stream.statistics().peak)
            read(stream)
        fill(send, *range(6))
        peaks.append(stream.statistics().peak)
        read(stream)
        assert [*peaks, stream.statistics().peak] == [0, 1, 2, 2, 4, 4]

    def test_peak_counts_items_that_need_no_space(self, make: MakeStream) -> None:
        send, stream = filled(make(buffer=2), 1, 2)
        assert send.push(3, extra=True)
        assert stream.statistics().peak == 3
        send.put_in_front([-1, 0])
        assert stream.statistics().peak == 5
        send.hold()
        read(stream)
        fill(send, 10, 11)
        send.put_ahead([7, 8, 9, 9])
        assert stream.statistics().peak == 6
        send.release()
        assert stream.statistics().peak == stream.statistics().current_buffer_used == 6

    @pytest.mark.parametrize("overflow", ["raise", "drop_oldest", "drop_newest"])
    def test_peak_does_not_count_dropped_items(self, make: MakeStream, overflow: Overflow) -> None:
        _, stream = filled(make(2, overflow), 1, 2, 3, 4)
        assert stream.statistics().peak == 2

    def test_waiting_since_is_the_time_of_the_next_item(
        self, make: MakeStream, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def since() -> float | None:
            moment = stream.statistics().waiting_since
            assert moment is None or moment.tzinfo is UTC
            return None if moment is None else moment.timestamp()

        now = 0.0
        monkeypatch.setattr("emitter_anyio._streams.queue.time", lambda: now)
        send, stream = make(buffer=5)
        assert since() is None
        for now in (10.0, 20.0):
            send.push_many([now, now])
        now = 30.0
        send.push(now)
        times = [since()]
        while stream.statistics().current_buffer_used:
            stream.receive_nowait()
            times.append(since())
        assert times == [10, 10, 20, 20, 30, None]
        send.push(0)
        now = 40.0
        send.put_in_front([now])
        assert since() == 40
        stream.receive_nowait()
        assert since() == 30

    def test_waiting_since_ignores_items_that_are_held_back(self, make: MakeStream) -> None:
        send, stream = make()
        send.hold()
        send.push(1)
        assert stream.statistics().waiting_since is None
        send.release()
        assert stream.statistics().waiting_since is not None

    def test_public_methods_are_those_of_anyio(self) -> None:
        names = {name for name in dir(EventStream) if not name.startswith("_")}
        theirs = {name for name in dir(MemoryObjectReceiveStream) if not name.startswith("_")}
        assert names == theirs


class TestEntering:
    async def test_block_can_be_entered_once(self) -> None:
        created = []

        @asynccontextmanager
        async def make() -> AsyncGenerator[str]:
            created.append("in")
            yield "value"
            created.append("out")

        entering = Entering(Owner(), make)
        assert created == [], "the block started too early"
        async with entering as value:
            assert value == "value"
            assert created == ["in"]
        assert created == ["in", "out"]
        with pytest.raises(RuntimeError, match="cannot enter this object twice"):
            async with entering:
                created.append("never")
        assert created == ["in", "out"]

    async def test_exceptions_propagate(self) -> None:
        decoded = []

        @asynccontextmanager
        async def make() -> AsyncGenerator[None]:
            try:
                yield
            except ZeroDivisionError as exc:
                decoded.append(exc)
                raise

        boom = ZeroDivisionError()
        with pytest.raises(ZeroDivisionError) as caught:
            async with Entering(Owner(), make):
                raise boom
        assert caught.value is boom
        assert decoded == [boom]


class TestReprAndOptions:
    def test_repr(self, make: MakeStream) -> None:
        send, stream = filled(make(), 1, 2)
        assert repr(stream) == "<EventStream subscribe('a/'), open, 2 buffered>"
        send.end()
        assert repr(stream) == "<EventStream subscribe('a/'), ended, 2 buffered>"

    @pytest.mark.parametrize("overflow", get_args(Overflow))
    def test_valid_buffers(self, overflow: Overflow) -> None:
        check_buffer(1, overflow)
        check_buffer(10**9, overflow)

    @pytest.mark.parametrize(
        ("buffer", "overflow", "error", "pattern"),
        [
            (0, "raise", ValueError, "buffer.*at least 1.* 0"),
            (-1, "raise", ValueError, "buffer.*-1"),
            (1.0, "raise", TypeError, "buffer.*float"),
            (True, "raise", TypeError, "buffer.*bool"),
            (None, "raise", TypeError, "buffer.*NoneType"),
            (1, "drop", ValueError, "overflow.*'raise'.*'block'.*'drop'"),
            (1, None, ValueError, "overflow.*None"),
        ],
    )
    def test_invalid_buffers(
        self, buffer: Any, overflow: Any, error: type[Exception], pattern: str
    ) -> None:
        with pytest.raises(error, match=pattern):
            check_buffer(buffer, overflow)


def test_items_held_twice_wait_for_both_releases(make: MakeStream) -> None:
    send, stream = make()
    send.hold()
    send.hold()
    send.push("item")
    send.release()
    assert read(stream) == []
    send.release()
    assert read(stream) == ["item"]


def test_message_weighs_the_same_among_other_items(make: MakeStream) -> None:
    message = EmitterMessage("a/", b"xyz")
    send, stream = make()
    send.push_many([message, Gap("a/"), message])
    assert figures(stream) == (3, 3 * ITEM_OVERHEAD_BYTES + 2 * 5, 0, 0)
    assert weight_of(message) == ITEM_OVERHEAD_BYTES + 5


def test_held_item_is_replaced_by_identity(make: MakeStream) -> None:
    send, stream = make()
    gap, equal, new = Gap("a/"), Gap("a/"), Gap("a/", 1)
    send.hold()
    fill(send, gap, equal, gap)
    send.replace_held(gap, new)
    send.release()
    assert list(map(id, read(stream))) == list(map(id, (new, equal, new)))


def test_held_items_use_buffer_space(make: MakeStream) -> None:
    send, stream = filled(make(buffer=3), 0)
    send.hold()
    assert send.push_many([EmitterMessage("a/", b"x")] * 3, 131) == 2
    fill(send, 4, 5)
    assert figures(stream) == (3, 128 + 2 * 131, 0, 2)
    assert read(stream) == [0]
    send.put_ahead([1])
    send.put_ahead([])
    send.release()
    assert [type(item) for item in read(stream)] == [int, EmitterMessage, EmitterMessage, str]


def test_oldest_held_items_are_dropped(make: MakeStream) -> None:
    send, stream = make(buffer=2, overflow="drop_oldest")
    send.hold()
    fill(send, EmitterMessage("a/", b"x"), 2, 3)
    assert figures(stream) == (2, 256, 0, 1)
    send.end()
    assert read(stream) == [2, 3]


def test_buffered_bytes_stay_correct(make: MakeStream) -> None:
    send, stream = make(buffer=100)
    sent = [EmitterMessage("a/", bytes(n)) for n in range(12)]
    weights = list(map(weight_of, sent))
    send.push_many(sent[4:8])
    assert [stream.receive_nowait(), stream.receive_nowait()] == sent[4:6]
    send.put_in_front(sent[2:4])
    assert stream.receive_nowait() is sent[2]
    send.put_in_front(sent[:2])
    send.push_many(sent[8:10])
    send.push(sent[10])
    left = [0, 1, 3, 6, 7, 8, 9, 10]
    while left:
        assert stream.statistics().buffered_bytes == sum(weights[n] for n in left)
        assert stream.receive_nowait() is sent[left.pop(0)]
    assert stream.statistics().buffered_bytes == 0


def test_receiver_without_a_buffer_is_never_full() -> None:
    class CountingReceiver(Receiver[int]):
        def __init__(self) -> None:
            self.count = 0

        def push(self, item: int, *, extra: bool = False) -> bool:
            self.count += 1
            return True

    receiver = CountingReceiver()
    assert receiver.push_many([1, 2, 3]) == 3
    receiver.push_or_drop(4)
    receiver.note_gap()
    receiver.end()
    assert (receiver.count, receiver.dropped) == (4, 0)
    assert len({receiver, receiver}) == 1
