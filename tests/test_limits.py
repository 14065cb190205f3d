"""How long one waits for an answer: each from the moment at which his question has left."""

from __future__ import annotations

import gc
import math
import sys
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final, TypeAlias

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emitter_anyio import RequestTimeoutError
from emitter_anyio._limits import Limit, Limits, OwnLimit
from emitter_anyio._timer import Timer
from emitter_anyio._transport import Transport
from emitter_anyio._writer import Writer
from tests.support.links import one_link
from tests.support.peer import PUBLISH, Peer, memory_peer

SECONDS: Final = (5, 2, 3)
"""Two that many share; the third one is for one who waits by himself."""


class World(Transport):
    """A link that takes what it may, and a clock; both are moved by hand."""

    tears = False

    def __init__(self) -> None:
        self.now = 0.0
        self.may_take = 0
        self.wakes_at = math.inf
        self.ran_at = 0.0
        """When the loop last ran, before the present turn."""

    async def receive(self, size: int = 0) -> bytes:
        raise NotImplementedError

    async def send(self, data: bytes | memoryview) -> int:
        raise NotImplementedError

    async def send_eof(self) -> None:
        raise NotImplementedError

    def interrupt(self) -> None:
        raise NotImplementedError

    async def aclose(self) -> None:
        raise NotImplementedError

    def try_send(self, data: bytes | memoryview) -> int:
        taken = min(len(data), self.may_take)
        self.may_take -= taken
        return taken

    def turn(self, now: float) -> None:
        """Have the loop run once at a time."""
        self.now = now
        if self.wakes_at <= now:
            self.wakes_at = math.inf
            self.wake()
        self.ran_at = now

    def clock(self) -> float:
        return self.now

    def open_waker(self, wake: Callable[[], None], start: object) -> World:
        self.wake = wake
        return self

    def set(self, when: float) -> None:
        self.wakes_at = when

    def stop(self) -> None:
        self.wakes_at = math.inf


class Waiting:
    """One who waits, and what must become of it."""

    def __init__(self, world: World, seconds: float) -> None:
        self.world = world
        self.seconds = seconds
        self.limit: Limit
        self.mark = 0
        self.left: float | None = None
        self.woken: list[float] = []
        self.read_at = -math.inf
        """When the reader last ran before it was woken."""

    def wake(self) -> None:
        self.woken.append(self.world.now)
        self.read_at = self.world.ran_at


Steps: TypeAlias = list[tuple[str, object]]

_ask = st.tuples(st.just("ask"), st.tuples(st.sampled_from(range(3)), st.integers(1, 40)))
_take = st.tuples(st.just("take"), st.integers(1, 100))
_answer = st.tuples(st.just("answer"), st.integers(0, 20))
_wait = st.tuples(st.just("wait"), st.integers(1, 4))
_stand_still = st.tuples(st.just("stand still"), st.integers(1, 4))


def _steps(*kinds: st.SearchStrategy[tuple[str, object]]) -> st.SearchStrategy[Steps]:
    return st.lists(st.one_of(*kinds), min_size=20, max_size=60)


def played(steps: Steps) -> Iterator[tuple[World, list[Waiting]]]:
    """Do one step after another, and give what there is after each."""
    world = World()
    timer = Timer(world.open_waker, world.clock)
    writer = Writer(world, world.clock)
    limits = [Limits(seconds, timer, writer) for seconds in SECONDS[:2]]
    everybody: list[Waiting] = []
    writer.begin(lambda: None)
    timer.begin(lambda exc: pytest.fail(repr(exc)), int, print)

    def note_left() -> None:
        for one in everybody:
            if one.left is None and one.mark <= writer.sent:
                one.left = world.now

    for step in steps:
        match step:
            case ("ask", (int(which), int(size))):
                one = Waiting(world, SECONDS[which])
                everybody.append(one)
                writer.write(bytes(size))
                one.mark = writer.queued
                if which < 2:
                    one.limit = limits[which].add(one.wake)
                else:
                    one.limit = OwnLimit(one.wake, SECONDS[which], timer, writer)
            case ("take", int(size)):
                world.may_take += size
                writer.hurry()
            case ("answer", int(which)) if which < len(everybody):
                everybody[which].limit.done = True
            case ("wait", int(seconds)):
                until = world.now + seconds
                while world.wakes_at <= until + 1e-9:
                    world.turn(max(world.now, world.wakes_at))
                world.turn(until)
            case ("stand still", int(seconds)):
                world.turn(world.now + seconds)
        note_left()
        yield world, everybody


@given(_steps(_ask, _take, _answer, _wait))
def test_each_one_is_woken_at_his_own_time(steps: Steps) -> None:
    for world, everybody in played(steps):
        for one in everybody:
            if one.left is None or one.left + one.seconds > world.now:
                assert not one.woken
            elif not one.limit.done:
                assert one.woken == [pytest.approx(one.left + one.seconds, abs=1e-9)]


@given(_steps(_ask, _take, _answer, _wait, _stand_still))
def test_nobody_is_woken_before_the_reader_has_run_after_his_time(steps: Steps) -> None:
    for _, everybody in played([*steps, ("take", 10_000), ("wait", 100)]):
        for one in everybody:
            if one.woken:
                assert one.left is not None
                due = one.left + one.seconds
                assert one.read_at >= due
    assert all(one.limit.done or len(one.woken) == 1 for one in everybody)


def test_one_who_waits_long_does_not_keep_the_others() -> None:
    world = World()
    world.may_take = sys.maxsize
    timer = Timer(world.open_waker, world.clock)
    writer = Writer(world, world.clock)
    limits = Limits(math.inf, timer, writer)
    writer.begin(lambda: None)
    timer.begin(lambda exc: pytest.fail(repr(exc)), int, print)
    long = [limits.add(pytest.fail) for _ in range(3)]
    for _ in range(10_000):
        writer.write(b"x")
        limits.add(pytest.fail).done = True
    assert long == [limit for limit in limits._waiting if not limit.done]
    assert len(limits._waiting) < 100
    assert len(timer._heap) == 1


def test_what_a_lost_link_leaves_waits_for_no_garbage_collector() -> None:
    world = World()
    timer = Timer(world.open_waker, world.clock)
    writer = Writer(world, world.clock)
    limits = Limits(5, timer, writer)
    writer.begin(lambda: None)
    timer.begin(lambda exc: pytest.fail(repr(exc)), int, print)
    for _ in range(3):
        writer.write(b"x")
        limits.add(pytest.fail)
        OwnLimit(pytest.fail, 5, timer, writer)
    timer.end()
    writer.stop()
    # The timer is held by the world of this test.
    gone = [weakref.ref(one) for one in (writer, limits)]
    gc.disable()
    try:
        del writer, limits
        assert [one() for one in gone] == [None, None]
    finally:
        gc.enable()


class Reluctant:
    """A peer that answers one of the publishes, after a while."""

    def __init__(self, answered: int, after: float) -> None:
        self._answered = answered
        self._after = after

    async def play(self, peer: Peer) -> None:
        await peer.accept()
        for number in range(4):
            packet = await peer.until(PUBLISH)
            if number == self._answered:
                await anyio.sleep(self._after)
                await peer.answer(packet)
        await peer.answer_all()


@pytest.mark.virtual_time
async def test_an_answer_for_one_changes_nothing_for_the_others(anyio_backend: object) -> None:
    ends: dict[str, float] = {}
    errors: dict[str, str] = {}
    async with memory_peer(Reluctant(1, 1).play) as connectable:
        async with one_link(connectable=connectable, request_timeout=10) as emitter:
            start = anyio.current_time()

            async def ask(name: str, timeout: float | None) -> None:
                options = {} if timeout is None else {"timeout": timeout}
                try:
                    await emitter.publish("k", f"{name}/", "x", qos=1, **options)  # type: ignore[arg-type]
                except RequestTimeoutError as exc:
                    errors[name] = str(exc)
                ends[name] = round(anyio.current_time() - start, 3)

            async with anyio.create_task_group() as tasks:
                for name, timeout in (("a", None), ("b", None), ("c", 2.5), ("d", None)):
                    tasks.start_soon(partial(ask, name, timeout))
                    await anyio.sleep(3)
    assert ends == {"a": 10, "b": 4, "c": 8.5, "d": 19}
    assert errors.keys() == {"a", "c", "d"}
    for name, limit in (("a", "10 s"), ("c", "2.5 s"), ("d", "10 s")):
        assert f"'{name}/'" in errors[name]
        assert limit in errors[name]
        assert "unknown" in errors[name]
