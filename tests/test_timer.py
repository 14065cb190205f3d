"""What wakes the timers of links."""

from __future__ import annotations

import math
from contextlib import AsyncExitStack
from typing import Any

import anyio
import pytest
import trio

from emitter_anyio._alarm import AlarmWaker
from emitter_anyio._timer import Due, Timer, open_timer
from tests.support.leaks import living_tasks
from tests.support.links import one_link
from tests.support.peer import Peer, memory_peer

pytestmark = pytest.mark.virtual_time

HOUR = 3600.0

# The loop of asyncio wakes timers itself.
on_trio = pytest.mark.parametrize("anyio_backend", ["trio"], indirect=True)


async def serve(peer: Peer) -> None:
    await peer.serve()


def sleepers() -> list[trio.lowlevel.Task]:
    return [task for task in living_tasks() if task.name == "emitter_anyio timer"]


@on_trio
async def test_each_link_has_one_which_ends_with_it(anyio_backend: object) -> None:
    async with memory_peer(serve) as connectable:
        for _ in range(2):
            async with AsyncExitStack() as stack:
                for _ in range(3):
                    await stack.enter_async_context(one_link(connectable=connectable))
                await anyio.wait_all_tasks_blocked()
                assert len(sleepers()) == 3
            assert not sleepers()


@on_trio
async def test_one_that_was_stopped_at_once_ends(anyio_backend: object) -> None:
    async with anyio.create_task_group() as tasks:
        AlarmWaker(print, tasks.start_soon).stop()


@on_trio
async def test_it_sleeps_for_those_who_wait_for_nothing(anyio_backend: object) -> None:
    async with anyio.create_task_group() as tasks:
        woken = anyio.Event()
        waker = AlarmWaker(woken.set, tasks.start_soon)
        await anyio.wait_all_tasks_blocked()
        for late in (2, 1):
            waker.set(anyio.current_time() + late)
        start = anyio.current_time()
        await woken.wait()
        assert anyio.current_time() - start == 1
        waker.stop()


class Failing(Due):
    @property
    def done(self) -> bool:
        return False

    def fall_due(self, now: float) -> None:
        raise ZeroDivisionError


@pytest.mark.parametrize("seconds", [0, 1])
async def test_nothing_falls_due_behind_what_fails(seconds: float, anyio_backend: object) -> None:
    timer, failed = open_timer(), list[Exception]()
    for _ in range(2):
        timer.add(timer.clock() + seconds, Failing())
    async with anyio.create_task_group() as tasks:
        timer.begin(failed.append, int, tasks.start_soon)
        await anyio.sleep(5)
        timer.end()
    assert [type(one) for one in failed] == [ZeroDivisionError]


# How often a timer wakes


@pytest.fixture
def woken(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When timers have woken."""
    times: list[float] = []
    wake = Timer._wake

    def noted(timer: Timer) -> None:
        times.append(anyio.current_time())
        wake(timer)

    monkeypatch.setattr(Timer, "_wake", noted)
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
        async with one_link(connectable=connectable, keepalive=60) as emitter:
            for _ in range(500):
                await emitter.publish("k", "a/", "x", qos=1, **options)
                await anyio.sleep(7.2)
            assert emitter._slot.connection is not None
            # The keepalive, and a few that are done.
            assert len(emitter._slot.connection.timer._heap) < 12
    assert 50 < len(woken) <= most + 10


async def test_the_timer_wakes_once_for_a_ping_that_is_answered(
    anyio_backend: object, woken: list[float]
) -> None:
    async with memory_peer(serve) as connectable:
        async with one_link(connectable=connectable, keepalive=30):
            await anyio.sleep(HOUR + 1)
    # Once for each ping.
    assert len(woken) == 120


async def test_the_timer_of_a_link_that_has_ended_wakes_no_more(
    anyio_backend: object, woken: list[float]
) -> None:
    async with memory_peer(serve) as connectable:
        async with one_link(connectable=connectable, keepalive=30) as emitter:
            await emitter.publish("k", "a/", "x", qos=1)
        await anyio.sleep(HOUR)
    assert not woken
