from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, get_args

import anyio
import pytest
import sniffio
from anyio import EndOfStream, WouldBlock
from anyio.abc import ObjectReceiveStream
from anyio.lowlevel import checkpoint
from hypothesis import given
from hypothesis import strategies as st

from emitter_anyio._backend import Owner
from emitter_anyio._buffer import MAX_BYTES, Overflow, check_buffer, weight_of
from emitter_anyio._errors import ConnectionLostError, SlowConsumerError
from emitter_anyio._messages import ITEM_BYTES, EmitterMessage, Gap
from emitter_anyio._requests import Member, PresenceEvent
from emitter_anyio._subscription import Entering, EventStream, StreamStatistics

MakeStream = Callable[..., EventStream[Any]]


@pytest.fixture
def make() -> Iterator[MakeStream]:
    """Makes streams, and closes them behind the test."""
    made: list[EventStream[Any]] = []

    def make(buffer: int = 3, overflow: Overflow = "raise") -> EventStream[Any]:
        made.append(EventStream("subscribe('a/')", buffer, overflow))
        return made[-1]

    yield make
    for stream in made:
        stream.close()


def fill(stream: EventStream[Any], *items: object) -> EventStream[Any]:
    """Put items in, and do as the policy says with those that have no room."""
    for item in items:
        stream.push_or_drop(item)
    return stream


def read(stream: EventStream[Any]) -> list[object]:
    """Take out all that can be taken; a gap shows as the text of its size."""
    items: list[object] = []
    while True:
        try:
            items.append(stream.receive_nowait())
        except SlowConsumerError as exc:
            items.append(f"{exc.dropped} missing")
        except (WouldBlock, EndOfStream):
            return items


async def give_up_turns(stream: EventStream[Any]) -> None:
    """Have it wait for its consumer, so that from now on it gives it no turns before it waits."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stream.make_room)
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()


async def cancel_when_blocked(scope: anyio.CancelScope) -> None:
    await anyio.wait_all_tasks_blocked()
    scope.cancel()


def figures(buffered: int, buffered_bytes: int, received: int, dropped: int) -> StreamStatistics:
    return StreamStatistics(buffered, buffered_bytes, received, dropped, 0)


class TestReceiving:
    async def test_what_is_buffered(self, make: MakeStream) -> None:
        stream = fill(make(), 1, 2, 3)
        assert [await stream.receive() for _ in range(3)] == [1, 2, 3]

    def test_nothing_is_there_yet(self, make: MakeStream) -> None:
        with pytest.raises(WouldBlock):
            make().receive_nowait()

    async def test_it_waits_for_what_comes(self, make: MakeStream) -> None:
        stream = make()
        got = []

        async def receive() -> None:
            got.append(await stream.receive())
            got.append(await stream.receive())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive)
            await anyio.wait_all_tasks_blocked()
            assert got == []
            stream.push("first")
            await anyio.wait_all_tasks_blocked()
            assert got == ["first"]
            stream.push("second")
        assert got == ["first", "second"]

    async def test_it_is_an_object_stream_and_an_iterator(self, make: MakeStream) -> None:
        stream = fill(make(), 1, 2, 3)
        stream.end()
        assert isinstance(stream, ObjectReceiveStream)
        assert [item async for item in stream] == [1, 2, 3]

    async def test_several_tasks_share_one_stream(self, make: MakeStream) -> None:
        stream = make(buffer=1000)
        got: dict[str, list[int]] = {"a": [], "b": [], "c": []}

        async def receive(name: str) -> None:
            async for item in stream:
                got[name].append(item)
                await checkpoint()

        async with anyio.create_task_group() as tasks:
            for name in got:
                tasks.start_soon(receive, name)
            await anyio.wait_all_tasks_blocked()
            for number in range(300):
                stream.push(number)
                if number % 7 == 0:
                    await checkpoint()
            stream.end()
        assert sorted(item for items in got.values() for item in items) == list(range(300))
        assert all(items == sorted(items) for items in got.values())
        assert all(got.values()), "each of them got something"

    @pytest.mark.parametrize("count", [1, 2])
    async def test_one_item_wakes_those_who_wait_and_one_gets_it(
        self, make: MakeStream, count: int
    ) -> None:
        stream = make()
        got = []

        async def receive() -> None:
            got.append(await stream.receive())

        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(receive)
            await anyio.wait_all_tasks_blocked()
            fill(stream, *range(count))
            await anyio.wait_all_tasks_blocked()
            assert sorted(got) == list(range(count))
            tasks.cancel_scope.cancel()

    async def test_it_yields_at_least_at_every_64th_item(self, make: MakeStream) -> None:
        stream = fill(make(buffer=1000), *range(1000))
        stream.end()
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await checkpoint()

        got: list[int] = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(other)
            got += [item async for item in stream]
            tasks.cancel_scope.cancel()
        assert len(got) == 1000
        # Trio runs those who are ready in any order: the last turn may come too late.
        assert turns >= 1000 // 64 - 1

    async def test_it_may_be_cancelled_at_least_at_every_64th_item(self, make: MakeStream) -> None:
        stream = fill(make(buffer=1000), *range(1000))
        got = []
        with anyio.CancelScope() as scope:
            scope.cancel()
            async for item in stream:
                got.append(item)  # noqa: PERF401 - a list that is cancelled leaves nothing
        assert len(got) < 64
        assert read(stream) == list(range(len(got), 1000)), "nothing is lost"


class TestCancelling:
    """An item stays in the stream until its receiver runs."""

    @pytest.mark.parametrize("order", ["item, cancel", "cancel, item"])
    @pytest.mark.parametrize("natively", [False, True])
    async def test_in_the_turn_in_which_an_item_comes(
        self, make: MakeStream, order: str, natively: bool
    ) -> None:
        stream = make()
        got = []

        async def receive() -> None:
            got.append(await stream.receive())

        def put() -> None:
            stream.push("item")

        scope = anyio.CancelScope()

        async def in_scope() -> None:
            with scope:
                await receive()

        async with anyio.create_task_group() as tasks:
            if natively and sniffio.current_async_library() == "asyncio":
                cancel: Callable[[], object] = asyncio.ensure_future(receive()).cancel
            else:  # on Trio there are only scopes
                tasks.start_soon(in_scope)
                cancel = scope.cancel
            await anyio.wait_all_tasks_blocked()
            for act in (put, cancel) if order == "item, cancel" else (cancel, put):
                act()
            await anyio.wait_all_tasks_blocked()
        assert got + read(stream) == ["item"]

    @pytest.mark.parametrize("turns", range(4))
    async def test_some_turns_after_it_came(self, make: MakeStream, turns: int) -> None:
        stream = make()
        got = []
        async with anyio.create_task_group() as tasks:

            async def receive() -> None:
                got.append(await stream.receive())

            tasks.start_soon(receive)
            await anyio.wait_all_tasks_blocked()
            stream.push("item")
            for _ in range(turns):
                await checkpoint()
            tasks.cancel_scope.cancel()
        assert got + read(stream) == ["item"]

    @pytest.mark.parametrize("turns", range(4))
    async def test_natively_some_turns_after_it_came(self, make: MakeStream, turns: int) -> None:
        if sniffio.current_async_library() != "asyncio":
            return  # Trio has no other cancellation than that of scopes
        stream = make()
        task = asyncio.ensure_future(stream.receive())
        await anyio.wait_all_tasks_blocked()
        stream.push("item")
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        got = [] if task.cancelled() else [task.result()]
        assert got + read(stream) == ["item"]

    async def test_one_who_gives_up_wakes_no_other_and_leaves_nothing(
        self, make: MakeStream
    ) -> None:
        stream = make()
        got = []

        async def patient() -> None:
            got.append(await stream.receive())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(patient)
            await anyio.wait_all_tasks_blocked()
            for _ in range(3):
                with anyio.CancelScope() as scope:
                    tasks.start_soon(cancel_when_blocked, scope)
                    await stream.receive()
            assert got == []
            assert len(stream._arrivals) == 1
            stream.push("item")
        assert got == ["item"]
        assert stream._arrivals == []

    async def test_another_receiver_gets_what_the_cancelled_one_did_not(
        self, make: MakeStream
    ) -> None:
        stream = make()
        got = []
        scope = anyio.CancelScope()

        async def cancelled() -> None:
            with scope:
                got.append(await stream.receive())

        async def patient() -> None:
            got.append(await stream.receive())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(cancelled)
            await anyio.wait_all_tasks_blocked()
            tasks.start_soon(patient)
            await anyio.wait_all_tasks_blocked()
            stream.push("item")
            scope.cancel()
            with anyio.CancelScope(shield=True):
                await anyio.wait_all_tasks_blocked()
            # Had the first one got it after all, the second one would wait for the next.
            stream.push("next")
        assert got[0] == "item"
        assert len(got) + len(read(stream)) == 2


class TestOverflow:
    @pytest.mark.parametrize(
        ("overflow", "left"),
        [
            ("raise", [1, 2, 3, "2 missing"]),
            ("drop_newest", [1, 2, 3]),
            ("drop_oldest", [3, 4, 5]),
            # Where nobody waits.
            ("block", [1, 2, 3, "2 missing"]),
        ],
    )
    def test_by_policy(self, make: MakeStream, overflow: Overflow, left: list[object]) -> None:
        stream = fill(make(overflow=overflow), 1, 2, 3, 4, 5)
        assert stream.dropped == stream.statistics().dropped == 2
        assert read(stream) == left
        received = sum(isinstance(item, int) for item in left)
        assert stream.statistics() == figures(0, 0, received, 2)

    def test_push_says_whether_there_was_room(self, make: MakeStream) -> None:
        stream = make(buffer=2)
        assert [stream.push(number) for number in range(3)] == [True, True, False]
        assert read(stream) == [0, 1]

    def test_a_gap_is_where_the_messages_are_missing(self, make: MakeStream) -> None:
        stream = fill(make(buffer=2), 1, 2, 3)
        assert stream.receive_nowait() == 1
        fill(stream, 4)
        assert stream.receive_nowait() == 2
        with pytest.raises(SlowConsumerError) as caught:
            stream.receive_nowait()
        assert caught.value.dropped == 1
        assert "subscribe('a/')" in str(caught.value)
        assert "buffer of 2" in str(caught.value)
        fill(stream, 5, 6, 7)
        assert read(stream) == [4, 5, "2 missing"]

    def test_what_is_dropped_while_the_gap_is_at_the_end_belongs_to_it(
        self, make: MakeStream
    ) -> None:
        stream = fill(make(buffer=1), 1, 2)
        assert stream.receive_nowait() == 1
        fill(stream, 3)
        fill(stream, 4, 5)
        assert read(stream) == ["1 missing", 3, "2 missing"]

    def test_a_gap_that_was_read_is_over(self, make: MakeStream) -> None:
        stream = fill(make(buffer=1), 1, 2)
        assert read(stream) == [1, "1 missing"]
        fill(stream, 3, 4, 5)
        assert read(stream) == [3, "2 missing"]

    def test_nothing_is_counted_in_a_gap_that_was_read(self, make: MakeStream) -> None:
        stream = fill(make(buffer=1), 1, 2)
        assert read(stream) == [1, "1 missing"]
        big = EmitterMessage("a/", bytes(MAX_BYTES))
        fill(stream, big, 3)
        assert read(stream) == [big, "1 missing"]

    async def test_a_new_loop_goes_on_after_the_gap(self, make: MakeStream) -> None:
        stream = fill(make(), 1, 2, 3, 4)
        got = []
        with pytest.raises(SlowConsumerError):
            async for item in stream:
                got.append(item)  # noqa: PERF401 - what came before the error is to be seen
        fill(stream, 5)
        stream.end()
        got += [item async for item in stream]
        assert got == [1, 2, 3, 5]

    @pytest.mark.parametrize("overflow", get_args(Overflow))
    @given(
        buffer=st.integers(1, 4),
        acts=st.lists(st.sampled_from(["push"] * 4 + ["take"] * 3 + ["extra"]), max_size=40),
    )
    def test_every_message_is_received_or_counted(
        self, overflow: Overflow, buffer: int, acts: list[str]
    ) -> None:
        stream: EventStream[int] = EventStream("x", buffer, overflow)
        pushed = 0
        taken: list[int] = []
        told = 0

        def take() -> bool:
            nonlocal told
            try:
                item = stream.receive_nowait()
            except WouldBlock:
                return False
            except SlowConsumerError as exc:
                told += exc.dropped
                missing.append((taken[-1] if taken else -1, exc.dropped))
                return True
            if missing and missing[-1][0] == (taken[-1] if taken else -1):
                # Just so many as are missing at this place.
                assert item == missing[-1][0] + missing[-1][1] + 1
            elif overflow in ("raise", "block"):
                assert item == (taken[-1] if taken else -1) + 1
            taken.append(item)
            return True

        missing: list[tuple[int, int]] = []
        for act in acts:
            if act == "push":
                stream.push_or_drop(pushed)
                pushed += 1
            elif act == "extra":
                assert stream.push(pushed, extra=True)
                pushed += 1
            else:
                take()
            assert stream.statistics().buffered <= buffer + acts.count("extra")
            assert stream.statistics().received == len(taken)
        newest = pushed - 1
        while take():
            pass
        assert taken == sorted(set(taken))
        assert len(taken) + stream.dropped == pushed
        assert told == (stream.dropped if overflow in ("raise", "block") else 0)
        if overflow == "drop_oldest" and taken:
            assert taken[-1] == newest
        assert stream.statistics() == figures(0, 0, len(taken), stream.dropped)
        stream.close()


class TestBytes:
    def test_a_buffer_is_full_with_8_mib(self, make: MakeStream) -> None:
        stream = make(buffer=1000)
        # A message weighs its payload, its channel and 128 bytes.
        half = EmitterMessage("a/", bytes(MAX_BYTES // 2 - len("a/") - 128))
        assert MAX_BYTES == 8 * 1024 * 1024
        assert stream.push(half)
        assert stream.push(half)
        assert stream.statistics() == figures(2, MAX_BYTES, 0, 0)
        assert not stream.push(EmitterMessage("a/", b""))
        assert stream.receive_nowait() is half
        assert stream.statistics() == figures(1, MAX_BYTES // 2, 1, 0)
        assert stream.push(EmitterMessage("a/", b""))

    def test_the_oldest_go_until_there_is_room(self, make: MakeStream) -> None:
        stream = make(buffer=1000, overflow="drop_oldest")
        small = [EmitterMessage("a/", b"x") for _ in range(3)]
        big = EmitterMessage("a/", bytes(MAX_BYTES))
        fill(stream, *small, big)
        last = EmitterMessage("a/", b"last")
        fill(stream, last)
        assert read(stream) == [last]
        assert stream.dropped == 4

    def test_an_empty_message_weighs_something(self, make: MakeStream) -> None:
        stream = make(buffer=10**6)
        taken = stream.push_many([EmitterMessage("a/", b"")] * 10**5)
        assert taken == -(-MAX_BYTES // 130)
        assert stream.statistics().buffered_bytes == 130 * taken

    def test_what_is_no_message_weighs_128_bytes(self, make: MakeStream) -> None:
        stream = fill(make(), "text", EmitterMessage("a/", b"x"))
        assert stream.statistics() == figures(2, 2 * 128 + 3, 0, 0)

    def test_a_change_of_presence_weighs_what_it_says(self, make: MakeStream) -> None:
        who = (Member("id", "ann"), Member("id", None))
        event = PresenceEvent(datetime.now(UTC), "subscribe", "a/", who)
        assert fill(make(), event).statistics() == figures(1, 3 * 128 + 7, 0, 0)

    def test_what_stands_beside_the_buffer_leaves_it_its_bytes(self, make: MakeStream) -> None:
        stream = make(buffer=1000)
        big = EmitterMessage("a/", bytes(MAX_BYTES))
        stream.put_in_front([big])
        assert stream.push(big)
        assert not stream.push(EmitterMessage("a/", b""))
        assert stream.receive_nowait() is big
        assert not stream.push(EmitterMessage("a/", b""))
        assert stream.receive_nowait() is big
        assert stream.push(EmitterMessage("a/", b""))


class TestExtraItems:
    def test_stand_beside_the_buffer(self, make: MakeStream) -> None:
        stream = make(buffer=2)
        for number in range(5):
            assert stream.push(number, extra=True)
        assert stream.push(5)
        assert stream.push(6)
        assert not stream.push(7)
        assert stream.statistics().buffered == 7
        assert read(stream) == list(range(7))

    def test_the_room_is_that_of_the_buffer_again_when_they_are_read(
        self, make: MakeStream
    ) -> None:
        stream = make(buffer=2)
        for number in range(3):
            stream.push(number, extra=True)
        assert read(stream) == [0, 1, 2]
        assert [stream.push(number) for number in range(3)] == [True, True, False]

    def test_come_in_when_it_is_full(self, make: MakeStream) -> None:
        stream = fill(make(buffer=1), 1)
        assert stream.push(2, extra=True)
        assert not stream.push(3)

    @pytest.mark.parametrize("count", [3, 5000])
    def test_one_overflow_drops_one_of_them(self, make: MakeStream, count: int) -> None:
        stream = make(buffer=1, overflow="drop_oldest")
        for number in range(count):
            stream.push(number, extra=True)
        fill(stream, "one", "two")
        assert stream.dropped == 1
        assert read(stream) == [*range(1, count), "one", "two"]


class TestPuttingInFront:
    def test_before_what_is_buffered(self, make: MakeStream) -> None:
        stream = fill(make(), 1, 2, 3)
        stream.put_in_front(["a", "b"])
        assert stream.statistics().buffered == 5
        assert not stream.push(4), "they stand beside the buffer, which is full"
        assert read(stream) == ["a", "b", 1, 2, 3]

    def test_of_nothing(self, make: MakeStream) -> None:
        stream = fill(make(), 1)
        stream.put_in_front([])
        assert read(stream) == [1]

    def test_the_gap_keeps_its_place(self, make: MakeStream) -> None:
        stream = fill(make(buffer=1), 1, 2)
        stream.put_in_front(["a"])
        fill(stream, 3)
        assert read(stream) == ["a", 1, "2 missing"]

    def test_of_an_ended_stream_changes_nothing(self, make: MakeStream) -> None:
        stream = fill(make(), 1)
        stream.end()
        stream.put_in_front(["a"])
        assert read(stream) == [1]
        stream.close()
        stream.put_in_front(["a"])

    async def test_wakes_the_receiver(self, make: MakeStream) -> None:
        stream = make()
        got = []

        async def receive() -> None:
            got.append(await stream.receive())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive)
            await anyio.wait_all_tasks_blocked()
            stream.put_in_front(["a"])
        assert got == ["a"]


@pytest.mark.parametrize("each", [None, 3 + len("a/") + 128])
def test_what_is_known_of_the_size_is_counted_as_what_is_weighed(
    make: MakeStream, each: int | None
) -> None:
    stream = make(buffer=2)
    assert stream.push_many([EmitterMessage("a/", b"one")] * 3, each) == 2
    assert stream._bytes == stream.statistics().buffered_bytes == 2 * 133
    assert len(read(stream)) == 2
    assert stream.statistics().buffered_bytes == 0


class TestMakingRoom:
    async def test_there_is_room(self, make: MakeStream) -> None:
        stream = make(overflow="block")
        with anyio.CancelScope() as scope:
            scope.cancel()
            await stream.make_room()  # it would be cancelled if it waited
            assert not stream.blocks
        assert not scope.cancelled_caught

    @pytest.mark.parametrize("pauses", [0, 1, 2])
    @pytest.mark.parametrize("overflow", get_args(Overflow))
    async def test_a_busy_consumer_loses_nothing(
        self, make: MakeStream, overflow: Overflow, pauses: int
    ) -> None:
        stream = make(buffer=5, overflow=overflow)
        got = []

        async def consume() -> None:
            async for item in stream:
                got.append(item)
                for _ in range(pauses):
                    await checkpoint()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(consume)
            for number in range(500):
                if not stream.push(number):
                    await stream.make_room()
                    stream.push_or_drop(number)
            stream.end()
        assert got == list(range(500))
        assert stream.dropped == 0

    @pytest.mark.parametrize("overflow", ["raise", "drop_oldest", "drop_newest"])
    async def test_a_consumer_that_waits_for_something_else_holds_nobody_up(
        self, make: MakeStream, overflow: Overflow
    ) -> None:
        stream = fill(make(overflow=overflow), 1, 2, 3)
        assert not stream.blocks
        await stream.make_room()
        with anyio.CancelScope() as scope:
            scope.cancel()
            # Once it has not come in its turns, it gets no more of them.
            await stream.make_room()
        assert not scope.cancelled_caught
        stream.receive_nowait()
        fill(stream, 4)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await stream.make_room()
        assert scope.cancelled_caught, "it has come back, and gets its turns again"

    @pytest.mark.parametrize(
        "take", [EventStream.receive_nowait, EventStream.receive, EventStream.__anext__]
    )
    async def test_under_block_it_takes_as_long_as_it_takes(
        self, make: MakeStream, take: Callable[[EventStream[int]], Any]
    ) -> None:
        stream = fill(make(overflow="block"), 1, 2, 3)
        assert stream.blocks
        done = []

        async def wait(name: str) -> None:
            await stream.make_room()
            done.append(name)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait, "reader")
            tasks.start_soon(wait, "another")
            await anyio.wait_all_tasks_blocked()
            assert done == []
            taken = take(stream)
            assert (await taken if inspect.isawaitable(taken) else taken) == 1
        assert sorted(done) == ["another", "reader"]
        assert not stream.blocks

    @pytest.mark.parametrize("take", [EventStream.receive, EventStream.__anext__])
    async def test_who_already_waits_for_an_item_makes_room(
        self, make: MakeStream, take: Callable[[EventStream[int]], Any]
    ) -> None:
        stream = fill(make(buffer=1, overflow="block"), 1)
        await give_up_turns(stream)
        stream.drain()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(take, stream)
            await anyio.wait_all_tasks_blocked()
            tasks.start_soon(stream.make_room)
            fill(stream, 2)
        assert not stream.blocks

    @pytest.mark.parametrize("take", [EventStream.receive, EventStream.__anext__])
    async def test_who_gives_others_a_turn_makes_room_behind_it(
        self, make: MakeStream, take: Callable[[EventStream[int]], Any]
    ) -> None:
        stream = make(buffer=2, overflow="block")
        for number in range(62):
            fill(stream, number).receive_nowait()
        stream.push_many([62, 63])
        assert stream.push(64, extra=True)
        assert stream.receive_nowait() == 62
        assert stream.blocks
        await give_up_turns(stream)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(take, stream)
            tasks.start_soon(stream.make_room)
        assert not stream.blocks

    async def test_who_comes_too_late_waits_on(self, make: MakeStream) -> None:
        stream = fill(make(buffer=1, overflow="block"), 1)
        done = []

        async def put(item: int) -> None:
            await stream.make_room()
            assert stream.push(item)
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
    async def test_the_end_lets_go_those_who_wait(self, make: MakeStream, end: str) -> None:
        stream = fill(make(overflow="block"), 1, 2, 3)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stream.make_room)
            await anyio.wait_all_tasks_blocked()
            getattr(stream, end)()
        assert not stream.blocks
        assert stream.push(4), "what comes behind the end is dealt with"

    async def test_it_may_be_cancelled(self, make: MakeStream) -> None:
        stream = fill(make(overflow="block"), 1, 2, 3)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stream.make_room)
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        assert read(stream) == [1, 2, 3]
        fill(stream, 4, 5, 6)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stream.make_room)
            await anyio.wait_all_tasks_blocked()
            stream.receive_nowait()


class TestTheEnd:
    async def test_comes_behind_what_is_buffered(self, make: MakeStream) -> None:
        stream = fill(make(), 1, 2, 3, 4)
        stream.end()
        assert stream.push(5)
        assert [await stream.receive() for _ in range(3)] == [1, 2, 3]
        with pytest.raises(SlowConsumerError):
            await stream.receive()
        for _ in range(2):
            with pytest.raises(EndOfStream):
                await stream.receive()
            with pytest.raises(EndOfStream):
                stream.receive_nowait()

    async def test_with_an_error_behind_what_is_buffered(self, make: MakeStream) -> None:
        stream = fill(make(), 1)
        stream.end(lambda: ConnectionLostError("gone"))
        stream.end(ZeroDivisionError)
        assert await stream.receive() == 1
        caught = []
        for _ in range(2):
            with pytest.raises(ConnectionLostError, match="gone") as info:
                await stream.receive()
            caught.append(info.value)
        assert caught[0] is not caught[1], "each one who receives has an error of its own"
        assert caught[0].__context__ is None

    @pytest.mark.parametrize("error", [None, lambda: ConnectionLostError("gone")])
    async def test_wakes_all_who_wait(self, make: MakeStream, error: Any) -> None:
        stream = make()
        ended = []

        async def receive() -> None:
            with pytest.raises((EndOfStream, ConnectionLostError)) as caught:
                await stream.receive()
            ended.append(caught.type)

        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(receive)
            await anyio.wait_all_tasks_blocked()
            stream.end(error)
        assert ended == [EndOfStream if error is None else ConnectionLostError] * 3

    async def test_comes_behind_what_others_may_still_take(self, make: MakeStream) -> None:
        stream = make()
        taken: list[object] = []

        async def receive() -> None:
            taken.append(await stream.receive())

        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(receive)
            await anyio.wait_all_tasks_blocked()
            stream.push_many([1, 2])
            stream.end()
        assert sorted(map(str, taken)) == ["1", "2"]

    async def test_of_a_stream_that_is_left(self, make: MakeStream) -> None:
        stream = fill(make(), 1, 2)
        await stream.aclose()
        await stream.aclose()
        with pytest.raises(EndOfStream):
            await stream.receive()
        assert stream.push(3)
        fill(stream, 4)
        assert stream.statistics() == figures(2, 2 * 128, 0, 0)

    async def test_leaving_wakes_the_receiver_and_never_waits(self, make: MakeStream) -> None:
        stream = make()

        async def receive() -> None:
            with pytest.raises(EndOfStream):
                await stream.receive()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive)
            await anyio.wait_all_tasks_blocked()
            with anyio.CancelScope() as scope:
                scope.cancel()
                async with stream:
                    pass
            assert not scope.cancelled_caught

    async def test_an_ended_stream_that_is_left_gives_no_error_any_more(
        self, make: MakeStream
    ) -> None:
        stream = fill(make(), 1)
        stream.end(lambda: ConnectionLostError("gone"))
        stream.close()
        with pytest.raises(EndOfStream):
            await stream.receive()

    def test_draining_takes_all_but_the_gaps(self, make: MakeStream) -> None:
        stream = fill(make(), 1, EmitterMessage("a/", b"xy"), 3, 4)
        assert stream.statistics() == figures(3, 3 * 128 + len("a/xy"), 0, 1)
        items = stream.drain()
        assert [items[0], items[2]] == [1, 3]
        assert len(items) == 3
        assert stream.statistics() == figures(0, 0, 0, 1)
        stream.end()
        assert stream.drain() == []


class TestEntering:
    async def test_once(self) -> None:
        made = []

        @asynccontextmanager
        async def make() -> AsyncGenerator[str]:
            made.append("in")
            yield "value"
            made.append("out")

        entering = Entering(Owner(), make)
        assert made == [], "nothing happens before"
        async with entering as value:
            assert value == "value"
            assert made == ["in"]
        assert made == ["in", "out"]
        with pytest.raises(RuntimeError, match="entered"):
            async with entering:
                made.append("never")
        assert made == ["in", "out"]

    async def test_exceptions_pass(self) -> None:
        seen = []

        @asynccontextmanager
        async def make() -> AsyncGenerator[None]:
            try:
                yield
            except ZeroDivisionError as exc:
                seen.append(exc)
                raise

        boom = ZeroDivisionError()
        with pytest.raises(ZeroDivisionError) as caught:
            async with Entering(Owner(), make):
                raise boom
        assert caught.value is boom
        assert seen == [boom]


class TestSayingWhatItIs:
    def test_repr(self, make: MakeStream) -> None:
        stream = fill(make(), 1, 2)
        assert repr(stream) == "<EventStream subscribe('a/'), open, 2 buffered>"
        stream.end()
        assert repr(stream) == "<EventStream subscribe('a/'), ended, 2 buffered>"

    @pytest.mark.parametrize("overflow", get_args(Overflow))
    def test_buffers_that_make_sense(self, overflow: Overflow) -> None:
        check_buffer(1, overflow)
        check_buffer(10**9, overflow)

    @pytest.mark.parametrize(
        ("buffer", "overflow", "error", "why"),
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
    def test_buffers_that_do_not(
        self, buffer: Any, overflow: Any, error: type[Exception], why: str
    ) -> None:
        with pytest.raises(error, match=why):
            check_buffer(buffer, overflow)


def test_what_two_hold_back_waits_for_both(make: MakeStream) -> None:
    stream = make()
    stream.hold()
    stream.hold()
    stream.push("item")
    stream.release()
    assert read(stream) == []
    stream.release()
    assert read(stream) == ["item"]


def test_a_message_weighs_the_same_among_other_items() -> None:
    items = [EmitterMessage("a/", b"xyz"), Gap("a/")]
    assert weight_of(items) == 2 * ITEM_BYTES + 5
