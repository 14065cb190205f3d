"""The timer of a connection."""

from __future__ import annotations

import math
from contextlib import AsyncExitStack
from typing import Any, ClassVar

import anyio
import pytest
from anyio.lowlevel import checkpoint

from emitter_anyio._net.timer import Timer, TimerEntry
from tests.support.clock import simulate_blocking
from tests.support.connections import connect_once
from tests.support.leaks import running_tasks
from tests.support.peer import Peer, memory_peer

pytestmark = pytest.mark.virtual_time

HOUR = 3600.0


async def serve(peer: Peer) -> None:
    await peer.serve()


def timers() -> list[Any]:
    """The tasks of timers."""
    names = ((task, getattr(task, "name", None) or task.get_name()) for task in running_tasks())
    return [task for task, name in names if name == "emitter_anyio timer"]


async def test_each_connection_has_one_which_ends_with_it(anyio_backend: object) -> None:
    async with memory_peer(serve) as connectable:
        for _ in range(2):
            async with AsyncExitStack() as stack:
                for _ in range(3):
                    await stack.enter_async_context(connect_once(connectable=connectable))
                await anyio.wait_all_tasks_blocked()
                assert len(timers()) == 3
            assert not timers()


async def test_one_that_ends_before_its_task_begins_ends_it(anyio_backend: object) -> None:
    timer = Timer(anyio.current_time)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(timer.run, fail_with, int)
        timer.end()


def fail_with(error: Exception) -> None:
    raise error


class Noted(TimerEntry):
    """Something that notes when it falls due."""

    needs_reader: ClassVar = False

    def __init__(self) -> None:
        self.times: list[float] = []

    @property
    def done(self) -> bool:
        return False

    def expire(self, now: float) -> None:
        self.times.append(anyio.current_time())


async def test_what_is_added_while_it_sleeps_falls_due_at_its_time(anyio_backend: object) -> None:
    timer, noted = Timer(anyio.current_time), Noted()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(timer.run, fail_with, int)
        await anyio.wait_all_tasks_blocked()
        start = anyio.current_time()
        for late in (2, 1):
            timer.add(start + late, noted)
        await anyio.sleep(5)
        timer.end()
    assert noted.times == [pytest.approx(start + late, abs=1e-6) for late in (1, 2)]


class Judging(Noted):
    """Something that falls due only after the reader."""

    needs_reader: ClassVar = True


@pytest.mark.parametrize(("reads", "fewest"), [([0], 10), ([0, 1, None, 2, 2, None, 3], 16)])
async def test_one_that_judges_waits_for_the_reader_others_do_not(
    anyio_backend: object, reads: list[int | None], fewest: int
) -> None:
    timer, noted, judging = Timer(anyio.current_time), Noted(), Judging()
    start = anyio.current_time()
    timer.add(start + 1, judging)
    timer.add(start + 0.5, noted)
    asked = 0

    def count() -> int | None:
        nonlocal asked
        asked += 1
        assert len(noted.times) == 1
        assert not judging.times
        return reads[min(asked, len(reads)) - 1]

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(timer.run, fail_with, count)
        await anyio.wait_all_tasks_blocked()
        simulate_blocking(2)
        await anyio.sleep(1)
        timer.end()
    assert len(judging.times) == 1
    assert asked > fewest


async def test_a_reader_that_is_never_quiet_has_a_second(anyio_backend: object) -> None:
    timer, judging = Timer(anyio.current_time), Judging()
    start = anyio.current_time()
    timer.add(start + 1, judging)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(timer.run, fail_with, lambda: None)
        while not judging.times:
            simulate_blocking(0.01)
            await checkpoint()
        timer.end()
    assert judging.times == [pytest.approx(start + 2, abs=0.03)]


class Failing(Noted):
    def expire(self, now: float) -> None:
        raise ZeroDivisionError


@pytest.mark.parametrize("seconds", [0, 1])
async def test_nothing_falls_due_after_what_fails(seconds: float, anyio_backend: object) -> None:
    timer, failed = Timer(anyio.current_time), list[Exception]()
    for _ in range(2):
        timer.add(timer.clock() + seconds, Failing())
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(timer.run, failed.append, int)
        await anyio.sleep(5)
        timer.end()
    assert [type(one) for one in failed] == [ZeroDivisionError]


# How often a timer wakes


@pytest.fixture
def woken(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When timers have begun to sleep."""
    times: list[float] = []

    async def noted() -> None:
        times.append(anyio.current_time())
        await anyio.sleep_forever()

    monkeypatch.setattr("emitter_anyio._net.timer.sleep_forever", noted)
    return times


@pytest.mark.parametrize(
    ("options", "most"),
    [
        # For every second one of the times by which there was to be an answer, which finds it done.
        ({}, 249),
        ({"timeout": 10}, 249),
        ({"timeout": math.inf}, 60),
        ({"timeout": None}, 60),
    ],
)
async def test_the_timer_of_a_busy_link_wakes_for_few(
    anyio_backend: object, woken: list[float], options: dict[str, Any], most: int
) -> None:
    async with memory_peer(serve) as connectable:
        async with connect_once(connectable=connectable, keepalive=60) as emitter:
            for _ in range(500):
                await emitter.publish("k", "a/", "x", qos=1, **options)
                await anyio.sleep(7.2)
            assert emitter._slot.connection is not None
            # The keepalive, and a few that are done.
            assert len(emitter._slot.connection.timer._heap) < 70
    assert 50 < len(woken) <= most + 10


async def test_the_timer_wakes_twice_for_a_ping_that_is_answered(
    anyio_backend: object, woken: list[float]
) -> None:
    async with memory_peer(serve) as connectable:
        async with connect_once(connectable=connectable, keepalive=30):
            await anyio.sleep(HOUR + 1)
    # To send it, and to find it answered.
    assert len(woken) <= 2 * 120 + 1


async def test_the_timer_of_a_link_that_has_ended_wakes_no_more(
    anyio_backend: object, woken: list[float]
) -> None:
    async with memory_peer(serve) as connectable:
        async with connect_once(connectable=connectable, keepalive=30) as emitter:
            await emitter.publish("k", "a/", "x", qos=1)
        before = len(woken)
        await anyio.sleep(HOUR)
    assert len(woken) == before
