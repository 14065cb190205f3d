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
    """Return the tasks of all timers."""
    names = ((task, getattr(task, "name", None) or task.get_name()) for task in running_tasks())
    return [task for task, name in names if name == "emitter_anyio timer"]


async def test_each_connection_has_a_timer_that_ends_with_it(anyio_backend: object) -> None:
    async with memory_peer(serve) as connectable:
        for _ in range(2):
            async with AsyncExitStack() as stack:
                for _ in range(3):
                    await stack.enter_async_context(connect_once(connectable=connectable))
                await anyio.wait_all_tasks_blocked()
                assert len(timers()) == 3
            assert not timers()


async def test_timer_ended_before_its_task_starts(anyio_backend: object) -> None:
    timer = Timer(anyio.current_time)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(timer.run, fail_with, int)
        timer.end()


def fail_with(error: Exception) -> None:
    raise error


class RecordingEntry(TimerEntry):
    """An entry that records when it falls due."""

    needs_reader: ClassVar = False

    def __init__(self) -> None:
        self.times: list[float] = []

    @property
    def done(self) -> bool:
        return False

    def expire(self, now: float) -> None:
        self.times.append(anyio.current_time())


async def test_entry_added_while_the_timer_sleeps_falls_due_on_time(anyio_backend: object) -> None:
    timer, recording = Timer(anyio.current_time), RecordingEntry()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(timer.run, fail_with, int)
        await anyio.wait_all_tasks_blocked()
        start = anyio.current_time()
        for delay in (2, 1):
            timer.add(start + delay, recording)
        await anyio.sleep(5)
        timer.end()
    assert recording.times == [pytest.approx(start + delay, abs=1e-6) for delay in (1, 2)]


class JudgingEntry(RecordingEntry):
    """An entry that falls due only after the reader has read what has arrived."""

    needs_reader: ClassVar = True


@pytest.mark.parametrize(("reads", "minimum"), [([0], 10), ([0, 1, None, 2, 2, None, 3], 16)])
async def test_only_judging_entries_wait_for_the_reader(
    anyio_backend: object, reads: list[int | None], minimum: int
) -> None:
    timer, recording, judging = Timer(anyio.current_time), RecordingEntry(), JudgingEntry()
    start = anyio.current_time()
    timer.add(start + 1, judging)
    timer.add(start + 0.5, recording)
    calls = 0

    def count() -> int | None:
        nonlocal calls
        calls += 1
        assert len(recording.times) == 1
        assert not judging.times
        return reads[min(calls, len(reads)) - 1]

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(timer.run, fail_with, count)
        await anyio.wait_all_tasks_blocked()
        simulate_blocking(2)
        await anyio.sleep(1)
        timer.end()
    assert len(judging.times) == 1
    assert calls > minimum


async def test_judging_entry_waits_at_most_a_second_for_the_reader(anyio_backend: object) -> None:
    timer, judging = Timer(anyio.current_time), JudgingEntry()
    start = anyio.current_time()
    timer.add(start + 1, judging)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(timer.run, fail_with, lambda: None)
        while not judging.times:
            simulate_blocking(0.01)
            await checkpoint()
        timer.end()
    assert judging.times == [pytest.approx(start + 2, abs=0.03)]


class FailingEntry(RecordingEntry):
    def expire(self, now: float) -> None:
        raise ZeroDivisionError


@pytest.mark.parametrize("seconds", [0, 1])
async def test_nothing_falls_due_after_an_entry_fails(
    seconds: float, anyio_backend: object
) -> None:
    timer, failed = Timer(anyio.current_time), list[Exception]()
    for _ in range(2):
        timer.add(timer.clock() + seconds, FailingEntry())
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(timer.run, failed.append, int)
        await anyio.sleep(5)
        timer.end()
    assert [type(one) for one in failed] == [ZeroDivisionError]


# How often a timer wakes


@pytest.fixture
def wake_times(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The times at which timers started to sleep."""
    times: list[float] = []

    async def recording() -> None:
        times.append(anyio.current_time())
        await anyio.sleep_forever()

    monkeypatch.setattr("emitter_anyio._net.timer.sleep_forever", recording)
    return times


@pytest.mark.parametrize(
    ("options", "maximum"),
    [
        # A wake-up at every second deadline, which then finds its reply done.
        ({}, 249),
        ({"timeout": 10}, 249),
        ({"timeout": math.inf}, 60),
        ({"timeout": None}, 60),
    ],
)
async def test_timer_of_a_busy_connection_wakes_rarely(
    anyio_backend: object, wake_times: list[float], options: dict[str, Any], maximum: int
) -> None:
    async with memory_peer(serve) as connectable:
        async with connect_once(connectable=connectable, keepalive=60) as emitter:
            for _ in range(500):
                await emitter.publish("k", "a/", "x", qos=1, **options)
                await anyio.sleep(7.2)
            assert emitter._slot.connection is not None
            # The keepalive, and some entries that are done.
            assert len(emitter._slot.connection.timer._heap) < 70
    assert 50 < len(wake_times) <= maximum + 10


async def test_timer_wakes_twice_per_answered_ping(
    anyio_backend: object, wake_times: list[float]
) -> None:
    async with memory_peer(serve) as connectable:
        async with connect_once(connectable=connectable, keepalive=30):
            await anyio.sleep(HOUR + 1)
    # Once to send the ping, once to find it answered.
    assert len(wake_times) <= 2 * 120 + 1


async def test_timer_of_a_closed_connection_does_not_wake(
    anyio_backend: object, wake_times: list[float]
) -> None:
    async with memory_peer(serve) as connectable:
        async with connect_once(connectable=connectable, keepalive=30) as emitter:
            await emitter.publish("k", "a/", "x", qos=1)
        before = len(wake_times)
        await anyio.sleep(HOUR)
    assert len(wake_times) == before
