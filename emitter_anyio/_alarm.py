"""One task of a run of Trio that wakes all timers, as asyncio's loop does itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Final

import trio

_STALE: Final = 64
"""So many times that are none any more may be kept, and as many as there are others."""


class Alarm:
    """
    Wakes each one at its time.

    To begin and to end a task takes a fifth of a link's life on Trio. So one serves all, and ends
    as soon as there is nobody left to be woken.
    """

    def __init__(self) -> None:
        self.wakers: set[AlarmWaker] = set()
        self.heap: list[tuple[float, int, AlarmWaker]] = []
        """Times; one that is not its waker's any more is passed over."""
        self.count = 0
        self.scope = trio.CancelScope()
        """In which the task sleeps; what is done to it while the task is awake is void."""
        self._runs = False

    def run(self) -> None:
        """Have the task run."""
        if not self._runs:
            self._runs = True
            trio.lowlevel.spawn_system_task(self._run, name="emitter_anyio timer")

    def tidy(self) -> None:
        """Drop times that are none any more, when there are many."""
        if len(self.heap) > 2 * len(self.wakers) + _STALE:
            self.heap = [entry for entry in self.heap if entry[2].when == entry[0]]
            heapify(self.heap)

    def first(self) -> float:
        """Give the time of who is to be woken next."""
        heap = self.heap
        while heap and heap[0][2].when != heap[0][0]:
            heappop(heap)
        return heap[0][0] if heap else math.inf

    async def _run(self) -> None:
        try:
            while self.wakers:
                with trio.CancelScope(deadline=self._wake(trio.current_time())) as self.scope:
                    await trio.sleep_forever()
        finally:
            self.heap.clear()
            self._runs = False

    def _wake(self, now: float) -> float:
        while (first := self.first()) <= now:
            waker = heappop(self.heap)[2]
            waker.when = -math.inf
            waker.wake()
        return first


class AlarmWaker:
    """
    Wakes one timer.

    :param wake: is called then, and raises nothing
    """

    __slots__ = ("_alarm", "wake", "when")

    def __init__(self, wake: Callable[[], None]) -> None:
        self.wake = wake
        self.when = -math.inf
        """When it is to be woken; before everything else if it is not."""
        try:
            self._alarm = _ALARM.get()
        except LookupError:
            self._alarm = Alarm()
            _ALARM.set(self._alarm)
        self._alarm.wakers.add(self)
        self._alarm.tidy()
        self._alarm.run()

    def set(self, when: float) -> None:
        """Wake it then, and not at the time that it was set to."""
        alarm, before, self.when = self._alarm, self.when, when
        alarm.count += 1
        heappush(alarm.heap, (when, alarm.count, self))
        deadline = alarm.scope.deadline
        if when < deadline:
            alarm.scope.deadline = when
        elif before == deadline:
            alarm.scope.deadline = alarm.first()

    def stop(self) -> None:
        """Wake it no more."""
        self.when = -math.inf
        self._alarm.wakers.discard(self)
        if not self._alarm.wakers:
            self._alarm.scope.cancel()


_ALARM: Final[trio.lowlevel.RunVar[Alarm]] = trio.lowlevel.RunVar("emitter_anyio alarm")
